"""How fast this process computes and copies memory. Short, and the same work everywhere, so that ranks compare."""

import statistics
import time
from collections.abc import Callable

GEMM_SIZE = 1024
GEMM_FLOPS = 2 * GEMM_SIZE**3
_COPY_BYTES = 64 << 20  # source and target together are larger than the part of a cache that one rank has
_FEWEST = 3


def gemm_seconds(limit_seconds: float = 0.5) -> float:
    """Return the seconds of one product of two float32[1024, 1024] matrices with NumPy's threads.

    The median of all that fit into the limit: a core that somebody else uses half of the time shows as such.
    """
    import numpy as np

    random = np.random.default_rng(0)
    left, right = (random.random((GEMM_SIZE, GEMM_SIZE), np.float32) for _ in range(2))
    out = np.empty_like(left)
    return _median_seconds(lambda: np.matmul(left, right, out=out), limit_seconds)


def copy_bytes_per_second(limit_seconds: float = 0.3) -> float:
    """Return the bytes read and written a second when one thread copies 64 MiB, the median of several copies."""
    import numpy as np

    source, target = np.ones(_COPY_BYTES, np.uint8), np.zeros(_COPY_BYTES, np.uint8)
    return 2 * _COPY_BYTES / _median_seconds(lambda: np.copyto(target, source), limit_seconds)


def _median_seconds(work: Callable[[], object], limit_seconds: float) -> float:
    work()  # starts threads, touches pages
    taken: list[float] = []
    end = time.perf_counter() + limit_seconds
    while len(taken) < _FEWEST or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
