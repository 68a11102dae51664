"""Arrays out of an .npz file that may come from somebody else: no pickles, no more memory than the file has bytes."""

import errno
import math
import struct
import zipfile
from pathlib import Path
from tokenize import TokenError
from typing import IO

import numpy as np

_DAMAGE = (zipfile.BadZipFile, EOFError, struct.error, NotImplementedError, RuntimeError, KeyError, OverflowError)
_HEADER_DAMAGE = (SyntaxError, TokenError, TypeError, AttributeError, MemoryError)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file that `np.savez` has written, by name.

    Raises ValueError for anything else: an array that is compressed, a pickle, longer or shorter than its header says,
    or one that shares bytes with another. Raises OSError where the file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check(archive, path.stat().st_size)
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, *_DAMAGE, *_HEADER_DAMAGE) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # which is a place before the file's start
            raise
        raise ValueError(f"{path.name} holds no arrays as they were written: {error}") from error


def _check(archive: zipfile.ZipFile, file_bytes: int) -> None:
    """Raise ValueError unless every member is an array, stored as it is, and all of them fit into the file."""
    total = 0
    names = set()
    for member in archive.infolist():
        total += member.file_size
        stored = member.compress_type == zipfile.ZIP_STORED and member.file_size == member.compress_size
        if not stored or total > file_bytes or member.filename in names or not member.filename.endswith(".npy"):
            raise ValueError(f"{member.filename!r} is not stored as np.savez does it")
        names.add(member.filename)
        with archive.open(member) as content:
            num_bytes = _array_bytes(content)
            if num_bytes != member.file_size - content.tell():
                raise ValueError(f"{member.filename!r} has other than the {num_bytes} bytes that its header says")


def _array_bytes(content: IO[bytes]) -> int:
    """Read the header of an array and return how many bytes are to follow."""
    version = np.lib.format.read_magic(content)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"an array is in version {version} of NumPy's format")
    shape, _, dtype = read(content)
    if dtype.hasobject:
        raise ValueError("an array of Python objects")
    return math.prod(shape) * dtype.itemsize
