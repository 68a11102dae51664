#!/usr/bin/env python3
"""Makes a small JPEG data set to train on, without a download.

    python data_prep/make_sample.py OUT_DIR [--train 6000] [--val 1200] [--size 64] [--seed 0] [--workers N]

Handwritten digits are drawn on three kinds of ground (two photographs and painted stripes); a class is a digit on a
ground, such as `digit3-on-china`, which makes 30 classes. The digits and the photographs come with scikit-learn.
Every image differs in ground crop, in the digit's scan, size, angle, position and color, in brightness, noise, image
size, aspect ratio and JPEG quality. The validation images use scans of digits and regions of the photographs that no
training image uses.

Written are `OUT_DIR/train/CLASS/*.jpg`, `OUT_DIR/val/CLASS/*.jpg` and, last, `OUT_DIR/sample.json` with the options.
The same options give the same bytes, whatever the number of workers.
"""

import argparse
import colorsys
import io
import json
import math
import multiprocessing
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hpctrain.data.hashing import hash64, uniform
from hpctrain.errors import UserError

GROUNDS = ("china", "flower", "stripes")
CLASSES = tuple(f"digit{digit}-on-{ground}" for ground in GROUNDS for digit in range(10))
SPLITS = ("train", "val")
# Raise it whenever the pixels change, so that an older sample is not mistaken for what this program makes.
GENERATOR_VERSION = 1
MARKER = "sample.json"
UNFINISHED_MARKER = "sample.json.partial"
# The photographs (427 x 640) are cut into cells of this side; a crop never leaves its cell, and a cell has one split.
CELL_SIDE = 106
CHUNK_IMAGES = 64

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Options:
    """What decides the bytes of a sample: numbers of images, nominal image side in pixels, and the seed."""

    train: int = 6000
    val: int = 1200
    size: int = 64
    seed: int = 0


@dataclass(frozen=True)
class Sources:
    """The raw material: photographs (height, width, 3) uint8 by ground, digit scans (n, 8, 8) of 0..16, labels (n,)."""

    photographs: dict[str, Pixels]
    scans: Floats
    labels: NDArray[np.int64]


# randomness ---------------------------------------------------------------------------------------


class Draws:
    """A stream of random numbers that is a function of its integer key alone."""

    def __init__(self, *key: int) -> None:
        self._key = key
        self._number = 0

    def uniform(self, low: float, high: float) -> float:
        """Return a number in [low, high)."""
        self._number += 1
        return low + (high - low) * float(uniform(*self._key, self._number))

    def integer(self, low: int, high: int) -> int:
        """Return an integer from low to high, both included."""
        return low + int(self.uniform(0, high - low + 1))

    def noise(self, shape: tuple[int, ...]) -> Floats:
        """Return float32 noise of mean 0 and standard deviation 1, nearly normal: four uniform numbers added."""
        self._number += 1
        bits = hash64(*self._key, self._number, np.arange(math.prod(shape)))
        total = sum((bits >> np.uint64(shift)) & np.uint64(0xFFFF) for shift in (0, 16, 32, 48))
        centered = np.asarray(total, dtype=np.float32) - 2 * 65535
        return (centered / (65536 * math.sqrt(4 / 12))).reshape(shape).astype(np.float32)


# raw material, split ------------------------------------------------------------------------------


def load_sources() -> Sources:
    """Return what scikit-learn ships: two photographs and 1,797 scanned digits (Alpaydin and Kaynak, UCI, 1998)."""
    try:
        from sklearn.datasets import load_digits, load_sample_image
    except ImportError:
        raise UserError(
            "the sample is made from images that come with scikit-learn, which is not installed: "
            'run `pip install "hpctrain[demo]"` or `pip install scikit-learn`'
        ) from None
    digits = load_digits()
    photographs = {name: np.ascontiguousarray(load_sample_image(f"{name}.jpg")) for name in ("china", "flower")}
    return Sources(photographs, digits.images.astype(np.float32), digits.target.astype(np.int64))


