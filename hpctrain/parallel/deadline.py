"""A time limit for what keeps the interpreter to itself, such as MPI's start."""

import contextlib
import os
import select
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def ends_within(seconds: float, message: str) -> Iterator[None]:
    """Print `message` on stderr and kill this process if the block takes longer.

    A thread could not: mpi4py keeps Python's lock during MPI_Init, where a rank may wait for ever for one that never
    comes up. So a child process watches, which is forked before anything big is loaded and ends with the block.
    """
    watched = os.getpid()
    end, keep = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            os.close(keep)
            if not select.select([end], [], [], seconds)[0]:  # readable once the other end is closed, also by a death
                os.write(2, f"{message}\n".encode())
                os.kill(watched, signal.SIGKILL)
        os._exit(0)
    os.close(end)
    try:
        yield
    finally:
        os.close(keep)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)
