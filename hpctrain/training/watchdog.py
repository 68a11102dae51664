"""Notices that a run makes no progress, names the ranks it waits for, and ends it.

A reduction waits for all ranks, and a rank that is stopped, or whose host or file system hangs, never comes. The other
ranks cannot ask it: their communication is what hangs. So each rank watches only itself, with its own clock. Where
nothing moves for too long, each rank that still can writes where it is, with the stacks of all its threads, to
RUN_DIR/stacks/rank-N.txt; who has written nothing, or is behind the others, is who they wait for. Then the job ends.
"""

import faulthandler
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from hpctrain.parallel.world import World, end_job
from hpctrain.training.console import Console

# Where a rank can be in a step, in this order.
START, INPUT, STEP, SAVE, EVALUATE, END = range(6)
_WORDS = ("starting", "waiting for its input", "computing or reducing", "saving", "evaluating", "ending")

_PATIENT_FACTOR = 10  # where graphs are built, thousands of ranks start from one file system, or a last file is written
_QUIET_SECONDS = 60.0  # without a line on the console
_WRITE_SECONDS = 5.0  # for a stack to be written; the file system may be what hangs
_GRACE_SECONDS = 2.0
_NAMED = 8


class Watchdog:
    """Watches this rank. `at` is called wherever it moves on, which costs a microsecond."""

    def __init__(self, world: World, stacks: Path, limit_seconds: float, quiet_seconds: float = _QUIET_SECONDS) -> None:
        """Begin to watch. `stacks` is the folder for the ranks' stacks; what an earlier stall left there goes."""
        self._world, self._stacks, self._limit = world, stacks, limit_seconds
        self._tick = min(limit_seconds / 10, 2.0)
        self._step, self._place, self._since = 0, START, time.monotonic()
        self._longest = 0.0  # between two calls of `at`, after the first step
        self._steps_done, self._evaluated, self._ending = 0, False, False
        self._quiet_seconds = quiet_seconds
        self._console: TimedConsole | None = None
        self._patient = True
        self._ended = threading.Event()
        if world.is_root:
            for path in stacks.glob("rank-*.txt"):
                path.unlink(missing_ok=True)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def at(self, place: int, step: int) -> None:
        """Note that this rank has come to a place in a step."""
        now = time.monotonic()
        if not self._patient:
            self._longest = max(self._longest, now - self._since)
        if place == INPUT and step != self._step:
            self._steps_done += 1
        if place != EVALUATE and self._place == EVALUATE:
            self._evaluated = True
        first_evaluation = place == EVALUATE and not self._evaluated
        self._patient = self._steps_done <= 1 or first_evaluation or self._ending
        self._step, self._place, self._since = step, place, now

    def sign(self) -> None:
        """Note that this rank moves on where it is."""
        self.at(self._place, self._step)

    def ending(self) -> None:
        """Be patient from now on: the last steps of a run wait for files that are being written."""
        self._ending = self._patient = True

    def close(self) -> None:
        """Watch no longer."""
        self._ended.set()
        self._thread.join()

    def keep_alive_line(self, console: "TimedConsole") -> None:
        """Print a line on this console whenever there was none for a minute."""
        self._console = console

    @property
    def allowed_seconds(self) -> float:
        """How long this rank may stay where it is."""
        if self._patient:
            return self._limit * _PATIENT_FACTOR
        return self._limit + 2 * self._longest

    def _watch(self) -> None:
        while not self._ended.wait(self._tick):
            seconds = time.monotonic() - self._since
            # Rank 0 hears of the others' stalls; it may have come to where it waits for them only a while ago.
            told = self._world.is_root and self._world.size > 1 and any(self._stacks.glob("rank-*.txt"))
            if told or seconds > self.allowed_seconds:
                self._report(seconds)
            elif self._console is not None and self._console.quiet_seconds > self._quiet_seconds:
                self._console.line(
                    f"{datetime.now():%F %T}  step {self._step}, {_WORDS[self._place]} for {seconds:.0f} s"
                )

    def _report(self, seconds: float) -> None:
        """Write our stacks, wait for those of the others, and end the job if it is on us to do so."""
        place = self._step, self._place
        writer = threading.Thread(target=self._write_stacks, args=(seconds,), daemon=True)
        writer.start()
        # Rank 0 speaks; the next one only if rank 0 is among those that do not answer.
        patience = _GRACE_SECONDS + 2 * self._tick + min(2 * self._longest, self._limit)
        if self._ended.wait(patience if self._world.is_root else 2 * patience + _WRITE_SECONDS):
            return
        if (self._step, self._place) != place:
            (self._stacks / f"rank-{self._world.rank}.txt").unlink(missing_ok=True)
            return  # it goes on after all
        found: list[dict[int, tuple[int, int]]] = []
        reader = threading.Thread(target=lambda: found.append(read_places(self._stacks)), daemon=True)
        reader.start()
        reader.join(_WRITE_SECONDS)
        hosts = [one.host for one in self._world.places]
        cause = name_the_missing(found[0] if found else {}, hosts)
        speaker = min(found[0], default=0) if found else 0
        if speaker != self._world.rank and self._ended.wait(3 * _WRITE_SECONDS):
            return
        end_job(
            f"hpctrain: no progress for {seconds:.0f} s at step {self._step}: {cause}; stacks of all ranks are in "
            f"{self._stacks}; see to that host or leave it out, and start again: the run resumes from its last "
            "checkpoint",
            1,
        )

    def _write_stacks(self, seconds: float) -> None:
        path = self._stacks / f"rank-{self._world.rank}.txt"
        self._stacks.mkdir(parents=True, exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(
                f"{self._step} {self._place}\nrank {self._world.rank} on {self._world.host}, process {os.getpid()}: "
                f"step {self._step}, {_WORDS[self._place]} for {seconds:.0f} s\n\n"
            )
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)


