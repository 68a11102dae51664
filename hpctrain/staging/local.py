"""The directory on a node that shards are staged to: made ready, known again by its marker, measured."""

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hpctrain.data.atomic import make_folder, remove_temporaries, write_file
from hpctrain.errors import UserError

MARKER_NAME = ".staged.json"  # says that staging made the directory, so that it may remove what is in it
_TOKEN = ".node.tmp-"  # a temporary's name (data/atomic.py), so that a later run removes a leftover
_MARGIN_SHARE = 0.02  # of what is copied stays free, for the file system's own needs,
_MARGIN_BYTES = 64 << 20  # and at least this


@contextmanager
def naming(host: str, action: str) -> Iterator[None]:
    """Turn an OSError into a UserError that names the host and what could not be done there."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{host}: cannot {action}: {error.strerror or error}") from error


def make_folder_apart(folder: Path, source: Path, host: str) -> None:
    """Create `folder` on this node; a UserError says when that is or lies in the data set itself, or cannot be done."""
    if any(place.exists() and place.samefile(source) for place in (folder, folder.parent)):
        raise UserError(f"{folder} on {host} is the data set itself; give a directory on the node's own disk or memory")
    try:
        make_folder(folder)
        check_owner(folder.parent)
        check_owner(folder)
    except UserError as error:
        raise UserError(f"{host}: {error}") from error


def check_owner(folder: Path) -> None:
    """Raise UserError for a folder in which another user may have put, or may exchange, what this one is to read.

    On nodes that several users share, anybody can make a folder of the expected name in /tmp first. Folders of root,
    and those where nobody can exchange others' files (the sticky bit of /tmp), are all right.
    """
    try:
        status = folder.stat()
    except OSError as error:
        raise UserError(f"cannot look at {folder}: {error.strerror}") from error
    if status.st_uid not in (0, os.geteuid()) and not status.st_mode & stat.S_ISVTX:
        raise UserError(f"{folder} belongs to another user; give another directory")


def make_ready(folder: Path, manifest_text: bytes, host: str) -> None:
    """Make the existing `folder` a place for shards of this manifest, or raise UserError.

    What another data set's staging left there is removed, and so are the half-written files of killed runs. A
    directory that staging did not make is refused unless it is empty. To be called on one rank of a node. Raises
    OSError where the folder cannot be written.
    """
    digest = hashlib.sha256(manifest_text).hexdigest()
    if not (folder / MARKER_NAME).exists():
        own = (_TOKEN, f".{MARKER_NAME}.tmp-")  # of a run that was killed before it wrote the marker
        others = sorted(path.name for path in folder.iterdir() if not path.name.startswith(own))
        if others:
            raise UserError(
                f"{folder} on {host} holds {others[0]}, which staging did not put there; give an empty directory"
            )
    elif _marked(folder) != digest:
        for path in sorted(folder.iterdir(), key=lambda path: path.name == MARKER_NAME):  # the marker last
            path.unlink()
    remove_temporaries(folder)
    write_file(folder / MARKER_NAME, json.dumps({"manifest_sha256": digest}).encode())


def token_prefix(run: str) -> str:
    """The start of the names of the files by which nodes see whether they share a directory; `run` is used once."""
    return f"{_TOKEN}{run}-"


def refuse_shared(folder: Path, hosts: Sequence[str], number: int, run: str) -> None:
    """Raise UserError where two of the `hosts` see the same `folder`, and so find the tokens of both in it.

    To be called on one rank of each node when all of them have made `token_prefix(run)` + their number there. Removes
    this node's token, that of `hosts[number]`.
    """
    prefix = token_prefix(run)
    seen = sorted(int(name[len(prefix) :]) for name in os.listdir(folder) if name.startswith(prefix))
    (folder / f"{prefix}{number}").unlink(missing_ok=True)
    other = next((one for one in seen if one != number), None)
    if other is not None:
        raise UserError(
            f"{folder} is the same directory on {hosts[number]} and {hosts[other]}, so it is not node-local; give one "
            "on the nodes' own disks or memory, such as below /tmp or /dev/shm"
        )


def refuse_full(folder: Path, needed_bytes: int, host: str) -> None:
    """Raise UserError unless `needed_bytes` and a margin fit into the file system (or memory) behind `folder`."""
    if needed_bytes == 0:
        return
    free, of_what = free_bytes(folder)
    margin = max(_MARGIN_BYTES, int(needed_bytes * _MARGIN_SHARE))
    if needed_bytes + margin > free:
        raise UserError(
            f"{host}: {needed_bytes:,} bytes do not fit into {folder}, where {free:,} bytes{of_what} are free and "
            f"{margin:,} should stay so; stage fewer shards a node (more data.partitions, --split train), or "
            "elsewhere"
        )


def free_bytes(folder: Path) -> tuple[int, str]:
    """Return how many bytes may be written to `folder`, and " of memory" if the node has less of that than the tmpfs.

    A tmpfs may be larger than the memory that is left, and a job that fills it is killed.
    """
    status = os.statvfs(folder)
    has_no_limit = status.f_blocks == 0  # a tmpfs mounted with size=0, or a ramfs
    free = status.f_bavail * status.f_frsize
    if _file_system(folder.resolve()) in ("tmpfs", "ramfs"):
        available = _available_memory()
        if available is not None and (available < free or has_no_limit):
            return available, " of memory"
    return free, ""


def _marked(folder: Path) -> object:
    try:
        marker = json.loads((folder / MARKER_NAME).read_bytes())
    except ValueError:
        return None
    return marker.get("manifest_sha256") if isinstance(marker, dict) else None


def _file_system(folder: Path) -> str:
    """The type of the file system that holds `folder`, after /proc/mounts; "" when that does not tell."""
    try:
        lines = Path("/proc/mounts").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    found, length = "", -1
    for line in lines:
        _, point, kind, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        if folder.is_relative_to(point) and len(point) >= length:  # the last of equals is mounted over the others
            found, length = kind, len(point)
    return found


def _available_memory() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
