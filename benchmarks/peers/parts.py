"""What is measured besides train steps: the allreduce, the start, many ranks on few cores, and the input pipeline."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.runner import ROOT, TIMEOUT_SECONDS, Failed, mpirun, run_commands

_BATCH = 32  # of a rank
_STEPS, _FIRST_STEPS = 12, 2  # of a start, and those that do not count as steps


def allreduce(sizes: str, repeats: int) -> dict[str, Any]:
    """Return what `hpctrain bench allreduce` finds between two ranks on this host."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "allreduce.json"
        command = [sys.executable, "-m", "hpctrain", "bench", "allreduce", "--sizes", sizes, "--repeats", str(repeats)]
        run_commands([mpirun(2, [*command, "--out", str(out)])])
        return json.loads(out.read_text())


def start_up(ranks: int) -> dict[str, Any]:
    """Start `hpctrain train demo` on made-up images; return medians over ranks, and the slowest rank's first step.

    `images_per_second` is that of all ranks together, over the steps after the first two.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "benchmarks.peers.startup", "demo", "--run-dir", f"{folder}/run"),
            *("data.synthetic=true", "data.path=null", "model.num_classes=10", "log.tensorboard=false"),
            *(f"train.micro_batch={_BATCH}", f"train.global_batch={_BATCH * ranks}", f"train.steps={_STEPS}"),
        ]
        lines = run_commands([mpirun(ranks, command)])
    if len(lines) != ranks:
        raise Failed(f"{len(lines)} of {ranks} ranks printed their figures")
    steps = [statistics.median(line["step_seconds"][_FIRST_STEPS - 1 :]) for line in lines]
    return {
        "ranks": ranks,
        "phases": {phase: statistics.median(line["phases"][phase] for line in lines) for phase in lines[0]["phases"]},
        "first_step_seconds": max(line["first_step_seconds"] for line in lines),
        "step_seconds": max(steps),
        "images_per_second": _BATCH * ranks / max(steps),
        "peak_rss_mb": max(line["peak_rss_mb"] for line in lines),
    }


def input_pipeline(images: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Return what benchmarks.input_pipeline finds on so many JPEGs."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.input_pipeline", "--work", folder, "--json"]
        options = ["--images", str(images), "--rounds", str(rounds), "--seconds", str(seconds)]
        try:
            done = subprocess.run(
                [*command, *options], cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"not done after {TIMEOUT_SECONDS:.0f} s") from None
    if done.returncode:
        raise Failed(f"exit code {done.returncode}: {_end_of(done.stderr.splitlines())}")
    return json.loads(done.stdout)


def _end_of(lines: Sequence[str]) -> str:
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing on stderr")
