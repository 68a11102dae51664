"""Opening a shard that may come from somebody else: only a file of its own folder, and without waiting for anything."""

import errno
import os
import stat
from pathlib import Path

from hpctrain.data.shard import DataError


def open_shard(path: Path) -> int:
    """Open a shard for reading and return the descriptor.

    Raises DataError for what is no file, and for a symbolic link that leads out of the shard's folder: a data set is
    copied, shared and unpacked by many, and must not make anyone read another's files. Raises OSError as os.open does.
    """
    # Without O_NONBLOCK the opening of a pipe would wait for somebody who writes into it.
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        target = Path(os.path.realpath(path))
        if not target.is_relative_to(os.path.realpath(path.parent)):
            raise DataError(
                f"shard {path} is a link that leads out of its folder; put the file itself there, or link the folder"
            ) from None
        descriptor = os.open(target, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise DataError(f"shard {path} is no file; copy it again or prepare the data again")
    os.set_blocking(descriptor, True)
    return descriptor


def printable(text: str) -> str:
    """Return a text with escapes for what a terminal would obey or not show, and for bytes that are no UTF-8."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
