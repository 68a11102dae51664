"""The cost of a ring allreduce, and its parameters from measured times: pure arithmetic.

On P ranks a ring allreduce of n bytes sends 2 (P-1) messages of n / P bytes a rank, and adds n / P bytes P-1 times:

    seconds(n) = 2 (P-1) alpha + 2 (P-1)/P n beta + (P-1)/P n gamma

alpha is the latency of a message, beta the time a byte takes on the wire, gamma the time to add a byte to another.
Source: Thakur, Rabenseifner, Gropp, "Optimization of Collective Communication Operations in MPICH", 2005, sections 3
and 4; the ring itself: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms", 2009.
"""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class RingFit:
    """Parameters of the formula above. Seconds, and seconds a byte."""

    alpha_seconds: float
    beta_seconds_per_byte: float  # of Horovod's path, which is the trainer's; of raw MPI where that alone was measured
    gamma_seconds_per_byte: float
    horovod_overhead_seconds: float  # what Horovod adds to an allreduce of any size
    mpi_beta_seconds_per_byte: float
    relative_error: float  # median over sizes of the path that beta is of


def ring_seconds(num_bytes: float, ranks: int, alpha: float, beta: float, gamma: float) -> float:
    """Return the time of a ring allreduce of `num_bytes` by the formula above."""
    share = (ranks - 1) / ranks
    return 2 * (ranks - 1) * alpha + 2 * share * num_bytes * beta + share * num_bytes * gamma


def bus_bandwidth(num_bytes: float, seconds: float, ranks: int) -> float:
    """Return bytes a second: the link rate that a bandwidth-optimal allreduce of that time needs, on any ranks.

    Source: NVIDIA nccl-tests, doc/PERFORMANCE.md, "busbw" of allreduce.
    """
    return num_bytes / seconds * 2 * (ranks - 1) / ranks


def fit_ring(
    sizes_bytes: Sequence[int],
    ranks: int,
    mpi_seconds: Sequence[float],
    horovod_seconds: Sequence[float] | None,
    gamma_seconds_per_byte: float,
) -> RingFit:
    """Return the parameters, none negative, that make the sum of squared relative errors smallest.

    Raw MPI and Horovod share alpha; each has its own beta, as Horovod's buffers take time by the byte; Horovod has a
    constant besides. gamma is given: beta and gamma both multiply n, so times alone cannot tell them apart.
    """
    share = (ranks - 1) / ranks
    rows, targets = [], []
    for path, times in enumerate((mpi_seconds, horovod_seconds or ())):
        for num_bytes, seconds in zip(sizes_bytes, times, strict=bool(times)):
            betas = [0.0, 0.0]
            betas[path] = 2 * share * num_bytes
            row = [2 * (ranks - 1), *betas, float(path == 1)]
            rows.append([value / seconds for value in row])
            targets.append((seconds - share * num_bytes * gamma_seconds_per_byte) / seconds)
    alpha, mpi_beta, horovod_beta, overhead = solve_non_negative(np.array(rows), np.array(targets))
    measured, beta = (horovod_seconds, horovod_beta) if horovod_seconds else (mpi_seconds, mpi_beta)
    errors = [
        abs(ring_seconds(num_bytes, ranks, alpha, beta, gamma_seconds_per_byte) + overhead - seconds) / seconds
        for num_bytes, seconds in zip(sizes_bytes, measured, strict=True)
    ]
    return RingFit(alpha, beta, gamma_seconds_per_byte, overhead, mpi_beta, statistics.median(errors))


def solve_non_negative(matrix: np.ndarray, target: np.ndarray) -> list[float]:
    """Return the x >= 0 that makes |matrix @ x - target| smallest, for a handful of unknowns.

    In the solution some unknowns are zero and the others solve the plain least squares problem, so all choices of
    which are zero are tried. Columns are scaled first: theirs differ by many powers of ten here.
    """
    columns = matrix.shape[1]
    scale = np.linalg.norm(matrix, axis=0)
    used = [column for column in range(columns) if scale[column] > 0]
    best, best_error = np.zeros(columns), float(np.linalg.norm(target))
    for count in range(1, len(used) + 1):
        for chosen in map(list, itertools.combinations(used, count)):
            solution = np.linalg.lstsq(matrix[:, chosen] / scale[chosen], target, rcond=None)[0] / scale[chosen]
            error = float(np.linalg.norm(matrix[:, chosen] @ solution - target))
            if np.all(solution >= 0) and error < best_error:
                best, best_error = np.zeros(columns), error
                best[chosen] = solution
    return [float(value) for value in best]
