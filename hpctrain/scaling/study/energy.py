"""What a job consumed, where the scheduler counts it: Slurm with an energy plugin and accounting."""

import shutil
import subprocess

_PATIENCE_SECONDS = 60
_UNKNOWN = (0, 2**32 - 2, 2**64 - 2)  # as Slurm writes that nothing was counted


def job_energy_joules(scheduler: str, job: str) -> float | None:
    """Return the energy of a whole job, start-up included, or None where nobody knows it.

    It is right only for a job that had its nodes to itself; Slurm says so of ConsumedEnergy.
    """
    if scheduler != "slurm" or shutil.which("sacct") is None:
        return None
    query = ["sacct", "--noheader", "--parsable2", f"--jobs={job}", "--format=JobID,ConsumedEnergyRaw"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=_PATIENCE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return parse_energy(done.stdout, job) if done.returncode == 0 else None


def parse_energy(text: str, job: str) -> float | None:
    """Return the joules in what sacct printed: the job's own, else those of the job's programs together.

    The steps `batch` and `extern` run beside the programs on the same nodes, and would count them twice.
    """
    lines = [line.split("|") for line in text.splitlines()]
    found = {parts[0]: int(parts[1]) for parts in lines if len(parts) == 2 and parts[1].isdecimal()}
    known = {name: joules for name, joules in found.items() if joules not in _UNKNOWN}
    programs = [
        joules for name, joules in known.items() if name.startswith(f"{job}.") and name.split(".")[1].isdecimal()
    ]
    return float(known[job]) if job in known else float(sum(programs)) if programs else None
