"""From what the user asks for to a checked job script: the work of `hpctrain submit`, without TensorFlow."""

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpctrain.config import Config, find_recipe, load_config
from hpctrain.data.atomic import make_folder, write_file
from hpctrain.data.manifest import Manifest
from hpctrain.errors import UserError
from hpctrain.jobs import render
from hpctrain.jobs.layout import Layout, environment, launch_arguments, layout
from hpctrain.jobs.site import Site, partition_for
from hpctrain.jobs.templates import SUFFIXES, read_template

# The batch system's signal comes this much before the time at which a run stops by itself.
_SIGNAL_LEAD_SECONDS = 60
_PBS_NAME_LENGTH = 15
# What keeps a job alive when one of its nodes fails.
_SURVIVE = {"slurm": "--no-kill", "pbs": "-W tolerate_node_failures=all"}


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
    spare_nodes: int = 0  # beyond `nodes`, kept in reserve for those that fail
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
    refusal: str | None = None  # why it is not to be submitted (too large or too long for the site): a sentence


def prepare(request: Request, site: Site) -> Submission:
    """Check a request and return its job, or raise UserError before any node-hour is spent. Writes nothing.

    A job that is only too large or too long for the site is returned all the same, and says so (`refusal`): its script
    can be looked at.
    """
    config = load_config(request.recipe, request.overrides)
    cores = _cores_of_a_part(request, site) if site.scheduler == "local" else request.cores
    plan = layout(site, request.nodes, request.ranks_per_node, cores)
    config.micro_batches_a_rank(plan.ranks)
    data = _check_data(config)
    name = _job_name(request.name, config.name, site.scheduler)
    run_dir = Path(os.path.abspath(request.run_dir or Path("runs") / (request.name or config.name)))
    render.one_line(str(run_dir), "the run directory")
    given = {override.partition("=")[0] for override in request.overrides}
    if request.array and "train.seed" in given:
        raise UserError("--array gives each run its own train.seed, so that key cannot be set as well; leave it out")
    overrides = [text for text in request.overrides if text.partition("=")[0] not in ("data.path", "data.partitions")]
    if "train.threads" not in given and config.train.threads is None and knows_cores(request, site):
        overrides.append(f"train.threads={plan.threads_per_rank}")  # not those of the reserved cores
    recipe = str(find_recipe(request.recipe).absolute()) if _is_file(request.recipe) else request.recipe
    variables = environment(site, plan)
    launch = launch_arguments(site, plan)
    if request.spare_nodes and (site.scheduler == "local" or site.launcher == "ibrun"):
        raise UserError(f"{site.name} cannot start a run on some of a job's nodes only; leave --spare-nodes out")
    if site.scheduler == "local":
        paths = [f"data.path={data}"] * bool(data) + [f"data.partitions={config.data.partitions}"]
        command = [*launch, "hpctrain", "train", recipe, *paths, *overrides, "--run-dir", str(run_dir)]
        return Submission(name, run_dir, plan, "", "", tuple(command), variables)

    seconds = _check_walltime(request, config)
    partition, refusal = partition_for(site, request.nodes + request.spare_nodes, seconds, request.partition)
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
        "SPARE_NODES": str(request.spare_nodes),
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
    further = [*site.directives, *([_SURVIVE[site.scheduler]] if request.spare_nodes else [])]
    script = render.render(template, site.scheduler, values, further, settings)
    return Submission(name, run_dir, plan, f"job{SUFFIXES[site.scheduler]}", script, (), {}, refusal)


def write_script(job: Submission) -> tuple[Path, set[str]]:
    """Write a job's script into its run directory.

    Returns its path and the variables that must not reach it from the environment of who submits it. Raises UserError
    if it cannot be written.
    """
    make_folder(job.run_dir.parent / "logs")  # Slurm makes no folders for logs: the job would fail without a word
    make_folder(job.run_dir)
    script = job.run_dir / job.script_name
    try:
        write_file(script, job.script.encode())
    except OSError as error:
        raise UserError(f"cannot write {script}: {error.strerror}; choose a place where you may write") from None
    return script, {*render.setting_names(job.script), "REQUEUES", "ARRAY_INDEX", "CHAIN_LINK"}


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
        "--nodes": str(plan.nodes + request.spare_nodes),
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
        "-l select": f"{plan.nodes + request.spare_nodes}:{chunk}" + (f":{site.select}" if site.select else ""),
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


def _check_walltime(request: Request, config: Config) -> int:
    """Check walltime and partition as far as no profile is needed; return the walltime in seconds."""
    seconds = render.walltime_seconds(request.walltime)
    margin = config.checkpoint.stop_margin_seconds
    if seconds <= margin:
        raise UserError(
            f"a walltime of {request.walltime} leaves no time to train: a run stops {margin:g} s before its end "
            "(checkpoint.stop_margin_seconds); ask for more or set that lower"
        )
    if request.partition is not None:
        render.checked(render.WORD, request.partition, "the partition", "letters, digits and ._@:+,-")
    return seconds


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
    if scheduler != "pbs":
        return render.checked(render.NAME, given or config_name, "the job's name", _NAME_EXPECTED)
    name = given or config_name[:_PBS_NAME_LENGTH]
    render.checked(render.PBS_NAME, name, "the job's name", _PBS_NAME_EXPECTED)
    if len(name) > _PBS_NAME_LENGTH:
        raise UserError(f"the job's name {name!r} is longer than the {_PBS_NAME_LENGTH} characters that PBS takes")
    return name


_NAME_EXPECTED = "letters, digits, dots, dashes and underscores, beginning with a letter or digit"
_PBS_NAME_EXPECTED = "letters, digits, dots, dashes and underscores, beginning with a letter, as PBS wants it"


def _words(launch: Sequence[str]) -> str:
    for word in launch:
        if not word or word.split() != [word]:
            raise UserError(f"the launcher's argument {word!r} holds a space, and job scripts take it apart at spaces")
    return " ".join(launch)


def _is_file(recipe: str) -> bool:
    return recipe.endswith((".yaml", ".yml")) or "/" in recipe


def _cores_of_a_part(request: Request, site: Site) -> int:
    """Return the cores of each of the `nodes` parts of this machine: equal shares, but one a rank at the least."""
    cores = request.cores or len(os.sched_getaffinity(0))
    return max(cores // request.nodes, request.ranks_per_node or site.ranks_per_node)


def local_command_text(job: Submission) -> str:
    """Return a local job's command as one would type it."""
    return " ".join([*(f"{k}={shlex.quote(v)}" for k, v in job.variables.items()), shlex.join(job.command)])
