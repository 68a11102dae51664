"""Reads records of a data set by number: large `pread`s at known offsets, no HDF5 calls, safe under threads."""

import errno
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hpctrain.data.checksum import crc32
from hpctrain.data.index_table import IndexTable
from hpctrain.data.manifest import Manifest, ShardEntry, split_directory
from hpctrain.data.shard import INDEX_TYPES, DataError, array_layout, index_checksum, index_problem
from hpctrain.data.shard_file import open_shard, printable

_MAX_BUFFERS = 256  # that one preadv fills; systems take 1,024
_ALIGNMENT = 64  # bytes
# What busy parallel file systems answer now and then, and what a second try usually cures.
_PASSING_ERRORS = {errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ESTALE, errno.EREMOTEIO, errno.EINTR}
_TRIES = 3
_FIRST_WAIT_SECONDS = 0.2

PathLike = str | os.PathLike[str]
Buffer = Any  # bytes, or anything that has them in one piece
Packed = tuple[NDArray[np.uint8], NDArray[np.int64]]  # k records one after the other; k + 1 offsets, from 0 to the end
_Result = TypeVar("_Result")


class ShardReader:
    """A split of a data set, open for reading.

    `source` is the split's directory, or a Manifest (which a job broadcasts so that one rank alone reads it) together
    with the `directory` of the shard files. Several directories may be given: each shard is taken from the first that
    has it, so that shards staged on local disks come before those on the shared file system. Opening touches no shard;
    each is opened when first needed, its index is checked and kept (24 bytes a record), and at most `max_open_files`
    stay open. With `verify`, `read` compares every record with its checksum. With `page_cache="drop"` the kernel is
    asked to forget what was read, which leaves memory to others where the data do not fit into it anyway.

    Methods may be called from many threads at once. Record numbers are global: 0 to num_records - 1.
    """

    def __init__(
        self,
        source: PathLike | Manifest,
        directory: PathLike | Sequence[PathLike] | None = None,
        verify: bool = True,
        max_open_files: int = 256,
        page_cache: str = "keep",
    ) -> None:
        if isinstance(source, Manifest):
            if directory is None:
                raise ValueError("a ShardReader made from a Manifest needs the directory of the shard files")
            self.manifest = source
        else:
            self.manifest = Manifest.load(source)
            directory = split_directory(source) if directory is None else directory
        given = [directory] if isinstance(directory, str | os.PathLike) else list(directory)
        self._directories = [Path(one) for one in given]
        self._verify = verify
        self._drop_cache = page_cache == "drop"
        self._first_records = np.array([shard.first_record for shard in self.manifest.shards], np.int64)
        self._lock = threading.Lock()
        self._index = IndexTable(len(self.manifest.shards))
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()  # the most recently used last
        self._max_open_files = max(1, max_open_files)

    @property
    def num_records(self) -> int:
        return self.manifest.num_records

    @property
    def num_classes(self) -> int:
        return self.manifest.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.manifest.class_names

    @property
    def encoding(self) -> str:
        """ "jpeg", or "raw" for uint8 arrays of `image_shape`."""
        return self.manifest.encoding

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image; only where the encoding is "raw"."""
        if self.manifest.image_shape is None:
            raise ValueError(f"images in encoding {self.encoding!r} have no common shape")
        return self.manifest.image_shape

    def __len__(self) -> int:
        return self.num_records

    def __enter__(self) -> "ShardReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the shard files; a later read opens them again."""
        with self._lock:
            self._files.clear()

    def read(self, records: ArrayLike, verify: bool | None = None) -> list[bytes]:
        """Return the bytes of the given records, in the given order; repeats are allowed.

        Records that lie beside each other in a shard are read together, in whatever order they are asked for.
        Raises a DataError that names shard, record and source file where bytes are missing or do not match their
        checksum (`verify`, by default what the reader was opened with).
        """
        return [bytes(part) for part in parts(*self.read_packed(records, verify))]

    def read_packed(self, records: ArrayLike, verify: bool | None = None) -> Packed:
        """Return (bytes uint8[n], offsets int64[k + 1]): the k given records, one after the other.

        Otherwise as `read`. Bytes are read right into place; those of the i-th are bytes[offsets[i]:offsets[i + 1]].
        """
        wanted = self._checked(records)
        shards, local = self._located(wanted)
        begins = self._index.lookup("offsets", shards, local)
        lengths = self._index.lookup("offsets", shards, local + 1) - begins
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
        packed = _aligned(int(offsets[-1]))
        blobs = parts(packed, offsets)
        order = np.argsort(wanted, kind="stable")
        apart = (np.diff(wanted[order]) != 1) | (np.diff(shards[order]) != 0)
        for first, last in pairwise([0, *(np.flatnonzero(apart) + 1).tolist(), len(order)]):
            for start in range(first, last, _MAX_BUFFERS):
                places = order[start : min(last, start + _MAX_BUFFERS)].tolist()
                shard = int(shards[places[0]])
                offset = self.manifest.shards[shard].data_offset + int(begins[places[0]])
                self._pread_into(shard, [blobs[place] for place in places], offset)
        if self._verify if verify is None else verify:
            self._raise_if_damaged(wanted, blobs)
        return packed, offsets

    def labels(self, records: ArrayLike) -> NDArray[np.int32]:
        """Return the class numbers of the given records, int32[n]."""
        return self._gather(records, "labels").astype(np.int32, copy=False)

    def sizes(self, records: ArrayLike) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Return heights and widths in pixels of the given records' decoded images, int32[n] each."""
        heights, widths = self._gather(records, "heights"), self._gather(records, "widths")
        return heights.astype(np.int32, copy=False), widths.astype(np.int32, copy=False)

    def record_bytes(self, records: ArrayLike) -> NDArray[np.int64]:
        """Return the number of bytes of the given records, int64[n]."""
        shards, local = self._located(records)
        return self._index.lookup("offsets", shards, local + 1) - self._index.lookup("offsets", shards, local)

    def _raise_if_damaged(self, records: NDArray[np.int64], blobs: Sequence[Buffer]) -> None:
        bad = np.flatnonzero(~self.checksums_ok(records, blobs))
        if bad.size:
            record = int(records[bad[0]])
            others = f" (and {bad.size - 1} more of those read with it)" if bad.size > 1 else ""
            raise DataError(
                f"{self.describe(record)} does not match its checksum{others}: the file was damaged after it was "
                "written; run `hpctrain data verify`, copy the shard again, or set data.on_bad_record=skip",
                record,
            )

    def checksums_ok(self, records: ArrayLike, blobs: Sequence[Buffer]) -> NDArray[np.bool_]:
        """Return bool[n]: whether each of the given bytes matches the checksum of its record."""
        expected = self._gather(records, "checksums")
        found = np.fromiter((crc32(blob) for blob in blobs), np.uint32, len(blobs))
        return np.asarray(found == expected)

    def name(self, record: int) -> str:
        """Return the name of the file that a record was made from, relative to the input of the preparation."""
        number = self._shard_numbers(self._checked([record]))[0]
        entry = self.manifest.shards[number]
        start = entry.array_offsets["names"] + (record - entry.first_record) * entry.name_bytes
        content = self._pread(int(number), entry.name_bytes, start)
        return os.fsdecode(content.rstrip(b"\0"))

    def describe(self, record: int) -> str:
        """Return words for an error message: "record 17 of DIR/train-00000-of-00008.h5 (made from n01/a.jpg)"."""
        number = int(self._shard_numbers(self._checked([record]))[0])
        words = f"record {record} of {self._path(number)}"
        try:
            return f"{words} (made from {printable(self.name(record))})"
        except DataError:
            return words

    def _checked(self, records: ArrayLike) -> NDArray[np.int64]:
        wanted = np.asarray(records)
        if wanted.size and not np.issubdtype(wanted.dtype, np.integer):
            raise TypeError(f"record numbers are integers, not {wanted.dtype}")
        wanted = wanted.astype(np.int64, copy=False).reshape(-1)
        if wanted.size and (wanted.min() < 0 or wanted.max() >= self.num_records):
            wrong = wanted[(wanted < 0) | (wanted >= self.num_records)][0]
            raise IndexError(f"record {wrong} is outside 0..{self.num_records - 1}")
        return wanted

    def _shard_numbers(self, records: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._first_records, records, side="right") - 1

    def _located(self, records: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the number of each record's shard, whose index is there then, and the record's number in it."""
        wanted = self._checked(records)
        shards = self._shard_numbers(wanted)
        for number in self._index.missing(shards):
            entry = self.manifest.shards[number]
            load = partial(
                _load_index, entry=entry, num_classes=self.num_classes, image_shape=self.manifest.image_shape
            )
            self._index.add(number, self._with_file(number, load))
        return shards, wanted - self._first_records[shards]

    def _gather(self, records: ArrayLike, array: str) -> NDArray[Any]:
        return self._index.lookup(array, *self._located(records))

    def _path(self, number: int) -> Path:
        """The shard's file in the first directory that has it; in the last directory if none has."""
        candidates = [directory / self.manifest.shards[number].file for directory in self._directories]
        return next((path for path in candidates[:-1] if path.exists()), candidates[-1])

    def _pread(self, number: int, num_bytes: int, offset: int) -> bytes:
        return self._with_file(number, lambda file: file.pread(num_bytes, offset))

    def _pread_into(self, number: int, buffers: list[memoryview], offset: int) -> None:
        self._with_file(number, lambda file: file.pread_into(buffers, offset))

    def _with_file(self, number: int, use: "Callable[[_OpenFile], _Result]") -> _Result:
        """Call `use` with the open shard; passing errors of the file system are tried again after a wait."""
        for attempt in range(_TRIES):
            try:
                return use(self._file(number))
            except OSError as error:
                path = self._path(number)
                if error.errno == errno.ENOENT:
                    raise DataError(f"shard {path} is missing; copy it again or prepare the data again") from error
                if error.errno not in _PASSING_ERRORS or attempt == _TRIES - 1:
                    place = getattr(error, "offset", None)
                    where = f" at byte {place}" if place is not None else ""
                    raise DataError(
                        f"cannot read shard {path}{where}: {error.strerror} (errno {error.errno}, {attempt + 1} tries)"
                    ) from error
                with self._lock:
                    self._files.pop(number, None)  # a stale handle needs a new open
                time.sleep(_FIRST_WAIT_SECONDS * 4**attempt)
        raise AssertionError("unreachable")

    def _file(self, number: int) -> "_OpenFile":
        with self._lock:
            file = self._files.get(number)
            if file is not None:
                self._files.move_to_end(number)
                return file
        opened = _OpenFile(self._path(number), self.manifest.shards[number].file_bytes, self._drop_cache)
        with self._lock:
            file = self._files.setdefault(number, opened)
            self._files.move_to_end(number)
            while len(self._files) > self._max_open_files:
                self._files.popitem(last=False)  # closed when the last thread that reads from it is done
        return file


class _OpenFile:
    """A shard file of the right size. Closes itself when nobody refers to it any more."""

    def __init__(self, path: Path, expected_bytes: int, drop_cache: bool) -> None:
        self.path = path
        self._drop_cache = drop_cache and hasattr(os, "posix_fadvise")
        self._descriptor = -1
        self._descriptor = open_shard(path)
        if hasattr(os, "posix_fadvise"):
            # Each read asks for all that is wanted and no more; the kernel's guess at what comes next would be wrong.
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        size = os.fstat(self._descriptor).st_size
        if size != expected_bytes:
            state = "cut off" if size < expected_bytes else "another file"
            raise DataError(
                f"shard {path} has {size} bytes, its dataset.json says {expected_bytes}: it is {state}; copy it again"
            )

    def pread_into(self, buffers: list[memoryview], offset: int) -> None:
        """Fill `buffers`, one after the other, with what is at `offset`, however many system calls that takes."""
        begin = offset
        while buffers:
            try:
                count = os.preadv(self._descriptor, buffers, offset)
            except OSError as error:
                error.offset = offset  # type: ignore[attr-defined]
                raise
            if not count:
                raise DataError(f"shard {self.path} ends at byte {offset}, before its data do; copy it again")
            offset += count
            while buffers and count >= len(buffers[0]):
                count -= len(buffers[0])
                buffers = buffers[1:]
            if count:
                buffers = [buffers[0][count:], *buffers[1:]]
        if self._drop_cache:
            os.posix_fadvise(self._descriptor, begin, offset - begin, os.POSIX_FADV_DONTNEED)

    def pread(self, num_bytes: int, offset: int) -> bytes:
        """Read exactly `num_bytes` at `offset`."""
        content = bytearray(num_bytes)
        self.pread_into([memoryview(content)], offset)
        return bytes(content)

    def __del__(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)


def parts(packed: NDArray[np.uint8], offsets: NDArray[np.int64]) -> list[memoryview]:
    """Return the records that lie one after the other in `packed`, without copying them."""
    view = packed.data
    return [view[begin:end] for begin, end in pairwise(offsets.tolist())]


def pack(records: Sequence[Buffer]) -> Packed:
    """Return the bytes of `records` one after the other."""
    offsets = np.cumsum([0, *map(len, records)], dtype=np.int64)
    packed = _aligned(int(offsets[-1]))
    for place, record in zip(parts(packed, offsets), records, strict=True):
        place[:] = record
    return packed, offsets


def _aligned(num_bytes: int) -> NDArray[np.uint8]:
    """Return an array that begins where TensorFlow wants it to: it then takes the array over, and copies others."""
    buffer = np.empty(num_bytes + _ALIGNMENT, np.uint8)
    first = -buffer.ctypes.data % _ALIGNMENT
    return buffer[first : first + num_bytes]


def _load_index(
    file: _OpenFile, entry: ShardEntry, num_classes: int, image_shape: tuple[int, int, int] | None
) -> dict[str, NDArray[Any]]:
    """Read and check the index arrays of a shard. Their sizes fit into the file: the manifest was checked for that."""
    layout = array_layout(entry.num_records, entry.num_bytes, entry.name_bytes)
    index: dict[str, NDArray[Any]] = {}
    for name in INDEX_TYPES:
        dtype, length = layout[name]
        content = file.pread(dtype.itemsize * length, entry.array_offsets[name])
        index[name] = np.frombuffer(content, dtype)
    if index_checksum(index) != entry.checksum:
        raise DataError(
            f"the index of shard {file.path} does not match dataset.json: one of them is damaged or from another "
            "preparation; copy both again"
        )
    problem = index_problem(index, entry.num_bytes, num_classes, image_shape)
    if problem:
        raise DataError(f"shard {file.path} has a wrong index: {problem}; prepare the data again")
    return index
