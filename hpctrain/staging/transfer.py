"""Moves a file's bytes from one reader to several ranks over MPI, in blocks, with memory for one block."""

import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from hpctrain.errors import UserError
from hpctrain.parallel.world import sleep_until

BLOCK_BYTES = 16 << 20  # of one read on the shared file system and of one broadcast
# What busy parallel file systems answer now and then, and what a second try usually cures.
_PASSING_ERRORS = {errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ESTALE, errno.EREMOTEIO, errno.EINTR}
_TRIES = 3
_FIRST_WAIT_SECONDS = 0.2
_TAG = 77


def open_file(path: Path) -> int:
    """Open a file that the user has named, and return the descriptor."""
    return os.open(path, os.O_RDONLY | os.O_CLOEXEC)


class Source:
    """A file on the shared file system, read once from its start to its end; a UserError says why it cannot be."""

    def __init__(self, path: Path, expected_bytes: int, opener: Callable[[Path], int] = open_file) -> None:
        self.path, self._expected_bytes, self._opener = path, expected_bytes, opener
        self._descriptor = -1

    def __enter__(self) -> "Source":
        self._retry(self._open, 0)
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill the view with the file's bytes from `offset` on."""
        while len(view):
            count = self._retry(lambda: os.preadv(self._descriptor, [view], offset), offset)  # noqa: B023 (at once)
            if count == 0:
                raise UserError(f"{self.path} ends at byte {offset}, expected {self._expected_bytes} bytes")
            view, offset = view[count:], offset + count

    def _open(self) -> int:
        if self._descriptor >= 0:  # a stale handle needs a new open
            os.close(self._descriptor)
            self._descriptor = -1
        self._descriptor = self._opener(self.path)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        return self._descriptor

    def _retry(self, call: Any, offset: int) -> int:
        for attempt in range(_TRIES):
            try:
                return int(call())
            except OSError as error:
                if error.errno not in _PASSING_ERRORS or attempt == _TRIES - 1:
                    raise UserError(
                        f"cannot read {self.path} at byte {offset}: {error.strerror} (errno {error.errno}, "
                        f"{attempt + 1} tries)"
                    ) from error
                time.sleep(_FIRST_WAIT_SECONDS * 4**attempt)
                if error.errno == errno.ESTALE:
                    self._open()
        raise AssertionError("unreachable")


class Route:
    """How blocks get from the `reader` to the other `ranks`: down a binary tree of sends and receives.

    Each rank passes a block on while it uses it, so a long file flows through the tree at half of a link's speed at
    least, on two nodes or two thousand, with memory for one block a rank. There are no communicators to be made for
    groups of ranks: messages of different files between two ranks stay in order by themselves.
    """

    def __init__(self, comm: Any, rank: int, reader: int, ranks: Sequence[int]) -> None:
        first, size = ranks.index(reader), len(ranks)
        position = (ranks.index(rank) - first) % size
        self._comm = comm
        self.reads = rank == reader
        self._parent = ranks[((position - 1) // 2 + first) % size]
        self._children = [ranks[(p + first) % size] for p in (2 * position + 1, 2 * position + 2) if p < size]

    def pass_on(self, view: memoryview) -> Iterator[None]:
        """Fill the view with the reader's bytes, let the caller use it once, and wait until it may be overwritten."""
        if not self.reads:
            sleep_until(lambda: self._comm.Iprobe(self._parent, _TAG))  # the file system may be slow
            self._comm.Recv(view, self._parent, _TAG)
        sends = [self._comm.Isend(view, child, _TAG) for child in self._children]
        yield
        for send in sends:
            send.Wait()

    def flag(self, value: bool) -> bool:
        """Return the reader's value on every rank."""
        byte = bytearray([value])
        for _ in self.pass_on(memoryview(byte)):
            pass
        return bool(byte[0])


def blocks(path: Path, num_bytes: int, route: Route, opener: Callable[[Path], int] = open_file) -> Iterator[memoryview]:
    """Yield the file's bytes in blocks on every rank of the route; one rank reads them, from what `opener` opens.

    All of the ranks must take every block. A view is good until the next one is asked for.
    """
    buffer = memoryview(bytearray(min(BLOCK_BYTES, num_bytes)))
    with Source(path, num_bytes, opener) if route.reads else nullcontext() as source:
        for offset in range(0, num_bytes, BLOCK_BYTES):
            view = buffer[: min(BLOCK_BYTES, num_bytes - offset)]
            if source is not None:
                source.read_into(view, offset)
            for _ in route.pass_on(view):
                yield view
