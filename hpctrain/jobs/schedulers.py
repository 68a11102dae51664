"""Slurm and PBS as programs on the PATH: submit, ask, cancel."""

import json
import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hpctrain.errors import UserError

_PATIENCE_SECONDS = 120  # a busy Slurm controller answers late


@dataclass(frozen=True)
class JobState:
    """What the scheduler says of a job. `active`: it waits, runs or ends just now."""

    job: str
    word: str
    active: bool
    elapsed: str = ""
    limit: str = ""
    reason: str = ""


class Scheduler(Protocol):
    """A batch system."""

    def submit(self, script: Path, options: Sequence[str], variables: Mapping[str, str], hidden: Iterable[str]) -> str:
        """Submit a script and return the job's id. The job sees `variables`, and none of `hidden` from outside."""

    def after(self, job: str, *, any_end: bool) -> list[str]:
        """Return the options that make a job wait for another: for any end of it, or for a good one."""

    def array(self, first: int, last: int) -> list[str]:
        """Return the options of an array of jobs."""

    def states(self, jobs: Sequence[str]) -> list[JobState]:
        """Return what is known of the jobs, in their order, of an array of each of its jobs.

        Those the scheduler has forgotten are left out.
        """

    def cancel(self, jobs: Sequence[str]) -> None:
        """End jobs that wait or run."""


class Slurm:
    """sbatch, squeue, sacct, scancel."""

    JOB = re.compile(r"\d+(?:_\d+)?")

    def submit(self, script: Path, options: Sequence[str], variables: Mapping[str, str], hidden: Iterable[str]) -> str:
        """See Scheduler. sbatch passes its whole environment on, so what would be taken for a setting is removed."""
        # SBATCH_* variables go before directives: a forgotten one would change the job unseen.
        environ = {name: value for name, value in _environ(hidden).items() if not name.startswith("SBATCH_")}
        output = _call(["sbatch", "--parsable", *options, str(script)], environ | dict(variables))
        return self._id(output)

    def _id(self, output: str) -> str:
        job = output.strip().splitlines()[-1].split(";")[0] if output.strip() else ""
        if not self.JOB.fullmatch(job):
            raise UserError(
                f"sbatch answered {output.strip()!r} instead of a job id; look at squeue before trying again"
            )
        return job

    def after(self, job: str, *, any_end: bool) -> list[str]:
        """See Scheduler."""
        return [f"--dependency={'afterany' if any_end else 'afterok'}:{job}"]

    def array(self, first: int, last: int) -> list[str]:
        """See Scheduler."""
        return [f"--array={first}-{last}"]

    def states(self, jobs: Sequence[str]) -> list[JobState]:
        """See Scheduler. Ended jobs leave squeue after some minutes; sacct knows them where accounting is kept."""
        found: dict[str, list[JobState]] = {}
        query = ["squeue", "--noheader", "--states=all", f"--jobs={','.join(jobs)}", "--format=%F|%i|%T|%M|%l|%r"]
        listed = _try(query)
        if listed is None:  # one job alone that it does not know is an error
            _call(["squeue", "--noheader", "--format=%i", "--states=RUNNING"])
            listed = ""
        for line in listed.splitlines():
            first, job, word, elapsed, limit, reason = line.split("|", 5)
            state = JobState(job, word, word not in _SLURM_ENDED, elapsed, limit, "" if reason == "None" else reason)
            found.setdefault(first if first in jobs else job, []).append(state)
        missing = [job for job in jobs if job not in found]
        format_ = "--format=JobID,State,Elapsed,Timelimit"
        query = ["sacct", "-X", "--noheader", "--parsable2", f"--jobs={','.join(missing)}", format_]
        for line in ((missing and _try(query)) or "").splitlines():
            parts = line.split("|")
            key = next((job for job in missing if parts[0] == job or parts[0].startswith(f"{job}_")), None)
            if len(parts) == 4 and key is not None:
                word = parts[1].split(" ")[0]
                state = JobState(parts[0], word, word not in _SLURM_ENDED, parts[2], parts[3])
                found.setdefault(key, []).append(state)
        return [state for job in jobs for state in found.get(job, [])]

    def cancel(self, jobs: Sequence[str]) -> None:
        """See Scheduler."""
        _call(["scancel", *jobs])


