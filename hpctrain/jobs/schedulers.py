"""Slurm and PBS as programs on the PATH: submit, ask, cancel."""

import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

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

    JOB = re.compile(r"\d+(?:\[\d*\])?(?:\.[A-Za-z0-9._-]+)?")

    def submit(self, script: Path, options: Sequence[str], variables: Mapping[str, str], hidden: Iterable[str]) -> str:
        """See Scheduler. qsub passes its environment on only where a directive -V asks for it."""
        # Names alone might get their values from the environment of a qsub that has stayed in the background.
        given = ["-v", ",".join(f"{name}={value}" for name, value in variables.items())] if variables else []
        output = _call(["qsub", *options, *given, str(script)], _environ(hidden))
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
        """See Scheduler. Ended jobs are known where the server keeps a history (-x), which it does not by default."""
        # Not as JSON: some versions print some variables of jobs so that it is none.
        known = _pbs_facts(_run(["qstat", "-x", "-f", *jobs]).stdout)
        if not known:
            done = _run(["qstat", "-f", *jobs])
            if done.returncode and not _only(done.stderr, _PBS_UNKNOWN):
                raise UserError(_refusal("qstat", done))
            known = _pbs_facts(done.stdout)
        found = []
        for job in jobs:
            facts = next((facts for name, facts in known.items() if name.split(".")[0] == job.split(".")[0]), None)
            if facts is None:
                continue
            letter = facts.get("job_state", "?")
            word, active = _PBS_STATES.get(letter, letter), letter not in "FX"
            if letter == "F":
                word += f" (exit status {facts['Exit_status']})" if "Exit_status" in facts else " (never started)"
            reason = facts.get("array_state_count" if letter == "B" else "comment" if letter in "QHW" else "", "")
            elapsed, limit = facts.get("resources_used.walltime", ""), facts.get("Resource_List.walltime", "")
            found.append(JobState(job, word, active, elapsed, limit, reason.strip()))
        return found

    def cancel(self, jobs: Sequence[str]) -> None:
        """See Scheduler."""
        # The last one first: else the next of a chain would start when the one before it ends.
        done = _run(["qdel", *reversed(jobs)])
        if done.returncode and not _only(done.stderr, _PBS_UNKNOWN):  # some may have ended just now
            raise UserError(_refusal("qdel", done))


_PBS_UNKNOWN = ("Unknown Job Id", "Job has finished")


def _pbs_facts(printed: str) -> dict[str, dict[str, str]]:
    """Return what `qstat -f` has printed: attributes by name, by job."""
    jobs: dict[str, dict[str, str]] = {}
    facts: dict[str, str] = {}
    for line in printed.replace("\n\t", "").splitlines():  # long lines are broken
        if line.startswith("Job Id: "):
            facts = jobs[line.removeprefix("Job Id: ").strip()] = {}
        elif match := re.fullmatch(r" {4}([A-Za-z_.]+) = (.*)", line):
            facts.setdefault(match[1], match[2])
    return jobs


def _only(words: str, expected: Sequence[str]) -> bool:
    """Return whether every line of a program's complaints holds one of the expected ones."""
    return all(any(part in line for part in expected) for line in words.splitlines() if line.strip())


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


def _run(command: Sequence[str], environ: Mapping[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    """Return how a program ended and what it printed. Raises UserError if it is not there or does not answer."""
    try:
        return subprocess.run(
            command, env=environ, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=False
        )
    except FileNotFoundError:
        raise UserError(
            f"there is no {command[0]} on the PATH; run this on a login node, or choose another site"
        ) from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]} did not answer within {_PATIENCE_SECONDS} s; try again later") from None


def _refusal(program: str, done: "subprocess.CompletedProcess[str]") -> str:
    words = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
    return f"{program} refused: {words}"


def _call(command: Sequence[str], environ: Mapping[str, str] | None = None) -> str:
    """Return what a program prints, or raise UserError with its own words."""
    done = _run(command, environ)
    if done.returncode:
        raise UserError(_refusal(command[0], done))
    return done.stdout


def _try(command: Sequence[str]) -> str | None:
    """Return what a program prints, or None if it fails."""
    try:
        return _call(command)
    except UserError:
        return None
