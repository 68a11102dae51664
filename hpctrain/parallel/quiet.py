"""Starting TensorFlow without the lines that each of a thousand ranks would print, and without needless work."""

import gc
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

# TensorFlow says these before any log level of its own takes effect.
_CHATTER = re.compile(
    rb"^(WARNING: All log messages before absl::InitializeLog.*|[IW]0000 .*|To enable the following instructions:.*)$"
)

# Keras loads these where they are installed, for its plots, scikit-learn wrappers and old image generators: with
# what they load, 900 of 3,800 modules and 95 MB of each rank. A model that wants them itself still gets them.
_OPTIONAL_FOR_KERAS = ("matplotlib", "scipy", "sklearn")


@contextmanager
def without_chatter() -> Iterator[None]:
    """Hold back what is written to stderr, then let through only those lines that tell something.

    For the import of TensorFlow and for its first operation.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            captured.seek(0)
            os.write(2, b"".join(line for line in captured if not _CHATTER.match(line)))


@contextmanager
def without_modules(names: Iterable[str]) -> Iterator[None]:
    """Let imports of these modules fail in the block, as if they were not installed, unless they are loaded already."""
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None is Python's own sign for it
    try:
        yield
    finally:
        for name in absent:
            sys.modules.pop(name, None)


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Do not look for cyclic garbage in the block, nor ever among what is there at its end.

    For what makes many objects that stay: imports and graphs. The search would go through all of them again and again,
    later too, while the other ranks wait.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def import_tensorflow() -> None:
    """Import TensorFlow and Keras without their chatter, and without what no rank needs of them."""
    with without_chatter(), without_modules(_OPTIONAL_FOR_KERAS), no_garbage_collection():
        import tensorflow  # noqa: F401, I001 - which loads Keras itself, in some versions only when it is first used
        import keras  # noqa: F401
