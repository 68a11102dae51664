"""Preparation from a tar in several processes: ranks, workers, and one that was killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import image_bytes
from tests.data.source_inputs import WNIDS, make_tar, run, shard_bytes, tar_of_tars

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, str(ROOT / "data_prep" / "prepare_imagenet.py")]


@pytest.fixture
def train_tar(tmp_path: Path) -> Path:
    images = {
        w: {f"{w}_{i}.JPEG": image_bytes(100 * c + i, 80, 90 + i) for i in range(40)} for c, w in enumerate(WNIDS)
    }
    path = tmp_path / "ILSVRC2012_img_train.tar"
    path.write_bytes(tar_of_tars(images))
    return path


def environment() -> dict[str, str]:
    result = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if os.geteuid() == 0:
        result.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    return result


def test_killed_and_run_again_gives_the_same_from_a_tar(train_tar: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--split", "train", "--shards", "32", "--resize", "64", "--workers", "2"]
    process = subprocess.Popen([*PROGRAM, train_tar, out, *options], env=environment(), stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while len(list(out.glob("train/*.h5"))) < 3 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("train/*.h5")}
    assert 3 <= len(finished) < 32 and not (out / "train" / "dataset.json").exists()
    time.sleep(0.5)  # the workers notice that their parent is gone
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("train/*.h5")}
    again = subprocess.run([*PROGRAM, train_tar, out, *options], env=environment(), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert {name: (out / "train" / name).stat().st_mtime_ns for name in finished} == finished
    run(train_tar, tmp_path / "whole", "train", shards=32, resize=64)
    assert shard_bytes(out / "train") == shard_bytes(tmp_path / "whole" / "train")
    assert (out / "train" / "dataset.json").read_bytes() == (tmp_path / "whole" / "train" / "dataset.json").read_bytes()
    assert not [path for path in (out / "train").iterdir() if path.name.startswith(".")]


def under_mpi(ranks: int, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["mpirun", "--oversubscribe", "-n", str(ranks), *PROGRAM, *map(str, arguments)]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=240)


@pytest.mark.mpi
def test_ranks_make_the_same_from_a_tar(train_tar: Path, tmp_path: Path) -> None:
    for ranks in (1, 3):
        done = under_mpi(
            ranks, train_tar, tmp_path / f"out{ranks}", "--split", "train", "--shards", "5", "--resize", "64"
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("160 images") == 1  # one rank speaks for all
    run(train_tar, tmp_path / "out", "train", shards=5, resize=64)
    files = sorted(path.name for path in (tmp_path / "out" / "train").iterdir())
    for name in files:
        expected = (tmp_path / "out" / "train" / name).read_bytes()
        assert (tmp_path / "out1" / "train" / name).read_bytes() == expected
        assert (tmp_path / "out3" / "train" / name).read_bytes() == expected


@pytest.mark.mpi
def test_ranks_end_with_one_sentence_on_a_damaged_tar(train_tar: Path, tmp_path: Path) -> None:
    train_tar.write_bytes(train_tar.read_bytes()[:100_000])
    done = under_mpi(3, train_tar, tmp_path / "out", "--split", "train")
    assert done.returncode == 2
    assert done.stderr.count("is cut off") == 1 and "Traceback" not in done.stderr


def test_flat_tar_without_labels_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "val.tar").write_bytes(make_tar({"ILSVRC2012_val_00000001.JPEG": image_bytes(1)}))
    command = [*PROGRAM, tmp_path / "val.tar", tmp_path / "out", "--split", "val"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and "--labels" in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "labels.csv").write_text("ILSVRC2012_val_00000001.JPEG,n01440764\n")
    done = subprocess.run(
        [*command, "--labels", tmp_path / "labels.csv", "--shard-mb", "1"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "1 records" in done.stderr and (tmp_path / "out/val/val-00000-of-00001.h5").exists()
