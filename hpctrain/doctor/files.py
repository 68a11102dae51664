"""How fast a directory's file system is from here: bytes written and read back, small files made and removed."""

import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

FILE_BYTES = 4 << 20
_SMALL_FILES = 50
_BLOCK_BYTES = 1 << 20
_READ_BYTES = 64 << 20
_names = itertools.count()


@dataclass(frozen=True)
class FileSpeeds:
    """What a directory's file system did for one process."""

    write_bytes_per_second: float  # with fsync
    read_bytes_per_second: float  # after the kernel was asked to forget the file, which not every file system does
    operations_per_second: float  # create, stat, unlink


def probe_directory(directory: Path, limit_seconds: float = 1.0) -> FileSpeeds:
    """Write a file of 4 MiB in `directory` and read it back, then create, stat and remove 50 empty ones.

    Each part stops early at the limit, between two calls to the system. Raises OSError where one of them fails. The
    large file has no name any more when it is written, so that a killed process leaves nothing of it.
    """
    descriptor = _create(directory)
    try:
        written, write_seconds = _write(descriptor, limit_seconds)
        forget(descriptor)
        read, read_seconds = _read(descriptor, 0, written, limit_seconds)
    finally:
        os.close(descriptor)
    operations, seconds = 0, 0.0
    start = time.perf_counter()
    while operations < 3 * _SMALL_FILES and seconds < limit_seconds:
        path = _fresh_name(directory)
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        try:
            os.stat(path)
        finally:
            os.unlink(path)
        operations += 3
        seconds = time.perf_counter() - start
    return FileSpeeds(written / write_seconds, read / read_seconds, operations / seconds)


def read_bytes_per_second(files: Sequence[Path], number: int, limit_seconds: float = 1.0) -> float:
    """Return how fast the `number`-th of several readers reads 64 MiB of its file, in calls of 1 MiB.

    Readers are spread over the files and over the places in them. Raises OSError where the file cannot be read.
    """
    path = files[number % len(files)]
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        if size == 0:
            raise OSError(f"{path} is empty")
        forget(descriptor)
        turn = number // len(files)
        offset = turn * _READ_BYTES % max(1, size - _READ_BYTES)
        read, seconds = _read(descriptor, offset, min(_READ_BYTES, size), limit_seconds)
        return read / seconds
    finally:
        os.close(descriptor)


def within(limit_seconds: float, action: Callable[[], T]) -> T:
    """Return what `action` returns; raise TimeoutError when it takes longer, as with a file server that is gone.

    It goes on in a thread that does not keep the program from ending.
    """
    results: list[T] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            results.append(action())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit_seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {limit_seconds:g} s")
    return results[0]


def forget(descriptor: int) -> None:
    """Ask the kernel to drop a file's pages, so that it is read from where it is kept."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _fresh_name(directory: Path) -> Path:
    return directory / f".hpctrain-doctor-{os.uname().nodename}-{os.getpid()}-{next(_names)}"


def _create(directory: Path) -> int:
    path = _fresh_name(directory)
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    os.unlink(path)
    return descriptor


def _write(descriptor: int, limit_seconds: float) -> tuple[int, float]:
    block = os.urandom(_BLOCK_BYTES)  # a file system that packs zeros would look fast
    written = 0
    start = time.perf_counter()
    while written < FILE_BYTES and (written == 0 or time.perf_counter() - start < limit_seconds):
        written += os.write(descriptor, block)
    os.fsync(descriptor)
    return written, time.perf_counter() - start


def _read(descriptor: int, offset: int, size: int, limit_seconds: float) -> tuple[int, float]:
    read = 0
    start = time.perf_counter()
    while read < size and (read == 0 or time.perf_counter() - start < limit_seconds):
        block = os.pread(descriptor, min(_BLOCK_BYTES, size - read), offset + read)
        if not block:
            break
        read += len(block)
    return read, time.perf_counter() - start
