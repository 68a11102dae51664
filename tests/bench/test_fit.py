"""The formula of a ring allreduce and the fit of its parameters, on times that are made from known ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.bench.fit import bus_bandwidth, fit_ring, ring_seconds, solve_non_negative

SIZES = [2**12, 2**16, 2**20, 2**24, 2**26, 2**28]


def test_a_ring_by_hand() -> None:
    """4 ranks, 4,000 bytes: 6 messages of 1,000 bytes one after the other, and 3 times 1,000 bytes to add."""
    assert ring_seconds(4000, 4, alpha=2.0, beta=0.5, gamma=0.25) == 6 * (2.0 + 1000 * 0.5) + 3 * 1000 * 0.25


def test_bus_bandwidth_of_two_ranks_is_bytes_by_seconds() -> None:
    assert bus_bandwidth(1e9, 0.5, 2) == 2e9
    assert bus_bandwidth(1e9, 0.5, 4) == 3e9


@given(
    st.integers(2, 4096),
    st.floats(1e-7, 1e-3),
    st.floats(1e-11, 1e-8),
    st.floats(0.3, 3),
    st.floats(0, 1e-9),
    st.floats(1e-5, 1e-2),
)
def test_the_fit_finds_what_the_times_were_made_from(
    ranks: int, alpha: float, beta: float, faster: float, gamma: float, overhead: float
) -> None:
    mpi = [ring_seconds(size, ranks, alpha, beta * faster, gamma) for size in SIZES]
    horovod = [ring_seconds(size, ranks, alpha, beta, gamma) + overhead for size in SIZES]
    fit = fit_ring(SIZES, ranks, mpi, horovod, gamma)
    assert fit.alpha_seconds == pytest.approx(alpha, rel=1e-3)
    assert fit.beta_seconds_per_byte == pytest.approx(beta, rel=1e-3)
    assert fit.mpi_beta_seconds_per_byte == pytest.approx(beta * faster, rel=1e-3)
    assert fit.horovod_overhead_seconds == pytest.approx(overhead, rel=1e-3)
    assert fit.relative_error < 1e-6
    assert fit.gamma_seconds_per_byte == gamma


@given(st.integers(2, 64), st.floats(1e-7, 1e-3), st.floats(1e-11, 1e-8), st.floats(0, 1e-9))
def test_without_horovod_the_parameters_are_mpis(ranks: int, alpha: float, beta: float, gamma: float) -> None:
    times = [ring_seconds(size, ranks, alpha, beta, gamma) for size in SIZES]
    fit = fit_ring(SIZES, ranks, times, None, gamma)
    assert fit.alpha_seconds == pytest.approx(alpha, rel=1e-3)
    assert fit.beta_seconds_per_byte == fit.mpi_beta_seconds_per_byte == pytest.approx(beta, rel=1e-3)
    assert fit.horovod_overhead_seconds == 0


@given(st.lists(st.floats(1e-6, 10), min_size=6, max_size=6), st.lists(st.floats(1e-6, 10), min_size=6, max_size=6))
def test_no_parameter_is_negative_whatever_was_measured(mpi: list[float], horovod: list[float]) -> None:
    fit = fit_ring(SIZES, 8, mpi, horovod, 1e-10)
    assert min(fit.alpha_seconds, fit.beta_seconds_per_byte, fit.horovod_overhead_seconds) >= 0
    assert fit.mpi_beta_seconds_per_byte >= 0


@given(st.lists(st.floats(-5, 5), min_size=12, max_size=12), st.lists(st.floats(-5, 5), min_size=4, max_size=4))
def test_the_solution_is_not_beaten_by_its_neighbors(numbers: list[float], target: list[float]) -> None:
    matrix, goal = np.array(numbers).reshape(4, 3), np.array(target)
    best = np.array(solve_non_negative(matrix, goal))
    error = np.linalg.norm(matrix @ best - goal)
    for step in (*np.eye(3), *-np.eye(3)):
        neighbor = np.maximum(best + 0.05 * step, 0)
        assert error <= np.linalg.norm(matrix @ neighbor - goal) + 1e-6
