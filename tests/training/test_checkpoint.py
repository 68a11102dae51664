"""Checkpoints: complete or absent, whatever happens while they are written and whatever happens to them later."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpctrain.errors import UserError
from hpctrain.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointWriter,
    arrays_to_variables,
    latest_checkpoint,
    list_checkpoints,
    read_checkpoint,
    variables_to_arrays,
    write_checkpoint,
)

RUN = {"model.name": "résnet", "train.global_batch": 64, "rate": 0.1, "options": {"a": [1, 2]}, "none": None}


def checkpoint(step: int) -> Checkpoint:
    values = np.arange(12, dtype=np.float32).reshape(3, 4) + step
    model = {"conv/kernel": values, "bn/moving_mean": values[0] / 3, "scalar": np.float32(step)}
    return Checkpoint(step, model, {"iteration": np.array(step, np.int64), "conv/kernel_momentum": -values}, RUN)


def assert_same(left: Checkpoint, right: Checkpoint) -> None:
    assert (left.step, left.run) == (right.step, right.run)
    for mine, its in ((left.model, right.model), (left.optimizer, right.optimizer)):
        assert list(mine) == list(its)
        for name, array in mine.items():
            assert np.asarray(array).dtype == its[name].dtype and np.shape(array) == its[name].shape
            assert np.asarray(array).tobytes() == its[name].tobytes()


def steps_in(directory: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in list_checkpoints(directory)]


def test_round_trip(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "runs" / "checkpoints", checkpoint(1234))
    assert folder == tmp_path / "runs" / "checkpoints" / "step-00001234"
    assert_same(checkpoint(1234), read_checkpoint(folder))


def test_every_bit_pattern_survives(tmp_path: Path) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 1000, np.uint32)
    bits[:4] = [0x7F800000, 0xFFC00001, 0x80000000, 1]  # infinity, a NaN with a payload, -0, the least positive one
    before = Checkpoint(1, {"w": bits.view(np.float32)}, {"empty": np.zeros((0, 3))}, {})
    assert_same(before, read_checkpoint(write_checkpoint(tmp_path, before)))


def test_the_newest_is_found_by_its_number(tmp_path: Path) -> None:
    for step in (5, 100_000_000, 99_999_999):
        write_checkpoint(tmp_path, checkpoint(step))
    (tmp_path / "step-latest").mkdir()
    (tmp_path / "notes.txt").touch()
    assert steps_in(tmp_path) == [5, 99_999_999, 100_000_000]
    found, complaints = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 100_000_000 and complaints == []
    assert latest_checkpoint(tmp_path / "none") == (None, [])


def test_the_same_step_again_replaces_the_first(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, checkpoint(3))
    again = Checkpoint(3, {"w": np.ones(2)}, {}, {"try": 2})
    assert_same(again, read_checkpoint(write_checkpoint(tmp_path, again)))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def fill_with_zeros(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))  # what some file systems leave after the power fails


def empty(path: Path) -> None:
    path.write_text("[]")


def edit(path: Path) -> None:
    path.write_text(path.read_text().replace("20", "21"))


DAMAGES = [
    (file, damage)
    for file in ("model.npz", "optimizer.npz", "state.json")
    for damage in (truncate, flip_a_bit, fill_with_zeros, Path.unlink)
]


@pytest.mark.parametrize(("file", "damage"), [*DAMAGES, ("state.json", edit), ("state.json", empty)])
def test_damage_is_found_and_the_one_before_is_taken(
    file: str, damage: Callable[[Path], object], tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, checkpoint(10))
    newer = write_checkpoint(tmp_path, checkpoint(20))
    damage(newer / file)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(newer)
    text = str(caught.value)
    assert str(newer) in text and "\n" not in text
    found, complaints = latest_checkpoint(tmp_path)
    assert found is not None and complaints == [text]
    assert_same(checkpoint(10), found)


def test_every_flipped_bit_of_the_state_is_found(tmp_path: Path) -> None:
    """It says which run this was; nothing in it may change unnoticed."""
    folder = write_checkpoint(tmp_path, checkpoint(20))
    content = (folder / "state.json").read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1
        (folder / "state.json").write_bytes(damaged)
        try:
            assert_same(checkpoint(20), read_checkpoint(folder))  # white space may change
        except CheckpointError:
            continue


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, checkpoint(1))
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "version": 2}))
    with pytest.raises(CheckpointError, match="version"):
        read_checkpoint(folder)


def test_when_all_are_damaged_each_is_named(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        (write_checkpoint(tmp_path, checkpoint(step)) / "model.npz").unlink()
    found, complaints = latest_checkpoint(tmp_path)
    assert found is None
    assert ["step-00000003" in complaints[0], "step-00000001" in complaints[2]] == [True, True]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, keep=2)
    for step in (1, 2, 30, 31):
        writer.save(checkpoint(step))
    writer.wait()
    assert steps_in(tmp_path) == [30, 31]
    assert len(list(tmp_path.iterdir())) == 2
    assert_same(checkpoint(31), read_checkpoint(tmp_path / "step-00000031"))


@pytest.mark.parametrize("keep", [1, 2])
def test_a_run_that_goes_back_leaves_its_former_future(tmp_path: Path, keep: int) -> None:
    """After damage, or by wish, a run resumes before its newest checkpoint: that one is not what it has come to."""
    for step in (10, 20):
        write_checkpoint(tmp_path, checkpoint(step))
    truncate(tmp_path / "step-00000020" / "model.npz")
    writer = CheckpointWriter(tmp_path, keep)
    writer.save(checkpoint(13))
    writer.wait()
    assert steps_in(tmp_path) == [10, 13][-keep:]
    found, complaints = latest_checkpoint(tmp_path)
    assert found is not None and found.step == 13 and complaints == []


def test_an_interrupted_write_is_nothing_and_is_cleared_away(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, checkpoint(7))
    for name in (".step-00000009.tmp", ".step-00000008.tmp"):
        shutil.copytree(folder, tmp_path / name)
    (tmp_path / ".step-00000009.tmp" / "more").touch()
    assert steps_in(tmp_path) == [7]
    write_checkpoint(tmp_path, checkpoint(9))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000007", "step-00000009"]
    assert sorted(path.name for path in (tmp_path / "step-00000009").iterdir()) == [
        "model.npz",
        "optimizer.npz",
        "state.json",
    ]


class Killed(BaseException):
    """Stands for the end of the process at some system call."""


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`kill_at(n)`: the n-th change to the file system from then on, and all that would follow, do not happen."""
    left = [sys.maxsize]

    def wrap(module: Any, name: str) -> None:
        original = getattr(module, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, counting)

    for name in ("rename", "replace", "unlink", "rmdir", "mkdir", "fsync"):
        wrap(os, name)

    def set_at(number: int) -> None:
        left[0] = number

    return set_at


