"""Writes shards: one at a time (`ShardBuilder`, `write_shard`), or a whole data set from Python (`ShardWriter`)."""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.atomic import make_folder, publish, remove_temporaries, temporary_path
from hpctrain.data.checksum import crc32
from hpctrain.data.hdf5 import inspect_shard, write_hdf5
from hpctrain.data.images import ImageError, jpeg_header
from hpctrain.data.manifest import Manifest, ShardEntry
from hpctrain.data.shard import (
    ENCODINGS,
    MANIFEST_NAME,
    MAX_NAME_BYTES,
    MAX_PIXELS,
    MAX_RECORD_BYTES,
    MAX_RECORDS,
    MAX_SHARD_RECORDS,
    MAX_SHARDS,
    check_split_name,
    shard_bounds,
    shard_file_name,
)
from hpctrain.errors import UserError, nearest

_MEMORY_BYTES = 192 << 20  # a shard larger than this collects its records in an unnamed temporary file


class Record(NamedTuple):
    """One image on its way into a shard."""

    blob: bytes
    label: int
    name: str  # of its source
    height: int
    width: int


class ShardBuilder:
    """Collects the records of one shard and writes it; `finish` makes the file appear, complete, under its name."""

    def __init__(self, path: Path, first_record: int, attributes: Mapping[str, str | int] | None = None) -> None:
        self.path = path
        self._first_record = first_record
        self._attributes = dict(attributes or {})
        self._data: IO[bytes] = tempfile.SpooledTemporaryFile(_MEMORY_BYTES, dir=str(path.parent))  # noqa: SIM115
        self._offsets = [0]
        self._rows: list[tuple[int, int, int, int]] = []  # label, checksum, height, width
        self._names: list[bytes] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, record: Record) -> None:
        """Append one record."""
        if not record.blob:
            raise UserError(f"record {self._first_record + len(self)} ({record.name}) has no bytes")
        if len(record.blob) > MAX_RECORD_BYTES or record.height * record.width > MAX_PIXELS:
            raise UserError(
                f"record {self._first_record + len(self)} ({record.name}) has {len(record.blob):,} bytes and "
                f"{record.width} x {record.height} pixels; a record may have {MAX_RECORD_BYTES:,} and {MAX_PIXELS:,}"
            )
        try:
            self._data.write(record.blob)
        except OSError as error:
            raise UserError(f"cannot write to {self.path.parent}: {error.strerror}") from error
        self._offsets.append(self._offsets[-1] + len(record.blob))
        self._rows.append((record.label, crc32(record.blob), record.height, record.width))
        self._names.append(os.fsencode(record.name)[-MAX_NAME_BYTES:])

    def finish(self, attributes: Mapping[str, str | int] | None = None) -> ShardEntry:
        """Write the file durably and return its entry for the manifest."""
        rows = np.array(self._rows, np.int64).reshape(-1, 4)
        index: dict[str, NDArray[Any]] = {
            "offsets": np.array(self._offsets, "<i8"),
            "labels": rows[:, 0].astype("<i4"),
            "checksums": rows[:, 1].astype("<u4"),
            "heights": rows[:, 2].astype("<i4"),
            "widths": rows[:, 3].astype("<i4"),
        }
        name_bytes = max(1, max(map(len, self._names)))
        names = np.array(self._names, f"S{name_bytes}")
        temporary = temporary_path(self.path)
        try:
            write_hdf5(
                temporary, self._first_record, index, names, self._data, {**self._attributes, **(attributes or {})}
            )
            publish(temporary, self.path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            if isinstance(error, OSError | RuntimeError):  # HDF5's own text is long; its first words hold the reason
                reason = getattr(error, "strerror", None) or str(error)[:200]
                raise UserError(f"cannot write {self.path}: {reason}") from error
            raise
        finally:
            self.abort()
        return inspect_shard(self.path)[0]

    def abort(self) -> None:
        """Forget what was collected."""
        self._data.close()


def write_shard(
    path: Path, first_record: int, records: Iterable[Record], attributes: Mapping[str, str | int] | None = None
) -> ShardEntry:
    """Write one shard file from its records, whole or not at all, and return its entry for the manifest."""
    builder = ShardBuilder(path, first_record, attributes)
    try:
        for record in records:
            builder.add(record)
        return builder.finish()
    finally:
        builder.abort()


class ShardWriter:
    """Writes one split of a data set into `directory`/`split`, record by record in their order.

        with ShardWriter("data", "train", num_records=1000, num_shards=8, class_names=["cat", "dog"]) as writer:
            for blob, label in ...:
                writer.add(blob, label)

    `dataset.json` is written last, when the `with` block ends without an error: until then there is no data set. With
    `encoding="raw"` records are uint8 arrays of the same `image_shape` (height, width, 3). `info` is kept in the
    manifest under "prepare". No more than one shard is held, in memory or in a temporary file.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        split: str,
        num_records: int,
        num_shards: int | None = None,
        class_names: Sequence[str] = (),
        encoding: str = "jpeg",
        *,
        image_shape: tuple[int, int, int] | None = None,
        info: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        if encoding not in ENCODINGS:
            raise UserError(f"unknown encoding {encoding!r}; {nearest(encoding, ENCODINGS)}")
        if (encoding == "raw") != (image_shape is not None):
            raise UserError("image_shape (height, width, 3) goes with encoding 'raw', and only with it")
        if not 1 <= num_records <= MAX_RECORDS:
            raise UserError(f"num_records is {num_records}; a data set has 1 to {MAX_RECORDS} records")
        num_shards = min(8, num_records) if num_shards is None else num_shards
        if not 1 <= num_shards <= min(num_records, MAX_SHARDS):
            raise UserError(f"num_shards is {num_shards}; expected 1 to {num_records}, the number of records")
        if num_records > num_shards * MAX_SHARD_RECORDS:
            raise UserError(f"num_shards is {num_shards}; a shard may have {MAX_SHARD_RECORDS:,} records, so give more")
        if not class_names or len(set(class_names)) != len(class_names) or not all(class_names):
            raise UserError("class_names should be one or more different names")
        self.directory = Path(directory) / check_split_name(split)
        self.split = split
        self._num_records = num_records
        self._bounds = shard_bounds(num_records, num_shards).tolist()
        self._class_names = tuple(class_names)
        self._encoding = encoding
        self._image_shape = image_shape
        self._info = dict(info or {})
        self._entries: list[ShardEntry] = []
        self._builder: ShardBuilder | None = None
        self._num_added = 0
        start_split(self.directory, overwrite)

    def add(
        self,
        image: bytes | NDArray[np.uint8],
        label: int,
        name: str = "",
        height: int | None = None,
        width: int | None = None,
    ) -> int:
        """Append a record and return its number. The size of a JPEG is read from its header where it is not given."""
        record = self._num_added
        if record >= self._num_records:
            raise UserError(f"the data set was announced with {self._num_records} records, and this is one more")
        if not 0 <= label < len(self._class_names):
            raise UserError(f"label {label} of record {record} is outside 0..{len(self._class_names) - 1}")
        if self._image_shape is not None:
            if isinstance(image, np.ndarray) and (image.dtype != np.uint8 or image.shape != self._image_shape):
                raise UserError(f"record {record} is {image.dtype}{image.shape}; expected uint8{self._image_shape}")
            blob = image.tobytes() if isinstance(image, np.ndarray) else bytes(image)
            if len(blob) != int(np.prod(self._image_shape)):
                raise UserError(f"record {record} has {len(blob)} bytes; expected uint8{self._image_shape}")
            height, width = self._image_shape[:2]
        else:
            blob = bytes(image)
            if height is None or width is None:
                try:
                    header = jpeg_header(blob)
                except ImageError as error:
                    raise UserError(f"record {record} ({name or 'no name'}) is not a JPEG: {error}") from error
                height, width = header.height, header.width
        if height < 1 or width < 1:
            raise UserError(f"record {record} has a size of {height} x {width} pixels")
        if self._builder is None:
            shard = len(self._entries)
            file = shard_file_name(self.split, shard, len(self._bounds) - 1)
            self._builder = ShardBuilder(self.directory / file, record, {"encoding": self._encoding})
        self._builder.add(Record(blob, int(label), name, height, width))
        self._num_added += 1
        if self._num_added == self._bounds[len(self._entries) + 1]:
            self._entries.append(self._builder.finish())
            self._builder = None
        return record

    def close(self) -> Manifest:
        """Write `dataset.json`, and so complete the data set; a UserError says if records are missing."""
        if self._num_added != self._num_records:
            self.abort()
            raise UserError(
                f"the data set was announced with {self._num_records} records but only {self._num_added} were added; "
                f"no {MANIFEST_NAME} was written"
            )
        manifest = Manifest(
            split=self.split,
            encoding=self._encoding,
            num_records=self._num_records,
            num_bytes=sum(entry.num_bytes for entry in self._entries),
            class_names=self._class_names,
            shards=tuple(self._entries),
            image_shape=self._image_shape,
            prepare=self._info,
        )
        remove_other_shards(self.directory, self.split, {entry.file for entry in self._entries})
        manifest.save(self.directory)
        return manifest

    def abort(self) -> None:
        """Forget the shard being collected; the data set stays incomplete."""
        if self._builder is not None:
            self._builder.abort()
            self._builder = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def start_split(folder: Path, overwrite: bool) -> None:
    """Make a split's folder ready for new shards: no manifest, no half-written files. A finished data set is kept
    unless `overwrite` says otherwise."""
    make_folder(folder)
    manifest = folder / MANIFEST_NAME
    if manifest.exists() and not overwrite:
        raise UserError(f"{folder} already holds a data set; give another directory, or overwrite it on purpose")
    try:
        manifest.unlink(missing_ok=True)  # first, so that it never describes shards that are changing
        remove_temporaries(folder)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error


def remove_other_shards(folder: Path, split: str, keep: set[str]) -> None:
    """Remove the shard files of an earlier preparation of this split, all but those to keep."""
    for path in sorted(folder.iterdir()):
        if path.name not in keep and re.fullmatch(re.escape(split) + r"-\d{5,7}-of-\d{5,7}\.h5", path.name):
            path.unlink()
