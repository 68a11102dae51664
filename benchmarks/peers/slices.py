"""Programs that are there at the same time and yet never run beside each other: all but one are stopped.

A machine that others use as well changes its speed within seconds by more than is to be measured. Programs that run one
after the other meet different machines; those that take turns so quickly meet the same. Between its slices a program
stands still wherever it is, so what runs in them is what it does when nobody stops it: processes that know nothing of
each other drift apart, ranks wait for each other.

Each process of a program writes a line to a file of its own, in a folder that it is told, when a step is done: the time
on the clock of the machine, and the processor time it has used (`step_forever`).
"""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from benchmarks.peers.plan import SLICE_SECONDS
from benchmarks.peers.runner import ROOT, TIMEOUT_SECONDS, Failed, OutOfTime, as_root

_WARM_UP = 3  # steps before a program counts as started


@dataclass(frozen=True)
class Trace:
    """What one process did: when it ran and when it was done with each step, on one clock in seconds."""

    slices: Sequence[tuple[float, float]]  # the first, its start, and the last do not count
    step_ends: Sequence[float]
    processor_seconds: Sequence[float]  # used since its start, at the end of each step

    def steps_in_slices(self) -> np.ndarray:
        """Return how many steps were done in each slice that counts; parts of steps count by their time."""
        edges = self._running(np.array(self.slices[1:-1]))
        return np.diff(np.interp(edges, self._running(self.step_ends), np.arange(len(self.step_ends))), axis=1)[:, 0]

    def step_seconds(self) -> np.ndarray:
        """Return what each step took that ended after the first slice, without the time it was stopped."""
        return np.diff(self._running(self.step_ends))[self._counted()]

    def processor_seconds_a_step(self) -> float:
        """Return the mean processor time of such a step."""
        return float(np.mean(np.diff(self.processor_seconds)[self._counted()]))

    def _counted(self) -> np.ndarray:
        return np.asarray(self.step_ends[1:]) > self.slices[1][0]

    def _running(self, times: Sequence[float] | np.ndarray) -> np.ndarray:
        """Seconds that it had run until then."""
        starts, ends = np.array(self.slices).T
        before = np.concatenate([[0.0], np.cumsum(ends - starts)])
        return np.interp(times, np.array(self.slices).ravel(), np.stack([before[:-1], before[1:]], axis=1).ravel())


class Program:
    """Processes that belong together, stopped but for their slices. `end` is to be called whatever happens."""

    def __init__(
        self, name: str, commands: Sequence[Sequence[str]], processes: int, folder: Path, environment: Mapping[str, str]
    ) -> None:
        """Start it: `processes` in all are to write into `folder`, which is new."""
        self.name = name
        self._processes, self._folder = processes, folder
        self._slices: list[tuple[float, float]] = []
        self._since = time.monotonic()
        self._pids: list[int] = []
        folder.mkdir()
        everything = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **as_root(), **environment}
        self._started = [
            subprocess.Popen(command, cwd=ROOT, env=everything, start_new_session=True)  # Ctrl-C is for this process
            for command in commands
        ]

    def wait(self, until: float) -> None:
        """Return when all have taken a few steps, and stop them. Raises Failed, or OutOfTime after `until`."""
        own_until = time.monotonic() + TIMEOUT_SECONDS
        while len(self._pids) < self._processes:
            self._check(until)
            if time.monotonic() > own_until:
                raise Failed(f"{self.name} did not start in {TIMEOUT_SECONDS:.0f} s")
            time.sleep(0.05)
            files = list(self._folder.iterdir())
            self._pids = [int(file.name) for file in files if file.read_text().count("\n") >= _WARM_UP]
        self._stop()

    def run(self, until: float, seconds: float = SLICE_SECONDS) -> None:
        """Let it run for so long."""
        self._go()
        time.sleep(seconds)
        self._stop()
        self._check(until)

    def traces(self, until: float) -> list[Trace]:
        """Return what each process did, after a last slice in which all end the step that they are in."""
        steps = [len(trace.step_ends) for trace in self._read()]
        self._go()
        while any(len(trace.step_ends) <= before for trace, before in zip(self._read(), steps, strict=True)):
            self._check(until)
            time.sleep(0.02)
        self._stop()
        return self._read()

    def end(self) -> None:
        """End its processes."""
        self._signal(signal.SIGKILL)
        for process in self._started:
            process.terminate()
            process.wait()

    def _go(self) -> None:
        self._since = time.monotonic()
        self._signal(signal.SIGCONT)

    def _stop(self) -> None:
        self._signal(signal.SIGSTOP)
        self._slices.append((self._since, time.monotonic()))

    def _read(self) -> list[Trace]:
        traces = []
        for pid in self._pids:
            lines = (self._folder / str(pid)).read_text().split("\n")[:-1]
            ends, used = zip(*(map(float, line.split()) for line in lines), strict=True)
            traces.append(Trace(self._slices, ends, used))
        return traces

    def _check(self, until: float) -> None:
        for process in self._started:
            if process.poll() is not None:
                raise Failed(f"{self.name} ended with exit code {process.returncode}; see above")
        if time.monotonic() > until:
            raise OutOfTime("the time was up")

    def _signal(self, number: signal.Signals) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):  # gone by itself, which _check tells
                os.kill(pid, number)


def step_forever(step: Callable[[], None], folder: Path) -> NoReturn:
    """Take steps, and write a line for each into the folder."""
    file = os.open(folder / str(os.getpid()), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    while True:
        step()
        os.write(file, f"{time.monotonic()} {time.process_time()}\n".encode())
