"""What rank 0 prints while it trains: plain lines in a batch log, a progress bar under them on a terminal."""

import os
import stat
import sys
from pathlib import Path
from typing import Any


class Console:
    """Prints on rank 0 and is silent elsewhere."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self._bar: Any = None
        self._task: Any = None

    def line(self, text: str) -> None:
        """Print one line."""
        if not self.enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, flush=True)

    def start_progress(self, total_steps: int, done: int) -> None:
        """Show a bar of `total_steps` if the output is a terminal."""
        if self.enabled and _on_terminal():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[note]}"))
            self._bar = Progress(*columns, TimeRemainingColumn())
            self._task = self._bar.add_task("steps", total=total_steps, completed=done, note="")
            self._bar.start()

    def progress(self, step: int, note: str) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=note)

    def stop_progress(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _on_terminal() -> bool:
    """Whether somebody sees this output as it appears.

    mpirun gives its ranks a terminal of its own making even when it writes to a file itself, so the launcher's output
    has to be one too.
    """
    if not sys.stdout.isatty():
        return False
    try:
        return (
            stat.S_ISCHR(os.stat(f"/proc/{os.getppid()}/fd/1").st_mode)
            and str(Path(f"/proc/{os.getppid()}/fd/1").readlink()) != "/dev/null"
        )
    except OSError:
        return False
