"""The HDF5 side of a shard: writing the file, and looking at one through the HDF5 library. Training uses neither."""

import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from hpctrain.data.manifest import ShardEntry
from hpctrain.data.shard import (
    ARRAYS,
    INDEX_TYPES,
    MAX_NAME_BYTES,
    MAX_SHARD_RECORDS,
    VERSION,
    DataError,
    array_layout,
    check_version,
    index_checksum,
)

SHARD_FORMAT = "hpctrain-shard"
_BLOCK_BYTES = 16 << 20
_ALIGN_FROM_BYTES = 64 << 10  # arrays of this size and more start at a multiple of a page
_PAGE_BYTES = 4096
_ATTRIBUTES = ("format", "version", "encoding", "key", "conversions", "converted")
_MAX_ATTRIBUTE_BYTES = 1 << 20
_PROBE_BYTES = 1 << 16  # more than HDF5's own parts of a shard


def write_hdf5(
    path: Path,
    first_record: int,
    index: Mapping[str, NDArray[Any]],
    names: NDArray[np.bytes_],
    data: IO[bytes],
    attributes: Mapping[str, str | int],
) -> None:
    """Write one shard to `path`. `index` holds the arrays of INDEX_TYPES; `data` is read from its start.

    The same arguments always give the same bytes: fixed library versions, fixed alignment, no times. Raises OSError
    where there is no room. The HDF5 library may crash of that, so it writes only what describes the arrays, where some
    room has just been found; the arrays go into their places without it.
    """
    num_records = len(index["labels"])
    layout = array_layout(num_records, int(index["offsets"][-1]), names.dtype.itemsize)
    ids = np.arange(first_record, first_record + num_records, dtype=np.int64)
    arrays = {**index, "ids": ids, "names": names}
    path.write_bytes(bytes(_PROBE_BYTES))
    places: dict[str, int] = {}
    with _create(path) as file:
        for key, value in {"format": SHARD_FORMAT, "version": VERSION, **attributes}.items():
            file.attrs[key] = np.bytes_(value.encode()) if isinstance(value, str) else np.int64(value)
        for name, (dtype, length) in layout.items():
            places[name] = _contiguous_dataset(file, name, dtype, length).id.get_offset()
    with open(path, "r+b") as plain:
        for name, (dtype, length) in layout.items():
            plain.seek(places[name])
            if name != "data":
                plain.write(np.asarray(arrays[name], dtype).tobytes())
                continue
            data.seek(0)
            for start in range(0, length, _BLOCK_BYTES):
                plain.write(data.read(min(_BLOCK_BYTES, length - start)))


def _create(path: Path) -> h5py.File:
    file_properties = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    file_properties.set_obj_track_times(False)  # else the root group would hold the time of day
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    access.set_fclose_degree(h5py.h5f.CLOSE_STRONG)
    access.set_libver_bounds(h5py.h5f.LIBVER_V110, h5py.h5f.LIBVER_V110)
    access.set_alignment(_ALIGN_FROM_BYTES, _PAGE_BYTES)
    access.set_file_locking(False, True)  # Lustre file systems are often mounted without locks
    return h5py.File(h5py.h5f.create(os.fsencode(path), h5py.h5f.ACC_TRUNC, file_properties, access))


def _contiguous_dataset(file: h5py.File, name: str, dtype: np.dtype[Any], length: int) -> h5py.Dataset:
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.CONTIGUOUS)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)  # so that arrays lie in the order of their creation
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)
    space = h5py.h5s.create_simple((length,))
    kind = h5py.h5t.py_create(dtype, logical=True)
    return h5py.Dataset(h5py.h5d.create(file.id, name.encode(), kind, space, properties))


def inspect_shard(path: Path) -> tuple[ShardEntry, dict[str, str | int]]:
    """Return what the manifest should say about a shard file, and the file's attributes, read through HDF5.

    Raises a DataError where the file is not a whole shard. Reads the index but not the records. The HDF5 library may
    crash on a file that somebody has made to that end: use `hdf5_apart.Inspector` for files from elsewhere.
    """
    try:
        file_bytes = path.stat().st_size
        with h5py.File(path, "r", locking=False) as file:
            return _inspect(file, path, file_bytes)
    except DataError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, MemoryError, OverflowError) as error:
        raise DataError(f"{path} is not a whole HDF5 shard: {error}") from error


def _inspect(file: h5py.File, path: Path, file_bytes: int) -> tuple[ShardEntry, dict[str, str | int]]:
    attributes = _attributes(file)
    if attributes.get("format") != SHARD_FORMAT:
        raise DataError(f"{path} is an HDF5 file but not a shard of hpctrain")
    check_version(attributes.get("version"), str(path))
    datasets = {}
    for name in ARRAYS:
        # Links of other kinds may lead into other files.
        here = isinstance(file.get(name, getlink=True), h5py.HardLink)
        dataset = file.get(name) if here else None
        if not isinstance(dataset, h5py.Dataset) or dataset.ndim != 1:
            raise DataError(f"{path} has no array /{name} of one dimension")
        datasets[name] = dataset
    num_records, num_bytes = len(datasets["labels"]), len(datasets["data"])
    name_bytes = datasets["names"].dtype.itemsize
    if not 1 <= name_bytes <= MAX_NAME_BYTES:
        raise DataError(f"{path}: /names has entries of {name_bytes} bytes")
    places: dict[str, int] = {}
    for name, (dtype, length) in array_layout(num_records, num_bytes, name_bytes).items():
        dataset = datasets[name]
        if dataset.dtype != dtype or len(dataset) != length:
            raise DataError(f"{path}: /{name} is {dataset.dtype}[{len(dataset)}], expected {dtype}[{length}]")
        place = dataset.id.get_offset()
        if place is None or dataset.chunks is not None or place + length * dtype.itemsize > file_bytes:
            raise DataError(f"{path}: /{name} is not stored in one piece inside the file")
        places[name] = int(place)
    if not 1 <= num_records <= MAX_SHARD_RECORDS:
        raise DataError(f"{path} has {num_records:,} records; expected 1 to {MAX_SHARD_RECORDS:,}")
    index = {name: datasets[name][:] for name in INDEX_TYPES}
    ids = datasets["ids"][:]
    if np.any(ids != ids[0] + np.arange(num_records)):
        raise DataError(f"{path}: /ids do not count up by one")
    entry = ShardEntry(
        file=path.name,
        first_record=int(ids[0]),
        num_records=num_records,
        num_bytes=num_bytes,
        file_bytes=file_bytes,
        name_bytes=name_bytes,
        checksum=index_checksum(index),
        names_checksum=_names_checksum(datasets["names"], num_records, name_bytes),
        array_offsets=places,
    )
    return entry, attributes


def _attributes(file: h5py.File) -> dict[str, str | int]:
    """The attributes of a shard's root group; what else there may be is not looked at."""
    found: dict[str, str | int] = {}
    for name in _ATTRIBUTES:
        if name not in file.attrs:
            continue
        if h5py.h5a.open(file.id, name.encode()).get_storage_size() > _MAX_ATTRIBUTE_BYTES:
            raise ValueError(f"the attribute {name} is too large")
        value = file.attrs[name]
        found[name] = value.decode() if isinstance(value, bytes) else int(value)
    return found


def _names_checksum(names: h5py.Dataset, num_records: int, name_bytes: int) -> int:
    checksum, step = 0, max(1, _BLOCK_BYTES // name_bytes)
    for start in range(0, num_records, step):
        checksum = zlib.crc32(names[start : start + step].tobytes(), checksum)
    return checksum
