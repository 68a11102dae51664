"""How the C library keeps memory for the large buffers of the input pipeline."""

import ctypes
import functools

# From <malloc.h>; mallopt takes these numbers on every Linux with glibc.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3
_MMAP_THRESHOLD_BYTES = 32 << 20  # the most that glibc takes
_TRIM_THRESHOLD_BYTES = 256 << 20
_TOP_PAD_BYTES = 64 << 20


@functools.cache
def keep_freed_memory() -> None:
    """Let the process keep the memory of buffers that it frees, for the next ones.

    Otherwise a batch of images is memory that the kernel has to map and clear page by page, each time. TensorFlow sets
    the threshold above which freed memory is given back to 128 KiB when it starts a dataset's generator, so this is
    called from inside of one. Does nothing where the C library is not glibc.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return
    libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
    libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)
    libc.mallopt(_M_TOP_PAD, _TOP_PAD_BYTES)
