"""One job for several runs of a study, side by side on nodes of their own: the template `scaling`."""

import os
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hpctrain.config import Config, load_config
from hpctrain.errors import UserError
from hpctrain.jobs import render
from hpctrain.jobs.layout import environment, launch_arguments, layout
from hpctrain.jobs.site import Site
from hpctrain.jobs.submission import Request, Submission, knows_cores, prepare
from hpctrain.jobs.templates import read_template
from hpctrain.scaling.study.plan import Run, Study

_OPTION = {
    "slurm": re.compile(r"#SBATCH (--[a-z-]+|-[A-Za-z])(?:[= ](.*))?"),
    "pbs": re.compile(r"#PBS (-l [a-z]+|-[A-Za-z])(?:[= ](.*))?"),
}


def prepare_together(study: Study, site: Site, runs: Sequence[Run]) -> Submission:
    """Return the job that does these runs, each count once at the same time, repeats one after the other.

    It asks for as many nodes as the runs of a repeat have together. Everything about the allocation is decided as for a
    training job of that size.
    """
    arguments = study.arguments
    total = max(
        sum(run.nodes for run in runs if run.repeat == repeat) for repeat in range(1, study.arguments.repeats + 1)
    )
    config = load_config(arguments.recipe, study.overrides)
    plan = layout(site, total, arguments.ranks_per_node, arguments.cores)
    batch = config.train.micro_batch * plan.ranks * config.data.partitions  # any that divides: nothing trains with it
    whole = Request(
        arguments.recipe,
        (*arguments.overrides, f"train.global_batch={batch}"),
        total,
        walltime=arguments.walltime,
        account=arguments.account,
        partition=arguments.partition,
        ranks_per_node=arguments.ranks_per_node,
        cores=arguments.cores,
        name="study",
        run_dir=study.out / "together",
        requeue=0,
    )
    job = prepare(whole, site)
    if job.refusal is not None:
        raise UserError(f"side by side the counts take {total:,} nodes: {job.refusal}")
    overrides = [text for text in study.overrides if not text.startswith("data.path=")]
    given = {text.partition("=")[0] for text in overrides}
    if "train.threads" not in given and config.train.threads is None and knows_cores(whole, site):
        overrides.append(f"train.threads={plan.threads_per_rank}")
    scheduler = site.scheduler
    template = read_template(scheduler, "scaling")
    directives, further = _options(job.script, template, scheduler)
    settings: dict[str, str | render.Expanded] = {
        "RECIPE": _recipe(arguments.recipe),
        "OUT": str(study.out.absolute()),
        "DATA": render.one_line(_data(config), "data.path"),
        "HPCTRAIN_PREFIX": sys.prefix,
        "SETUP": render.lines_value(site.setup, "a setup line of the site"),
        "VARIABLES": render.lines_value(
            (f"{name}={value}" for name, value in environment(site, plan).items()), "a variable"
        ),
        "OVERRIDES": render.lines_value(overrides, "an override"),
        "LAUNCH": " ".join(launch_arguments(site, plan)),
        "RUNS": render.lines_value((_line(study, site, run) for run in runs), "a run"),
        "SIDE_BY_SIDE": "yes",
    }
    if scheduler == "pbs":
        settings["LOG_DIR"] = str(job.run_dir.parent / "logs")
    script = render.render(template, scheduler, directives, further, settings)
    return replace(job, script=script)


def _data(config: Config) -> str:
    return "" if config.data.synthetic or config.data.path is None else os.path.abspath(config.data.path)


def _line(study: Study, site: Site, run: Run) -> str:
    """Return a line of RUNS: nodes, directory, global batch, launcher's words."""
    arguments = study.arguments
    plan = layout(site, run.nodes, arguments.ranks_per_node, arguments.cores)
    words = launch_arguments(site, plan)
    return " ".join([str(run.nodes), run.next_dir(), str(run.global_batch), *words])


def _options(script: str, template: str, scheduler: str) -> tuple[dict[str, str | None], list[str]]:
    """Return the values of a training job's directives that this template has too, and the site's further options."""
    pattern = _OPTION[scheduler]
    mark = "#SBATCH " if scheduler == "slurm" else "#PBS "
    usual = {m[1] for m in map(pattern.fullmatch, _uncommented(read_template(scheduler, "train"), mark)) if m}
    ours = {m[1] for m in map(pattern.fullmatch, _uncommented(template, mark)) if m}
    directives: dict[str, str | None] = {}
    further = []
    for line in script.split("\n"):
        match = pattern.fullmatch(line)
        if match and match[1] in ours:
            directives[match[1]] = match[2]
        elif match and match[1] not in usual:
            further.append(line.removeprefix(mark))
    return directives, further


def _uncommented(template: str, mark: str) -> list[str]:
    return [line.removeprefix("#") if line.startswith(f"#{mark}") else line for line in template.split("\n")]


def _recipe(recipe: str) -> str:
    is_file = recipe.endswith((".yaml", ".yml")) or "/" in recipe
    return str(Path(recipe).absolute()) if is_file else recipe
