"""The shard format (docs/shard-format.md): names, types and rules shared by the writer, the reader and the checks."""

import re
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.errors import UserError

FORMAT = "hpctrain-shards"
VERSION = "1.0"
MANIFEST_NAME = "dataset.json"
ENCODINGS = ("jpeg", "raw")

# The small arrays that training reads, in the order in which they are written and go into the index checksum.
INDEX_TYPES = {"offsets": "<i8", "labels": "<i4", "checksums": "<u4", "heights": "<i4", "widths": "<i4"}
ARRAYS = (*INDEX_TYPES, "ids", "names", "data")

# What a reader takes into memory at once is bounded by these, whatever a file says of itself.
MAX_RECORDS = 2**40
MAX_SHARDS = 2**17
MAX_SHARD_RECORDS = 2**24  # whose index has 400 MB
MAX_NAME_BYTES = 4096
MAX_PIXELS = 2**27  # of an image
MAX_RECORD_BYTES = 3 * MAX_PIXELS


class DataError(UserError):
    """A shard or a manifest that is not what it should be. `record` is the global record number at fault, if one is."""

    def __init__(self, message: str, record: int | None = None) -> None:
        super().__init__(message)
        self.record = record


def array_layout(num_records: int, num_bytes: int, name_bytes: int) -> dict[str, tuple[np.dtype[Any], int]]:
    """Return the type and the length of every array of a shard, in file order."""
    layout = {name: (np.dtype(code), num_records) for name, code in INDEX_TYPES.items()}
    layout["offsets"] = (layout["offsets"][0], num_records + 1)
    layout["ids"] = (np.dtype("<i8"), num_records)
    layout["names"] = (np.dtype(f"S{name_bytes}"), num_records)
    layout["data"] = (np.dtype("u1"), num_bytes)
    return layout


def shard_bounds(num_records: int, num_shards: int) -> NDArray[np.int64]:
    """Return int64[num_shards + 1]: shard s holds the records from bounds[s] up to bounds[s + 1].

    bounds[s] = floor(s * N / S), the rule by which the sample order cuts the data set into partitions as well: with a
    number of shards that is a multiple of the number of partitions, every shard lies inside one partition.
    """
    return np.arange(num_shards + 1, dtype=np.int64) * num_records // num_shards


def shard_file_name(split: str, shard: int, num_shards: int) -> str:
    """Return for instance train-00003-of-00008.h5."""
    return f"{split}-{shard:05d}-of-{num_shards:05d}.h5"


def check_split_name(split: str) -> str:
    """Return the name of a split if it can be a folder's name and the start of a file's, else raise a UserError."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}", split):
        raise UserError(
            f"split {split[:80]!r} should be a short name of letters, digits, _ and -, such as train or val"
        )
    return split


def check_version(version: object, where: str) -> None:
    """Raise a DataError unless this program can read format `version`: same major number, any minor number."""
    match = re.fullmatch(r"([0-9]{1,6})\.([0-9]{1,6})", version) if isinstance(version, str) else None
    if match is None:
        raise DataError(f"{where}: version is {repr(version)[:60]}; expected text such as {VERSION!r}")
    if int(match[1]) > int(VERSION.split(".")[0]):
        raise DataError(
            f"{where} is in shard format {version}, newer than the {VERSION} that this hpctrain reads; "
            "install a newer hpctrain, or prepare the data again with this one"
        )
    if int(match[1]) < int(VERSION.split(".")[0]):
        raise DataError(f"{where} is in shard format {version}, which this hpctrain does not read; prepare it again")


def index_checksum(index: Mapping[str, NDArray[Any]]) -> int:
    """Return the crc32 over the bytes of the arrays of INDEX_TYPES in their order, little-endian."""
    checksum = 0
    for name, code in INDEX_TYPES.items():
        checksum = zlib.crc32(np.asarray(index[name], code).tobytes(), checksum)
    return checksum


def index_problem(
    index: dict[str, NDArray[Any]], num_bytes: int, num_classes: int, image_shape: tuple[int, int, int] | None = None
) -> str | None:
    """Say in words what is wrong with a shard's index arrays; None when nothing is.

    Every record must have one to MAX_RECORD_BYTES bytes and lie inside the shard's data, labels must be in
    [0, num_classes), and images must have one to MAX_PIXELS pixels; raw images must have the `image_shape` of their
    data set.
    """
    offsets = index["offsets"]
    if offsets[0] != 0 or offsets[-1] != num_bytes or np.any(offsets[1:] <= offsets[:-1]):
        return f"offsets do not rise from 0 to {num_bytes}"
    if np.diff(offsets).max() > MAX_RECORD_BYTES:
        return f"a record has more than {MAX_RECORD_BYTES:,} bytes"
    labels = index["labels"]
    wrong = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if wrong.size:
        return (
            f"{wrong.size} labels are outside 0..{num_classes - 1}, the first is {labels[wrong[0]]} "
            f"at record {wrong[0]} of the shard"
        )
    if np.any(index["heights"] < 1) or np.any(index["widths"] < 1):
        return "image sizes below one pixel"
    if np.any(index["heights"].astype(np.int64) * index["widths"] > MAX_PIXELS):
        return f"an image has more than {MAX_PIXELS:,} pixels"
    if image_shape is not None:
        height, width, channels = image_shape
        if np.any(index["heights"] != height) or np.any(index["widths"] != width):
            return f"image sizes other than the {height} x {width} of the data set"
        if np.any(np.diff(offsets) != height * width * channels):
            return f"records of other than {height * width * channels} bytes"
    return None
