"""Memory of large buffers is kept for the next ones instead of being mapped anew."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource, sys
from hpctrain.data.heap import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.mallopt(-1, 128 << 10)  # as TensorFlow does
if sys.argv[1] == "keep":
    keep_freed_memory()
num_bytes = 20 << 20
def use():
    buffer = libc.malloc(num_bytes)
    ctypes.memset(buffer, 1, num_bytes)
    libc.free(buffer)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc can be told to")
def test_freed_memory_is_used_again() -> None:
    def page_faults(how: str) -> int:
        output = subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True).stdout
        return int(output)

    assert page_faults("keep") < 50 < page_faults("leave")
