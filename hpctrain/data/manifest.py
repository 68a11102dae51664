"""`dataset.json`: what a data set holds and where each array lies, so that nobody need list folders or ask HDF5."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zlib import crc32

from hpctrain.data.atomic import write_file
from hpctrain.data.shard import (
    ARRAYS,
    ENCODINGS,
    FORMAT,
    MANIFEST_NAME,
    MAX_NAME_BYTES,
    MAX_PIXELS,
    MAX_RECORDS,
    MAX_SHARD_RECORDS,
    MAX_SHARDS,
    VERSION,
    DataError,
    array_layout,
    check_split_name,
    check_version,
    shard_bounds,
)
from hpctrain.errors import UserError

_MAX_MANIFEST_BYTES = 128 << 20  # that of MAX_SHARDS shards has half of it
_MAX_FILE_BYTES = 1 << 62


@dataclass(frozen=True)
class ShardEntry:
    """One shard file: which records it holds and at which file offsets (in bytes) its arrays start."""

    file: str
    first_record: int
    num_records: int
    num_bytes: int  # of /data
    file_bytes: int
    name_bytes: int  # width of one entry of /names
    checksum: int  # crc32 over the arrays of shard.INDEX_TYPES, which include the records' checksums
    names_checksum: int  # crc32 over /names
    array_offsets: Mapping[str, int]

    @property
    def data_offset(self) -> int:
        """File offset of the first record's first byte."""
        return self.array_offsets["data"]


