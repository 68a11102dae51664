"""Gradients laid out for the ranks of a host: what each finds of the others, beside sums in float64.

All ranks are this process, with as many threads where they wait for each other; training/test_host_weights.py has real
ones.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from hpctrain.native import host_summands, momentum

tf = pytest.importorskip("tensorflow")

SHAPES = [(3, 3, 17, 40), (1,), (70_001,), (16,), (0,)]


class Host:
    """Memory of some ranks, and gradients of each of them."""

    def __init__(self, ranks: int) -> None:
        random = np.random.default_rng(ranks)
        self.ranks = ranks
        self.weights = [random.standard_normal(shape).astype(np.float32) for shape in SHAPES]
        self.gradients = [[random.standard_normal(s).astype(np.float32) for s in SHAPES] for _ in range(ranks)]
        offsets = [24 * len(SHAPES)]
        for weight in self.weights:
            offsets.append(-(-(offsets[-1] + weight.nbytes) // 64) * 64)
        self.offsets = offsets[:-1]
        with tf.device("CPU:0"):
            self.memory = tf.Variable(tf.zeros(4096, tf.uint8))
            self.summands = tf.Variable(tf.fill([ranks * offsets[-1]], tf.constant(255, tf.uint8)))  # NaN everywhere

    def give(self, rank: int, gradients: list[Any]) -> list[bool]:
        """Return for each gradient whether it is finite."""
        module = host_summands()
        assert module is not None, "run `python -m hpctrain.native.build`"
        place = {"part": rank, "parts": self.ranks}
        return [
            bool(module.hpctrain_give_summands(self.summands.handle, gradient, offset=offset, **place))
            for gradient, offset in zip(gradients, self.offsets, strict=True)
        ]

    def sums(self) -> list[np.ndarray]:
        return [sum(g.astype(np.float64) for g in of_ranks) for of_ranks in zip(*self.gradients, strict=True)]


@pytest.mark.parametrize("ranks", [2, 3, 5, 8])
def test_an_update_of_each_part_adds_up_what_all_ranks_have(ranks: int) -> None:
    host = Host(ranks)
    for rank in range(ranks):
        assert all(host.give(rank, host.gradients[rank]))
    for i, (weight, total) in enumerate(zip(host.weights, host.sums(), strict=True)):
        found = []
        for rank in range(ranks):
            # Where the variable is a rank's own it needs the whole sum; of the others' parts it knows no more than NaN.
            variable, buffer = tf.Variable(weight), tf.Variable(tf.zeros_like(weight))
            momentum()(
                variable.handle,
                buffer.handle,
                host.gradients[rank][i],
                1.0,
                1.0,
                [],
                [host.summands.handle],
                summands_offset=host.offsets[i],
                part=rank,
                parts=ranks,
                momentum=0.0,
                decay=0.0,
                nesterov=False,
            )
            found.append(variable.numpy())
        right = np.isfinite(found)
        assert (right.sum(0) == 1).all()  # each number is in one rank's part
        np.testing.assert_allclose(np.nansum(found, 0), weight - total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_squares_are_those_of_the_sums_and_the_same_on_all_ranks(ranks: int) -> None:
    host = Host(ranks)
    for rank in range(ranks):
        host.give(rank, host.gradients[rank])

    def squares(rank: int) -> np.ndarray:
        return (
            host_summands()
            .hpctrain_host_squares(
                host.memory.handle,
                host.summands.handle,
                host.gradients[rank],
                host.weights,
                offsets=host.offsets,
                part=rank,
                parts=ranks,
            )
            .numpy()
        )

    with ThreadPoolExecutor(ranks) as threads:
        found = list(threads.map(squares, range(ranks)))
    assert all((one == found[0]).all() for one in found)
    wide = [(total, weight.astype(np.float64)) for total, weight in zip(host.sums(), host.weights, strict=True)]
    expected = [[np.sum(g * g) for g, _ in wide], [np.sum(w * w) for _, w in wide], [np.sum(g * w) for g, w in wide]]
    np.testing.assert_allclose(found[0], expected, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 35_000, 70_000])
def test_numbers_that_are_not_finite_are_noticed_wherever_they_are(bad: float, place: int) -> None:
    host = Host(2)
    for rank in range(2):
        gradients = [gradient.copy() for gradient in host.gradients[rank]]
        gradients[2][place] = bad
        assert host.give(rank, gradients) == [True, True, False, True, True]


def test_what_does_not_fit_is_refused() -> None:
    host = Host(2)
    with pytest.raises(tf.errors.InvalidArgumentError, match="no room"):
        host_summands().hpctrain_give_summands(
            host.summands.handle, np.zeros(10_000_000, np.float32), offset=0, part=0, parts=2
        )
