"""Where the members of a tar lie in its file, found by reading nothing but their headers.

The formats are ustar (POSIX 1003.1-1988), pax (2001) and GNU's. Python's own tarfile knows them as well, but keeps
every member in an object of a kilobyte, reads at one position at a time, and says little of a file that is cut off.
"""

from collections.abc import Iterator
from typing import NamedTuple

from hpctrain.data.prepare.sources.files import PlacedFile
from hpctrain.errors import UserError

BLOCK_BYTES = 512
_ZEROS = bytes(BLOCK_BYTES)
_MAX_EXTENSION_BYTES = 1 << 20  # a long name, or a pax header
_REGULAR = b"\0" + b"07"
_LINKS = b"12"
_WITHOUT_CONTENT = b"123456"  # links, devices, folders, pipes


class TarMember(NamedTuple):
    """A regular file in a tar."""

    name: str
    offset: int  # of its first byte, in the file that holds the tar
    num_bytes: int


def is_tar_header(block: bytes) -> bool:
    """True for the 512 bytes before a member: their checksum holds, and they are not all zero."""
    try:
        stated = _number(block[148:156])
    except ValueError:
        return False
    unsigned = sum(block) - sum(block[148:156]) + 8 * 32
    if len(block) != BLOCK_BYTES or stated == unsigned:
        return len(block) == BLOCK_BYTES
    # Some old programs took the bytes as signed.
    return stated == unsigned - 256 * sum(byte > 127 for byte in block[:148] + block[156:])


def tar_members(file: PlacedFile, start: int = 0, end: int | None = None, inside: str = "") -> Iterator[TarMember]:
    """Yield the regular files of the tar in the bytes `start` to `end` (all) of a file, without reading their content.

    `inside` is the name of the tar where it is itself a member. A UserError says where the tar is damaged or cut off.
    """
    end = file.num_bytes if end is None else end
    where = f"{inside} in {file.path}" if inside else str(file.path)
    place, last = start, "its start"
    extended: dict[str, str] = {}  # what the pax or GNU headers before a member say of it
    while True:
        block = file.read(place, BLOCK_BYTES) if place + BLOCK_BYTES <= end else b""
        if block == _ZEROS:
            return
        if len(block) < BLOCK_BYTES:
            raise UserError(
                f"{where} is cut off at byte {place} of {file.num_bytes}, after {last}: a tar ends with a block of "
                "zeros; copy or download it again"
            )
        if not is_tar_header(block):
            raise UserError(f"{where} is damaged at byte {place}, after {last}: no header of a tar member is there")
        kind = block[156:157]
        name = extended.pop("path", None) or _header_name(block)
        try:
            size = int(extended.pop("size", "") or _number(block[124:136]))
            if size < 0:
                raise ValueError
        except ValueError:
            raise UserError(f"{where} is damaged at byte {place}: the size of {name} is not a number") from None
        if kind in _WITHOUT_CONTENT:
            size = 0  # some programs state one for folders
        content, place = place + BLOCK_BYTES, place + BLOCK_BYTES + (size + 511) // 512 * 512
        if content + size > end:
            raise UserError(
                f"{where} is cut off inside {name}, which should reach from byte {content} to byte {content + size} "
                f"but ends at byte {end}; copy or download it again"
            )
        if kind in b"LKxXg":
            if size > _MAX_EXTENSION_BYTES:
                raise UserError(f"{where} is damaged at byte {content}: a name of {size:,} bytes")
            extended.update(_extension(kind, file.read(content, size), where, content))
            continue
        if kind in _REGULAR and not name.endswith("/"):  # old programs end the names of folders in this way
            if any(key.startswith("GNU.sparse") for key in extended):
                kind = b"S"
            else:
                yield TarMember(name, content, size)
        if kind in _LINKS:
            raise UserError(
                f"{where} holds {name} as a link, which has no bytes of its own; make the tar with "
                "`tar --dereference --hard-dereference`"
            )
        if kind == b"S":
            raise UserError(f"{where} holds {name} in pieces (a sparse file); make the tar without --sparse")
        extended = {}
        last = name


def _header_name(block: bytes) -> str:
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0":
        prefix = block[345:500].split(b"\0", 1)[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    """Octal digits, or base 256 where the first bit says so (GNU, for 8 GiB and more)."""
    if field[:1] in (b"\x80", b"\xff"):
        return int.from_bytes(field[1:], "big", signed=field[0] == 0xFF)
    return int(field.split(b"\0", 1)[0].strip() or b"0", 8)


def _extension(kind: bytes, content: bytes, where: str, place: int) -> dict[str, str]:
    if kind == b"L":
        return {"path": content.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")}
    if kind in b"Kg":  # the target of a link; what holds for all members, of which none of ours is
        return {}
    found = {}
    rest = content
    while rest:
        length, space, _ = rest.partition(b" ")
        if not space or not length.isdigit() or not len(length) + 3 <= int(length) <= len(rest):
            raise UserError(f"{where} is damaged at byte {place}: a pax header that is none")
        key, _, value = rest[len(length) + 1 : int(length) - 1].partition(b"=")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        rest = rest[int(length) :]
    return found
