"""Emulated hosts for the tests that are marked `emulated`."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.emulated_hosts import EmulatedHosts, why_impossible

MakeHosts = Callable[..., EmulatedHosts]


@pytest.fixture(scope="session")
def possible() -> None:
    """Skips where there can be no emulated hosts."""
    if reason := why_impossible():
        pytest.skip(reason)


@pytest.fixture
def make_hosts(possible: None, tmp_path: Path) -> Iterator[MakeHosts]:
    """Return a function that starts EmulatedHosts(count, rate_mbit); they are closed after the test."""
    with contextlib.ExitStack() as stack:
        made: list[EmulatedHosts] = []

        def make(count: int, rate_mbit: float | None = None) -> EmulatedHosts:
            made.append(EmulatedHosts(count, rate_mbit, directory=tmp_path / f"hosts{len(made)}"))
            return stack.enter_context(made[-1])

        yield make
