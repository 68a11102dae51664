"""Finds the fields of a tf.train.Example in its bytes (protocol buffers' wire format), stepping over the image.

message Example  { Features features = 1; }
message Features { map<string, Feature> feature = 1; }          // an entry is { string key = 1; Feature value = 2; }
message Feature  { oneof { BytesList = 1; FloatList = 2; Int64List = 3; } }
message BytesList { repeated bytes value = 1; }                 // Int64List: repeated int64 value = 1, packed or not
"""

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_MAX_KEY_BYTES = 256
_MAX_SMALL_BYTES = 4096  # of a field that is read whole: a label, a class name, a file name

Read = Callable[[int, int], bytes]  # of (offset, number of bytes) in the file


class DamagedExample(Exception):
    """The bytes are no tf.train.Example; the text goes behind "it is damaged: "."""


class Extent(NamedTuple):
    """Where the bytes of a value are in the file."""

    offset: int
    num_bytes: int


class Example(NamedTuple):
    """What was asked for, by key, where the example has it; and all keys, for errors."""

    extents: dict[str, Extent]
    texts: dict[str, bytes]
    numbers: dict[str, int]
    keys: list[str]


def parse_example(
    read: Read, start: int, end: int, extents: Collection[str], texts: Collection[str], numbers: Collection[str]
) -> Example:
    """Return the single values of some features of the example in bytes `start` to `end` of a file.

    Of `extents` (byte strings of any size) only the place is found; of `texts` and `numbers` the value is read.
    """
    found = Example({}, {}, {}, [])
    for features in _messages(read, start, end, 1):
        for entry in _messages(read, features.offset, sum(features), 1):
            key, value = "", None
            for number, kind, extent in _fields(read, entry.offset, sum(entry)):
                if number == 1 and kind == _LENGTH and extent.num_bytes <= _MAX_KEY_BYTES:
                    key = read(*extent).decode("utf-8", "replace")
                elif number == 2 and kind == _LENGTH:
                    value = extent
            if value is None:
                continue
            found.keys.append(key)
            if key in extents:
                for item in _first(read, value, 1):
                    found.extents[key] = item
            elif key in texts:
                for item in _first(read, value, 1):
                    if item.num_bytes > _MAX_SMALL_BYTES:
                        raise DamagedExample(f"its {key} has {item.num_bytes:,} bytes")
                    found.texts[key] = read(*item)
            elif key in numbers:
                for integer in _integers(read, value):
                    found.numbers[key] = integer
    return found


def _first(read: Read, feature: Extent, number: int) -> list[Extent]:
    """The first value of a list of byte strings, if it has one."""
    for values in _messages(read, feature.offset, sum(feature), number):
        for item in _messages(read, values.offset, sum(values), 1):
            return [item]
    return []


def _integers(read: Read, feature: Extent) -> list[int]:
    """The first value of a list of integers, if it has one."""
    for values in _messages(read, feature.offset, sum(feature), 3):
        for number, kind, extent in _fields(read, values.offset, sum(values)):
            if number == 1 and kind in (_VARINT, _LENGTH) and extent.num_bytes:
                value = _varint(read, extent.offset, sum(extent))[0]
                return [value - (1 << 64) if value >> 63 else value]
    return []


def _messages(read: Read, start: int, end: int, number: int) -> Iterator[Extent]:
    """The extents of all fields of this number that have a length: messages, strings, byte strings."""
    for found, kind, extent in _fields(read, start, end):
        if found == number and kind == _LENGTH:
            yield extent


def _fields(read: Read, place: int, end: int) -> Iterator[tuple[int, int, Extent]]:
    """The number, the wire type and the content of each field between two places."""
    while place < end:
        tag, place = _varint(read, place, end)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            after = _varint(read, place, end)[1]
        elif kind == _FIXED64:
            after = place + 8
        elif kind == _FIXED32:
            after = place + 4
        elif kind == _LENGTH:
            length, place = _varint(read, place, end)
            after = place + length
        else:
            raise DamagedExample(f"a field of type {kind} at byte {place}")
        if after > end or number == 0:
            raise DamagedExample(f"a field at byte {place} does not fit into its message")
        yield number, kind, Extent(place, after - place)
        place = after


def _varint(read: Read, place: int, end: int) -> tuple[int, int]:
    """The number at a place, and the place behind it."""
    digits = read(place, min(10, end - place))
    if digits and digits[0] < 128:  # most
        return digits[0], place + 1
    value = 0
    for i, byte in enumerate(digits):
        value |= (byte & 127) << (7 * i)
        if byte < 128:
            return value & 0xFFFFFFFFFFFFFFFF, place + i + 1
    raise DamagedExample(f"a number at byte {place} does not end")
