"""Submits a study's runs: a job each, one after the other, or all in one allocation; on a local site, runs them."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hpctrain.data.atomic import make_folder
from hpctrain.errors import UserError, cannot_start
from hpctrain.jobs.records import JobRecord, append_record
from hpctrain.jobs.schedulers import SCHEDULERS
from hpctrain.jobs.site import Site
from hpctrain.jobs.submission import Request, Submission, log_path, prepare, write_script
from hpctrain.scaling.study.plan import Run, Study, Try
from hpctrain.scaling.study.together import prepare_together

Say = Callable[[str], None]


def _request(study: Study, run: Run) -> Request:
    """Return what `hpctrain submit` would be asked for this run."""
    arguments = study.arguments
    return Request(
        arguments.recipe,
        (*study.overrides, f"train.global_batch={run.global_batch}"),
        run.nodes,
        walltime=arguments.walltime,
        account=arguments.account,
        partition=arguments.partition,
        ranks_per_node=arguments.ranks_per_node,
        cores=arguments.cores,
        name=f"study-{run.nodes}-{run.repeat}",
        run_dir=study.out / run.next_dir(),
        requeue=0,  # a run in two parts would be measured in two places
    )


def check(study: Study, site: Site) -> list[Submission]:
    """Return the job of each run, or raise UserError if any of them cannot be submitted. Writes nothing."""
    jobs = [prepare(_request(study, run), site) for run in study.runs]
    for job in jobs:
        if job.refusal is not None:
            raise UserError(job.refusal)
    if study.arguments.how == "together":
        prepare_together(study, site, study.runs)
    return jobs


def submit(study: Study, site: Site, runs: Sequence[Run], active: Sequence[str], say: Say) -> None:
    """Submit these runs of a checked study, or run them here; study.json is true after each of them.

    `active` are the ids of the study's jobs that wait or run; a chain goes on from the last of them.
    """
    if site.scheduler == "local":
        for run in runs:
            _run_here(study, site, run, say)
    elif study.arguments.how == "together":
        _submit_together(study, site, runs, say)
    else:
        chain = study.arguments.how == "chain"
        before = max(active, key=lambda job: int(job.split(".")[0]), default=None) if chain else None
        for run in runs:
            job = prepare(_request(study, run), site)
            options: list[str] = SCHEDULERS[site.scheduler]().after(before, any_end=True) if before else []
            run.tries.append(Try(run.next_dir(), site.scheduler))
            run.tries[-1].job = job_id = _submit(job, site.scheduler, options)
            study.save()
            append_record(job.run_dir, JobRecord(site.scheduler, job_id, str(log_path(job, site.scheduler, job_id))))
            say(f"{_name(run)}: job {job_id}")
            before = job_id if chain else None


def _submit_together(study: Study, site: Site, runs: Sequence[Run], say: Say) -> None:
    job = prepare_together(study, site, runs)
    for run in runs:
        run.tries.append(Try(run.next_dir(), site.scheduler))
    job_id = _submit(job, site.scheduler, [])
    for run in runs:
        run.tries[-1].job = job_id
    study.save()
    append_record(job.run_dir, JobRecord(site.scheduler, job_id, str(log_path(job, site.scheduler, job_id))))
    say(f"{len(runs)} runs on {job.layout.nodes} nodes: job {job_id}")


def _submit(job: Submission, scheduler_name: str, options: Sequence[str]) -> str:
    """Write a job's script and submit it; return its id."""
    script, hidden = write_script(job)
    return SCHEDULERS[scheduler_name]().submit(script, options, {}, hidden)


def _run_here(study: Study, site: Site, run: Run, say: Say) -> None:
    """Run a local job in the foreground. What it says goes to a log file."""
    job = prepare(_request(study, run), site)
    log = study.out / "logs" / f"{job.run_dir.name}.out"
    make_folder(log.parent)
    this = Try(run.next_dir(), "local")
    run.tries.append(this)
    study.save()
    say(f"{_name(run)}: running; its log: {log}")
    path = os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)])
    with open(log, "wb") as file:
        try:
            process = subprocess.Popen(
                job.command, env=os.environ | job.variables | {"PATH": path}, stdout=file, stderr=subprocess.STDOUT
            )
        except OSError as error:
            raise cannot_start(job.command[0], error) from None
        try:
            this.exit_code = process.wait()
        except KeyboardInterrupt:  # Ctrl-C reaches mpirun too, which ends the ranks
            process.wait()
            raise
    study.save()
    if this.exit_code:
        last = log.read_text(errors="replace").strip().splitlines()[-1:]
        say(f"{_name(run)}: failed with exit code {this.exit_code}: {''.join(last)}")


def _name(run: Run) -> str:
    return f"{run.nodes} node{'s' if run.nodes > 1 else ''}" + (f", repeat {run.repeat}" if run.repeat > 1 else "")
