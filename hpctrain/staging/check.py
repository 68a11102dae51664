"""Whether a shard file is what the manifest says: size, index, and, if asked, every record. Does not decode images."""

import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.checksum import crc32
from hpctrain.data.manifest import Manifest
from hpctrain.data.shard import INDEX_TYPES, array_layout, index_checksum, index_problem
from hpctrain.data.shard_file import open_shard, printable

_READ_BYTES = 16 << 20


def shard_problem(path: Path, manifest: Manifest, number: int, records: bool) -> str | None:
    """Say in words what is wrong with the copy of shard `number` at `path`; None when nothing is.

    Compares the size and the index arrays (24 bytes a record) with the manifest; with `records` also the names, the
    ids and every record with its checksum. Raises OSError where the file cannot be read.
    """
    entry = manifest.shards[number]
    layout = array_layout(entry.num_records, entry.num_bytes, entry.name_bytes)
    with os.fdopen(open_shard(path), "rb", buffering=0) as file:
        descriptor = file.fileno()
        size = os.fstat(descriptor).st_size
        if size != entry.file_bytes:
            return f"it has {size} bytes instead of {entry.file_bytes}"

        def array(name: str) -> NDArray[Any]:
            dtype, length = layout[name]
            return np.frombuffer(_pread(descriptor, dtype.itemsize * length, entry.array_offsets[name]), dtype)

        index = {name: array(name) for name in INDEX_TYPES}
        if index_checksum(index) != entry.checksum:
            return "its index does not match dataset.json"
        problem = index_problem(index, entry.num_bytes, manifest.num_classes, manifest.image_shape)
        if problem or not records:
            return f"its index is wrong: {problem}" if problem else None
        names_at = entry.array_offsets["names"]
        if _crc32_of(descriptor, entry.num_records * entry.name_bytes, names_at) != entry.names_checksum:
            return "its source files' names do not match dataset.json"
        if not np.array_equal(array("ids"), entry.first_record + np.arange(entry.num_records)):
            return "its record numbers are wrong"
        bad = _first_bad_record(descriptor, entry.data_offset, index["offsets"], index["checksums"])
        if bad is None:
            return None
        name = _pread(descriptor, entry.name_bytes, names_at + bad * entry.name_bytes).rstrip(b"\0")
    source = printable(os.fsdecode(name))
    return f"record {entry.first_record + bad} (made from {source}) does not match its checksum"


def _first_bad_record(
    descriptor: int, data_offset: int, offsets: NDArray[np.int64], checksums: NDArray[np.uint32]
) -> int | None:
    """Position in the shard of the first record that does not match its checksum, read in large pieces."""
    first, num_records = 0, len(checksums)
    while first < num_records:
        limit = int(offsets[first]) + _READ_BYTES
        last = max(first + 1, int(np.searchsorted(offsets, limit, side="right")) - 1)
        begin = int(offsets[first])
        content = memoryview(_pread(descriptor, int(offsets[last]) - begin, data_offset + begin))
        for record in range(first, last):
            piece = content[int(offsets[record]) - begin : int(offsets[record + 1]) - begin]
            if crc32(piece) != checksums[record]:
                return record
        first = last
    return None


def _crc32_of(descriptor: int, num_bytes: int, offset: int) -> int:
    """Checksum of a range, which may be larger than memory."""
    checksum = 0
    for start in range(0, num_bytes, _READ_BYTES):
        part = _pread(descriptor, min(_READ_BYTES, num_bytes - start), offset + start)
        checksum = zlib.crc32(part, checksum)
    return checksum


def _pread(descriptor: int, num_bytes: int, offset: int) -> bytes:
    """Read exactly `num_bytes`, which lie inside the file: its size was compared with the manifest's."""
    parts = []
    while num_bytes > 0:
        part = os.pread(descriptor, num_bytes, offset)
        if not part:
            raise OSError(0, "the file ends too early")
        parts.append(part)
        num_bytes -= len(part)
        offset += len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