def read_places(stacks: Path) -> dict[int, tuple[int, int]]:
    """Return (step, place) of each rank that has written its stacks."""
    places = {}
    for path in stacks.glob("rank-*.txt"):
        try:
            step, place = path.read_text(encoding="utf-8").split("\n", 1)[0].split()
            places[int(path.stem.removeprefix("rank-"))] = int(step), int(place)
        except (OSError, ValueError):
            continue  # not written to its end
    return places


def name_the_missing(places: dict[int, tuple[int, int]], hosts: Sequence[str]) -> str:
    """Return words for whom a job waits: ranks that do not answer, or those behind the others."""
    if not places:
        return "no rank could write where it is; the file system of the run directory may hang"
    silent = [rank for rank in range(len(hosts)) if rank not in places]
    if silent:
        return f"{_ranks(silent, hosts)} does not answer (stopped, or its host is gone)"
    first = min(places.values())
    late = [rank for rank in sorted(places) if places[rank] == first]
    if len(late) == len(hosts):
        return f"all ranks are {_WORDS[first[1]]} and none comes out of it; the network or MPI may hang"
    return f"{_ranks(late, hosts)} is behind the others, {_WORDS[first[1]]} in step {first[0]}"


def _ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return ", ".join(f"rank {rank} on {hosts[rank]}" for rank in ranks[:_NAMED]) + more


def give_horovod_time(limit_seconds: float) -> None:
    """Let Horovod's own stall check, which does not know why, be the second. To be called before Horovod starts.

    It looks between two rounds of communication, so a rank that is stopped altogether keeps it from looking at all.
    """
    later = str(int(3 * limit_seconds + 30))
    os.environ["HOROVOD_STALL_CHECK_TIME_SECONDS"] = os.environ["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"] = later


class Watched:
    """Stands for an object of which every use is a sign of life, such as the reader of an evaluation."""

    def __init__(self, inner: Any, sign: Callable[[], None]) -> None:
        self._inner, self._sign = inner, sign

    def __getattr__(self, name: str) -> Any:
        self._sign()
        return getattr(self._inner, name)


class TimedConsole(Console):
    """A Console that knows how long it has been silent."""

    def __init__(self, enabled: bool) -> None:
        super().__init__(enabled)
        self._spoke = time.monotonic()

    @property
    def quiet_seconds(self) -> float:
        """Seconds since the last line."""
        return time.monotonic() - self._spoke

    def line(self, text: str) -> None:
        """See Console."""
        self._spoke = time.monotonic()
        super().line(text)


class TimedBatches:
    """Iterator that adds up the time its consumer waits for it, and tells when the consumer comes and goes."""

    def __init__(self, batches: Iterator[Any], at: Callable[[int], None]) -> None:
        self._batches, self._at = batches, at
        self.seconds = 0.0

    def __iter__(self) -> "TimedBatches":
        return self

    def __next__(self) -> Any:
        self._at(INPUT)
        started = time.perf_counter()
        batch = next(self._batches)
        self.seconds += time.perf_counter() - started
        self._at(STEP)
        return batch
