"""Batch-size efficiency: how many epochs and how much time runs of several batch sizes took to the same accuracy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from hpctrain.scaling.run_data import RunData, number, steady_images_per_second, summarize


@dataclass(frozen=True)
class BatchRow:
    """When a run first reached the accuracy that all of them reach."""

    label: str
    batch: int
    epochs: float
    steps: float
    seconds: float | None  # of training, at the run's steady rate
    efficiency: float  # epochs of the smallest batch over these


@dataclass(frozen=True)
class BatchComparison:
    """Runs of one model by batch, and the top-1 that is compared at: the lowest of their best."""

    model: str
    top1: float
    rows: list[BatchRow]


def compare_batches(labeled: Sequence[tuple[str, RunData]]) -> list[BatchComparison]:
    """Return a comparison for each model with runs of more than one batch size that were evaluated."""
    by_model: dict[str, list[tuple[int, str, RunData, float]]] = {}
    for label, run in labeled:
        summary = summarize(run)
        if summary["model"] and summary["global_batch"] and summary["best_top1"] is not None:
            entry = (summary["global_batch"], label, run, summary["best_top1"])
            by_model.setdefault(summary["model"], []).append(entry)
    comparisons = []
    for model, entries in by_model.items():
        if len({batch for batch, *_ in entries}) < 2:
            continue
        entries.sort(key=lambda entry: entry[:2])
        top1 = min(best for *_, best in entries)
        reached = [(batch, label, run, _first(run, top1)) for batch, label, run, _ in entries]
        least = reached[0][3][0]
        rows = [
            BatchRow(label, batch, epochs, steps, _seconds(run, steps, batch), least / epochs)
            for batch, label, run, (epochs, steps) in reached
        ]
        comparisons.append(BatchComparison(model, top1, rows))
    return comparisons


def _first(run: RunData, top1: float) -> tuple[float, float]:
    """(epoch, step) of the first evaluation that is at least as good."""
    for record in run.of_kind("eval"):
        value = number(record.get("top1"))
        if value is not None and value >= top1:
            return number(record.get("epoch")) or math.nan, number(record.get("step")) or math.nan
    return math.nan, math.nan


def _seconds(run: RunData, steps: float, batch: int) -> float | None:
    rate = steady_images_per_second(run.series("train", "step", "images_per_second")[1])
    return steps * batch / rate if rate else None
