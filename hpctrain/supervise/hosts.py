"""Which hosts a job has: from Slurm, from PBS, or as they are given."""

import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hpctrain.errors import UserError

_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PATIENCE_SECONDS = 60
GUARD = "hpctrain-guard"  # the step in which the job script watches over its own node


@dataclass(frozen=True)
class Allocation:
    """Hosts in the order in which they were given, each once."""

    hosts: tuple[str, ...]
    ranks_per_host: int | None  # as the batch system was asked; None where it does not say
    scheduler: str  # slurm, pbs or none


def find_allocation(hosts: str | None, hostfile: Path | None, environ: Mapping[str, str]) -> Allocation:
    """Return the hosts of `a,b:2,c`, of a host file, or of the surrounding Slurm or PBS job, in this order.

    Raises UserError where there are none, or where a name is none that can be handed to a launcher.
    """
    if hosts is not None:
        return _allocation(_entries(hosts.split(",")), "none")
    if hostfile is not None:
        return _allocation(_entries(_read(hostfile).splitlines()), "none")
    if "SLURM_JOB_NODELIST" in environ:
        names = _hostnames(environ["SLURM_JOB_NODELIST"])
        ranks = re.fullmatch(r"(\d+)(?:\(x\d+\))?", environ.get("SLURM_NTASKS_PER_NODE", ""))
        count = int(ranks[1]) if ranks else 1
        return _allocation([(name, count) for name in names], "slurm")
    if "PBS_NODEFILE" in environ:
        return _allocation(_entries(_read(Path(environ["PBS_NODEFILE"])).splitlines()), "pbs")
    raise UserError("this is no Slurm or PBS job; name the hosts with --hosts a,b,c or --hostfile FILE")


def down_in_slurm(hosts: Iterable[str]) -> set[str]:
    """Return those hosts that Slurm has given up; none where it does not answer."""
    query = ["sinfo", "--noheader", "--Node", f"--nodes={','.join(hosts)}", "--format=%N %T"]
    states = (line.split() for line in _ask(query).splitlines())
    return {state[0] for state in states if len(state) == 2 and state[1].startswith("down")}


def cancel_steps(job: str) -> None:
    """End what still runs of a Slurm job: a step outlives an srun that was killed. Its script and guard stay."""
    lines = _ask(["squeue", "--noheader", "--steps", f"--jobs={job}", "--format=%i %j"]).splitlines()
    steps = [line.partition(" ")[0] for line in lines if line.partition(" ")[2].strip() != GUARD]
    numbered = [step for step in steps if step.rpartition(".")[2].isdigit()]
    if numbered:
        _ask(["scancel", "--quiet", *numbered])


def _ask(command: list[str]) -> str:
    """What a command prints, nothing if it fails: a busy controller is no reason to end a run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _hostnames(nodelist: str) -> list[str]:
    names = _ask(["scontrol", "show", "hostnames", nodelist]).split()
    if not names:
        raise UserError(f"`scontrol show hostnames {nodelist}` names no host; give them with --hosts a,b,c")
    return names


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the host file {path}: {error}; expected a host name a line") from None


def _entries(lines: Iterable[str]) -> list[tuple[str, int]]:
    """Hosts with how often each may be used: `a`, `a:2`, `a slots=2`; a host that comes again adds up."""
    found: Counter[str] = Counter()
    for line in lines:
        words = line.partition("#")[0].split()
        if words:
            name, _, count = words[0].partition(":")
            slots = next((word.removeprefix("slots=") for word in words[1:] if word.startswith("slots=")), count)
            found[name] += int(slots) if slots.isdigit() else 1
    return list(found.items())


def _allocation(entries: list[tuple[str, int]], scheduler: str) -> Allocation:
    for name, _ in entries:
        if not _HOST.fullmatch(name):
            raise UserError(f"{name!r} is no host name; expected letters, digits, dots, dashes and underscores")
    if not entries:
        raise UserError("there are no hosts to run on; name them with --hosts a,b,c or --hostfile FILE")
    counts = {count for _, count in entries}
    return Allocation(tuple(name for name, _ in entries), min(counts), scheduler)
