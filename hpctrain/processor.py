"""What the kernel says of this machine's processor."""

import functools
import platform
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16"}  # x86, x86, ARM


def name() -> str:
    """Return the processor's name, or else the machine's kind, such as `x86_64`."""
    return _value("model name", "cpu\t") or platform.machine()


@functools.cache
def has_bfloat16() -> bool:
    """Return whether it has instructions for products of bfloat16; where nothing is known, False."""
    return not _BFLOAT16.isdisjoint(instructions())


@functools.cache
def has_amx() -> bool:
    """Return whether it has instructions for products of matrices of bfloat16."""
    return "amx_bf16" in instructions()


def instructions() -> list[str]:
    """Return the kernel's names of the instruction sets it has, such as `avx512f`."""
    return _value("flags", "Features").split()


def _value(*keys: str) -> str:
    """Return the first value of a line that starts with one of the keys; "" if there is none."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(keys)), "")
