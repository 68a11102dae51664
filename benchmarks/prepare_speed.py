#!/usr/bin/env python3
"""What preparing a data set costs beside copying its files, and beside the bare work on its images.

On ImageNet-like JPEGs (500x375, quality 92) in class folders, in turn, from the page cache to the same disk:
preparation that keeps the bytes, beside `cp -r` and a sync; preparation with --resize 256, beside a bare loop in as
many processes that decodes, scales and encodes with the same library and writes nothing. Goals: 0.5 and 0.8.

    python -m benchmarks.prepare_speed --work /tmp/prepare-benchmark
"""

import argparse
import io
import multiprocessing
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from benchmarks.imagenet_like import jpegs
from hpctrain.data.prepare import prepare

CLASSES = 20
QUALITY = 90
SHORTER_SIDE = 256


def make_files(folder: Path, count: int) -> int:
    """Write the JPEGs into class folders unless they are there, and return their bytes."""
    if not folder.exists():
        distinct = list(jpegs(min(count, 1000)))
        for number in range(count):
            path = folder / f"class{number % CLASSES:02d}" / f"{number:06d}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(distinct[number % len(distinct)])
    return sum(path.stat().st_size for path in folder.rglob("*.jpg"))


def bare_resize(paths: list[Path]) -> int:
    """Decode, scale and encode files one after the other; returns the bytes made."""
    made = 0
    for path in paths:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            scale = SHORTER_SIDE / min(image.size)
            size = (round(image.width * scale), round(image.height * scale))
            file = io.BytesIO()
            image.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=QUALITY)
            made += file.tell()
    return made


def copy(source: Path, target: Path) -> None:
    """Copy a folder, and wait until it is on the disk, as preparation does too."""
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    subprocess.run(["sync", "-f", str(target)], check=True)


def seconds(work: Callable[[], object]) -> float:
    """Return how long `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Measure in rounds and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="folder for the data, about 2 GB; kept")
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    source, target = arguments.work / "images", arguments.work / "target"
    megabytes = make_files(source, arguments.images) / 1e6
    paths = sorted(source.rglob("*.jpg"))
    shares = [paths[i :: arguments.workers] for i in range(arguments.workers)]
    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        pool.map(bare_resize, [[]] * arguments.workers)  # so that starting it is not measured

        def shards(resize: int | None) -> None:
            prepare(source, target, "train", resize=resize, quality=QUALITY, workers=arguments.workers, quiet=True)

        works: dict[str, Callable[[], object]] = {
            "cp -r": lambda: copy(source, target),
            "prepare": lambda: shards(None),
            "bare resize": lambda: pool.map(bare_resize, shares),
            "prepare --resize": lambda: shards(SHORTER_SIDE),
        }
        found: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(arguments.rounds):
            for name, work in works.items():
                shutil.rmtree(target, ignore_errors=True)
                found[name].append(seconds(work))
    for name, times in found.items():
        middle = statistics.median(times)
        print(f"{name:18} {len(paths) / middle:8,.0f} images/s {megabytes / middle:8,.1f} MB/s of input")
    for above, below in (("prepare", "cp -r"), ("prepare --resize", "bare resize")):
        ratios = [b / a for a, b in zip(found[above], found[below], strict=True)]
        print(f"{above} / {below}: min {min(ratios):.2f} median {statistics.median(ratios):.2f} max {max(ratios):.2f}")
    shutil.rmtree(target, ignore_errors=True)


if __name__ == "__main__":
    main()