def digit_scans(labels: NDArray[np.int64], digit: int, split: str) -> NDArray[np.int64]:
    """Return the indices of the scans of `digit` that belong to `split`: every fifth one is for validation."""
    indices = np.flatnonzero(labels == digit)
    held_out = np.arange(len(indices)) % 5 == 4
    return indices[held_out if split == "val" else ~held_out]


def photograph_cells(height: int, width: int, split: str) -> list[tuple[int, int]]:
    """Return the (top, left) of the cells of a photograph that belong to `split`.

    A quarter of the cells, spread over the picture so that they show all it shows, are for validation.
    """
    return [
        (row * CELL_SIDE, column * CELL_SIDE)
        for row in range(height // CELL_SIDE)
        for column in range(width // CELL_SIDE)
        if ((column + 2 * row) % 4 == 1) == (split == "val")
    ]


# one image ----------------------------------------------------------------------------------------


def _photograph_ground(draws: Draws, photograph: Pixels, split: str, width: int, height: int) -> Floats:
    """Return a crop of one cell, perhaps mirrored, resized to (height, width, 3), float32 of 0..255."""
    cells = photograph_cells(photograph.shape[0], photograph.shape[1], split)
    top, left = cells[draws.integer(0, len(cells) - 1)]
    longer = draws.uniform(0.6, 1.0) * CELL_SIDE
    crop_width = max(1, int(longer * min(1.0, width / height)))
    crop_height = max(1, int(longer * min(1.0, height / width)))
    left += draws.integer(0, CELL_SIDE - crop_width)
    top += draws.integer(0, CELL_SIDE - crop_height)
    crop = Image.fromarray(photograph[top : top + crop_height, left : left + crop_width])
    ground = np.asarray(crop.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    return ground[:, ::-1] if draws.uniform(0, 1) < 0.5 else ground


def _stripes_ground(draws: Draws, width: int, height: int) -> Floats:
    """Return soft stripes of two colors at any angle, (height, width, 3), float32 of 0..255."""
    angle = draws.uniform(0, math.pi)
    periods = draws.uniform(3.0, 7.0)  # across the shorter side, so that they survive a resize to 32 pixels
    phase = draws.uniform(0, 2 * math.pi)
    hue = draws.uniform(0, 1)
    lightness = draws.uniform(0.3, 0.7)
    first = _color(hue, lightness + 0.1, draws.uniform(0.3, 0.8))
    second = _color(hue + draws.uniform(0.1, 0.3), lightness - 0.1, draws.uniform(0.3, 0.8))
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32) / min(width, height)
    distance = rows * math.sin(angle) + columns * math.cos(angle)
    share = 0.5 + 0.5 * np.sin(2 * math.pi * periods * distance + phase)
    return (share[..., None] * first + (1 - share[..., None]) * second).astype(np.float32)


def _color(hue: float, lightness: float, saturation: float) -> Floats:
    """Return red, green, blue of 0..255 for a hue, a lightness and a saturation of 0..1."""
    return 255 * np.array(colorsys.hls_to_rgb(hue % 1.0, lightness, saturation), dtype=np.float32)


def _digit_ink(draws: Draws, scan: Floats, width: int, height: int) -> Floats:
    """Return the ink of the enlarged scan, (height, width), float32 of 0..1; its strokes have soft edges."""
    shorter = min(width, height)
    side = max(8, round(draws.uniform(0.6, 0.74) * shorter))
    small = Image.fromarray(np.round(scan * (255 / 16)).astype(np.uint8))
    stroke = small.resize((side, side), Image.Resampling.BICUBIC)
    canvas = Image.new("L", (width, height))
    # It stays in the central 7/8 of the shorter side, which evaluation crops.
    left = (width - side) / 2 + draws.uniform(-0.06, 0.06) * shorter
    top = (height - side) / 2 + draws.uniform(-0.06, 0.06) * shorter
    canvas.paste(stroke, (round(left), round(top)))
    canvas = canvas.rotate(draws.uniform(-10, 10), Image.Resampling.BICUBIC)
    return np.asarray(canvas, dtype=np.float32) / np.float32(255)


def draw_image(sources: Sources, options: Options, split: str, index: int) -> Image.Image:
    """Return image number `index` of a split, an RGB image whose class is `CLASSES[index % len(CLASSES)]`."""
    ground_number, digit = divmod(index % len(CLASSES), 10)
    ground_name = GROUNDS[ground_number]
    draws = Draws(options.seed, SPLITS.index(split), index)
    width = round(options.size * draws.uniform(0.875, 1.25))
    height = round(options.size * draws.uniform(0.875, 1.25))

    if ground_name == "stripes":
        ground = _stripes_ground(draws, width, height)
    else:
        ground = _photograph_ground(draws, sources.photographs[ground_name], split, width, height)
    scans = digit_scans(sources.labels, digit, split)
    ink = _digit_ink(draws, sources.scans[scans[draws.integer(0, len(scans) - 1)]], width, height)

    # A light digit with a dark rim on a dimmed ground, so that it can be read on any part of a photograph.
    image = ground * draws.uniform(0.4, 0.7) + draws.uniform(0, 30)
    rim = 0.7 * np.clip((ink - 0.05) / 0.25, 0, 1)[..., None]
    image = image * (1 - rim)
    stroke = draws.uniform(0.85, 1.0) * np.clip((ink - 0.3) / 0.35, 0, 1)[..., None]
    color = _color(draws.uniform(0, 1), draws.uniform(0.7, 0.95), draws.uniform(0.2, 0.9))
    image = image * (1 - stroke) + color * stroke

    image = (image - 128) * draws.uniform(0.8, 1.1) + 128 + draws.uniform(-20, 20)
    image += draws.uniform(2, 10) * draws.noise((height, width, 3))
    return Image.fromarray(np.clip(np.round(image), 0, 255).astype(np.uint8))


def encode_image(sources: Sources, options: Options, split: str, index: int) -> bytes:
    """Return the JPEG bytes of image number `index` of a split."""
    quality = Draws(options.seed, SPLITS.index(split), index, 1).integer(75, 95)
    buffer = io.BytesIO()
    draw_image(sources, options, split, index).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


# the whole set ------------------------------------------------------------------------------------


def image_path(out_dir: Path, split: str, index: int) -> Path:
    """Return where image number `index` of a split is written."""
    return out_dir / split / CLASSES[index % len(CLASSES)] / f"{index:06d}.jpg"


# What a worker works on, sent once to each process rather than with every chunk.
_in_worker: dict[str, Any] = {}


def _start_worker(sources: Sources, options: Options, out_dir: Path) -> None:
    _in_worker.update(sources=sources, options=options, out_dir=out_dir)


def _write_chunk(chunk: tuple[str, int, int]) -> None:
    _write_images(**_in_worker, chunk=chunk)


def _write_images(sources: Sources, options: Options, out_dir: Path, chunk: tuple[str, int, int]) -> None:
    """Write the images `start` to `stop` (not included) of a split."""
    split, start, stop = chunk
    for index in range(start, stop):
        image_path(out_dir, split, index).write_bytes(encode_image(sources, options, split, index))


def _marker_text(options: Options) -> str:
    return json.dumps({"generator": GENERATOR_VERSION, **asdict(options)}, indent=2) + "\n"


def _num_files(out_dir: Path) -> int:
    return sum(1 for split in SPLITS for _ in out_dir.glob(f"{split}/*/*.jpg"))


def _is_complete(out_dir: Path, options: Options) -> bool:
    """Say whether `out_dir` already holds this sample; raise UserError if it holds anything else."""
    if not out_dir.exists():
        return False
    if not out_dir.is_dir():
        raise UserError(f"{out_dir} is a file, a directory was expected: give another OUT_DIR")
    if (out_dir / MARKER).exists():
        if (out_dir / MARKER).read_text(encoding="utf-8") != _marker_text(options):
            raise UserError(
                f"{out_dir} holds a sample made with other options (see {out_dir / MARKER}): "
                "give another OUT_DIR, or remove that one first"
            )
        return _num_files(out_dir) == options.train + options.val
    if (out_dir / UNFINISHED_MARKER).exists() or not any(out_dir.iterdir()):
        return False
    raise UserError(f"{out_dir} is not empty and holds no sample: give a new or an empty OUT_DIR")


def make_sample(out_dir: Path, options: Options, workers: int = 1) -> bool:
    """Write the sample into `out_dir` with `workers` processes; return False if it was there already.

    Raises UserError for options out of range, for a directory that holds something else, and without scikit-learn.
    """
    for name in SPLITS:
        if getattr(options, name) < len(CLASSES):
            raise UserError(f"--{name} is {getattr(options, name)}: at least {len(CLASSES)} expected, one a class")
    if not 16 <= options.size <= 1024:
        raise UserError(f"--size is {options.size}: 16 to 1024 pixels expected")
    if workers < 1:
        raise UserError(f"--workers is {workers}: at least 1 expected")
    try:
        if _is_complete(out_dir, options):
            return False
        sources = load_sources()
        out_dir.mkdir(parents=True, exist_ok=True)
        # From here on the directory is known to be ours and unfinished, so an interrupted run is simply repeated.
        (out_dir / UNFINISHED_MARKER).write_text(_marker_text(options), encoding="utf-8")
        (out_dir / MARKER).unlink(missing_ok=True)
        for split in SPLITS:
            shutil.rmtree(out_dir / split, ignore_errors=True)
            for name in CLASSES:
                (out_dir / split / name).mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot write {out_dir} ({error.strerror}): give an OUT_DIR that you may write to") from None

    chunks = [
        (split, start, min(start + CHUNK_IMAGES, getattr(options, split)))
        for split in SPLITS
        for start in range(0, getattr(options, split), CHUNK_IMAGES)
    ]
    if workers == 1:
        for chunk in chunks:
            _write_images(sources, options, out_dir, chunk)
    else:
        # Fresh processes: forking one that has loaded a threaded BLAS may hang.
        spawn = multiprocessing.get_context("spawn")
        shared = (sources, options, out_dir)
        with ProcessPoolExecutor(min(workers, len(chunks)), spawn, _start_worker, shared) as pool:
            list(pool.map(_write_chunk, chunks))

    with open(out_dir / UNFINISHED_MARKER, "rb") as marker:
        os.fsync(marker.fileno())
    (out_dir / UNFINISHED_MARKER).rename(out_dir / MARKER)
    return True


def main(arguments: list[str] | None = None) -> int:
    """Run the program; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="make_sample.py", description="Makes a small JPEG data set to train on, without a download."
    )
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path, help="directory for train/, val/ and sample.json")
    parser.add_argument("--train", type=int, default=Options.train, help="training images (default %(default)s)")
    parser.add_argument("--val", type=int, default=Options.val, help="validation images (default %(default)s)")
    parser.add_argument("--size", type=int, default=Options.size, help="nominal side in pixels (default %(default)s)")
    parser.add_argument("--seed", type=int, default=Options.seed, help="default %(default)s")
    parser.add_argument("--workers", type=int, default=_num_cores(), help="processes (default: one a core, at most 8)")
    given = parser.parse_args(arguments)
    options = Options(given.train, given.val, given.size, given.seed)
    began = time.perf_counter()
    try:
        made = make_sample(given.out_dir, options, given.workers)
    except UserError as error:
        print(f"make_sample.py: {error}", file=sys.stderr)
        return 2
    images = f"{options.train} training and {options.val} validation images of {len(CLASSES)} classes"
    if made:
        print(f"{given.out_dir}: made {images} in {time.perf_counter() - began:.1f} s")
    else:
        print(f"{given.out_dir}: {images} are there already")
    return 0


def _num_cores() -> int:
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


if __name__ == "__main__":
    sys.exit(main())
