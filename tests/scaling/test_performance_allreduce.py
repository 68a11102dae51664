"""The cost of an allreduce is what one adds up by hand, message for message."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.scaling.performance.allreduce import (
    ALGORITHMS,
    Link,
    Network,
    allreduce_seconds,
    best_algorithm,
    halving_doubling,
    recursive_doubling,
    ring,
    rounds_seconds,
    scatter_gather,
)

ONE = Link(Fraction(1), Fraction(1, 100), Fraction(1, 1000))  # type: ignore[arg-type]
FLAT = Network(ONE, ONE)


def seconds(algorithm: str, ranks: int, num_bytes: int, network: Network = FLAT) -> float:
    return allreduce_seconds(algorithm, ranks, Fraction(num_bytes), network)  # type: ignore[arg-type]


def test_a_ring_of_four_by_hand() -> None:
    # 1,000 bytes in 4 pieces of 250. Reduce-scatter: 3 messages of 1 + 250/100, and 3 times 250 bytes added, 250/1000.
    # Allgather: 3 more messages. 3 (1 + 2.5 + 0.25) + 3 (1 + 2.5) = 11.25 + 10.5
    assert seconds("ring", 4, 1000) == Fraction(87, 4)


def test_a_ring_in_floats_is_exact_too() -> None:
    link = Link(1.0, 1 / 64, 1 / 1024)  # powers of two: no rounding anywhere
    assert allreduce_seconds("ring", 4, 1024, Network(link, link)) == 6 * (1 + 256 / 64) + 3 * 256 / 1024


def test_doubling_and_halving_of_four_by_hand() -> None:
    # Two exchanges of everything: 2 (1 + 10 + 1)
    assert seconds("recursive_doubling", 4, 1000) == 24
    # 500 and 250 bytes there and back, the first two added: (1 + 5 + 0.5) + (1 + 2.5 + 0.25) + (1 + 2.5) + (1 + 5)
    assert seconds("halving_doubling", 4, 1000) == Fraction(79, 4)


def test_five_ranks_fold_one_away_first() -> None:
    # Doubling: the fifth gives everything to a neighbor (1 + 10 + 1) and gets the result (1 + 10), four do as above.
    assert seconds("recursive_doubling", 5, 1000) == 24 + 12 + 11
    # Rabenseifner: halves exchanged and added (1 + 5 + 0.5), one half given back (1 + 5), in the end all (1 + 10).
    assert seconds("halving_doubling", 5, 1000) == Fraction(79, 4) + Fraction(13, 2) + 6 + 11


@given(st.integers(1, 12), st.integers(1, 10**9))
def test_powers_of_two_follow_the_closed_forms(log_ranks: int, num_bytes: int) -> None:
    ranks, n = 2**log_ranks, Fraction(num_bytes)
    a, b, c = Fraction(1), Fraction(1, 100), Fraction(1, 1000)
    share = Fraction(ranks - 1, ranks)
    assert seconds("ring", ranks, num_bytes) == 2 * (ranks - 1) * a + 2 * share * n * b + share * n * c
    assert seconds("recursive_doubling", ranks, num_bytes) == log_ranks * (a + n * b + n * c)
    assert seconds("halving_doubling", ranks, num_bytes) == 2 * log_ranks * a + 2 * share * n * b + share * n * c


@given(st.integers(2, 3000), st.integers(1, 10**8))
def test_nothing_beats_the_bandwidth_bound(ranks: int, num_bytes: int) -> None:
    """No allreduce sends fewer than 2 (P-1)/P n bytes a rank (Patarasuk and Yuan 2009, theorem 1)."""
    bound = 2 * Fraction(ranks - 1, ranks) * num_bytes
    for rounds in (ring(ranks, Fraction(num_bytes)), halving_doubling(ranks, Fraction(num_bytes))):
        assert sum(each.count * each.sent_bytes for each in rounds) >= bound
    assert sum(each.count * each.sent_bytes for each in recursive_doubling(ranks, Fraction(num_bytes))) >= bound


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_rank_has_nothing_to_do(algorithm: str) -> None:
    assert seconds(algorithm, 1, 1000) == 0
    assert scatter_gather(1, 1000) == ()


def test_compression_sends_half_the_bytes_of_a_ring_and_adds_as_many() -> None:
    plain, compressed = ring(4, Fraction(1000)), scatter_gather(4, Fraction(1000))
    assert sum(r.count * r.sent_bytes for r in plain) == 2 * sum(r.count * r.sent_bytes for r in compressed)
    assert sum(r.count * r.reduced_bytes for r in plain) == sum(r.count * r.reduced_bytes for r in compressed)


FAST = Link(Fraction(0), Fraction(1, 10**6), Fraction(0))  # type: ignore[arg-type]


def test_a_ring_leaves_a_node_once_but_an_exchange_with_all_its_ranks() -> None:
    network = Network(ONE, FAST, 4)
    # 8 ranks, 2 nodes: every step of the ring waits for the hop between nodes.
    assert seconds("ring", 8, 800, network) == seconds("ring", 8, 800)
    # Halving over distances 1 and 2 stays in the node; over 4 all four ranks share the link, 100 bytes each.
    within = 2 * (400 + 200) * Fraction(1, 10**6)
    assert seconds("halving_doubling", 8, 800, network) == within + 2 * (1 + 4) + Fraction(100, 1000)


def test_hierarchical_sends_each_node_s_bytes_once() -> None:
    network = Network(ONE, FAST, 4)
    # In the node a ring of 4: 3 steps of 200 bytes there, 3 back. Between 2 nodes 200 bytes of each of the 4 ranks,
    # which share the link: one exchange of all of it is 1 + 200 * 4 / 100 + 0.2, less than halves twice.
    within = 6 * 200 * Fraction(1, 10**6)
    assert seconds("hierarchical", 8, 800, network) == within + 1 + 8 + Fraction(1, 5)


def test_nodes_of_one_rank_make_hierarchical_the_best_of_the_others() -> None:
    name, best = best_algorithm(16, 4e6, FLAT)
    assert seconds("hierarchical", 16, 4_000_000) == pytest.approx(best)
    assert best == pytest.approx(min(seconds(a, 16, 4_000_000) for a in ALGORITHMS))
    assert allreduce_seconds("best", 16, 4e6, FLAT) == best and name in ALGORITHMS


def test_latency_chooses_doubling_and_bandwidth_does_not() -> None:
    link = Link(1e-6, 1e-10, 1e-10)
    network = Network(link, link)
    assert best_algorithm(1024, 8, network)[0] == "recursive_doubling"
    assert best_algorithm(1024, 1e8, network)[0] == "halving_doubling"
    assert rounds_seconds(ring(1000, 1e9), 1000, network) < allreduce_seconds("halving_doubling", 1000, 1e9, network)
