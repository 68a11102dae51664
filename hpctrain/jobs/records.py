"""Which jobs a run has had: RUN_DIR/jobs.jsonl, one JSON object a line, appended by `submit` and by job scripts."""

import json
from dataclasses import dataclass
from pathlib import Path

from hpctrain.errors import UserError
from hpctrain.jobs.schedulers import SCHEDULERS

FILE_NAME = "jobs.jsonl"


@dataclass(frozen=True)
class JobRecord:
    """One job: whose it is and what it is called there."""

    scheduler: str
    job: str
    log: str = ""


def append_record(run_dir: Path, record: JobRecord) -> None:
    """Add a job to a run's list. Raises UserError if it cannot be written."""
    line = json.dumps({"scheduler": record.scheduler, "id": record.job, "log": record.log})
    try:
        with open(run_dir / FILE_NAME, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise UserError(
            f"job {record.job} runs, but {run_dir / FILE_NAME} cannot be written: {error.strerror}"
        ) from None


def members(run_dir: Path) -> list[Path]:
    """Return the runs of an array, RUN_DIR/SEED each, in the order of the seeds; none if it is no array."""
    try:
        found = [path for path in run_dir.iterdir() if path.name.isdigit() and path.is_dir()]
    except FileNotFoundError:
        return []
    return sorted(found, key=lambda path: int(path.name))


def read_records(run_dir: Path) -> list[JobRecord]:
    """Return a run's jobs in order of submission, then those by which each run of an array went on.

    Lines that are no record are left out.
    """
    return [record for path in (run_dir, *members(run_dir)) for record in _read(path / FILE_NAME)]


def _read(path: Path) -> list[JobRecord]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    records = []
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if not isinstance(entry, dict):
            continue
        scheduler, job = str(entry.get("scheduler")), str(entry.get("id"))
        if scheduler in SCHEDULERS and SCHEDULERS[scheduler].JOB.fullmatch(job):
            records.append(JobRecord(scheduler, job, str(entry.get("log", ""))))
    return records


def find_run(run: str) -> Path:
    """Return the run directory of a path or of a name under runs/. Raises UserError if there is none."""
    for path in (Path(run), Path("runs") / run):
        if path.is_dir():
            return path
    raise UserError(f"there is no run directory {run}, nor runs/{run}; `hpctrain status` lists what is in runs/")


def known_runs() -> list[Path]:
    """Return the run directories under runs/ that have had jobs, sorted."""
    return sorted(path.parent for path in Path("runs").glob(f"*/{FILE_NAME}"))
