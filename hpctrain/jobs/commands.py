"""`hpctrain submit`, `status`, `cancel` and `templates`. Imports nothing heavy until a verb runs."""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpctrain.errors import UserError, cannot_start

if TYPE_CHECKING:
    from hpctrain.jobs.schedulers import JobState
    from hpctrain.jobs.submission import Submission


@click.command("submit")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
@click.option("--site", "site_name", required=True, help="A name from `hpctrain sites`, or a YAML file.")
@click.option("--nodes", type=click.IntRange(min=1), required=True, help="Nodes of the job.")
@click.option(
    "--spare-nodes",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Further nodes, for those that fail: the run goes on with them inside the job.",
)
@click.option("--time", "walltime", default="01:00:00", show_default=True, metavar="HH:MM:SS", help="Walltime.")
@click.option("--account", help="Whose hours are used.")
@click.option("--partition", help="Partition (Slurm) or queue (PBS); default: the site's.")
@click.option("--ranks-per-node", type=click.IntRange(min=1), help="Default: the site's.")
@click.option(
    "--cores", type=click.IntRange(min=1), help="Physical cores of a node, where the site's profile does not know."
)
@click.option("--name", help="Name of job and run; default: the recipe's.")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Where the run is kept; default: runs/NAME.")
@click.option("--stage", is_flag=True, help="Copy the data to the nodes' own storage first (the site's node_local).")
@click.option(
    "--stage-env", type=click.Path(path_type=Path), help="A packed Python environment to unpack on the nodes."
)
@click.option("--after", metavar="JOBID", help="Start when this job has ended well.")
@click.option("--array", metavar="A-B", help="Repeat the run with train.seed=A to B, each in RUN_DIR/SEED.")
@click.option("--chain", type=click.IntRange(min=1), default=1, help="Queue so many jobs at once that go on in turn.")
@click.option(
    "--requeue", type=click.IntRange(min=0), help="How often the job goes on by itself; default 20, in a chain 0."
)
@click.option("--dry-run", is_flag=True, help="Print the job script and submit nothing.")
def submit(
    recipe: str,
    overrides: tuple[str, ...],
    site_name: str,
    nodes: int,
    spare_nodes: int,
    walltime: str,
    account: str | None,
    partition: str | None,
    ranks_per_node: int | None,
    cores: int | None,
    name: str | None,
    run_dir: Path | None,
    stage: bool,
    stage_env: Path | None,
    after: str | None,
    array: str | None,
    chain: int,
    requeue: int | None,
    dry_run: bool,
) -> int:
    """Check a training job, write its script from the site's template, and submit it.

    RECIPE is a name from `hpctrain recipes` or a YAML file; each key can be overridden: train.epochs=30. The job stops
    before its walltime is over, and goes on in a further one until the run is finished.
    """
    from hpctrain.jobs.schedulers import SCHEDULERS
    from hpctrain.jobs.site import load_site
    from hpctrain.jobs.submission import Request, knows_cores, local_command_text, prepare

    site = load_site(site_name)
    batch_only = {"--after": after, "--array": array, "--chain": chain > 1, "--stage": stage, "--stage-env": stage_env}
    given = [option for option, value in batch_only.items() if value]
    if site.scheduler == "local" and given:
        raise UserError(f"{given[0]} needs a batch system, and the site {site.name} has none; choose another site")
    if array and chain > 1:
        raise UserError("--array and --chain do not go together; let each job of the array go on by itself (--requeue)")
    if requeue and chain > 1:
        raise UserError(
            "--requeue and --chain do not go together: a job that goes on by itself and the next of the chain would be "
            "two that write one run; leave one of them out"
        )
    bounds = _array_bounds(array)
    request = Request(
        recipe,
        overrides,
        nodes,
        walltime=walltime,
        account=account,
        partition=partition,
        ranks_per_node=ranks_per_node,
        cores=cores,
        name=name,
        run_dir=run_dir,
        array=array is not None,
        requeue=requeue if requeue is not None else (0 if chain > 1 else 20),
        stage=stage,
        stage_env=stage_env,
        spare_nodes=spare_nodes,
    )
    job = prepare(request, site)
    if site.scheduler == "local":
        if dry_run:
            click.echo(local_command_text(job))
            return 0
        return _run_here(job)
    if not knows_cores(request, site):
        click.echo(
            f"warning: the profile {site.name} does not know how many cores a node has, so each rank gets one; give "
            "--cores N, or a profile of your own",
            err=True,
        )
    if after is not None and not SCHEDULERS[site.scheduler].JOB.fullmatch(after):
        raise UserError(f"--after is {after!r}; expected a job id as {site.scheduler} prints it")
    if job.refusal is not None and not dry_run:
        raise UserError(job.refusal)
    if dry_run:
        if job.refusal is not None:
            click.echo(f"warning: submit will refuse this job: {job.refusal}", err=True)
        click.echo(job.script, nl=False)
        return 0
    _submit(job, site.scheduler, after, bounds, chain)
    return 0


