"""Staged shards are the same bytes, checked, each read once; what is there is kept; nothing is half done."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hpctrain.data import ShardReader
from hpctrain.data.manifest import Manifest
from hpctrain.data.order import SampleOrder
from hpctrain.errors import UserError
from hpctrain.parallel.world import World
from hpctrain.staging import local as staging_local
from hpctrain.staging import stage
from hpctrain.staging.local import refuse_full
from hpctrain.staging.traffic import Traffic
from tests.data.test_verify import flip
from tests.staging.conftest import ROOT, Outcome

RunJob = Callable[..., Outcome]


@pytest.fixture
def data(make_dataset: Callable[..., Any]) -> Path:
    """A data set of 8 train and 2 val shards."""
    make_dataset(records=11, shards=2, split="val")
    folder, _, _ = make_dataset(records=64, shards=8)
    return Path(folder).parent


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return tmp_path / "local"


@pytest.fixture
def run(data: Path, local: Path, lone_world: World) -> Callable[..., Traffic]:
    return lambda **options: stage(data, local, lone_world, **options)


def shards_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.h5"))}


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*") if path.name != ".staged.json"]


def assert_whole(staged: Path, data: Path) -> None:
    """Both splits are there, byte for byte, and usable by themselves."""
    for split in ("train", "val"):
        assert shards_in(staged / split) == shards_in(data / split)
        assert (staged / split / "dataset.json").read_bytes() == (data / split / "dataset.json").read_bytes()
    records = np.arange(64)
    assert ShardReader(staged / "train").read(records) == ShardReader(data / "train").read(records)
    assert leftovers(staged) == []


# ------------------------------------------------------------------------------------------ one process, one node


def test_everything_once_and_then_nothing_again(run: Callable[..., Traffic], data: Path, local: Path) -> None:
    lines: list[str] = []
    first = run(say=lines.append)
    assert_whole(local, data)
    assert (first.shards_read, first.shards_received, first.shards_reused) == (10, 0, 0)
    assert first.bytes_read == sum(map(len, [*shards_in(data / "train").values(), *shards_in(data / "val").values()]))
    assert any("MB/s" in line for line in lines) and lines[-1] == f"train with data.path={local}"
    times = {path: path.stat().st_mtime_ns for path in local.rglob("*.h5")}
    again = run()
    assert (again.shards_read, again.shards_reused) == (0, 10)
    assert {path: path.stat().st_mtime_ns for path in local.rglob("*.h5")} == times
    assert_whole(local, data)


def test_one_split(run: Callable[..., Traffic], data: Path, local: Path) -> None:
    lines: list[str] = []
    assert run(splits=("val",), say=lines.append).shards_read == 2
    assert not (local / "train").exists()
    assert lines[-1] == f"train with data.path={data} data.staged={local}"


def test_a_data_set_without_val(run: Callable[..., Traffic], data: Path) -> None:
    shutil.rmtree(data / "val")
    assert run().shards_read == 8
    with pytest.raises(UserError, match="has no val split"):
        run(splits=("val",))


def test_the_folder_called_train_is_train(run: Callable[..., Traffic], data: Path, local: Path) -> None:
    shutil.copytree(data / "train", data / "train-old")
    manifest = data / "train-old" / "dataset.json"
    manifest.write_text(manifest.read_text() + "\n")
    run()
    assert (local / "train" / "dataset.json").read_bytes() == (data / "train" / "dataset.json").read_bytes()


def test_a_full_tmpfs_is_not_one_without_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(staging_local, "_file_system", lambda folder: "tmpfs")
    for blocks, free in ((10, 0), (0, staging_local._available_memory())):
        status = SimpleNamespace(f_bavail=0, f_frsize=4096, f_blocks=blocks)
        monkeypatch.setattr(os, "statvfs", lambda path, status=status: status)
        found, _ = staging_local.free_bytes(tmp_path)
        assert (found == 0) == (free == 0)


def test_what_is_there_and_wrong_is_replaced(run: Callable[..., Traffic], data: Path, local: Path) -> None:
    run()
    entries = Manifest.load(data / "train").shards
    staged = [local / "train" / entry.file for entry in entries]
    staged[0].unlink()
    staged[1].write_bytes(staged[1].read_bytes()[:-1])
    flip(staged[2], entries[2].array_offsets["labels"])
    (local / "train" / f".{staged[3].name}.tmp-elsewhere-1-0").write_bytes(b"half of a shard")
    assert run().shards_read == 3
    assert_whole(local, data)
    flip(staged[4], entries[4].data_offset + 10)  # in a record: seen when asked for, and by training in any case
    assert run().shards_read == 0
    assert run(verify_existing=True).shards_read == 1
    assert_whole(local, data)


def test_another_data_set_takes_the_place_of_the_first(
    run: Callable[..., Traffic], make_dataset: Callable[..., Any], data: Path, local: Path
) -> None:
    run()
    shutil.rmtree(data)
    make_dataset(records=30, shards=3)
    run()
    assert shards_in(local / "train") == shards_in(data / "train") and len(shards_in(local / "train")) == 3


def test_a_flipped_byte_at_the_source_is_named_and_not_published(
    run: Callable[..., Traffic], data: Path, local: Path
) -> None:
    entry = Manifest.load(data / "train").shards[5]
    for place in (entry.data_offset + entry.num_bytes - 1, entry.array_offsets["names"], entry.array_offsets["ids"]):
        flip(data / "train" / entry.file, place)
        with pytest.raises(UserError) as caught:
            run()
        assert str(data / "train" / entry.file) in str(caught.value)
        assert not (local / "train" / entry.file).exists() and leftovers(local) == []
        assert not (local / "train" / "dataset.json").exists()
        if place > entry.data_offset:
            assert "record 47 (made from dir/image47.jpg)" in str(caught.value)
        flip(data / "train" / entry.file, place)
    run()
    assert_whole(local, data)


def test_refusals_before_anything_is_copied(
    run: Callable[..., Traffic], data: Path, local: Path, lone_world: World, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "link").symlink_to(data)
    foreign = tmp_path / "foreign" / "train"
    foreign.mkdir(parents=True)
    (foreign / "train-00000-of-00008.h5").write_bytes(b"somebody's work")
    before = shards_in(data / "train")
    cases = [
        (data, data, "is the data set itself"),
        (data, tmp_path / "link", "is the data set itself"),
        (data / "train", data, "is the data set itself"),
        (data / "train", data / "train", "is the data set itself"),
        (data, tmp_path / "file" / "x", "node7: cannot create the folder"),
        (data, tmp_path / "foreign", "train-00000-of-00008.h5, which staging did not put there"),
        (tmp_path / "nothing", local, "does not exist"),
    ]
    for source, target, message in cases:
        with pytest.raises(UserError, match=message):
            stage(source, target, lone_world, splits=("train",))
    assert (foreign / "train-00000-of-00008.h5").read_bytes() == b"somebody's work"
    assert shards_in(data / "train") == before and not (data / "train" / ".staged.json").exists()
    (data / "train" / "train-00003-of-00008.h5").write_bytes(b"")
    with pytest.raises(UserError, match=r"train-00003-of-00008\.h5 has 0 bytes instead of"):
        run()
    assert not local.exists()


def test_what_does_not_fit_is_refused(
    run: Callable[..., Traffic], local: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(splits=("val",))
    free = 64 << 20  # as much as has to stay free
    monkeypatch.setattr(
        os, "statvfs", lambda path: SimpleNamespace(f_bavail=free // 4096, f_frsize=4096, f_blocks=9**9)
    )
    with pytest.raises(
        UserError, match=r"node7: [\d,]+ bytes do not fit into .*, where 67,108,864 bytes( of memory)? are free"
    ):
        run()
    assert not list((local / "train").glob("*.h5"))
    assert run(splits=("val",)).shards_reused == 2, "nothing to copy fits anywhere"


def test_memory_counts_where_memory_is_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(staging_local, "_file_system", lambda folder: "tmpfs")
    monkeypatch.setattr(staging_local, "_available_memory", lambda: 1000)
    with pytest.raises(UserError, match="where 1,000 bytes of memory are free"):
        refuse_full(tmp_path, 10, "node7")
    refuse_full(tmp_path, 0, "node7")
    monkeypatch.undo()
    if os.path.ismount("/dev/shm"):
        assert staging_local._file_system(Path("/dev/shm")) == "tmpfs"
    assert staging_local._file_system(Path("/proc")) == "proc"


def test_the_program(data: Path, local: Path) -> None:
    program = [sys.executable, str(ROOT / "data_prep" / "stage.py")]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*program, data, local, "--split", "train"], capture_output=True, text=True, env=environ)
    assert done.returncode == 0 and done.stderr == "" and "staged in" in done.stdout
    assert shards_in(local / "train") == shards_in(data / "train")
    done = subprocess.run([*program, data, data], capture_output=True, text=True, env=environ)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "is the data set itself" in done.stderr


# ------------------------------------------------------------------------------------------ several ranks and nodes


@pytest.mark.mpi
def test_two_nodes_that_need_everything(run_job: RunJob, data: Path, local: Path) -> None:
    outcome = run_job(["a", "a", "b", "b"], data, block_bytes=1000)
    assert outcome.code == 0, outcome.stderr
    for node in ("a", "b"):
        assert_whole(local / node, data)
    files = [*shards_in(data / "train"), *shards_in(data / "val")]
    assert sorted(outcome.opened) == sorted(files), "each shard is opened once in the job"
    assert (outcome.traffic["shards_read"], outcome.traffic["shards_received"]) == (10, 10)
    # One node loses two shards, the other one of them.
    for node, shard in (("a", 1), ("a", 6), ("b", 6)):
        (local / node / "train" / f"train-{shard:05d}-of-00008.h5").unlink()
    outcome = run_job(["a", "a", "b", "b"], data)
    assert sorted(outcome.opened) == ["train-00001-of-00008.h5", "train-00006-of-00008.h5"]
    assert [outcome.traffic[f"shards_{what}"] for what in ("read", "received", "reused")] == [2, 1, 17]
    assert_whole(local / "a", data)
    assert_whole(local / "b", data)


@pytest.mark.mpi
def test_each_node_has_what_its_ranks_read(run_job: RunJob, data: Path, local: Path, tmp_path: Path) -> None:
    hosts = ["a", "b", "b", "c"]
    outcome = run_job(hosts, data, stage={"partitions": 4, "val_micro_batch": 3})
    assert outcome.code == 0, outcome.stderr
    assert f"data.path={data} data.staged={local / 'a'}" in outcome.stdout
    assert sorted(outcome.opened) == sorted([*shards_in(data / "train"), *shards_in(data / "val")])
    assert [len(shards_in(local / node / "train")) for node in "abc"] == [2, 4, 2]
    assert not (local / "b" / "train" / "dataset.json").exists()
    assert len(shards_in(local / "a" / "val")) == 1
    manifest = Manifest.load(data / "train")
    order = SampleOrder(64, 16, seed=1, partitions=4, shuffle_block=2)
    shared = ShardReader(data / "train")
    (tmp_path / "empty").mkdir()
    for rank, host in enumerate(hosts):
        reader = ShardReader(manifest, [local / host / "train", tmp_path / "empty"])
        for step in range(1, 9):
            records, _ = order.batch(step, rank, 4)
            assert reader.read(records) == shared.read(records)
        assert ShardReader(manifest, [local / host / "train", data / "train"]).read(np.arange(64))


@pytest.mark.mpi
def test_killed_and_run_again(run_job: RunJob, data: Path, local: Path) -> None:
    outcome = run_job(["a", "b", "b"], data, rank_that_dies=2, dies_at=3)
    assert outcome.code != 0 and outcome.seconds < 60
    assert len(shards_in(local / "b" / "train")) < 8 and leftovers(local / "b")
    assert not (local / "a" / "train" / "dataset.json").exists()
    for path in local.rglob("*.h5"):
        assert path.read_bytes() == (data / path.parent.name / path.name).read_bytes()
    outcome = run_job(["a", "b", "b"], data)
    assert outcome.code == 0 and outcome.traffic["shards_reused"] > 0
    for node in ("a", "b"):
        assert_whole(local / node, data)


@pytest.mark.mpi
def test_a_damaged_source_ends_all_ranks_with_one_sentence(run_job: RunJob, data: Path, local: Path) -> None:
    entry = Manifest.load(data / "train").shards[2]
    flip(data / "train" / entry.file, entry.data_offset + 5)
    outcome = run_job(["a", "b", "c"], data)
    assert outcome.code != 0 and outcome.seconds < 60
    lines = [line for line in outcome.stderr.splitlines() if "hpctrain:" in line]
    assert len(lines) == 1 and f"shard {data / 'train' / entry.file} is damaged: record 16" in lines[0]
    assert not list(local.rglob(entry.file)) and "Traceback" not in outcome.stderr


@pytest.mark.mpi
def test_a_full_disk_on_one_node_ends_all_ranks_with_one_sentence(run_job: RunJob, data: Path, local: Path) -> None:
    outcome = run_job(["a", "b", "c"], data, rank_with_full_disk=1, block_bytes=1000)
    assert outcome.code != 0 and outcome.seconds < 60
    lines = [line for line in outcome.stderr.splitlines() if "hpctrain:" in line]
    assert len(lines) == 1 and f"b: cannot write {local / 'b' / 'train'}" in lines[0] and "too large" in lines[0]


@pytest.mark.mpi
def test_a_directory_that_two_nodes_see_is_refused(run_job: RunJob, data: Path, local: Path) -> None:
    outcome = run_job(["a", "b"], data, same_directory=True)
    assert outcome.code != 0 and "is the same directory on a and b, so it is not node-local" in outcome.stderr
    assert outcome.stderr.count("hpctrain:") == 1
    assert not list(local.rglob("*.h5")) and outcome.opened == []
