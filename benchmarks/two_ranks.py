#!/usr/bin/env python3
"""What two ranks on a host cost beside two processes that know nothing of each other, step by step.

A machine that others use as well changes its speed within seconds by more than is to be measured. So both are there
from the beginning and take turns of two steps, of which the second counts, while the other pair is stopped. Printed are
medians over all rounds of

    ranks / independent    images/s of both ranks to the sum of what each process does by itself; the goals are 0.98 for
                           ResNet-50 and 0.93 for AlexNet-BN
    ranks / together       the same to twice what the slower process does, as ranks wait for the slower one in each step
    by processor time      the processor time of a step of both processes to that of both ranks, which has no waiting

with quartiles and the standard error of the median. `python -m benchmarks.two_ranks --help` lists the options.
"""

import argparse
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.peers.plan import OUR_ENVIRONMENT
from benchmarks.peers.runner import ROOT, mpirun

MICRO_BATCH = {"resnet50": 8, "alexnet_bn": 32, "resnet20": 32}
_START_SECONDS = 300.0
_SERVE = "--serve"  # for the processes themselves


@dataclass(frozen=True)
class Step:
    """What one process took for a step."""

    seconds: float
    processor_seconds: float


class Pair:
    """Two processes that take a step when they are told to, and are stopped in between."""

    def __init__(self, name: str, commands: Sequence[Sequence[str]], socket_path: Path) -> None:
        self.name = name
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(socket_path))
        self._server.listen(2)
        self._server.settimeout(1.0)
        environment = {**os.environ, **OUR_ENVIRONMENT, "TF_CPP_MIN_LOG_LEVEL": "3"}
        if os.geteuid() == 0:  # what Open MPI asks of root
            environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        self._started = [
            subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)  # Ctrl-C is for this process
            for command in commands
        ]
        self._lines: list[tuple[socket.socket, Any, int]] = []

    def wait(self) -> None:
        """Return when both are ready, and stop them."""
        until = time.monotonic() + _START_SECONDS
        while len(self._lines) < 2:
            try:
                connection, _ = self._server.accept()
            except TimeoutError:
                if any(process.poll() is not None for process in self._started) or time.monotonic() > until:
                    raise SystemExit(f"error: {self.name} did not start; see above") from None
                continue
            connection.setblocking(True)
            file = connection.makefile("r")
            self._lines.append((connection, file, int(file.readline())))
        self._signal(signal.SIGSTOP)

    def turn(self) -> list[Step]:
        """Take two steps; return what the second took on each of them."""
        self._signal(signal.SIGCONT)
        for _ in range(2):
            for connection, _, _ in self._lines:
                connection.sendall(b"x")
            steps = [Step(*map(float, file.readline().split())) for _, file, _ in self._lines]
        self._signal(signal.SIGSTOP)
        return steps

    def end(self) -> None:
        """End them."""
        self._signal(signal.SIGKILL)
        for process in self._started:
            process.terminate()
            process.wait()
        self._server.close()

    def _signal(self, number: signal.Signals) -> None:
        for _, _, pid in self._lines:
            os.kill(pid, number)


def serve(path: str, arguments: Sequence[str]) -> NoReturn:
    """Be one of the processes: take a step for each byte that comes, and answer with its times."""
    from benchmarks.peers.hpctrain_step import make_step
    from benchmarks.peers.work import parse_work

    step, _ = make_step(parse_work([*arguments, "--threads", "1", "--steps", "1"]))
    for _ in range(3):
        step()
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(path)
        line.sendall(f"{os.getpid()}\n".encode())
        while line.recv(1):
            started, processor_started = time.perf_counter(), time.process_time()
            step()
            seconds, processor_seconds = time.perf_counter() - started, time.process_time() - processor_started
            line.sendall(f"{seconds} {processor_seconds}\n".encode())
    os._exit(0)


def measure(model: str, precision: str, rounds: int, folder: Path) -> None:
    """Let both pairs take turns, and print what came out."""
    work = ["--model", model, "--precision", precision, "--micro-batch", str(MICRO_BATCH[model])]
    paths = [folder / f"{model}-ranks", folder / f"{model}-apart"]
    rank, process = ([sys.executable, "-m", "benchmarks.two_ranks", _SERVE, str(path), *work] for path in paths)
    cpus = sorted(os.sched_getaffinity(0))
    halves = (cpus[: len(cpus) // 2], cpus[len(cpus) // 2 :])
    pairs: list[Pair] = []
    try:
        pairs.append(Pair("2 ranks", [mpirun(2, rank)], paths[0]))
        pairs[0].wait()
        apart = [[*process, "--cpus", ",".join(map(str, half))] for half in halves]
        pairs.append(Pair("2 processes", apart, paths[1]))
        pairs[1].wait()
        taken: dict[str, list[list[Step]]] = {pair.name: [] for pair in pairs}
        for number in range(rounds):
            for pair in pairs if number % 2 else pairs[::-1]:
                taken[pair.name].append(pair.turn())
    finally:
        for pair in pairs:
            pair.end()
    report(model, precision, taken["2 ranks"], taken["2 processes"])


def report(model: str, precision: str, ranks: list[list[Step]], apart: list[list[Step]]) -> None:
    """Print the ratios."""
    print(f"{model}, {precision}, {MICRO_BATCH[model]} images a rank, {len(ranks)} rounds")
    both = list(zip(ranks, apart, strict=True))
    slower = [max(step.seconds for step in steps) for steps in ranks]
    slower_apart = [max(step.seconds for step in steps) for steps in apart]
    print(f"  seconds of a step: ranks {statistics.median(slower):.3f}, slower process {_median(slower_apart)}")
    independent = [sum(1 / step.seconds for step in steps) / 2 for steps in apart]
    _line("ranks / independent", [1 / (a * b) for a, b in zip(slower, independent, strict=True)])
    _line("ranks / together", [b / a for a, b in zip(slower, slower_apart, strict=True)])
    used = [[sum(step.processor_seconds for step in steps) for steps in pair] for pair in both]
    _line("by processor time", [b / a for a, b in used])


def _line(name: str, ratios: Sequence[float]) -> None:
    low, middle, high = statistics.quantiles(ratios, n=4)
    error = 1.25 * statistics.stdev(ratios) / len(ratios) ** 0.5  # of a median, if they were normally distributed
    print(f"  {name:20s} {middle:.3f} (quartiles {low:.2f} and {high:.2f}, standard error {error:.3f})", flush=True)


def _median(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f}"


def main() -> None:
    """Measure, or be one of those that are measured."""
    if sys.argv[1:2] == [_SERVE]:
        serve(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description="Two ranks beside two independent processes, step by step.")
    parser.add_argument("models", nargs="*", metavar="MODEL", default=["resnet50", "alexnet_bn"])
    parser.add_argument("--precision", choices=["float32", "mixed_bfloat16"], default="float32")
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds is {options.rounds}; there are no quartiles of fewer than 2")
    for model in options.models:
        if model not in MICRO_BATCH:
            parser.error(f"there is no model {model}; take of {', '.join(MICRO_BATCH)}")
    if shutil.which("mpirun") is None:
        parser.error("there is no mpirun on the PATH; put the bin folder of the environment there")
    try:
        with tempfile.TemporaryDirectory() as folder:
            for model in options.models:
                measure(model, options.precision, options.rounds, Path(folder))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
