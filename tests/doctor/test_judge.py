"""Naming the odd one: nobody among equals, the slow one among few and many."""

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.doctor.judge import odd_ones, rounds_of_pairs, slow_in_pairs, unlike
from hpctrain.doctor.names import fold_hosts, fold_numbers

SIZES = [2, 3, 4, 7, 8, 64, 2048]


@pytest.mark.parametrize("size", [0, 1, *SIZES])
def test_equal_values_name_nobody(size: int) -> None:
    assert odd_ones([0.25] * size) == []


@given(st.sampled_from(SIZES), st.integers(0, 10_000), st.data())
def test_one_slow_is_named_and_noise_is_not(size: int, seed: int, data: st.DataObject) -> None:
    noise = random.Random(seed)
    costs: list[float | None] = [0.02 * noise.uniform(0.9, 1.1) for _ in range(size)]
    assert odd_ones(costs) == []
    slow = data.draw(st.integers(0, size - 1))
    costs[slow] = 0.02 * 2
    assert odd_ones(costs) == [slow]


@given(st.integers(0, 10_000))
def test_several_slow_ones_do_not_hide_each_other(seed: int) -> None:
    noise = random.Random(seed)
    costs = [noise.uniform(0.9, 1.1) for _ in range(100)]
    slow = noise.sample(range(100), 20)
    for position, i in enumerate(slow):
        costs[i] = 3.0 + position
    assert odd_ones(costs) == slow[::-1], "the slowest first"


@given(st.lists(st.floats(1e-6, 1e3), max_size=40), st.floats(1e-3, 1e3))
def test_the_unit_does_not_matter(costs: list[float], unit: float) -> None:
    named = odd_ones(costs)
    assert len(named) <= len(costs) / 2
    # Two ways of rounding may differ on a value that is at the limit itself.
    limit = min((costs[i] for i in named), default=math.inf)
    rescaled = odd_ones([cost * unit for cost in costs])
    assert {i for i in rescaled if costs[i] > limit * 1.001} == {i for i in named if costs[i] > limit * 1.001}


def test_two_are_told_apart_only_if_clearly_different() -> None:
    assert odd_ones([1.0, 1.4]) == []
    assert odd_ones([1.0, 1.6]) == [1]
    assert odd_ones([5.0, 1.0]) == [0]


def test_what_was_not_measured_is_left_out() -> None:
    assert odd_ones([None, 1.0, math.nan, 1.0, 1.0, 9.0]) == [5]
    assert odd_ones([None, 3.0]) == []


@given(st.integers(2, 70), st.integers(1, 12))
def test_pairs_meet_once_and_everybody_takes_part(members: int, most: int) -> None:
    rounds = rounds_of_pairs(members, most)
    assert 1 <= len(rounds) <= most
    for pairs in rounds:
        taking_part = [member for pair in pairs for member in pair]
        assert len(set(taking_part)) == len(taking_part) == members - members % 2
    everything = [pair for pairs in rounds for pair in pairs]
    assert len(set(everything)) == len(everything)
    if most >= members:
        assert len(everything) == members * (members - 1) // 2


def test_thousands_of_hosts_take_as_many_rounds_as_tens() -> None:
    assert [len(rounds_of_pairs(n, 8)) for n in (1, 16, 2048, 9408)] == [0, 8, 8, 8]


@given(st.sampled_from([3, 4, 5, 16, 65, 300]), st.integers(0, 1000), st.data())
def test_a_host_that_is_slow_in_its_pairs_is_named_and_its_partners_are_not(
    size: int, seed: int, data: st.DataObject
) -> None:
    noise = random.Random(seed)
    bad = data.draw(st.integers(0, size - 1))
    seconds = {pair: noise.uniform(0.95, 1.05) for pairs in rounds_of_pairs(size, 8) for pair in pairs}
    assert slow_in_pairs(seconds) == ([], [])
    slow = {pair: value * (3 if bad in pair else 1) for pair, value in seconds.items()}
    assert slow_in_pairs(slow) == ([bad], [])


def test_a_slow_link_between_good_hosts_is_named_as_a_link() -> None:
    seconds = {pair: 1.0 for pairs in rounds_of_pairs(16, 8) for pair in pairs}
    link = next(iter(seconds))
    assert slow_in_pairs({**seconds, link: 5.0}) == ([], [link])


def test_of_two_hosts_nobody_is_to_blame_for_their_link() -> None:
    assert slow_in_pairs({(0, 1): 9.0}) == ([], [])
    assert slow_in_pairs({}) == ([], [])


def test_unlike_names_the_minority() -> None:
    assert unlike(["3.14"] * 5) == ("3.14", {})
    assert unlike(["3.14", "3.15", "3.15", "3.13"]) == ("3.15", {"3.14": [0], "3.13": [3]})
    assert unlike(["old", "new"]) == ("old", {"new": [1]}), "of two, rank 0 is what the other is compared with"


def test_names_are_folded() -> None:
    assert fold_numbers([3, 1, 2, 0, 7]) == "0-3,7"
    assert fold_hosts([f"a{i:03d}" for i in range(1, 513)]) == "a[001-512]"
    assert fold_hosts(["n9", "n10", "n11", "login"]) == "login, n[10-11], n9"
    assert fold_hosts(["c1-001", "c1-002", "c2-001", "c1-009"]) == "c1-[001-002,009], c2-001"


@given(st.sets(st.integers(0, 300), min_size=1))
def test_folded_numbers_can_be_read_back(numbers: set[int]) -> None:
    parts = [part.split("-") for part in fold_numbers(sorted(numbers)).split(",")]
    assert {n for part in parts for n in range(int(part[0]), int(part[-1]) + 1)} == numbers
    assert all(int(b[0]) > int(a[-1]) + 1 for a, b in pairwise(parts))
