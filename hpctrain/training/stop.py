"""When a run should end before it is finished: signals and the walltime. A rank only votes; the step decides."""

import os
import signal
import time
from collections.abc import Mapping
from types import FrameType

EXIT_PREEMPTED = 85  # "resume me": a checkpoint is there and steps are left; job scripts requeue on it

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """This rank's vote for an agreed stop at the end of a step.

    SIGTERM and SIGUSR1 (batch systems), SIGINT (Ctrl-C), and the job's own end time less a margin all ask for it.
    A second Ctrl-C ends the process at once. `step_seconds` is what a step takes: a vote ends the run only after the
    step in which it is given, and is given at its start.
    """

    def __init__(self, end_time_seconds: float | None = None, margin_seconds: float = 120.0) -> None:
        self.reason = ""
        self.step_seconds = 0.0
        self._deadline = None if end_time_seconds is None else end_time_seconds - margin_seconds
        self._previous = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}

    @property
    def requested(self) -> bool:
        """Whether this rank wants the run to stop."""
        # The next vote would be heard two steps from now.
        return self.leaves_no_time_for(2 * self.step_seconds)

    def leaves_no_time_for(self, seconds: float) -> bool:
        """Whether this rank wants the run to stop, also because what takes so long would last beyond its time."""
        if not self.reason and self._deadline is not None and time.time() + seconds >= self._deadline:
            self.reason = "the walltime is nearly over"
        return bool(self.reason)

    def close(self) -> None:
        """Put back the signal handlers of before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason:
            raise KeyboardInterrupt
        self.reason = self.reason or f"{signal.Signals(number).name} received"


def job_end_time(environ: Mapping[str, str] = os.environ) -> float | None:
    """Return when the batch system ends this job, in seconds since the epoch, where it says so; else None.

    HPCTRAIN_END_TIME, which job scripts set, goes before Slurm's SLURM_JOB_END_TIME.
    """
    for name in ("HPCTRAIN_END_TIME", "SLURM_JOB_END_TIME"):
        try:
            return float(environ[name])
        except (KeyError, ValueError):
            continue
    return None
