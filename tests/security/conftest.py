"""Measuring what hostile input costs, and mutations of files."""

import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import strategies as st

from hpctrain.errors import UserError

MOST_BYTES = 200 << 20  # that any small hostile input may make us allocate

# In the place of numbers, texts and structures.
HOSTILE_NUMBERS = st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31), 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63)])
HOSTILE_TEXTS = st.sampled_from(
    ["", ".", "..", "../x", "/etc/passwd", "a/b", "a\\b", "a\0b", "\x1b[2J", "\ud800", "x" * 300, "1e999", "null"]
)
HOSTILE_VALUES: st.SearchStrategy[Any] = st.one_of(
    HOSTILE_NUMBERS,
    HOSTILE_TEXTS,
    st.sampled_from([2**64, 10**400, 1.5, -0.0, 1e308, True, False, None, [], {}, [[[]]], {"a": {"b": []}}]),
)


@contextmanager
def bounded_memory(most: int = MOST_BYTES) -> Iterator[None]:
    """Fail when more than `most` bytes are allocated at a time."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def refused_or(work: Callable[[], Any]) -> Any:
    """Return what the work returns, or None where it ends in a UserError: one sentence without the unprintable."""
    with bounded_memory():
        try:
            return work()
        except UserError as error:
            sentence = str(error)
            assert sentence and len(sentence) < 2000, sentence[:300]
            assert "\x1b" not in sentence and "\0" not in sentence, repr(sentence)
            return None


@st.composite
def mutated_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with some bits flipped, numbers overwritten, parts cut out, the end cut off or something added."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(changed) - 1)))
        kind = draw(st.sampled_from(["flip", "number", "zeros", "cut", "truncate", "extend"]))
        if kind == "flip" and changed:
            changed[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "number":
            size = draw(st.sampled_from([1, 2, 4, 8]))
            number = draw(HOSTILE_NUMBERS) % 2 ** (8 * size)
            changed[place : place + size] = number.to_bytes(size, "little")
        elif kind == "zeros":
            changed[place : place + 64] = bytes(len(changed[place : place + 64]))
        elif kind == "cut":
            del changed[place : place + draw(st.integers(1, 64))]
        elif kind == "truncate":
            del changed[place:]
        else:
            changed += draw(st.binary(max_size=64))
    return bytes(changed)


@st.composite
def mutated_json(draw: st.DrawFn, document: Any) -> Any:
    """The document with one to three of its values replaced by hostile ones, or left out, or put one level deeper."""
    for _ in range(draw(st.integers(1, 3))):
        document = draw(_one_mutation(document))
    return document


@st.composite
def _one_mutation(draw: st.DrawFn, value: Any) -> Any:
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not keys or draw(st.integers(0, 9)) == 0:
        return draw(st.one_of(HOSTILE_VALUES, st.just([value]), st.just({"x": value})))
    key = draw(st.sampled_from(keys))
    changed = dict(value) if isinstance(value, dict) else list(value)
    if draw(st.integers(0, 9)) == 0:
        del changed[key]
    else:
        changed[key] = draw(_one_mutation(value[key]))
    return changed
