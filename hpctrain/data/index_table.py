"""The small arrays of the shards that a reader has needed so far, to look many records up at once."""

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.shard import INDEX_TYPES


class IndexTable:
    """The index arrays (`INDEX_TYPES`) of shards, one shard after the other in the order in which they were added.

    Looking up needs no lock, also while another thread adds a shard.
    """

    def __init__(self, num_shards: int) -> None:
        self._first_places = np.full(num_shards, -1, np.int64)
        self._arrays = {name: np.empty(0, code) for name, code in INDEX_TYPES.items()}
        self._used = 0
        self._lock = threading.Lock()

    def missing(self, shards: NDArray[np.int64]) -> list[int]:
        """Return those of `shards` that were not added yet."""
        return np.unique(shards[self._first_places[shards] < 0]).tolist()

    def add(self, shard: int, index: dict[str, NDArray[Any]]) -> None:
        """Take over the arrays of a shard, unless they are here."""
        with self._lock:
            if self._first_places[shard] >= 0:
                return
            first, end = self._used, self._used + len(index["offsets"])  # offsets are one more than records
            arrays = self._arrays
            if end > len(arrays["offsets"]):
                arrays = {name: np.concatenate([old[:first], np.empty(end, old.dtype)]) for name, old in arrays.items()}
            for name, values in index.items():
                arrays[name][first : first + len(values)] = values
            # In this order: who sees the place finds the arrays that have it. Arrays that were replaced stay right.
            self._arrays, self._used = arrays, end
            self._first_places[shard] = first

    def lookup(self, array: str, shards: NDArray[np.int64], records: NDArray[np.int64]) -> NDArray[Any]:
        """Return the numbers of `array` for records, given by their shards, which were added, and places in them."""
        places = self._first_places[shards] + records
        return self._arrays[array][places]
