"""The part of MATLAB's file format, version 5, that ImageNet's meta.mat needs: fields of a struct array.

After "MAT-File Format" (MathWorks), version 5. A file is a header of 128 bytes and elements: a tag of type and length,
then data padded to 8 bytes; up to 4 bytes of data fit into the tag itself. An element can be a zlib stream that holds
another. Arrays are elements of elements. Every size that the file states is compared with the bytes that are there.
"""

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hpctrain.errors import UserError

Value = float | str | None

_HEADER_BYTES = 128
_MAX_BYTES = 64 << 20  # of an element once decompressed; the meta.mat of ImageNet has less than 2 MB
_MAX_NUMBERS_BYTES = 4096  # of what is read as numbers: flags, shapes, single values
_MAX_NAMES_BYTES = 1 << 16  # of the names of a struct's fields
_MAX_STRUCTS = 1 << 18  # ImageNet has 1,860 synsets
_MATRIX, _COMPRESSED = 14, 15
_STRUCT, _CHAR, _NUMERIC = 2, 4, range(6, 16)  # classes of arrays; the others are cells, objects and sparse ones
_NUMBERS = {1: "b", 2: "B", 3: "h", 4: "H", 5: "i", 6: "I", 7: "f", 9: "d", 12: "q", 13: "Q"}
_TEXT = {1: "latin-1", 2: "latin-1", 4: "utf-16", 16: "utf-8", 17: "utf-16"}


class _Damaged(Exception):
    pass


@dataclass
class _Array:
    kind: int
    shape: tuple[int, ...]
    name: str
    content: "_Elements"  # what follows: the data, or for structs the names of the fields and their values


class _Elements:
    """The elements inside some bytes, one after the other."""

    def __init__(self, data: memoryview, order: str) -> None:
        self.data = data
        self.order = order  # "<" or ">"
        self.place = 0

    def next(self) -> tuple[int, memoryview]:
        """Return the type and the data of the next element, and move behind it."""
        if len(self.data) - self.place < 8:
            raise _Damaged("it ends inside an element")
        (first,) = struct.unpack_from(self.order + "I", self.data, self.place)
        if first >> 16:  # a small element: length and type in the first half, data in the second
            kind, length, start, step = first & 0xFFFF, first >> 16, self.place + 4, 8
            if length > 4:
                raise _Damaged(f"a small element has {length} bytes")
        else:
            kind = first
            (length,) = struct.unpack_from(self.order + "I", self.data, self.place + 4)
            start = self.place + 8
            step = 8 + (length if kind == _COMPRESSED else (length + 7) // 8 * 8)
        if start + length > len(self.data):
            raise _Damaged(f"an element of {length:,} bytes does not fit into the {len(self.data) - start:,} left")
        self.place = min(self.place + step, len(self.data))
        return kind, self.data[start : start + length]

    def numbers(self) -> list[float]:
        """Return the next element as numbers."""
        kind, data = self.next()
        code = _NUMBERS.get(kind)
        if code is None or len(data) % struct.calcsize(code) or len(data) > _MAX_NUMBERS_BYTES:
            raise _Damaged(f"an element of type {kind} with {len(data):,} bytes is where numbers should be")
        return list(struct.unpack(f"{self.order}{len(data) // struct.calcsize(code)}{code}", data))

    def text(self) -> str:
        """Return the next element as text."""
        kind, data = self.next()
        encoding = _TEXT.get(kind)
        if encoding is None:
            raise _Damaged(f"an element of type {kind} is where text should be")
        if encoding == "utf-16":
            encoding += "-le" if self.order == "<" else "-be"
        return bytes(data).decode(encoding, "replace")

    def array(self, data: memoryview) -> _Array | None:
        """Take the head of an array apart; None for the empty one that has no head."""
        if not data:
            return None
        inside = _Elements(data, self.order)
        flags, shape, name = inside.numbers(), inside.numbers(), inside.text()
        if not flags or not shape or any(size < 0 or size != int(size) for size in shape):
            raise _Damaged("an array has no shape")
        return _Array(int(flags[0]) & 0xFF, tuple(int(size) for size in shape), name, inside)


def read_struct_array(content: bytes, variable: str, fields: Sequence[str], where: str) -> list[dict[str, Value]]:
    """Return the named fields of every element of the struct array `variable`, in MATLAB's order.

    A field is a number or a row of text; None where it is something else. `where` names the file for the UserError
    that says why it cannot be read.
    """
    try:
        return _read(content, variable, fields)
    except (_Damaged, struct.error, zlib.error) as error:
        raise UserError(
            f"{where} is no MATLAB 5 file with a struct array {variable!r}, or it is damaged: {error}"
        ) from error


def _read(content: bytes, variable: str, fields: Sequence[str]) -> list[dict[str, Value]]:
    mark = content[126:128]
    if len(content) < _HEADER_BYTES or mark not in (b"IM", b"MI"):
        raise _Damaged("it does not start like one")
    seen = []
    for array in _variables(content, "<" if mark == b"IM" else ">"):
        if array.name == variable and array.kind == _STRUCT:
            return _structs(array, fields)
        seen.append(array.name)
    raise _Damaged(f"it holds {', '.join(map(repr, seen[:5])) or 'nothing'}")


def _variables(content: bytes, order: str) -> Iterator[_Array]:
    top = _Elements(memoryview(content)[_HEADER_BYTES:], order)
    while top.place < len(top.data):
        kind, data = top.next()
        if kind == _COMPRESSED:
            unpacker = zlib.decompressobj()
            unpacked = unpacker.decompress(data, _MAX_BYTES)
            if not unpacker.eof:
                raise _Damaged(f"an element is cut off or larger than {_MAX_BYTES:,} bytes")
            kind, data = _Elements(memoryview(unpacked), order).next()
        array = top.array(data) if kind == _MATRIX else None
        if array is not None:
            yield array


def _structs(array: _Array, fields: Sequence[str]) -> list[dict[str, Value]]:
    inside = array.content
    lengths = inside.numbers()
    _, data = inside.next()
    length = int(lengths[0]) if lengths else 0
    if not 1 <= length <= len(data) <= _MAX_NAMES_BYTES:
        raise _Damaged("a struct array names no fields")
    names = [bytes(data[i : i + length]).split(b"\0")[0].decode("latin-1") for i in range(0, len(data), length)]
    missing = [name for name in fields if name not in names]
    if missing:
        raise _Damaged(f"its elements have no field {missing[0]!r}, but {', '.join(map(repr, names[:12]))}")
    if math.prod(array.shape) > _MAX_STRUCTS:
        raise _Damaged(f"a struct array has {math.prod(array.shape):,} elements")
    result = []
    for _ in range(math.prod(array.shape)):  # ends early, with an exception, if there are not as many
        values: dict[str, Value] = {}
        for name in names:
            kind, data = inside.next()
            if kind != _MATRIX:
                raise _Damaged(f"an element of type {kind} is where an array should be")
            if name in fields:
                values[name] = _value(inside.array(data))
        result.append(values)
    return result


def _value(array: _Array | None) -> Value:
    if array is None:
        return None
    size = math.prod(array.shape)
    if array.kind == _CHAR and len(array.shape) == 2 and array.shape[0] <= 1:
        return array.content.text() if size else ""
    if array.kind in _NUMERIC and size == 1:
        numbers = array.content.numbers()
        return numbers[0] if numbers else None
    return None