def _submit(
    job: "Submission", scheduler_name: str, after: str | None, array: tuple[int, int] | None, chain: int
) -> None:
    from hpctrain.jobs.records import JobRecord, append_record, read_records
    from hpctrain.jobs.schedulers import SCHEDULERS
    from hpctrain.jobs.submission import log_path, write_script

    scheduler = SCHEDULERS[scheduler_name]()
    earlier = [record.job for record in read_records(job.run_dir) if record.scheduler == scheduler_name]
    busy = [state for state in scheduler.states(earlier) if state.active] if earlier else []
    if busy and after is None:
        raise UserError(
            f"job {busy[0].job} of the run {job.run_dir} is {busy[0].word}, and two jobs must not write one run; "
            "cancel it, wait for it with --after, or give another --name or --run-dir"
        )
    script, hidden = write_script(job)
    for link in range(1, chain + 1):
        options = scheduler.after(after, any_end=link > 1) if after else []
        options += scheduler.array(*array) if array else []
        variables = {"CHAIN_LINK": str(link)} if link > 1 else {}
        after = scheduler.submit(script, options, variables, hidden)
        pattern = (f"{after}_*" if scheduler_name == "slurm" else after.replace("[]", "[*]")) if array else after
        log = log_path(job, scheduler_name, pattern)
        append_record(job.run_dir, JobRecord(scheduler_name, after, str(log)))
        click.echo(f"job: {after}")
        click.echo(f"log: {log}")
    click.echo(f"run: {job.run_dir}")


def _run_here(job: "Submission") -> int:
    """Run a local job in the foreground and return its exit code."""
    path = os.pathsep.join([str(Path(sys.prefix) / "bin"), os.environ.get("PATH", os.defpath)])
    try:
        process = subprocess.Popen(job.command, env=os.environ | job.variables | {"PATH": path})
    except OSError as error:
        raise cannot_start(job.command[0], error) from None
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # Ctrl-C reaches mpirun too, which ends the ranks
            continue


def _array_bounds(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})-(\d{1,6})", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise UserError(f"--array is {text!r}; expected the first and the last seed, such as 1-5")
    return int(match[1]), int(match[2])


@click.command("status")
@click.argument("run", required=False)
def status(run: str | None) -> None:
    """Say what the scheduler knows of RUN's jobs, and how far it is; without RUN, of all runs in runs/."""
    from hpctrain.jobs.progress import describe_progress
    from hpctrain.jobs.records import find_run, known_runs, members, read_records

    run_dirs = [find_run(run)] if run is not None else known_runs()
    if not run_dirs:
        click.echo(
            "no run in runs/ has been submitted; `hpctrain submit` does it, and a run elsewhere is named: status RUN"
        )
    for run_dir in run_dirs:
        click.echo(str(run_dir))
        records = read_records(run_dir)
        for line in _job_lines(run_dir):
            click.echo(f"  {line}")
        array = members(run_dir)
        for member in array or [run_dir]:
            for line in describe_progress(member):
                click.echo(f"  {member.name + ': ' if array else ''}{line}")
        logs = [record.log for record in records if record.log and Path(record.log).exists()]
        if logs:
            click.echo(f"  log: {logs[-1]}")


def _job_lines(run_dir: Path) -> list[str]:
    records, states = _states(run_dir)
    if not records:
        return ["no job of it was submitted by `hpctrain submit`"]
    arrays: dict[str, Counter[str]] = {}
    single = []
    for state in states:
        if re.match(r"\d+_", state.job):  # one job of a Slurm array
            arrays.setdefault(state.job.split("_")[0], Counter())[state.word] += 1
        else:
            single.append(state)
    lines = [f"job {job}: " + ", ".join(f"{n} {word}" for word, n in counts.items()) for job, counts in arrays.items()]
    # Ended jobs but the last say nothing about what happens now.
    for state in [state for state in single if state.active] or single[-1:]:
        time = f", {state.elapsed} of {state.limit}" if state.elapsed and state.limit else ""
        lines.append(f"job {state.job}: {state.word}{time}" + (f" ({state.reason})" if state.reason else ""))
    return lines or [f"job {records[-1]}: no longer known to the scheduler"]


def _states(run_dir: Path) -> "tuple[list[str], list[JobState]]":
    """Return the ids of a run's jobs and what their schedulers know of them."""
    from hpctrain.jobs.records import read_records
    from hpctrain.jobs.schedulers import SCHEDULERS

    records = read_records(run_dir)
    states = []
    for name, scheduler in SCHEDULERS.items():
        jobs = list(dict.fromkeys(record.job for record in records if record.scheduler == name))
        states += scheduler().states(jobs) if jobs else []
    return [record.job for record in records], states


@click.command("cancel")
@click.argument("run")
def cancel(run: str) -> None:
    """End RUN's jobs that wait or run. What was trained up to the last checkpoint stays, and can be gone on with."""
    from hpctrain.jobs.records import find_run, read_records
    from hpctrain.jobs.schedulers import SCHEDULERS

    run_dir = find_run(run)
    records = read_records(run_dir)
    if not records:
        raise UserError(f"no job of {run_dir} was submitted by `hpctrain submit`; cancel it with scancel or qdel")
    cancelled = 0
    for name, kind in SCHEDULERS.items():
        jobs = list(dict.fromkeys(record.job for record in records if record.scheduler == name))
        scheduler = kind()
        active = {state.job for state in scheduler.states(jobs) if state.active} if jobs else set()
        ending = [job for job in jobs if any(state == job or state.startswith(f"{job}_") for state in active)]
        if ending:
            scheduler.cancel(ending)
            click.echo(f"cancelled: {' '.join(ending)}")
            cancelled += len(ending)
    if not cancelled:
        click.echo(f"{run_dir} has no job that waits or runs")


@click.command("templates")
@click.option("--copy", "destination", type=click.Path(path_type=Path), help="Copy all of them to this folder.")
def templates(destination: Path | None) -> None:
    """List the job templates: complete job scripts to submit by hand, which `hpctrain submit` fills in."""
    from hpctrain.jobs.templates import copy_templates, template_files

    for path in template_files() if destination is None else copy_templates(destination):
        click.echo(str(path))
