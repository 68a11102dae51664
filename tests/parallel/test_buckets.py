"""Which gradients are reduced together, and in which order micro-batches are added."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.parallel.buckets import assign_buckets, merge_plan


@given(st.lists(st.integers(0, 50), max_size=40), st.floats(1, 120))
def test_buckets_partition_the_tensors_from_the_last_to_the_first(sizes: list[int], bucket_bytes: float) -> None:
    buckets = assign_buckets(sizes, bucket_bytes)
    assert [i for bucket in buckets for i in bucket] == list(reversed(range(len(sizes))))
    assert all(buckets)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.floats(1, 120))
def test_buckets_are_full_but_not_too_full(sizes: list[int], bucket_bytes: float) -> None:
    totals = [[sizes[i] for i in bucket] for bucket in assign_buckets(sizes, bucket_bytes)]
    assert all(sum(total) <= bucket_bytes or len(total) == 1 for total in totals)
    for bucket, following in pairwise(totals):
        assert sum(bucket) + following[0] > bucket_bytes


def test_buckets_of_a_small_network() -> None:
    assert assign_buckets([4, 4, 100, 4, 4, 4], 10) == [[5, 4], [3], [2], [1, 0]]
    assert assign_buckets([], 10) == []


def add_up(summands: list[str], plan: list[int]) -> str:
    """Run the stack machine on names instead of numbers: the result shows who was added to whom."""
    stack: list[str] = []
    for summand, merges in zip(summands, plan, strict=True):
        stack.append(summand)
        for _ in range(merges):
            right = stack.pop()
            stack[-1] = f"({stack[-1]}+{right})"
    (total,) = stack
    return total


def over_ranks(sums: list[str]) -> str:
    """How recursive doubling adds a power of two of ranks: neighbors first."""
    while len(sums) > 1:
        sums = [f"({left}+{right})" for left, right in zip(sums[::2], sums[1::2], strict=True)]
    return sums[0]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("micro_batches", [1, 2, 3, 4, 5, 6, 7, 8, 12, 20, 64])
def test_the_tree_goes_on_over_the_ranks(ranks: int, micro_batches: int) -> None:
    """Bit-for-bit equality on 1, 2, 4, ... ranks: the very same expression, whoever works out which part."""
    names = [str(i) for i in range(ranks * micro_batches)]
    plan = merge_plan(micro_batches, tree=True)
    parts = [add_up(names[r * micro_batches : (r + 1) * micro_batches], plan) for r in range(ranks)]
    assert over_ranks(parts) == add_up(names, merge_plan(len(names), tree=True))


def test_the_tree_is_balanced() -> None:
    assert add_up(list("abcdefgh"), merge_plan(8, tree=True)) == "(((a+b)+(c+d))+((e+f)+(g+h)))"
    assert add_up(list("abcdef"), merge_plan(6, tree=True)) == "(((a+b)+c)+((d+e)+f))"


@given(st.integers(1, 100))
def test_without_the_tree_it_is_left_to_right(count: int) -> None:
    names = [str(i) for i in range(count)]
    expected = names[0]
    for name in names[1:]:
        expected = f"({expected}+{name})"
    assert add_up(names, merge_plan(count, tree=False)) == expected


@given(st.integers(1, 2048), st.booleans())
def test_few_partial_sums_are_kept(count: int, tree: bool) -> None:
    """Each is a whole set of gradients in memory."""
    depth = deepest = 0
    for merges in merge_plan(count, tree):
        depth += 1
        deepest = max(deepest, depth)
        depth -= merges
    assert depth == 1
    assert deepest <= (count.bit_length() + 1 if tree else 2)
