"""Hashed randomness: uniform, independent, and the same for years."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.data.hashing import hash64, uniform

WORDS = st.integers(-(2**63), 2**63 - 1)


def test_values_are_pinned() -> None:
    """Every order and every crop of every run follows from these: they must never change."""
    assert hash64(0).tolist() == 12035550249420947055
    assert hash64(1, 2, 3).tolist() == 17961212225009843706
    assert hash64(7, -1, np.arange(3)).tolist() == [
        12404812029710785662,
        17928368136621275043,
        16398060633603978518,
    ]
    assert uniform(5, 6).tolist() == 0.18280599943334608


def reference(*words: int) -> int:
    """The same in Python's unbounded integers."""
    mask = 2**64 - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    state = 0
    for word in words:
        state = mix((state * 0x94D049BB133111EB + 0x9E3779B97F4A7C15 + word) & mask)
    return mix((state + 0x9E3779B97F4A7C15) & mask)


@given(st.lists(WORDS, min_size=1, max_size=4))
def test_arithmetic_is_modulo_2_to_the_64(words: list[int]) -> None:
    assert int(hash64(*words)) == reference(*words)


@given(WORDS, st.lists(WORDS, min_size=1, max_size=20))
def test_an_element_does_not_depend_on_the_others(seed: int, words: list[int]) -> None:
    together = hash64(seed, np.array(words))
    assert together.dtype == np.uint64
    assert [int(hash64(seed, word)) for word in words] == together.tolist()


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64, np.uint64, np.uint8])
def test_the_integer_type_does_not_matter(dtype: type) -> None:
    assert np.array_equal(hash64(3, np.arange(100, dtype=dtype)), hash64(3, np.arange(100)))


def test_words_broadcast_and_their_order_matters() -> None:
    table = hash64(np.arange(50)[:, np.newaxis], np.arange(50))
    assert table.shape == (50, 50)
    assert len(np.unique(table)) == 2500  # also (1, 2) and (2, 1) differ
    one, two, three = hash64(np.arange(50)), hash64(np.arange(50), 0), hash64(0, 0, np.arange(50))
    assert len(np.unique([one, two, three])) == 150  # nor does a zero at either end go unnoticed


@pytest.mark.parametrize("place", [0, 1, 2])
def test_neighboring_words_give_uniform_and_unrelated_numbers(place: int) -> None:
    """Records, epochs and seeds are small numbers beside each other; what they are hashed to must not show it."""
    words: list[Any] = [4, 5, 6]
    words[place] = np.arange(100_000)
    draws = uniform(*words)
    assert draws.min() >= 0 and draws.max() < 1
    counts = np.bincount((draws * 64).astype(int), minlength=64)
    assert abs(counts - 100_000 / 64).max() < 6 * np.sqrt(100_000 / 64)
    for lag in (1, 2, 64):
        assert abs(np.corrcoef(draws[:-lag], draws[lag:])[0, 1]) < 6 / np.sqrt(100_000)


def test_a_bit_of_the_word_changes_half_of_the_bits_of_the_hash() -> None:
    words = np.arange(1000, dtype=np.int64)
    for bit in (0, 1, 20, 62):
        changed = hash64(9, words) ^ hash64(9, words ^ (1 << bit))
        share = np.unpackbits(changed.view(np.uint8)).mean()
        assert abs(share - 0.5) < 0.02
