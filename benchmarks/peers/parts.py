"""What is measured besides train steps: allreduce, start, more ranks than cores, input pipeline, profile of a step.

`until` is always an end on time.monotonic's clock.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.plan import PROFILE, Group
from benchmarks.peers.runner import (
    ROOT,
    TIMEOUT_SECONDS,
    Failed,
    LeftOut,
    OutOfTime,
    mpirun,
    run_commands,
    start,
    work_words,
)

_BATCH = 32  # of a rank
_FIRST_STEPS = 2  # of a start, which do not count as steps
_FEWEST_STEPS, _STEPS_OF_ALL = 12, 300  # of a start; more ranks on the same cores take longer for each
_MEMORY_SHARE = 0.9  # of what is free, that ranks may take


def allreduce(sizes: str, repeats: int, until: float) -> dict[str, Any]:
    """Return what `hpctrain bench allreduce` finds between two ranks on this host."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "allreduce.json"
        command = [sys.executable, "-m", "hpctrain", "bench", "allreduce", "--sizes", sizes, "--repeats", str(repeats)]
        run_commands([mpirun(2, [*command, "--out", str(out)])], until=until)
        return json.loads(out.read_text())


def start_up(ranks: int, until: float) -> dict[str, Any]:
    """Start `hpctrain train demo` on made-up images; return medians over ranks, and the slowest rank's first step.

    `step_seconds` and `images_per_second`, that of all ranks together, are means over the steps after the first two.
    """
    steps = max(_FEWEST_STEPS, _STEPS_OF_ALL // ranks)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, "-m", "benchmarks.peers.startup", "demo", "--run-dir", f"{folder}/run"),
            *("data.synthetic=true", "data.path=null", "model.num_classes=10", "log.tensorboard=false"),
            *(f"train.micro_batch={_BATCH}", f"train.global_batch={_BATCH * ranks}", f"train.steps={steps}"),
        ]
        lines = run_commands([mpirun(ranks, command)], until=until)
    if len(lines) != ranks:
        raise Failed(f"{len(lines)} of {ranks} ranks printed their figures")
    means = [statistics.mean(line["step_seconds"][_FIRST_STEPS - 1 :]) for line in lines]
    return {
        "ranks": ranks,
        "phases": {phase: statistics.median(line["phases"][phase] for line in lines) for phase in lines[0]["phases"]},
        "first_step_seconds": max(line["first_step_seconds"] for line in lines),
        "step_seconds": max(means),
        "images_per_second": _BATCH * ranks / max(means),
        "peak_rss_mb": max(line["peak_rss_mb"] for line in lines),
        "shared_out_mb": statistics.mean(line["shared_out_mb"] for line in lines),
    }


def check_memory(ranks: int, before: Sequence[Mapping[str, Any]]) -> None:
    """Raise LeftOut if so many ranks would not fit into the memory that is free, by what a rank took in earlier starts.

    The earlier start with most ranks tells: the more there are, the smaller is each one's share of common pages.
    """
    if not before:
        return
    each = max(before, key=lambda start: start["ranks"])["shared_out_mb"]
    free = _available_mb()
    if ranks * each > _MEMORY_SHARE * free:
        raise LeftOut(f"{ranks} ranks would take {ranks * each / 1e3:.1f} GB of the {free / 1e3:.1f} GB that are free")


def _available_mb() -> float:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))) * 1024 / 1e6


def input_pipeline(images: int, rounds: int, seconds: float, until: float) -> dict[str, Any]:
    """Return what benchmarks.input_pipeline finds on so many JPEGs."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.input_pipeline", "--work", folder, "--json"]
        options = ["--images", str(images), "--rounds", str(rounds), "--seconds", str(seconds)]
        left = until - time.monotonic()
        try:
            done = subprocess.run(
                [*command, *options],
                cwd=ROOT,
                env=os.environ,
                capture_output=True,
                text=True,
                timeout=max(0.1, min(left, TIMEOUT_SECONDS)),
            )
        except subprocess.TimeoutExpired:
            if left < TIMEOUT_SECONDS:
                raise OutOfTime("the time was up") from None
            raise Failed(f"not done after {TIMEOUT_SECONDS:.0f} s") from None
    if done.returncode:
        raise Failed(f"exit code {done.returncode}: {_end_of(done.stderr.splitlines())}")
    return json.loads(done.stdout)


def profile(groups: Sequence[Group], until: float) -> list[dict[str, Any]]:
    """Return where a step's time goes, of two independent processes and of two ranks; the mean of the two.

    `groups` are those of the models in plan.PROFILE, which says how many images a step.
    """
    results = []
    for group in groups:
        for contender in PROFILE[group.model]:
            lines = start(contender, work_words(group, contender, quick=True), until=until)
            kinds = lines[0]["milliseconds"]
            mean = {kind: statistics.mean(line["milliseconds"][kind] for line in lines) for kind in kinds}
            results.append({"group": group.name, "contender": contender.name, "milliseconds": mean})
    return results


def _end_of(lines: Sequence[str]) -> str:
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing on stderr")
