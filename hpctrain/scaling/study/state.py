"""How each run of a study stands: from its run directory, and from the scheduler where that does not tell."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hpctrain.errors import UserError
from hpctrain.jobs.schedulers import SCHEDULERS, JobState
from hpctrain.scaling.run_data import number, read_metrics
from hpctrain.scaling.study.plan import Run, Study, Try

Word = Literal["done", "missing", "waiting", "running", "failed", "unknown"]

_AT_WORK = ("RUNNING", "COMPLETING", "ENDING")


@dataclass(frozen=True)
class State:
    """Where a run stands, and why or how far in words."""

    word: Word
    note: str = ""


def states(study: Study) -> list[State]:
    """Return the states of a study's runs, in order. Each scheduler is asked once, and only where it is needed.

    A job whose scheduler does not answer, as on a machine without it, is `unknown`.
    """
    found = [_from_files(study.out, run) for run in study.runs]
    open_tries = [run.tries[-1] for run, state in zip(study.runs, found, strict=True) if state is None]
    known, silent = _ask(open_tries)
    result = []
    for run, state in zip(study.runs, found, strict=True):
        if state is None and run.tries[-1].scheduler in silent:
            state = State("unknown", f"job {run.tries[-1].job}; {silent[run.tries[-1].scheduler]}")
        result.append(state or _from_scheduler(study.out, run.tries[-1], known))
    return result


def progress(run_dir: Path) -> tuple[int, str | None]:
    """Return the last step that a run has logged, and how its last session ended if it did."""
    try:
        records = read_metrics(run_dir / "metrics.jsonl")
    except UserError:
        return 0, None
    steps = [int(number(record.get("step")) or 0) for record in records if record.get("kind") == "train"]
    end = str(records[-1].get("reason")) if records and records[-1].get("kind") == "end" else None
    return max(steps, default=0), end


def _from_files(out: Path, run: Run) -> State | None:
    """Return a run's state if files tell it; None means that the scheduler knows."""
    if not run.tries:
        return State("missing")
    last = run.tries[-1]
    step, end = progress(out / last.run_dir)
    if end == "finished":
        return State("done")
    if last.scheduler != "local":
        return None
    if last.exit_code is None:
        return State("missing", f"interrupted after step {step}" if step else "interrupted")
    return State("failed", f"exit code {last.exit_code}")


def _from_scheduler(out: Path, last: Try, known: dict[tuple[str, str], JobState]) -> State:
    step, end = progress(out / last.run_dir)
    after = f" after step {step}" if step else ""
    if last.job is None:
        return State("missing", "it was not submitted")
    job = known.get((last.scheduler, last.job))
    if job is None:
        return State("failed", f"job {last.job} is no longer known{after}")
    if job.active and (step or job.word in _AT_WORK):
        return State("running", f"job {last.job}, " + (f"step {step}" if step else "before its first step"))
    if job.active:
        return State("waiting", f"job {last.job} is {job.word}" + (f" ({job.reason})" if job.reason else ""))
    return State("failed", f"job {last.job} {'stopped' if end == 'preempted' else 'ended'} as {job.word}{after}")


def _ask(tries: Sequence[Try]) -> tuple[dict[tuple[str, str], JobState], dict[str, str]]:
    """Return what schedulers know by scheduler and job, and why a scheduler did not answer."""
    found, silent = {}, {}
    for name, kind in SCHEDULERS.items():
        jobs = list(dict.fromkeys(each.job for each in tries if each.scheduler == name and each.job is not None))
        try:
            for state in kind().states(jobs) if jobs else []:
                found[name, state.job] = state
        except UserError as error:
            silent[name] = str(error)
    return found, silent
