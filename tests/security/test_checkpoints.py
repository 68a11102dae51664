"""Checkpoints that somebody else has made: arrays as they were written, or one sentence."""

import io
import json
import shutil
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.training.checkpoint import Checkpoint, CheckpointError, read_checkpoint, write_checkpoint
from hpctrain.training.npz import read_npz
from tests.security.conftest import bounded_memory, mutated_bytes, mutated_json, refused_or

ARRAYS: dict[str, np.ndarray] = {
    "a/kernel": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.array(3, np.float32),
    "c": np.zeros((0, 2), "i8"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run = {"model.name": "resnet20", "model.num_classes": 6}
    return write_checkpoint(folder, Checkpoint(12, ARRAYS, {"momentum": np.ones(3, np.float32)}, run))


@pytest.fixture(scope="module")
def copy(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    place = tmp_path_factory.mktemp("copy") / good.name

    def make() -> Path:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(good, place)
        return place

    return make


def with_right_checksums(folder: Path) -> None:
    """Make state.json agree with the array files again, as one who has changed them on purpose would."""
    state = json.loads((folder / "state.json").read_text())
    for name, entry in state["files"].items():
        content = (folder / name).read_bytes()
        entry |= {"bytes": len(content), "crc32": zlib.crc32(content)}
    write_state(folder, state)


def write_state(folder: Path, state: Any) -> None:
    if isinstance(state, dict):
        state.pop("crc32", None)
        state = {**state, "crc32": zlib.crc32(json.dumps(state, sort_keys=True).encode())}
    (folder / "state.json").write_text(json.dumps(state))


def same(found: dict[str, np.ndarray]) -> bool:
    return found.keys() == ARRAYS.keys() and all(np.array_equal(found[name], ARRAYS[name]) for name in ARRAYS)


def test_arrays_come_back(good: Path) -> None:
    assert same(read_npz(good / "model.npz"))
    assert same(read_checkpoint(good).model)


@given(data=st.data())
def test_mutated_files_are_refused(data: st.DataObject, good: Path, copy: Callable[[], Path]) -> None:
    folder = copy()
    name = data.draw(st.sampled_from(["model.npz", "optimizer.npz", "state.json"]))
    (folder / name).write_bytes(data.draw(mutated_bytes((good / name).read_bytes())))
    found = refused_or(lambda: read_checkpoint(folder))
    assert found is None or same(found.model)


@given(data=st.data())
def test_mutated_arrays(data: st.DataObject, good: Path, copy: Callable[[], Path]) -> None:
    path = copy() / "model.npz"
    path.write_bytes(data.draw(mutated_bytes((good / "model.npz").read_bytes())))
    with bounded_memory():
        try:
            read_npz(path)
        except ValueError as error:
            assert str(error)


@given(data=st.data())
def test_crafted_arrays_with_right_checksums(data: st.DataObject, good: Path, copy: Callable[[], Path]) -> None:
    folder = copy()
    (folder / "model.npz").write_bytes(data.draw(mutated_bytes((good / "model.npz").read_bytes())))
    with_right_checksums(folder)
    refused_or(lambda: read_checkpoint(folder))


@given(data=st.data())
def test_crafted_state_with_a_right_checksum(data: st.DataObject, good: Path, copy: Callable[[], Path]) -> None:
    folder = copy()
    state = json.loads((good / "state.json").read_text())
    write_state(folder, data.draw(mutated_json(state)))
    found = refused_or(lambda: read_checkpoint(folder))
    assert found is None or (type(found.step) is int and found.step >= 0 and isinstance(found.run, dict))


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "null", "1", '{"format": "hpctrain-checkpoint", "version": 1}'])
def test_odd_states_are_refused(text: str, copy: Callable[[], Path]) -> None:
    folder = copy()
    (folder / "state.json").write_text(text)
    with bounded_memory(), pytest.raises(CheckpointError):
        read_checkpoint(folder)


def npy(header: str, content: bytes = b"") -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + content


BOMBS = {
    "pickle": (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", b"cos\nsystem\n(S'x'\ntR."), False),
    "shape": (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}", b"1234"), False),
    "negative": (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}", b"1234"), False),
    "itemsize": (npy("{'descr': '|V1000000000', 'fortran_order': False, 'shape': (1000,)}", b""), False),
    "compressed": (npy("{'descr': '|u1', 'fortran_order': False, 'shape': (300000000,)}", bytes(300_000_000)), True),
    "code": (npy("{'descr': __import__('os').system('touch pwned'), 'shape': (1,)}"), False),
    "nested": (npy("(" * 117), False),
    "text": (b"hello", False),
}


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bombs")
    for name, (content, compressed) in BOMBS.items():
        kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
        with zipfile.ZipFile(folder / f"{name}.npz", "w", kind) as archive:
            archive.writestr("x.npy", content)
    return folder


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused(name: str, bombs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with (
        bounded_memory(1 << 20),
        pytest.raises(ValueError, match=r"npz holds|not stored|header|objects|other than|magic|malformed"),
    ):
        read_npz(bombs / f"{name}.npz")
    assert list(tmp_path.iterdir()) == []


def test_members_that_share_their_bytes_are_refused(tmp_path: Path) -> None:
    """A file of many names for the same bytes, which would be many times as large in memory."""
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(1000))
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", buffer.getvalue())
        for name in ("b.npy", "c.npy"):
            again = zipfile.ZipInfo(name)
            first = archive.infolist()[0]
            again.header_offset, again.file_size, again.compress_size = 0, first.file_size, first.compress_size
            again.CRC = first.CRC
            archive.filelist.append(again)
            archive.NameToInfo[name] = again
    with pytest.raises(ValueError, match=r"not stored|holds no arrays"):
        read_npz(path)
