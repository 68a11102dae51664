"""Starting TensorFlow without the lines that each of a thousand ranks would print."""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

# TensorFlow says these before any log level of its own takes effect.
_CHATTER = re.compile(
    rb"^(WARNING: All log messages before absl::InitializeLog.*|[IW]0000 .*|To enable the following instructions:.*)$"
)


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


def import_tensorflow() -> None:
    """Import TensorFlow without its chatter."""
    with without_chatter():
        import tensorflow  # noqa: F401
