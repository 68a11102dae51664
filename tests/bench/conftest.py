"""Runs of `hpctrain bench` in processes of their own."""

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import HPCTRAIN, Launcher, Outcome

_LONGEST_SECONDS = 900  # on a machine that does other things, too


@pytest.fixture
def run_bench(tmp_path: Path) -> Iterator[Callable[..., Outcome]]:
    """Run `mpirun -n RANKS hpctrain bench ...` to its end."""
    launcher = Launcher(tmp_path)

    def run(ranks: int, *arguments: str) -> Outcome:
        return launcher.start(ranks, "bench", *arguments).wait(_LONGEST_SECONDS)

    yield run
    for job in launcher.jobs:
        job.kill()


@pytest.fixture
def bench_json(run_bench: Callable[..., Outcome]) -> Callable[..., dict[str, Any]]:
    """The same with --json; returns what it prints."""

    def run(ranks: int, *arguments: str) -> dict[str, Any]:
        outcome = run_bench(ranks, *arguments, "--json")
        assert outcome.code == 0, outcome.stderr[-3000:]
        return json.loads(outcome.stdout)

    return run


@pytest.fixture
def refusal() -> Callable[..., str]:
    """Run `hpctrain bench ...` on one rank and return the one sentence it is refused with."""

    def run(*arguments: str) -> str:
        command = [*HPCTRAIN, "bench", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LONGEST_SECONDS, check=False)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        (sentence,) = done.stderr.splitlines()
        assert sentence.startswith("hpctrain: error: ")
        return sentence

    return run
