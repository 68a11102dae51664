"""A time limit that holds even while the interpreter's lock is held."""

import subprocess
import sys
import time

import pytest

from hpctrain.parallel.deadline import ends_within

# ctypes.PyDLL keeps the lock during the call, as mpi4py does during MPI_Init.
HANGS = """
import ctypes
from hpctrain.parallel.deadline import ends_within
with ends_within({limit}, "too long"):
    ctypes.PyDLL(None).usleep(int({seconds} * 1e6))
print("done")
"""


def run(limit: float, seconds: float) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", HANGS.format(limit=limit, seconds=seconds)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_process_that_hangs_is_ended_with_the_message() -> None:
    started = time.monotonic()
    done = run(0.3, 30)
    assert (done.returncode, done.stdout, done.stderr) == (-9, "", "too long\n")
    assert time.monotonic() - started < 20


def test_in_time_nothing_happens_and_nothing_is_left() -> None:
    done = run(30, 0.01)  # would not return if a child held its output open
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_an_error_in_the_block_comes_through() -> None:
    with pytest.raises(KeyError), ends_within(30, ""):
        raise KeyError
