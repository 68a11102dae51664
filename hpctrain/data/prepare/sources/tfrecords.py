"""Images in TFRecords of the layout that most programs for ImageNet write, read without TensorFlow.

A record is its length (uint64), a checksum of that, the data, and a checksum of these; the data are a tf.train.Example.
"""

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpctrain.data.images import ImageError
from hpctrain.data.prepare.sources.base import ImageList, Listing, SourceImage
from hpctrain.data.prepare.sources.crc32c import masked_crc32c
from hpctrain.data.prepare.sources.example import DamagedExample, parse_example
from hpctrain.data.prepare.sources.files import OpenFiles, PlacedFile, in_threads
from hpctrain.data.prepare.sources.labels import read_class_list
from hpctrain.data.shard import MAX_RECORD_BYTES
from hpctrain.errors import UserError

IMAGE, LABEL, SYNSET, FILE_NAME = "image/encoded", "image/class/label", "image/class/synset", "image/filename"
HEAD_BYTES = 12
_BLOCK_BYTES = 4096
_OTHER_FIELDS_BYTES = 2048  # what a record usually has besides its image, at most
_PART = re.compile(r"(?P<stem>.+)-(?P<part>\d{5})-of-(?P<parts>\d{5})(\.tfrecords?)?")
_COMPRESSED = (b"\x1f\x8b", b"\x78\x01", b"\x78\x9c", b"\x78\xda")  # gzip and zlib, which TensorFlow can write
_STEMS = {"train": ("train", "training"), "val": ("validation", "val", "valid")}


@dataclass(frozen=True)
class TFRecords:
    """Files of TFRecords in one folder: `train-00000-of-01024`, ....

    Classes are those that image/class/synset names. Where it is missing, `classes` is a file of class names and
    image/class/label a number in it, from 0 or from 1.
    """

    root: Path
    files: tuple[str, ...]
    classes: Path | None = None
    kind: str = "TFRecords"
    _open: OpenFiles = field(default_factory=OpenFiles, repr=False, compare=False)

    def list_images(self) -> Listing:
        images, nameless = ImageList(), 0
        for found, without_synset in in_threads(lambda name: _list_file(self.root, name), self.files):
            images.extend(found)
            nameless += without_synset
        if not images:
            raise UserError(f"the TFRecords in {self.root} hold no records")
        if nameless:
            images = self._name_classes(images, nameless)
        return Listing(sorted(images.class_names), images)

    def read(self, image: SourceImage) -> bytes:
        """Read the whole record, which is not much more than its image, and check it."""
        path, start = self.root / image.file, image.offset
        content = self._open.read(path, start, HEAD_BYTES + image.num_bytes + _OTHER_FIELDS_BYTES)
        length = record_length(content[:HEAD_BYTES], path, start)
        size = HEAD_BYTES + length + 4
        if length > MAX_RECORD_BYTES:
            raise ImageError(f"the record at byte {start} of {path} has {length:,} bytes, more than any image")
        if len(content) < size:
            content += self._open.read(path, start + len(content), size - len(content))
        if len(content) < size:
            raise UserError(f"{path} has become shorter: the record at byte {start} should have {size} bytes")
        data = content[HEAD_BYTES : HEAD_BYTES + length]
        # Worth its time, half as long again as the decoding that checks every image: a decoder does not notice most
        # flipped bits.
        if masked_crc32c(data) != int.from_bytes(content[size - 4 : size], "little"):
            raise ImageError(f"the record at byte {start} of {path} is damaged: its checksum is wrong")
        try:
            place = parse_example(lambda at, n: data[at : at + n], 0, length, (IMAGE,), (), ()).extents[IMAGE]
        except (DamagedExample, KeyError) as error:
            raise ImageError(f"the record at byte {start} of {path} is damaged: {error}") from error
        return data[place.offset : sum(place)]

    def _name_classes(self, images: ImageList, nameless: int) -> ImageList:
        """Put names in the place of labels, which the images' class names are until now."""
        if any(not name.isdigit() for name in images.class_names):
            raise UserError(f"{nameless:,} of {len(images):,} records in {self.root} have no {SYNSET}, the others do")
        labels = [int(name) for name in images.class_names]
        low, high = min(labels), max(labels)
        if self.classes is None:
            raise UserError(
                f"the records in {self.root} have no {SYNSET}, only labels from {low} to {high}; give the class names "
                "with --classes FILE, one a line in the order of the labels"
            )
        names = read_class_list(self.classes)
        first = 1 if low >= 1 and high == len(names) else 0
        if low < first or high >= first + len(names) or (first == 0 and low > 0):
            raise UserError(
                f"the records in {self.root} have labels from {low} to {high}, but {self.classes} names {len(names)} "
                f"classes; expected labels from 1 to {len(names)}, or from 0 to at most {len(names) - 1}"
            )
        return images.with_class_names([names[label - first] for label in labels])


