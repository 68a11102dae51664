"""Files that appear complete or not at all."""

import contextlib
import itertools
import os
from pathlib import Path

from hpctrain.errors import UserError

_TEMPORARY = ".tmp-"
_counter = itertools.count()


def temporary_path(path: Path) -> Path:
    """Return a hidden name beside `path` that no other process on this host uses."""
    return path.with_name(f".{path.name}{_TEMPORARY}{os.uname().nodename}-{os.getpid()}-{next(_counter)}")


def publish(temporary: Path, path: Path) -> None:
    """Make a finished temporary file durable and give it its name."""
    descriptor = os.open(temporary, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError:
        pass  # some file systems cannot sync a folder; the rename itself is still atomic
    finally:
        os.close(folder)


def write_file(path: Path, content: bytes) -> None:
    """Write a whole file at once, or leave what was there before."""
    temporary = temporary_path(path)
    try:
        temporary.write_bytes(content)
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_temporaries(folder: Path) -> int:
    """Remove what an interrupted run left half-written in `folder`; return how many files that was."""
    leftovers = [path for path in sorted(folder.iterdir()) if path.name.startswith(".") and _TEMPORARY in path.name]
    for path in leftovers:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    return len(leftovers)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents; a UserError says why it cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the folder {folder}: {error.strerror}; give another one") from error