def test_a_kill_at_any_moment_leaves_only_checkpoints_that_read(tmp_path: Path, kill_at: Callable[[int], None]) -> None:
    number = 0
    while True:
        directory = tmp_path / str(number)
        kill_at(sys.maxsize)
        for step in (1, 2, 3):
            write_checkpoint(directory, checkpoint(step))
        writer = CheckpointWriter(directory, keep=1)
        kill_at(number)
        killed = False
        try:
            writer.save(checkpoint(2))  # replaces 2, removes 1 and 3
            writer.wait()
        except Killed:
            killed = True
        kill_at(sys.maxsize)
        found = [read_checkpoint(folder).step for folder in list_checkpoints(directory)]
        assert found, "nothing is left to resume from"
        if not killed:
            assert found == [2] and number > 15
            return
        write_checkpoint(directory, checkpoint(4))
        assert not [path for path in directory.iterdir() if path.name.startswith(".")]
        number += 1


WRITE_FOR_EVER = """
import itertools, sys
from pathlib import Path
import numpy as np
from hpctrain.training.checkpoint import Checkpoint, CheckpointWriter
writer = CheckpointWriter(Path(sys.argv[1]), keep=2)
for i in itertools.count():
    step = i % 5 + 1 + i // 50
    writer.save(Checkpoint(step, {"w": np.full(30_000, step, np.float32)}, {}, {"i": i}))
    if i == 5:
        print("going", flush=True)
"""


def test_kill_9_leaves_only_checkpoints_that_read(tmp_path: Path) -> None:
    waits = random.Random(1)
    for _ in range(8):
        command = [sys.executable, "-c", WRITE_FOR_EVER, str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"going\n"
            time.sleep(waits.uniform(0, 0.05))
            process.send_signal(signal.SIGKILL)
        found = [read_checkpoint(folder) for folder in list_checkpoints(tmp_path)]
        assert found
        assert all((c.model["w"] == c.step).all() for c in found)


def test_a_directory_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    writer = CheckpointWriter(tmp_path / "file" / "checkpoints", keep=2)
    writer.save(checkpoint(1))
    with pytest.raises(CheckpointError) as caught:
        writer.wait()
    text = str(caught.value)
    assert "file/checkpoints" in text and "--run-dir" in text and "Errno" not in text
    writer.wait()  # once is enough


def test_a_full_disk_is_told_and_the_last_checkpoint_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter(tmp_path, keep=1)
    writer.save(checkpoint(1))
    writer.wait()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    writer.save(checkpoint(2))
    with pytest.raises(CheckpointError, match="No space left on device"):
        writer.save(checkpoint(3))  # the next one tells too
    assert steps_in(tmp_path) == [1]
    assert_same(checkpoint(1), read_checkpoint(tmp_path / "step-00000001"))


@pytest.fixture(scope="module")
def variables() -> Iterator[list[Any]]:
    """Three Keras variables of two names."""
    import keras

    yield [
        keras.Variable(np.full((2, 3), 1.5, np.float32), name="w"),
        keras.Variable(np.zeros(3, np.float32), name="w"),
        keras.Variable(np.array(7, np.int64), dtype="int64", name="count"),
    ]


def test_variables_of_the_same_name_are_told_apart(variables: list[Any], tmp_path: Path) -> None:
    arrays = variables_to_arrays(variables)
    assert list(arrays) == ["w", "w#2", "count"]
    read = read_checkpoint(write_checkpoint(tmp_path, Checkpoint(1, arrays, {}, {}))).model
    variables[0].assign(np.zeros((2, 3)))
    variables[2].assign(0)
    assert (arrays["w"] == 1.5).all()  # a copy, which training on does not change
    arrays_to_variables(read, variables, "model")
    assert [np.asarray(variable.value).tolist() for variable in variables] == [[[1.5] * 3] * 2, [0.0] * 3, 7]


def test_arrays_that_do_not_fit(variables: list[Any]) -> None:
    arrays = variables_to_arrays(variables)
    for wrong, words in (
        ({name: arrays[name] for name in ("w", "count")}, "lacks w#2 .1 missing, 0 extra"),
        ({**arrays, "more": arrays["w"]}, "has more, .*0 missing, 1 extra"),
        ({**arrays, "w": arrays["w"].T}, r"w has shape \(3, 2\) .* \(2, 3\) in the optimizer"),
    ):
        with pytest.raises(UserError, match=words):
            arrays_to_variables(wrong, variables, "optimizer")