_SLURM_ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"}
_SLURM_ENDED |= {"PREEMPTED", "REVOKED", "TIMEOUT"}


class Pbs:
    """qsub, qstat, qdel of OpenPBS and PBS Professional."""

    JOB = re.compile(r"\d+(?:\[\d*\])?(?:\.[A-Za-z0-9.-]+)?")

    def submit(self, script: Path, options: Sequence[str], variables: Mapping[str, str], hidden: Iterable[str]) -> str:
        """See Scheduler. qsub passes its environment on only where a directive -V asks for it."""
        named = (
            ["-v", ",".join(variables)] if variables else []
        )  # names only: qsub takes the values from its environment
        output = _call(["qsub", *options, *named, str(script)], _environ(hidden) | dict(variables))
        job = output.strip().splitlines()[-1] if output.strip() else ""
        if not self.JOB.fullmatch(job):
            raise UserError(f"qsub answered {output.strip()!r} instead of a job id; look at qstat before trying again")
        return job

    def after(self, job: str, *, any_end: bool) -> list[str]:
        """See Scheduler."""
        return ["-W", f"depend={'afterany' if any_end else 'afterok'}:{job}"]

    def array(self, first: int, last: int) -> list[str]:
        """See Scheduler."""
        return ["-J", f"{first}-{last}"]

    def states(self, jobs: Sequence[str]) -> list[JobState]:
        """See Scheduler. Ended jobs are known where the server keeps a history (-x)."""
        text = _try(["qstat", "-x", "-f", "-F", "json", *jobs]) or _try(["qstat", "-f", "-F", "json", *jobs])
        try:
            listed: dict[str, dict[str, Any]] = json.loads(text or "{}").get("Jobs", {})
        except ValueError:
            raise UserError(
                "qstat -f -F json did not answer with JSON; this needs PBS Professional or OpenPBS"
            ) from None
        found = []
        for job in jobs:
            facts = listed.get(job) or next(
                (f for key, f in listed.items() if key.split(".")[0] == job.split(".")[0]), None
            )
            if facts is None:
                continue
            letter = str(facts.get("job_state", "?"))
            word, active = _PBS_STATES.get(letter, letter), letter not in "FX"
            if letter == "F":
                word += f" (exit status {facts['Exit_status']})" if "Exit_status" in facts else " (never started)"
            elapsed = str(facts.get("resources_used", {}).get("walltime", ""))
            limit = str(facts.get("Resource_List", {}).get("walltime", ""))
            found.append(
                JobState(job, word, active, elapsed, limit, str(facts.get("comment", "")) if letter in "QH" else "")
            )
        return found

    def cancel(self, jobs: Sequence[str]) -> None:
        """See Scheduler."""
        _call(["qdel", *jobs])


_PBS_STATES = {
    "Q": "QUEUED",
    "H": "HELD",
    "W": "WAITING",
    "R": "RUNNING",
    "B": "RUNNING",  # an array that has begun
    "E": "ENDING",
    "S": "SUSPENDED",
    "F": "FINISHED",
    "X": "FINISHED",
}

SCHEDULERS: dict[str, type[Slurm] | type[Pbs]] = {"slurm": Slurm, "pbs": Pbs}


def _environ(hidden: Iterable[str]) -> dict[str, str]:
    names = set(hidden)
    return {name: value for name, value in os.environ.items() if name not in names}


def _call(command: Sequence[str], environ: Mapping[str, str] | None = None) -> str:
    """Return what a program prints, or raise UserError with its own words."""
    try:
        done = subprocess.run(
            command, env=environ, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=False
        )
    except FileNotFoundError:
        raise UserError(
            f"there is no {command[0]} on the PATH; run this on a login node, or choose another site"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer within {_PATIENCE_SECONDS} s; try again later") from None
    if done.returncode:
        words = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise UserError(f"{command[0]} refused: {words}")
    return done.stdout


def _try(command: Sequence[str]) -> str | None:
    """Return what a program prints, or None if it fails."""
    try:
        return _call(command)
    except UserError:
        return None
