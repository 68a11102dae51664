"""Stateless random numbers: a value is a hash of what it belongs to, never of what was drawn before it.

The sample order and the augmentation draw from these, so that they are the same on any number of ranks, after any
resume, and in years to come: NumPy does not promise that its generators keep their streams between versions.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1 = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_2 = np.uint64(0x94D049BB133111EB)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * _MULTIPLY_1
    x = (x ^ (x >> np.uint64(27))) * _MULTIPLY_2
    return x ^ (x >> np.uint64(31))


def hash64(*words: ArrayLike) -> NDArray[np.uint64]:
    """Hash integers, elementwise and broadcast against each other, to uniform 64-bit values.

    `hash64(seed, epoch, np.arange(n))` gives n values of dtype uint64. Any integer type does; negative numbers are
    taken modulo 2**64. The order of the words matters.
    """
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is what is wanted
        for word in words:
            value = np.asarray(word)
            if value.dtype != np.uint64:
                value = value.astype(np.int64).astype(np.uint64)
            state = _mix(state * _MULTIPLY_2 + _GOLDEN + value)
        return _mix(state + _GOLDEN)


def uniform(*words: ArrayLike) -> NDArray[np.float64]:
    """Like `hash64`, as float64 in [0, 1) with 53 random bits."""
    return (hash64(*words) >> np.uint64(11)).astype(np.float64) * 2.0**-53
