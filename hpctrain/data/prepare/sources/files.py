"""Reading at known places of large files."""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from hpctrain.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")

_MAX_OPEN = 64  # of the at least 256 files that a process may have open
_LISTING_THREADS = 16


class PlacedFile:
    """One file, open for reading at any place; threads may share it."""

    def __init__(self, path: Path, random: bool = False) -> None:
        """`random` asks the system not to read ahead, for walks that skip most of the file."""
        self.path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.num_bytes = os.fstat(self._descriptor).st_size
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; make it readable and run this again") from error
        if random and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Return `num_bytes` bytes from byte `offset` on, fewer only at the end of the file."""
        parts = []
        try:
            while num_bytes > 0:
                part = os.pread(self._descriptor, num_bytes, offset)
                if not part:
                    break
                parts.append(part)
                offset, num_bytes = offset + len(part), num_bytes - len(part)
        except OSError as error:
            raise UserError(f"cannot read {self.path} at byte {offset}: {error.strerror}; run this again") from error
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def close(self) -> None:
        """Close the file; a second time does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> "PlacedFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", -1) >= 0:
            self.close()


class OpenFiles:
    """The files of an input that were read from lately, kept open. Its pickle holds none of them."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, PlacedFile] = OrderedDict()

    def read(self, path: Path, offset: int, num_bytes: int) -> bytes:
        """Return bytes of a file like `PlacedFile.read`."""
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = PlacedFile(path)
            if len(self._files) > _MAX_OPEN:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end(path)
        return file.read(offset, num_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return OpenFiles, ()


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield work(item) for each item in order, worked out by threads: listing mostly waits for the file system."""
    pool = ThreadPoolExecutor(_LISTING_THREADS)
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)
