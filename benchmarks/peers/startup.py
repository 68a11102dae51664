"""`hpctrain train` with a clock: what it does from the launcher's start to the second step, and how long that takes.

    mpirun -n 2 python -m benchmarks.peers.startup RECIPE [KEY.SUB=VALUE]... --run-dir DIR

Each rank prints one line of JSON: seconds of each phase, seconds from the launch to the end of the first step, and of
later steps. The parts of the program are wrapped from outside, so it is the program itself that is timed.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.peers.work import LAUNCHED, peak_rss_mb, print_line, shared_out_mb

PHASES = {
    "launch": "mpirun starts Python",
    "mpi": "MPI starts, ranks tell each other where they are",
    "imports": "imports of TensorFlow, Keras and hpctrain",
    "model": "model is built",
    "horovod": "Horovod starts",
    "broadcast": "weights are broadcast",
    "first_batch": "first batch",
    "first_step": "first step beyond a later one's time: its graph",
    "other": "everything else: configuration, run directory",
}


class Clock:
    """Adds up how long wrapped functions take, on the clock of the wall."""

    def __init__(self, launched: float) -> None:
        self.launched = launched
        self.seconds: dict[str, float] = {}
        self.steps: list[float] = []
        self.first_step_done = 0.0
        self.mpi_started = 0.0
        self.shared_out_mb = 0.0  # after the second step, when all ranks are there

    def timed(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, with its time added to a phase."""

        def call(*arguments: Any, **options: Any) -> Any:
            started = time.time()
            result = function(*arguments, **options)
            self.add(phase, time.time() - started)
            return result

        return call

    def add(self, phase: str, seconds: float) -> None:
        """Add to a phase."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + seconds

    def batches(self, made: tuple[Iterator[Any], set[int]]) -> tuple[Iterator[Any], set[int]]:
        """Return what training_batches returns, with the first batch timed."""

        def each() -> Iterator[Any]:
            started = time.time()
            batch = next(made[0])
            self.add("first_batch", time.time() - started)
            yield batch
            yield from made[0]

        return each(), made[1]

    def step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the step's function, each call of it timed."""

        def call(*arguments: Any, **options: Any) -> Any:
            started = time.time()
            result = function(*arguments, **options)
            ended = time.time()
            self.first_step_done = self.first_step_done or ended
            self.steps.append(ended - started)
            if len(self.steps) == 2:
                self.shared_out_mb = shared_out_mb()
            return result

        return call

    def phases(self) -> dict[str, float]:
        """Return seconds of all phases, which add up to the time to the first step less that of a later one."""
        later = min(self.steps[1:])
        found = {**self.seconds, "first_step": self.steps[0] - self.seconds["first_batch"] - later}
        total = self.first_step_done - self.launched - later
        found["other"] = total - sum(found.values())
        return {phase: found.get(phase, 0.0) for phase in PHASES}


def main() -> None:
    """Run `hpctrain train` with the given arguments."""
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - _started_since_boot()
    started = time.time() - age
    clock = Clock(float(os.environ.get(LAUNCHED) or started))
    clock.add("launch", started - clock.launched)
    from hpctrain.parallel import world

    start = world.start

    def start_world(**options: Any) -> Any:
        result = clock.timed("mpi", start)(**options)
        clock.mpi_started = time.time()
        return result

    def import_and_wrap(**options: Any) -> Any:
        result = start_world(**options)
        from hpctrain.parallel.quiet import import_tensorflow

        import_tensorflow()
        from hpctrain.training import loop, session
        from hpctrain.training.step import TrainStep
        from hpctrain.training.timing import TimedReducer

        assert loop
        clock.add("imports", time.time() - clock.mpi_started)
        for owner, name, phase in (
            (session, "build_model", "model"),
            (TimedReducer, "__init__", "horovod"),
            (TimedReducer, "broadcast", "broadcast"),
        ):
            setattr(owner, name, clock.timed(phase, getattr(owner, name)))
        make_batches = session.training_batches
        session.training_batches = lambda *a, **o: clock.batches(make_batches(*a, **o))
        TrainStep.__call__ = clock.step(TrainStep.__call__)  # type: ignore[method-assign]
        return result

    world.start = import_and_wrap
    from hpctrain.cli import main as hpctrain

    sys.argv[1:1] = ["train"]
    try:
        hpctrain()
    except SystemExit as ended:
        if ended.code:
            raise
    print_line(
        phases=clock.phases(),
        first_step_seconds=clock.first_step_done - clock.launched,
        step_seconds=clock.steps[1:],
        peak_rss_mb=peak_rss_mb(),
        shared_out_mb=clock.shared_out_mb,
    )


def _started_since_boot() -> float:
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
