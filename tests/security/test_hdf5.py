"""HDF5 files that somebody else has made: only `verify` opens them, in a process that may crash."""

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.data import ShardWriter
from hpctrain.data.hdf5 import inspect_shard
from hpctrain.data.hdf5_apart import Inspector
from hpctrain.data.manifest import Manifest
from hpctrain.data.shard import DataError
from hpctrain.data.verify import verify
from tests.conftest import image_bytes
from tests.security.conftest import mutated_bytes

SHARD = "train-00000-of-00001.h5"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good")
    with ShardWriter(root, "train", 3, 1, ["cat"]) as writer:
        for i in range(3):
            writer.add(image_bytes(i, 16, 16), 0, f"{i}.jpg")
    return root / "train" / SHARD


@pytest.fixture(scope="module")
def inspector() -> Iterator[Inspector]:
    with Inspector(patience_seconds=60) as inspector:
        yield inspector


@given(data=st.data())
@settings(max_examples=60)
def test_mutated_files_are_right_or_refused(data: st.DataObject, good: Path, inspector: Inspector) -> None:
    entry = Manifest.load(good.parent).shards[0]
    path = good.parent.parent / SHARD
    content = good.read_bytes()
    head = data.draw(mutated_bytes(content[:4096]))  # where the library's own structures are
    path.write_bytes(head + content[len(head) :])
    try:
        found = inspector.inspect(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        assert found.num_records == entry.num_records


@pytest.mark.parametrize("kind", ["external", "soft"])
def test_links_into_other_files_are_not_followed(kind: str, good: Path, tmp_path: Path) -> None:
    path = tmp_path / SHARD
    shutil.copy(good, path)
    with h5py.File(path, "r+") as file:
        file.move("labels", "elsewhere")
        file["labels"] = h5py.ExternalLink(str(good), "labels") if kind == "external" else h5py.SoftLink("/elsewhere")
    with pytest.raises(DataError, match="no array /labels"):
        inspect_shard(path)


def test_content_in_other_files_is_not_read(good: Path, tmp_path: Path) -> None:
    """External storage and virtual datasets: the bytes of an array lie in a file of any name."""
    path = tmp_path / SHARD
    for kind in ("external", "virtual"):
        shutil.copy(good, path)
        with h5py.File(path, "r+") as file:
            del file["labels"]
            if kind == "external":
                file.create_dataset("labels", (3,), "<i4", external=[("/etc/passwd", 0, 12)])
            else:
                layout = h5py.VirtualLayout((3,), "<i4")
                layout[:] = h5py.VirtualSource(str(good), "labels", (3,), "<i4")
                file.create_virtual_dataset("labels", layout)
        with pytest.raises(DataError):
            inspect_shard(path)


def test_huge_attributes_and_arrays_are_refused(good: Path, tmp_path: Path) -> None:
    path = tmp_path / SHARD
    shutil.copy(good, path)
    with h5py.File(path, "r+") as file:
        del file.attrs["format"]
        file.attrs.create("format", np.zeros(7000, "S8"))
    with pytest.raises(DataError):
        inspect_shard(path)
    shutil.copy(good, path)
    with h5py.File(path, "r+") as file:
        for name in ("labels", "ids", "names"):
            kind = file[name].dtype
            del file[name]
            file.create_dataset(name, (1 << 40,), kind, chunks=(1 << 10,))
    with pytest.raises(DataError):
        inspect_shard(path)


def test_a_crash_of_the_library_is_a_sentence_and_the_next_file_is_read(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that crashes is stood in for by a module that kills its process."""
    (tmp_path / "h5py.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    with Inspector() as inspector:
        with monkeypatch.context() as patch:
            patch.setenv("PYTHONPATH", str(tmp_path))
            with pytest.raises(DataError, match="makes the HDF5 library crash"):
                inspector.inspect(good)
        assert inspector.inspect(good) == Manifest.load(good.parent).shards[0]


def test_a_library_that_never_ends_is_given_up(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "h5py.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with Inspector(patience_seconds=0.5) as inspector, pytest.raises(DataError, match="busy without an end"):
        inspector.inspect(good)


def test_verify_does_not_open_them_in_its_own_process(
    make_dataset: Callable[..., tuple[Path, list[bytes], list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, *_ = make_dataset(4, 2)
    monkeypatch.setattr(h5py, "File", None)
    assert verify(folder, workers=1).ok


def test_the_process_leaves_no_core_file_and_takes_a_bounded_part_of_memory(good: Path) -> None:
    with Inspector() as inspector:
        inspector.inspect(good)
        process = inspector._process
        assert process is not None
        assert 4 << 30 <= resource.prlimit(process.pid, resource.RLIMIT_AS)[0] <= 64 << 30
        assert resource.prlimit(process.pid, resource.RLIMIT_CORE)[0] == 0
    assert process.poll() is not None
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)
