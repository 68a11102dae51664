"""Child processes that can be ended with all that they started."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

_LOOK_SECONDS = 0.1


class Child:
    """A program in a session of its own. Its exit code is that of a shell: 128 + N when signal N ended it."""

    def __init__(self, words: Sequence[str], env: Mapping[str, str], output: IO[bytes] | None = None) -> None:
        """Start it; its output goes where ours does, or to `output`. Raises OSError if it cannot be started."""
        self._process = subprocess.Popen(
            words,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self, seconds: float) -> int | None:
        """Return the exit code if it ends within so many seconds, else None."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        return code if code >= 0 else 128 - code

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the program itself, if it still runs; launchers pass it on to their ranks."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def end(self, grace_seconds: float) -> None:
        """Ask the program to end; then kill it and every process of its session and its tree."""
        family = _family(self._process.pid)
        if self._process.poll() is None:
            self.send(signal.SIGTERM)
            self.send(signal.SIGCONT)
            self.wait(grace_seconds)
        for pid in family | _family(self._process.pid):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


def run_limited(words: Sequence[str], env: Mapping[str, str], seconds: float, output: IO[bytes]) -> int | None:
    """Run a program for so many seconds at most and return its exit code, None if it had to be ended."""
    child = Child(words, env, output)
    try:
        return child.wait(seconds)
    finally:
        child.end(_LOOK_SECONDS)


def _family(root: int) -> set[int]:
    """The process, its descendants, and all processes of the session it leads: those whose parent is gone as well."""
    parents, found = {}, {root}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if fields[0] == "Z":
            continue
        parents[int(entry)] = int(fields[1])
        if int(fields[3]) == root:
            found.add(int(entry))
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found & parents.keys()


class StopFlag:
    """Whether we were told to stop, by SIGUSR1, SIGTERM or Ctrl-C; passes it on as SIGUSR1 to the child that runs.

    Always SIGUSR1: mpirun passes that on, and kills the ranks at a SIGTERM. srun passes both on.
    """

    NUMBER = signal.SIGUSR1

    def __init__(self) -> None:
        self.requested = False
        self.child: Child | None = None
        self._previous = {
            number: signal.signal(number, self._on_signal) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
        }

    def close(self) -> None:
        """Put back the signal handlers of before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if self.child is not None:
            self.child.send(self.NUMBER)


def pause(seconds: float, unless: StopFlag) -> None:
    """Wait so long, less if a stop is asked for."""
    end = time.monotonic() + seconds
    while not unless.requested and time.monotonic() < end:
        time.sleep(min(_LOOK_SECONDS, seconds))
