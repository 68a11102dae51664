"""Memory of a host where it cannot be had; `training/test_host_weights.py` has real ranks that use it."""

import os
from pathlib import Path
from typing import Any

import pytest

from hpctrain.parallel.host_memory import HostMemory
from hpctrain.parallel.launch import Place
from hpctrain.parallel.world import World

SIZE_BYTES = 1000


class Told(World):
    """The last of some ranks, which is told by the first that its memory is in file `number` of this process."""

    def __init__(self, *hosts: str, number: int | None = None, token: bytes = b"") -> None:
        places = tuple(Place(host, (0,), (0,), {0: 0}) for host in hosts)
        super().__init__(len(hosts) - 1, len(hosts), hosts[-1], places, (), None, "")
        object.__setattr__(self, "first", (os.getpid(), number, token))

    def allgather(self, value: Any) -> list[Any]:
        """All others say what this one says, but for the file."""
        first: Any = self.first if isinstance(value, tuple) else value  # type: ignore[attr-defined]
        return [first, *[value] * (self.size - 1)]


def memory_file(token: bytes) -> int:
    file = os.memfd_create("test")
    os.ftruncate(file, SIZE_BYTES)
    os.pwrite(file, token, SIZE_BYTES)
    return file


def test_what_the_first_rank_has_made_is_found() -> None:
    file, token = memory_file(bytes(range(16))), bytes(range(16))
    found = HostMemory.create(Told("a", "b", "b", "b", number=file, token=token), SIZE_BYTES)
    assert found is None  # that rank is on another host
    found = HostMemory.create(Told("b", "b", number=file, token=token), SIZE_BYTES)
    assert found is not None and found.ranks == (0, 1) and found.position == 1
    found.array[7] = 3
    assert found.array.shape == (SIZE_BYTES,) and os.pread(file, 1, 7) == b"\x03"
    os.close(file)


@pytest.mark.parametrize("what", ["pipe", "nothing", "short", "another", "closed"])
def test_another_file_of_that_number_is_no_memory(what: str, tmp_path: Path) -> None:
    """As where ranks of one host name do not see each other's processes."""
    if what == "pipe":
        file = os.pipe()[1]
    elif what == "another":
        file = memory_file(b"x" * 16)
    else:
        path = Path(os.devnull) if what == "nothing" else tmp_path / "short"
        file = os.open(path, os.O_RDWR | os.O_CREAT)
    if what == "closed":
        os.close(file)
    assert HostMemory.create(Told("a", "a", number=file, token=b"y" * 16), SIZE_BYTES) is None


def test_nobody_has_memory_alone_or_unasked(lone_world: World) -> None:
    assert HostMemory.create(lone_world, SIZE_BYTES) is None
    assert HostMemory.create(Told("a", "b"), SIZE_BYTES) is None
    assert HostMemory.create(Told("a", "a", number=None), SIZE_BYTES) is None
    file = memory_file(b"z" * 16)
    assert HostMemory.create(Told("a", "a", number=file, token=b"z" * 16), 0) is None
    os.close(file)
