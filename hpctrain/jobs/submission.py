"""From what the user asks for to a checked job script: the work of `hpctrain submit`, without TensorFlow."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpctrain.config import Config, find_recipe, load_config
from hpctrain.data.manifest import Manifest
from hpctrain.errors import UserError
from hpctrain.jobs import render
from hpctrain.jobs.layout import Layout, environment, launch_arguments, layout
from hpctrain.jobs.site import Site, partition_for
from hpctrain.jobs.templates import SUFFIXES, read_template

# The batch system's signal comes this much before the time at which a run stops by itself.
_SIGNAL_LEAD_SECONDS = 60
_PBS_NAME_LENGTH = 15


@dataclass(frozen=True)
class Request:
    """What the user asks for, as it was given."""

    recipe: str
    overrides: tuple[str, ...]
    nodes: int
    walltime: str = "01:00:00"
    account: str | None = None
    partition: str | None = None
    ranks_per_node: int | None = None
    cores: int | None = None  # physical cores of a node, where the site's profile does not know them
    name: str | None = None
    run_dir: Path | None = None
    array: bool = False
    requeue: int = 20
    stage: bool = False
    stage_env: Path | None = None


@dataclass(frozen=True)
class Submission:
    """A checked job: what it is called, where it runs, and the text of its script (empty on a local site)."""

    name: str
    run_dir: Path  # absolute
    layout: Layout
    script_name: str
    script: str
    command: tuple[str, ...]  # the whole command on a local site
    variables: dict[str, str]  # that a local command needs


def prepare(request: Request, site: Site) -> Submission:
    """Check a request and return its job, or raise UserError before any node-hour is spent. Writes nothing."""
    config = load_config(request.recipe, request.overrides)
    cores = _cores_here() if site.scheduler == "local" and request.cores is None else request.cores
    plan = layout(site, request.nodes, request.ranks_per_node, cores)
    config.micro_batches_a_rank(plan.ranks)
    data = _check_data(config)
    name = _job_name(request.name, config.name, site.scheduler)
    run_dir = Path(os.path.abspath(request.run_dir or Path("runs") / (request.name or config.name)))
    render.one_line(str(run_dir), "the run directory")
    given = {override.partition("=")[0] for override in request.overrides}
    overrides = [text for text in request.overrides if text.partition("=")[0] not in ("data.path", "data.partitions")]
    if "train.threads" not in given and config.train.threads is None and knows_cores(request, site):
        overrides.append(f"train.threads={plan.threads_per_rank}")  # not those of the reserved cores
    recipe = str(find_recipe(request.recipe).absolute()) if _is_file(request.recipe) else request.recipe
    variables = environment(site, plan)
    launch = launch_arguments(site, plan)
    if site.scheduler == "local":
        paths = [f"data.path={data}"] * bool(data) + [f"data.partitions={config.data.partitions}"]
        command = [*launch, "hpctrain", "train", recipe, *paths, *overrides, "--run-dir", str(run_dir)]
        return Submission(name, run_dir, plan, "", "", tuple(command), variables)

    seconds, partition = _check_limits(request, site, config)
    settings: dict[str, str | render.Expanded] = {
        "RECIPE": render.one_line(recipe, "the recipe"),
        "RUN_DIR": str(run_dir),
        "DATA": render.one_line(str(data or ""), "data.path"),
        "OVERRIDES": render.lines_value(overrides, "an override"),
        "HPCTRAIN_PREFIX": sys.prefix,
        "SETUP": render.lines_value(site.setup, "a setup line of the site"),
        "VARIABLES": render.lines_value((f"{k}={v}" for k, v in variables.items()), "a variable"),
        "LAUNCH": _words(launch),
        "PARTITIONS": str(config.data.partitions),
        "MAX_REQUEUES": str(request.requeue),
        "STAGE_ENV": render.one_line(os.path.abspath(request.stage_env), "--stage-env") if request.stage_env else "",
    }
    if request.stage or request.stage_env:
        if site.node_local is None:
            raise UserError(
                f"the site {site.name} names no node_local folder to stage to; set it in a profile of your own"
            )
        settings["STAGE_DIR"] = render.Expanded(site.node_local)
    logs = run_dir.parent / "logs"
    directives = _slurm_directives if site.scheduler == "slurm" else _pbs_directives
    if site.scheduler == "pbs":
        settings["LOG_DIR"] = str(logs)
    values = directives(request, site, plan, name, partition, logs) | _signal(site, config, seconds)
    template = read_template(site.scheduler, "train")
    script = render.render(template, site.scheduler, values, site.directives, settings)
    return Submission(name, run_dir, plan, f"job{SUFFIXES[site.scheduler]}", script, (), {})


def knows_cores(request: Request, site: Site) -> bool:
    """Return whether the cores of a node are known; else a job gets one a rank, which the user should be told."""
    return request.cores is not None or not site.node.nominal


def log_path(job: Submission, scheduler: str, job_id: str) -> Path:
    """Return where a submitted job writes its log."""
    return job.run_dir.parent / "logs" / f"{job.name}-{job_id.split('.')[0]}.out"


def _slurm_directives(
    request: Request, site: Site, plan: Layout, name: str, partition: str | None, logs: Path
) -> dict[str, str | None]:
    return {
        "--job-name": name,
        "--nodes": str(plan.nodes),
        "--ntasks-per-node": str(plan.ranks_per_node),
        "--cpus-per-task": str(plan.cpus_per_task),
        "--time": request.walltime,
        "--account": _account(request),
        "--partition": partition,
        "--output": render.output_path(f"{logs}/{name}-{'%A_%a' if request.array else '%j'}.out", "slurm"),
    }


def _pbs_directives(
    request: Request, site: Site, plan: Layout, name: str, partition: str | None, logs: Path
) -> dict[str, str | None]:
    cores = request.cores or (plan.ranks_per_node if site.node.nominal else site.node.cores)
    chunk = f"ncpus={cores}:mpiprocs={plan.ranks_per_node}:ompthreads={plan.threads_per_rank}"
    return {
        "-N": name,
        "-l select": f"{plan.nodes}:{chunk}" + (f":{site.select}" if site.select else ""),
        "-l walltime": request.walltime,
        "-A": _account(request),
        "-q": partition,
        "-o": render.output_path(f"{logs}/", "pbs"),
    }


def _signal(site: Site, config: Config, seconds: int) -> dict[str, str | None]:
    if site.scheduler != "slurm":
        return {}
    margin = int(config.checkpoint.stop_margin_seconds)
    lead = margin + _SIGNAL_LEAD_SECONDS
    return {"--signal": f"B:USR1@{min(lead if seconds > 2 * lead else max(margin, 1), 65535)}"}


def _account(request: Request) -> str | None:
    if request.account is None:
        return None
    return render.checked(render.WORD, request.account, "the account", "letters, digits and ._@:+,-")


def _check_limits(request: Request, site: Site, config: Config) -> tuple[int, str | None]:
    """Check time and partition against what the profile knows; return the walltime in seconds and the partition."""
    seconds = render.walltime_seconds(request.walltime)
    margin = config.checkpoint.stop_margin_seconds
    if seconds <= margin:
        raise UserError(
            f"a walltime of {request.walltime} leaves no time to train: a run stops {margin:g} s before its end "
            "(checkpoint.stop_margin_seconds); ask for more or set that lower"
        )
    if request.partition is not None:
        render.checked(render.WORD, request.partition, "the partition", "letters, digits and ._@:+,-")
    return seconds, partition_for(site, request.nodes, seconds, request.partition)


def _check_data(config: Config) -> Path | None:
    """Check that the data set is there and fits the configuration; return its absolute path, None if synthetic."""
    if config.data.synthetic:
        return None
    if config.data.path is None:
        raise UserError("the recipe names no data set; give data.path=DIR (made by `hpctrain data prepare`)")
    path = Path(os.path.abspath(config.data.path))
    train = path / "train" if (path / "train").is_dir() else path
    manifest = Manifest.load(train, check_files=True)
    if len(manifest.shards) < config.data.partitions:
        raise UserError(
            f"{train} has {len(manifest.shards)} shards, too few for data.partitions {config.data.partitions}; "
            f"prepare it with --shards {config.data.partitions} or a multiple, or set data.partitions lower"
        )
    return path


def _job_name(given: str | None, config_name: str, scheduler: str) -> str:
    """Return the job's name. One that is made from the recipe's is cut to what old versions of PBS take."""
    if given is None and scheduler == "pbs":
        return render.checked(render.NAME, config_name[:_PBS_NAME_LENGTH], "the job's name", _NAME_EXPECTED)
    name = render.checked(render.NAME, given or config_name, "the job's name", _NAME_EXPECTED)
    if scheduler == "pbs" and len(name) > _PBS_NAME_LENGTH:
        raise UserError(f"the job's name {name!r} is longer than the {_PBS_NAME_LENGTH} characters that PBS takes")
    return name


_NAME_EXPECTED = "letters, digits, dots, dashes and underscores, beginning with a letter or digit"


def _words(launch: Sequence[str]) -> str:
    for word in launch:
        if not word or word.split() != [word]:
            raise UserError(f"the launcher's argument {word!r} holds a space, and job scripts take it apart at spaces")
    return " ".join(launch)


def _is_file(recipe: str) -> bool:
    return recipe.endswith((".yaml", ".yml")) or "/" in recipe


def _cores_here() -> int:
    return len(os.sched_getaffinity(0))


def local_command_text(job: Submission) -> str:
    """Return a local job's command as one would type it."""
    return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in job.variables.items()), shlex.join(job.command)])