@dataclass(frozen=True)
class Manifest:
    """A split of a data set: records, classes, shards. `shard_bounds` says which shard holds record i."""

    split: str
    encoding: str
    num_records: int
    num_bytes: int
    class_names: tuple[str, ...]
    shards: tuple[ShardEntry, ...]
    image_shape: tuple[int, int, int] | None = None  # height, width, channels of every image where encoding is "raw"
    prepare: Mapping[str, Any] = field(default_factory=dict)
    version: str = VERSION

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def classes_checksum(self) -> str:
        """A CRC-32 of the class names in their order: the same where the same number means the same class."""
        return f"{crc32(json.dumps(self.class_names).encode()):08x}"

    @classmethod
    def load(cls, directory: str | os.PathLike[str], check_files: bool = False) -> "Manifest":
        """Read `dataset.json` of a split's directory; a UserError names what is missing or wrong.

        Touches that one file only, unless `check_files` asks to look for every shard and its size.
        """
        folder = split_directory(directory)
        path = folder / MANIFEST_NAME
        try:
            with open(path, "rb") as file:
                text = file.read(_MAX_MANIFEST_BYTES + 1)
            if len(text) > _MAX_MANIFEST_BYTES:
                raise DataError(f"{path} is larger than {_MAX_MANIFEST_BYTES} bytes, so it is no {MANIFEST_NAME}")
            manifest = cls.from_json(text, str(path))
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        if check_files:
            manifest.check_files(folder)
        return manifest

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `dataset.json`: the last step of making a data set, which makes it exist."""
        write_file(Path(directory) / MANIFEST_NAME, self.to_json().encode())

    def check_files(self, directory: str | os.PathLike[str]) -> None:
        """Raise a DataError naming the first shard that is missing or has another size than the manifest says."""
        for shard in self.shards:
            path = Path(directory) / shard.file
            try:
                size = path.stat().st_size
            except OSError as error:
                raise DataError(f"shard {path} cannot be opened: {error.strerror}; copy it again") from error
            if size != shard.file_bytes:
                raise DataError(f"shard {path} has {size} bytes instead of {shard.file_bytes}; copy it again")

    def to_json(self) -> str:
        """Return the text of `dataset.json`; the same manifest always gives the same text."""
        document = {
            "format": FORMAT,
            "version": self.version,
            "split": self.split,
            "encoding": self.encoding,
            "image_shape": list(self.image_shape) if self.image_shape else None,
            "num_records": self.num_records,
            "num_bytes": self.num_bytes,
            "prepare": dict(self.prepare),
            "class_names": list(self.class_names),
            "shards": [
                {
                    "file": shard.file,
                    "first_record": shard.first_record,
                    "num_records": shard.num_records,
                    "num_bytes": shard.num_bytes,
                    "file_bytes": shard.file_bytes,
                    "name_bytes": shard.name_bytes,
                    "checksum": shard.checksum,
                    "names_checksum": shard.names_checksum,
                    "array_offsets": {name: shard.array_offsets[name] for name in ARRAYS},
                }
                for shard in self.shards
            ],
        }
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str = MANIFEST_NAME) -> "Manifest":
        """Parse and check the text of `dataset.json`; `where` names it in errors."""
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where} is not valid JSON ({error}); copy it again or prepare the data again") from error
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise DataError(f'{where} does not describe a data set: it should hold "format": "{FORMAT}"')
        check_version(document.get("version"), where)
        take = _Fields(document, where)
        class_names = take.list_("class_names")
        if not class_names or not all(isinstance(name, str) and name for name in class_names):
            raise DataError(f"{where}: class_names should be a list of one or more names")
        if len(set(class_names)) != len(class_names):
            raise DataError(f"{where}: class_names holds a name twice")
        split = take.text("split")
        try:
            check_split_name(split)
        except UserError as error:
            raise DataError(f"{where}: {error}") from None
        encoding = take.text("encoding")
        if encoding not in ENCODINGS:
            raise DataError(f"{where}: encoding is {encoding[:40]!r}; this hpctrain reads {' and '.join(ENCODINGS)}")
        prepare = document.get("prepare", {})
        if not isinstance(prepare, dict):
            raise DataError(f"{where}: prepare should be an object")
        manifest = cls(
            split=split,
            encoding=encoding,
            num_records=take.integer("num_records", 1, MAX_RECORDS),
            num_bytes=take.integer("num_bytes", 1, _MAX_FILE_BYTES),
            class_names=tuple(class_names),
            shards=tuple(
                _shard_entry(item, f"{where}: shards[{number}]") for number, item in enumerate(take.list_("shards"))
            ),
            image_shape=_image_shape(document.get("image_shape"), encoding, where),
            prepare=prepare,
            version=document["version"],
        )
        _check_sums(manifest, where)
        return manifest


def split_directory(directory: str | os.PathLike[str]) -> Path:
    """Return the directory that holds `dataset.json`; a UserError says what was probably meant instead."""
    folder = Path(directory)
    if folder.name == MANIFEST_NAME and folder.is_file():
        folder = folder.parent
    if (folder / MANIFEST_NAME).is_file():
        return folder
    if not folder.exists():
        raise UserError(f"the data directory {folder} does not exist; check the path, or see `hpctrain data prepare`")
    if not folder.is_dir():
        raise UserError(f"{folder} is a file; expected a directory that holds {MANIFEST_NAME}")
    below = [str(path) for path in _subfolders(folder) if (path / MANIFEST_NAME).is_file()]
    if below:
        raise UserError(f"{folder} has no {MANIFEST_NAME}, but {' and '.join(below)} do: give one of them")
    if any(folder.glob("*-of-*.h5")):
        raise UserError(
            f"{folder} has shards but no {MANIFEST_NAME}: its preparation or its copy is not finished; run it again"
        )
    raise UserError(
        f"{folder} has no {MANIFEST_NAME}, so it holds no prepared data; turn images into shards with "
        "`hpctrain data prepare IMAGES OUTPUT --split train`"
    )


def split_directories(directory: str | os.PathLike[str]) -> list[Path]:
    """Return the splits of a data set: `directory` itself if it is one, else those directly inside it, train first."""
    folder = Path(directory)
    if folder.is_dir() and not (folder / MANIFEST_NAME).is_file():
        below = [path for path in _subfolders(folder) if (path / MANIFEST_NAME).is_file()]
        if below:
            return sorted(below, key=lambda path: (path.name != "train", path.name))
    return [split_directory(folder)]


def _subfolders(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}") from error


@dataclass
class _Fields:
    """Typed access to the fields of a JSON object, with errors that name the field."""

    document: dict[str, Any]
    where: str

    def _get(self, key: str, kind: type, description: str) -> Any:
        value = self.document.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            found = "is missing" if key not in self.document else f"is {str(value)[:40]!r}"
            raise DataError(f"{self.where}: {key} {found}; expected {description}")
        return value

    def text(self, key: str) -> str:
        return str(self._get(key, str, "text"))

    def list_(self, key: str) -> list[Any]:
        return list(self._get(key, list, "a list"))

    def integer(self, key: str, low: int, high: int) -> int:
        value = int(self._get(key, int, "an integer"))
        if not low <= value <= high:
            raise DataError(f"{self.where}: {key} is {value}; expected {low} to {high}")
        return value


def _image_shape(value: object, encoding: str, where: str) -> tuple[int, int, int] | None:
    if encoding != "raw":
        return None
    if (
        not isinstance(value, list)
        or len(value) != 3
        or not all(isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= 65535 for size in value)
        or value[2] != 3
    ):
        raise DataError(f"{where}: image_shape should be [height, width, 3] where the encoding is raw")
    if value[0] * value[1] > MAX_PIXELS:
        raise DataError(f"{where}: image_shape is {value}; an image may have {MAX_PIXELS:,} pixels")
    return (value[0], value[1], value[2])


def _shard_entry(item: object, where: str) -> ShardEntry:
    if not isinstance(item, dict):
        raise DataError(f"{where} should be an object")
    take = _Fields(item, where)
    file = take.text("file")
    # A data set is copied, shared and unpacked by many: its manifest must not make anyone read another's files, or
    # write to a terminal what that would not show.
    if file in ("", ".", "..") or "/" in file or "\\" in file or len(file) > 255 or not file.isprintable():
        raise DataError(f"{where}: file is {file[:100]!r}; expected the name of a file in the same directory")
    num_records = take.integer("num_records", 1, MAX_SHARD_RECORDS)
    num_bytes = take.integer("num_bytes", num_records, _MAX_FILE_BYTES)
    file_bytes = take.integer("file_bytes", num_bytes, _MAX_FILE_BYTES)
    name_bytes = take.integer("name_bytes", 1, MAX_NAME_BYTES)
    places = item.get("array_offsets")
    if not isinstance(places, dict):
        raise DataError(f"{where}: array_offsets should be an object")
    take_place = _Fields(places, f"{where}: array_offsets")
    offsets = {
        name: take_place.integer(name, 0, max(0, file_bytes - dtype.itemsize * length))
        for name, (dtype, length) in array_layout(num_records, num_bytes, name_bytes).items()
    }
    return ShardEntry(
        file=file,
        first_record=take.integer("first_record", 0, MAX_RECORDS),
        num_records=num_records,
        num_bytes=num_bytes,
        file_bytes=file_bytes,
        name_bytes=name_bytes,
        checksum=take.integer("checksum", 0, 2**32 - 1),
        names_checksum=take.integer("names_checksum", 0, 2**32 - 1),
        array_offsets=offsets,
    )


def _check_sums(manifest: Manifest, where: str) -> None:
    """The shards' records and bytes must add up to the data set's."""
    num_shards = len(manifest.shards)
    if not 1 <= num_shards <= min(MAX_SHARDS, manifest.num_records):
        raise DataError(f"{where}: {num_shards} shards cannot hold {manifest.num_records} records")
    bounds = shard_bounds(manifest.num_records, num_shards).tolist()
    for number, shard in enumerate(manifest.shards):
        if (shard.first_record, shard.first_record + shard.num_records) != (bounds[number], bounds[number + 1]):
            raise DataError(
                f"{where}: shards[{number}] should hold the records {bounds[number]} to {bounds[number + 1] - 1} "
                f"of {manifest.num_records}, not {shard.num_records} from {shard.first_record}"
            )
    if len({shard.file for shard in manifest.shards}) != num_shards:
        raise DataError(f"{where}: a shard file is listed twice")
    if sum(shard.num_bytes for shard in manifest.shards) != manifest.num_bytes:
        raise DataError(f"{where}: num_bytes is {manifest.num_bytes}, which is not the sum over the shards")
