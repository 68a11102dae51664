#!/usr/bin/env python3
"""What two ranks on a host cost beside two processes that know nothing of each other, in slices of half a second.

    python -m benchmarks.peers.two_ranks [MODEL]... [--precision P] [--seconds S]

All are there from the beginning and run in turns (slices.py). Printed are, over as many rounds as there are, each of
which has some steps,

    ranks / independent    images/s of both ranks to the sum of what the processes do; the goals are 0.98 for ResNet-50
                           and 0.93 for AlexNet-BN
    ranks / together       the same to what the processes would do if each step took both as long as the slower one, as
                           ranks have to wait
    by processor time      the processor time of a step of both processes to that of both ranks, which has no waiting

`make bench` measures the same (plan.TWO_RANKS).
"""

import argparse
import math
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from benchmarks.peers.figures import ratios_of_rounds
from benchmarks.peers.plan import OUR_ENVIRONMENT, SLICE_SECONDS, TWO_RANKS
from benchmarks.peers.runner import Failed, mpirun
from benchmarks.peers.slices import Program, Trace, step_forever

_ROUND_SECONDS = 8.0  # of each program: some steps of the slowest model
_SERVE = "--serve"  # for the processes themselves
# A rank that is stopped is not one that is lost.
_ENVIRONMENT = {**OUR_ENVIRONMENT, "HOROVOD_STALL_CHECK_DISABLE": "1"}


def measure(model: str, precision: str, seconds: float, until: float = math.inf) -> dict[str, Any]:
    """Let two ranks and two processes run for so many seconds together, and return `summarize` of what they did.

    Raises Failed if one of them ends, and OutOfTime (a Failed) after `until` on time.monotonic's clock.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("ranks", "apart")]
        work = ["--model", model, "--precision", precision, "--micro-batch", str(TWO_RANKS[model].micro_batch)]
        rank, process = (
            [sys.executable, "-m", "benchmarks.peers.two_ranks", _SERVE, str(path), *work] for path in paths
        )
        cpus = sorted(os.sched_getaffinity(0))
        halves = (cpus[: len(cpus) // 2], cpus[len(cpus) // 2 :])
        apart = [[*process, "--cpus", ",".join(map(str, half))] for half in halves]
        programs: list[Program] = []
        try:
            for name, path, commands in (("2 ranks", paths[0], [mpirun(2, rank)]), ("2 processes", paths[1], apart)):
                programs.append(Program(name, commands, 2, path, _ENVIRONMENT))
                programs[-1].wait(until)
            for turn in range(max(2, round(seconds / 2 / SLICE_SECONDS))):
                for program in programs if turn % 2 else programs[::-1]:
                    program.run(until)
            ranks, processes = (program.traces(until) for program in programs)
        finally:
            for program in programs:
                program.end()
    return {"model": model, "precision": precision, **summarize(ranks, processes)}


def summarize(ranks: Sequence[Trace], apart: Sequence[Trace]) -> dict[str, Any]:
    """Return steps a second of both ranks and of both processes in each round, and what else tells why.

    Steps a second are added up over the two, so two ranks at 1.5 steps a second count as 3.
    """
    together = [np.mean(np.maximum(*_same_length(traces))) for traces in (apart, ranks)]
    return {
        "ranks": _rates(ranks),
        "independent": _rates(apart),
        "ranks / together": float(together[0] / together[1]),
        "by processor time": sum(trace.processor_seconds_a_step() for trace in apart)
        / sum(trace.processor_seconds_a_step() for trace in ranks),
    }


def _rates(traces: Sequence[Trace]) -> list[float]:
    done = sum(trace.steps_in_slices() for trace in traces)
    lengths = np.diff(np.array(traces[0].slices[1:-1]), axis=1)[:, 0]
    rounds = max(1, int(len(lengths) * SLICE_SECONDS / _ROUND_SECONDS))
    return [
        float(np.sum(of_round) / np.sum(length))
        for of_round, length in zip(np.array_split(done, rounds), np.array_split(lengths, rounds), strict=True)
    ]


def _same_length(traces: Sequence[Trace]) -> list[np.ndarray]:
    steps = [trace.step_seconds() for trace in traces]
    return [one[: min(map(len, steps))] for one in steps]


def report(result: dict[str, Any]) -> None:
    """Print the ratios."""
    of_rounds = ratios_of_rounds(result)
    error = 1.25 * np.std(of_rounds, ddof=1) / len(of_rounds) ** 0.5  # of a median, if they were normally distributed
    low, middle, high = np.percentile(of_rounds, [25, 50, 75])
    batch = TWO_RANKS[result["model"]].micro_batch
    print(f"{result['model']}, {result['precision']}, {batch} images a rank, {len(of_rounds)} rounds")
    print(f"  steps a second of both: ranks {np.mean(result['ranks']):.3f}, apart {np.mean(result['independent']):.3f}")
    print(f"  ranks / independent  {middle:.3f} (quartiles {low:.2f} and {high:.2f}, standard error {error:.3f})")
    for name in ("ranks / together", "by processor time"):
        print(f"  {name:20s} {result[name]:.3f}", flush=True)


def serve(folder: str, arguments: Sequence[str]) -> NoReturn:
    """Be one of the processes."""
    from benchmarks.peers.hpctrain_step import make_step
    from benchmarks.peers.work import parse_work

    step, _ = make_step(parse_work([*arguments, "--threads", "1", "--steps", "1"]))
    step_forever(step, Path(folder))


def main() -> None:
    """Measure, or be one of those that are measured."""
    if sys.argv[1:2] == [_SERVE]:
        serve(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers.two_ranks", description="Two ranks beside two independent processes."
    )
    parser.add_argument("models", nargs="*", metavar="MODEL", default=["resnet50", "alexnet_bn"])
    parser.add_argument("--precision", choices=["float32", "mixed_bfloat16"], default="float32")
    parser.add_argument("--seconds", type=float, default=240.0, help="for each model, after the start (240)")
    options = parser.parse_args()
    least = 4 * _ROUND_SECONDS
    if options.seconds < least:
        parser.error(f"--seconds is {options.seconds:g}; two rounds of each take {least:g}")
    for model in options.models:
        if model not in TWO_RANKS:
            parser.error(f"there is no model {model}; take of {', '.join(TWO_RANKS)}")
    if shutil.which("mpirun") is None:
        parser.error("there is no mpirun on the PATH; put the bin folder of the environment there")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and not die at once: no process is to stay stopped
    try:
        for model in options.models:
            report(measure(model, options.precision, options.seconds))
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
