"""Medians, spreads and ratios of what was measured: plain arithmetic on runs, which are dictionaries as in the file."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.peers.plan import Goal

Run = dict[str, Any]


@dataclass(frozen=True)
class Spread:
    """The median of some numbers, and how far they lie apart."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of at least one number."""
        return cls(statistics.median(values), min(values), max(values))


def of_contender(runs: Sequence[Run], contender: str, measure: str) -> Spread | None:
    """Return a contender's figure over its rounds; None if it has none."""
    values = [run[measure] for run in runs if run["contender"] == contender and "error" not in run]
    return Spread.of(values) if values else None


def ratio(runs: Sequence[Run], goal: Goal) -> Spread | None:
    """Return the ratio of two contenders, taken round by round; None if there is no round that both have run in."""
    rounds = sorted({run["round"] for run in runs})
    ratios = []
    for number in rounds:
        found = {run["contender"]: run for run in runs if run["round"] == number and "error" not in run}
        if goal.above in found and goal.below in found:
            ratios.append(found[goal.above][goal.measure] / found[goal.below][goal.measure])
    return Spread.of(ratios) if ratios else None


def ratios_of_rounds(result: Run) -> list[float]:
    """Return two ranks' steps a second to those of two independent processes (two_ranks.py), round by round."""
    return [a / b for a, b in zip(result["ranks"], result["independent"], strict=True)]


def verdict(found: Spread | None, limit: float | None, at_most: bool = False) -> str:
    """Return `met` or `missed` for a ratio with a goal, judged by the median; nothing if either is not there."""
    if found is None or limit is None:
        return ""
    return "met" if (found.median <= limit if at_most else found.median >= limit) else "**missed**"


def peak_share(run_rate: float, flops_per_image: float, cores: int, gflops_a_core: float) -> float:
    """Return the share of the cores' peak that images/s of so many operations each amount to."""
    return run_rate * flops_per_image / (cores * gflops_a_core * 1e9)