def find_tfrecords(folder: Path, names: Sequence[str], split: str) -> tuple[str, ...]:
    """Return those of the files in a folder that are the TFRecords of a split; a UserError says what is missing."""
    groups: dict[str, list[str]] = {}
    for name in names:
        match = _PART.fullmatch(name)
        if match:
            groups.setdefault(match["stem"], []).append(name)
        elif name.endswith((".tfrecord", ".tfrecords")):
            groups.setdefault(name.rsplit(".", 1)[0], []).append(name)
    if not groups:
        return ()
    chosen = list(groups)
    if len(groups) > 1:
        words = {stem: set(re.split(r"[^a-z]+", stem.lower())) for stem in groups}
        chosen = [stem for stem in groups if words[stem] & set(_STEMS[split])] if split in _STEMS else []
    if len(chosen) != 1:
        raise UserError(
            f"{folder} holds TFRecords of {', '.join(sorted(groups))}; expected one set that is named for {split}, "
            f"such as {_STEMS.get(split, (split,))[0]}-00000-of-01024"
        )
    files = sorted(groups[chosen[0]])
    parts = [match for match in map(_PART.fullmatch, files) if match]
    if parts:
        expected = {(i, int(parts[0]["parts"])) for i in range(int(parts[0]["parts"]))}
        found = {(int(match["part"]), int(match["parts"])) for match in parts}
        if found - expected:
            raise UserError(f"{folder} holds TFRecords of two sets, {files[0]} and {files[-1]}; keep one of them")
        if expected - found:
            lost = min(expected - found)[0]
            raise UserError(
                f"{folder} lacks {len(expected - found)} of {len(expected)} TFRecord files, the first is number {lost} "
                f"({chosen[0]}-{lost:05d}-of-{len(expected):05d}); copy or download them again"
            )
    return tuple(files)


def record_length(head: bytes, path: Path, place: int) -> int:
    """Return the number of bytes of data in the record that starts with `head`, after checking its checksum."""
    if len(head) < HEAD_BYTES:
        raise UserError(f"{path} is cut off inside the record at byte {place}; copy or download it again")
    length, checksum = struct.unpack("<QI", head)
    if masked_crc32c(head[:8]) != checksum:
        if place == 0 and head[:2] in _COMPRESSED:
            raise UserError(f"{path} is compressed; write its records again without, or unpack it with `gunzip`")
        raise UserError(
            f"{path} is damaged at byte {place}, or no TFRecord file: the checksum of the record's length is wrong"
        )
    return int(length)


class _Window:
    """Reads a file in blocks, each where something is needed that the last one does not hold."""

    def __init__(self, file: PlacedFile) -> None:
        self._file = file
        self._start = 0
        self._block = b""

    def read(self, offset: int, num_bytes: int) -> bytes:
        begin = offset - self._start
        if begin < 0 or begin + num_bytes > len(self._block):
            self._start, begin = offset, 0
            self._block = self._file.read(offset, max(num_bytes, _BLOCK_BYTES))
        return self._block[begin : begin + num_bytes]


def _list_file(root: Path, name: str) -> tuple[ImageList, int]:
    """List the records of a file without reading the images; also how many have no class name, but a label as such.

    An image's place is that of its record.
    """
    images, nameless = ImageList(), 0
    with PlacedFile(root / name, random=True) as file:
        window = _Window(file)
        place = number = 0
        while place < file.num_bytes:
            length = record_length(window.read(place, HEAD_BYTES), file.path, place)
            start, end = place + HEAD_BYTES, place + HEAD_BYTES + length
            if end + 4 > file.num_bytes:
                raise UserError(
                    f"{file.path} is cut off inside the record at byte {place}, which should end at byte {end + 4}, "
                    f"not {file.num_bytes}; copy or download it again"
                )
            try:
                example = parse_example(window.read, start, end, (IMAGE,), (SYNSET, FILE_NAME), (LABEL,))
            except DamagedExample as error:
                raise UserError(f"{file.path}: the record at byte {place} is damaged: {error}") from error
            missing = IMAGE if IMAGE not in example.extents else LABEL
            synset = example.texts.get(SYNSET, b"").decode("utf-8", "surrogateescape")
            if missing == IMAGE or not (synset or LABEL in example.numbers):
                keys = ", ".join(sorted(example.keys)[:12]) or "nothing"
                raise UserError(f"{file.path}: the record at byte {place} has no {missing}, but {keys}")
            if example.numbers.get(LABEL, 0) < 0:
                raise UserError(f"{file.path}: the record at byte {place} has label {example.numbers[LABEL]}")
            nameless += not synset
            given = example.texts.get(FILE_NAME, b"").decode("utf-8", "surrogateescape").rsplit("/", 1)[-1]
            class_name = synset or str(example.numbers[LABEL])
            path = given or f"{name}-{number:06d}"
            images.append(SourceImage(class_name, path, example.extents[IMAGE].num_bytes, name, place))
            place, number = end + 4, number + 1
    return images, nameless
