#!/usr/bin/env python3
"""Does bfloat16 learn as well as float32? The recipe `demo` with both precisions and several seeds.

Prints the held-out top-1 of each run as it ends, then of each precision mean and spread (standard deviation over
seeds), and the mean difference seed by seed with its standard error. A run that OUT has already is not repeated.

    make demo                                                  # or ./demo.sh data, for the data alone
    python -m benchmarks.bfloat16_accuracy --data demo/shards --out /tmp/bfloat16 [--epochs 10] [--seeds 0 1 2 3 4]
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

PRECISIONS = ("float32", "mixed_bfloat16")


def main() -> None:
    """Train what is missing, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of the demo's shards")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--epochs", type=int, default=10, help="of all runs; the warm-up is a fifth of them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    arguments = parser.parse_args()
    top1: dict[str, dict[int, float]] = {precision: {} for precision in PRECISIONS}
    for seed in arguments.seeds:
        for precision in PRECISIONS:
            run_dir = arguments.out / f"{precision}-{arguments.epochs}epochs-seed{seed}"
            top1[precision][seed] = train(arguments.data, run_dir, precision, seed, arguments.epochs)
            print(f"seed {seed}  {precision:15} top-1 {top1[precision][seed]:.4f}", flush=True)
    print("\n".join(summary(top1)))


def train(data: Path, run_dir: Path, precision: str, seed: int, epochs: int) -> float:
    """Return the top-1 that a run ends with; trains it unless it has been."""
    metrics = run_dir / "metrics.jsonl"
    if not metrics.exists() or final_top1(metrics, epochs) is None:
        settings = [f"data.path={data.absolute()}", f"train.precision={precision}", f"train.seed={seed}"]
        settings += [
            f"train.epochs={epochs}",
            f"schedule.warmup_epochs={epochs / 5}",
            f"evaluate.every_epochs={epochs}",
        ]
        command = [sys.executable, "-m", "hpctrain", "train", "demo", *settings, "--run-dir", str(run_dir)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"})
    found = final_top1(metrics, epochs)
    if found is None:
        raise SystemExit(f"{metrics} has no evaluation after {epochs} epochs")
    return found


def final_top1(metrics: Path, epochs: int) -> float | None:
    """Return the top-1 of the evaluation after the last epoch; None if there is none."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    found = [line["top1"] for line in lines if line["kind"] == "eval" and line["epoch"] >= epochs - 1e-6]
    return found[-1] if found else None


def summary(top1: Mapping[str, Mapping[int, float]]) -> Sequence[str]:
    """Return lines that tell means, spreads and the difference, from the top-1 of each precision and seed."""
    lines = []
    for precision, of_seeds in top1.items():
        values = list(of_seeds.values())
        lines.append(f"{precision:15} mean {statistics.mean(values):.4f}  spread {_spread(values):.4f}")
    first, second = (top1[precision] for precision in PRECISIONS)
    differences = [second[seed] - first[seed] for seed in first]
    error = _spread(differences) / math.sqrt(len(differences))
    mean = statistics.mean(differences)
    return [*lines, f"bfloat16 less float32: {mean:+.4f}, standard error {error:.4f}, {len(differences)} seeds"]


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


if __name__ == "__main__":
    main()
