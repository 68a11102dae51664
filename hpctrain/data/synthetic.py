"""Data made from nothing, for benchmarks and dry runs: a few fixed micro-batches, handed out again and again."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf

_POOL = 4  # different micro-batches; more would only cost memory


def synthetic_batches(
    *,
    micro_batch: int,
    image_size: int,
    num_classes: int,
    seed: int,
    first: int = 0,
    micro_batches: int = 1,
    stride: int = 1,
) -> Iterator[tuple[Any, Any]]:
    """Yield (images float32[micro_batch, S, S, 3], labels int32[micro_batch]) without end.

    Micro-batch number n of the run (counted over all ranks) always has the same content. A rank gets `micro_batches`
    of them from number `first` on, then those `stride` further on, and so forth: its share of each global batch.
    """
    pool = [_make(seed + i, micro_batch, image_size, num_classes) for i in range(_POOL)]
    number = first
    while True:
        for i in range(micro_batches):
            yield pool[(number + i) % _POOL]
        number += stride


def _make(seed: int, micro_batch: int, image_size: int, num_classes: int) -> tuple[Any, Any]:
    random = np.random.default_rng(seed)
    images = random.standard_normal((micro_batch, image_size, image_size, 3), np.float32)
    labels = random.integers(num_classes, size=micro_batch, dtype=np.int32)
    return tf.constant(images), tf.constant(labels)
