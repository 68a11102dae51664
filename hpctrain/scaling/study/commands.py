"""`hpctrain study RECIPE ...` and `hpctrain study report DIR`. Imports nothing heavy until it runs."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hpctrain.errors import UserError

if TYPE_CHECKING:
    from hpctrain.jobs.site import Site
    from hpctrain.scaling.study.plan import Run, Study


@click.command("report")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
def report(directory: Path) -> None:
    """Report the study in DIR: tables here; DIR/report.md with pictures, report.csv, and calibration.json.

    It can be called at any time: counts that wait, run or failed are shown as such.
    """
    _report(directory)


class _Study(click.Command):
    """A command with one verb of its own, `report`, unless a recipe is called so."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> click.Context:
        if args[:1] == ["report"]:
            from hpctrain.config import recipe_names

            if "report" not in recipe_names():
                return report.make_context(f"{info_name} report", args[1:], parent=parent, **extra)
        return super().make_context(info_name, args, parent=parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)


@click.command("study", cls=_Study)
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
@click.option("--nodes", "counts", required=True, metavar="1,2,4", help="Node counts.")
@click.option(
    "--mode",
    type=click.Choice(["weak", "strong"]),
    required=True,
    help="weak: the recipe's global batch is that of the smallest count and grows with the nodes; strong: it is fixed.",
)
@click.option("--site", "site_name", required=True, help="A name from `hpctrain sites`, or a YAML file.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The study's directory.")
@click.option("--repeats", type=click.IntRange(min=1), default=1, show_default=True, help="Runs of each count.")
@click.option("--steps", type=click.IntRange(min=2), default=50, show_default=True, help="Measured steps of a run.")
@click.option("--warm-up", type=click.IntRange(min=0), default=10, show_default=True, help="Steps before them.")
@click.option("--time", "walltime", default="01:00:00", show_default=True, metavar="HH:MM:SS", help="Of each job.")
@click.option("--account", help="Whose hours are used.")
@click.option("--partition", help="Partition (Slurm) or queue (PBS); default: the site's.")
@click.option("--ranks-per-node", type=click.IntRange(min=1), help="Default: the site's.")
@click.option(
    "--cores", type=click.IntRange(min=1), help="Physical cores of a node, where the site's profile does not know."
)
@click.option("--chain", is_flag=True, help="One job after the other, so that they do not disturb each other.")
@click.option("--together", is_flag=True, help="All counts side by side in one job, on nodes of their own.")
@click.option("--resubmit-failed", is_flag=True, help="Run again what failed.")
@click.option("--dry-run", is_flag=True, help="Check and show the plan; write and submit nothing.")
def study(
    recipe: str,
    overrides: tuple[str, ...],
    counts: str,
    mode: str,
    site_name: str,
    out: Path,
    repeats: int,
    steps: int,
    warm_up: int,
    walltime: str,
    account: str | None,
    partition: str | None,
    ranks_per_node: int | None,
    cores: int | None,
    chain: bool,
    together: bool,
    resubmit_failed: bool,
    dry_run: bool,
) -> int:
    """Train RECIPE for some steps on each of several node counts, and report how it scales.

    A job for each count is submitted (on the site local they run here, one after the other). Called again with the same
    arguments, it submits what is missing. `hpctrain study report DIR` shows the results.
    """
    from hpctrain.jobs.site import load_site
    from hpctrain.scaling.study.plan import Arguments, How, check_same, load_study, make_study, parse_nodes
    from hpctrain.scaling.study.submit import check, submit

    if chain and together:
        raise UserError("--chain and --together do not go together; choose one")
    site = load_site(site_name)
    how: How = "together" if together else "chain" if chain else "separate"
    if how != "separate" and site.scheduler == "local":
        raise UserError(
            f"--{how} is for batch systems; on the site {site.name} runs are made one after the other anyway"
        )
    arguments = Arguments(
        recipe,
        overrides,
        parse_nodes(counts),
        "weak" if mode == "weak" else "strong",
        site_name,
        repeats=repeats,
        steps=steps,
        warm_up=warm_up,
        walltime=walltime,
        account=account,
        partition=partition,
        ranks_per_node=ranks_per_node,
        cores=cores,
        how=how,
    )
    now = make_study(arguments, out)
    before = load_study(out)
    if before is not None:
        check_same(before, now)
    plan = before or now
    jobs = check(plan, site)
    _warn(site, cores)
    if before is None:
        for run, job in zip(plan.runs, jobs, strict=True):
            if run.repeat == 1:
                size = f"{_count(run.nodes, 'node')}, {_count(job.layout.ranks, 'rank')}"
                click.echo(f"{size}: global batch {run.global_batch:,}, {arguments.warm_up + arguments.steps} steps")
    if dry_run:
        return 0
    open_runs, active = _open_runs(plan, resubmit_failed)
    if before is None:
        plan.save()
    submit(plan, site, open_runs, active, click.echo)
    if site.scheduler == "local":
        _report(out)
        return int(any(run.tries[-1].exit_code for run in plan.runs))
    click.echo(f"study: {out}; `hpctrain study report {out}` shows how far it is")
    return 0


def _open_runs(plan: "Study", resubmit_failed: bool) -> "tuple[list[Run], list[str]]":
    """Return the runs to submit now, and the jobs that wait or run; say what is left alone."""
    from hpctrain.scaling.study.state import states

    found = states(plan)
    for state in found:
        if state.word == "unknown":  # it may well run: a second one must not write the same study
            raise UserError(f"nothing was submitted, since nothing is known of {state.note}")
    failed = sum(state.word == "failed" for state in found)
    if failed and not resubmit_failed:
        click.echo(f"{failed} of {len(found)} runs failed; --resubmit-failed runs them again")
    wanted = ("missing", "failed") if resubmit_failed else ("missing",)
    chosen = [run for run, state in zip(plan.runs, found, strict=True) if state.word in wanted]
    if not chosen:
        words = [state.word for state in found]
        counted = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
        click.echo(f"nothing to submit: of {len(words)} runs {counted}")
    busy = [run for run, state in zip(plan.runs, found, strict=True) if state.word in ("waiting", "running")]
    return chosen, [run.tries[-1].job for run in busy if run.tries[-1].job]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _warn(site: "Site", cores: int | None) -> None:
    if site.scheduler != "local" and site.node.nominal and cores is None:
        click.echo(
            f"warning: the profile {site.name} does not know how many cores a node has, so each rank gets one; give "
            "--cores N, or a profile of your own",
            err=True,
        )


def _report(out: Path) -> None:
    from rich.console import Console

    from hpctrain.scaling.study.report import open_runs, tables, write_study_report

    results, files = write_study_report(out)
    console = Console(soft_wrap=False)
    if not console.is_terminal:
        console = Console(width=200)  # a log file has no width, and a table that is cut is no table
    console.print(f"{results.mode} scaling of {results.title}", highlight=False)
    for table in tables(results):
        console.print()
        console.print(table)
    console.print()
    for line in (*results.notes, *open_runs(results)):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(f"written: {', '.join(path.name for path in files)} in {out}", highlight=False, soft_wrap=True)
