"""Runs tasks in worker processes that count what they do, and tells the user how far they are."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TextIO, TypeVar

from hpctrain.errors import UserError

Context = TypeVar("Context")
Task = TypeVar("Task")
Result = TypeVar("Result")

_POLL_SECONDS = 0.25


class Count(Protocol):
    """Called by a task: `records` were worked through, of `num_bytes`; or found done already."""

    def __call__(self, records: int, num_bytes: int = 0, already_done: bool = False) -> None: ...


def available_cores() -> int:
    """Return how many cores this process may use, which a batch system often restricts."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    function: Callable[[Context, Task, Count], Result],
    context: Context,
    tasks: Sequence[Task],
    workers: int,
    progress: "Progress",
) -> list[Result]:
    """Return [function(context, task, count) for each task], worked out by `workers` processes (1: in this one).

    The first exception of a task ends the rest and is raised here. Processes are started afresh rather than forked,
    since MPI, TensorFlow and HDF5 do not survive a fork; so `function` must be importable, and a program that calls
    this needs `if __name__ == "__main__":`.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        done = [0, 0, 0]

        def count(records: int, num_bytes: int = 0, already_done: bool = False) -> None:
            _add(done, records, num_bytes, already_done)
            progress.show(*done)

        return [function(context, task, count) for task in tasks]
    return _run_in_pool(function, context, tasks, workers, progress)


def _run_in_pool(
    function: Callable[[Context, Task, Count], Result],
    context: Context,
    tasks: Sequence[Task],
    workers: int,
    progress: "Progress",
) -> list[Result]:
    fresh = multiprocessing.get_context("spawn")
    callers_own = set(multiprocessing.active_children())
    done = fresh.Array("q", 3)
    pool = ProcessPoolExecutor(workers, fresh, _start_worker, (function, context, done))
    try:
        futures = [pool.submit(_work, task) for task in tasks]
        pending = set(futures)
        while pending:
            finished, pending = wait(pending, _POLL_SECONDS, FIRST_EXCEPTION)
            for future in finished:
                future.result()
            progress.show(*done[:])
        results = [future.result() for future in futures]
        pool.shutdown()  # also waits for workers that have only just started, and would complain if this process left
        return results
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, most likely because the node ran out of memory; use fewer workers or more "
            "shards, and run the command again"
        ) from error
    finally:
        for child in set(multiprocessing.active_children()) - callers_own:  # none, unless something went wrong
            child.terminate()
        pool.shutdown(cancel_futures=True)


_worker: tuple[Any, Any, Any]


def _start_worker(function: Any, context: Any, done: Any) -> None:
    global _worker
    _worker = (function, context, done)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Workers of a killed parent would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(task: Any) -> Any:
    function, context, done = _worker

    def count(records: int, num_bytes: int = 0, already_done: bool = False) -> None:
        with done.get_lock():
            _add(done, records, num_bytes, already_done)

    return function(context, task, count)


def _add(done: Any, records: int, num_bytes: int, already_done: bool) -> None:
    if already_done:
        done[2] += records
    else:
        done[0] += records
        done[1] += num_bytes


class Progress:
    """One line with share done, rate and time left: redrawn on a terminal, else printed every `every_seconds`.

    with Progress("prepare train", total_records=1000) as progress:
        progress.show(records, num_bytes, already_done)
    """

    def __init__(
        self,
        title: str,
        total_records: int,
        stream: TextIO | None = None,
        every_seconds: float = 15.0,
        quiet: bool = False,
    ) -> None:
        self._title = title
        self._total = max(1, total_records)
        self._stream = stream or sys.stderr
        self._every_seconds = every_seconds
        self._quiet = quiet
        self._start = self._last = time.monotonic()
        self._live: Any = None
        self._task: Any = None

    def __enter__(self) -> "Progress":
        if not self._quiet and self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TaskProgressColumn, TextColumn
            from rich.progress import Progress as RichProgress

            title, text = TextColumn("{task.description}"), TextColumn("{task.fields[text]}")
            columns = (title, BarColumn(), TaskProgressColumn(), text)
            self._live = RichProgress(*columns, console=Console(file=self._stream), transient=True)
            self._task = self._live.add_task(self._title, total=self._total, text="")
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, records: int, num_bytes: int, already_done: int) -> None:
        """Tell how far the work is: records worked through, their bytes, and records found done at the start."""
        now = time.monotonic()
        if self._quiet or now - self._last < (0.2 if self._live else self._every_seconds):
            return
        self._last = now
        finished = records + already_done
        text = self._rates(records, num_bytes, finished, now - self._start)
        if self._live is not None:
            self._live.update(self._task, completed=finished, text=text)
        else:
            share = f"{finished:,} of {self._total:,} records ({100 * finished / self._total:.1f} %)"
            print(f"{self._title}: {share}, {text}", file=self._stream, flush=True)

    def _rates(self, records: int, num_bytes: int, finished: int, seconds: float) -> str:
        if records == 0 or seconds <= 0:
            return "no rate yet"
        left = max(0, self._total - finished) * seconds / records
        return f"{records / seconds:,.0f} records/s, {num_bytes / seconds / 1e6:,.1f} MB/s, {_duration(left)} left"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
