"""Memory that the ranks of one host have in common."""

import contextlib
import mmap
import os
import secrets
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.parallel.world import World

_TOKEN_BYTES = 16


class HostMemory:
    """Bytes that all ranks of a host read and write: `array`, uint8[size_bytes], zeros at first, aligned to pages.

    They have no name in a file system, so nothing is left of them when the job ends, however it ends.
    """

    def __init__(self, array: NDArray[np.uint8], ranks: tuple[int, ...], rank: int) -> None:
        self.array = array
        self.ranks = ranks  # of this host, in the world's numbers
        self.position = ranks.index(rank)  # this rank among them

    @classmethod
    def create(cls, world: World, size_bytes: int) -> "HostMemory | None":
        """Return the host's memory, or None on all of its ranks where it cannot be had or one asks for no bytes.

        A rank that is alone on its host gets None as well. All ranks of the world call this together.
        """
        ranks = tuple(rank for rank, place in enumerate(world.places) if place.host == world.host)
        first = world.rank == ranks[0]
        # The token is in case the ranks are in different process namespaces, where the number is another process's.
        token = secrets.token_bytes(_TOKEN_BYTES)
        file = _new_file(size_bytes, token) if first and size_bytes and len(ranks) > 1 else None
        process, file_there, token = world.allgather((os.getpid(), file, token))[ranks[0]]
        if not first and size_bytes and file_there is not None:
            file = _open(process, file_there, token)
        mapped = None if file is None else _map(file, size_bytes, ranks.index(world.rank), len(ranks))
        good = world.allgather(mapped is not None)
        if file is not None:
            os.close(file)
        if mapped is None or not all(good[rank] for rank in ranks):
            return None
        return cls(np.frombuffer(mapped, np.uint8)[:size_bytes], ranks, world.rank)


def _new_file(size_bytes: int, token: bytes) -> int | None:
    try:
        file = os.memfd_create("hpctrain")  # closed on exec
    except (OSError, AttributeError):
        return None
    try:
        os.ftruncate(file, size_bytes + _TOKEN_BYTES)
        os.pwrite(file, token, size_bytes)
    except OSError:
        os.close(file)
        return None
    return file


def _open(process: int, number: int, token: bytes) -> int | None:
    try:
        file = os.open(f"/proc/{process}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    with contextlib.suppress(OSError):  # of what is no file, or a shorter one
        if os.pread(file, _TOKEN_BYTES, os.fstat(file).st_size - _TOKEN_BYTES) == token:
            return file
    os.close(file)
    return None


def _map(file: int, size_bytes: int, position: int, count: int) -> Any:
    begin, end = (size_bytes * i // count for i in (position, position + 1))
    try:
        # Here, as later the process would be killed if there is no memory. Each rank asks for a part, which is near it.
        os.posix_fallocate(file, begin, max(1, end - begin))
        return mmap.mmap(file, size_bytes + _TOKEN_BYTES)
    except OSError:
        return None
