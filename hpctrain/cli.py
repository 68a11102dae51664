"""The command line: verbs only. Nothing heavy is imported before a verb needs it."""

import os
import sys
from pathlib import Path
from typing import Any, NoReturn

import click

from hpctrain import __version__
from hpctrain.errors import UserError, nearest, not_permitted


class _Verbs(click.Group):
    """A group whose verbs may live in other modules, loaded when they are called."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._elsewhere = {
            "data": ("hpctrain.data.commands", "data", "Prepare, verify and look at shards."),
            "bench": ("hpctrain.bench.commands", "bench", "Measure parts of a training job on this machine."),
            "submit": ("hpctrain.jobs.commands", "submit", "Submit a training job to a site's batch system."),
            "status": ("hpctrain.jobs.commands", "status", "Show jobs, and how far their runs are."),
            "cancel": ("hpctrain.jobs.commands", "cancel", "Cancel the jobs of a run."),
            "doctor": (
                "hpctrain.doctor.commands",
                "doctor",
                "Check installation, launch and nodes; name the odd one out.",
            ),
            "supervise": (
                "hpctrain.supervise.commands",
                "supervise",
                "Run a job inside an allocation and relaunch it without nodes that failed.",
            ),
            "study": ("hpctrain.scaling.study.commands", "study", "Measure how a recipe scales over node counts."),
            "predict": ("hpctrain.scaling.performance.commands", "predict", "Predict the time of a recipe on nodes."),
            "templates": ("hpctrain.jobs.commands", "templates", "Copy the job templates, to edit and submit by hand."),
        }

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *self._elsewhere]

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in self._elsewhere:
            import importlib

            module, attribute, _ = self._elsewhere[name]
            return getattr(importlib.import_module(module), attribute)
        return super().get_command(ctx, name)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and not args[0].startswith("-") and args[0] not in self.list_commands(ctx):
            raise UserError(f"there is no verb {args[0]!r}; {nearest(args[0], self.list_commands(ctx))}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, command.get_short_help_str(80)) for name, command in self.commands.items()]
        rows += [(name, text) for name, (_, _, text) in self._elsewhere.items()]
        with formatter.section("Verbs"):
            formatter.write_dl(rows)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="hpctrain")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Train ImageNet-class Keras models with huge batches on supercomputers."""
    from hpctrain.parallel.launch import launcher_size

    if launcher_size() > 1:  # for verbs that may share their work among ranks
        ctx.obj = {"make_group": _start_ranks}


def _start_ranks() -> Any:
    from hpctrain.parallel.world import start

    return start()


@cli.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
@click.option("--run-dir", type=click.Path(path_type=Path), help="Where the run is kept; default runs/NAME-TIMESTAMP.")
@click.option("--resume", default="auto", metavar="auto|none|PATH", help="What to go on from (default: auto).")
def train(recipe: str, overrides: tuple[str, ...], run_dir: Path | None, resume: str) -> None:
    """Train a model: what every rank runs, under mpirun or srun or alone.

    RECIPE is a name from `hpctrain recipes` or a YAML file; each key can be overridden: train.epochs=30.
    """

    def main() -> int:
        from hpctrain.config import load_config
        from hpctrain.parallel.world import start
        from hpctrain.training.dataset import open_data

        config = load_config(recipe, overrides)
        settings = config.train
        world = start(
            deterministic=settings.deterministic, threads=settings.threads, limit_seconds=settings.start_seconds
        )
        config.micro_batches_a_rank(world.size)
        data = open_data(config, world)
        _import_tensorflow()
        from hpctrain.training.loop import train as run

        return run(config, world, data, run_dir, resume)

    _run_rank(main)


@cli.command()
@click.argument("run")
@click.option("--data", help="Another data directory; its val split is taken.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def evaluate(run: str, data: str | None, as_json: bool) -> None:
    """Evaluate RUN, a run directory or one of its checkpoints, on held-out images."""

    def main() -> int:
        from hpctrain.config import load_config
        from hpctrain.parallel.world import start
        from hpctrain.training.dataset import open_split

        path = Path(run)
        home = next((p for p in (path, *path.parents[:2]) if (p / "config.yaml").is_file()), None)
        if not path.exists() or home is None:
            raise UserError(f"{run} is no run directory (with a config.yaml) and no checkpoint of one")
        config = load_config(home / "config.yaml", [f"data.path={data}"] if data else [])
        settings = config.train
        world = start(
            deterministic=settings.deterministic, threads=settings.threads, limit_seconds=settings.start_seconds
        )
        if config.data.path is None:
            raise UserError("the run has no data set of its own (synthetic data); give one with --data DIR")
        reader = open_split(config.data.path, "val", world)
        assert reader is not None
        _import_tensorflow()
        from hpctrain.training.standalone import evaluate_checkpoint

        evaluate_checkpoint(config, world, reader, path, as_json)
        return 0

    _run_rank(main)


@cli.group(invoke_without_command=True)
@click.pass_context
def recipes(ctx: click.Context) -> None:
    """List the recipes, or show one."""
    if ctx.invoked_subcommand is not None:
        return
    from rich.console import Console
    from rich.table import Table

    from hpctrain.config import load_config, recipe_names

    table = Table("recipe", "model", "batch", "epochs", "top-1 %", "what it is, and where its numbers come from")
    configs = {name: load_config(name) for name in recipe_names()}
    for name, config in sorted(configs.items(), key=lambda item: (item[1].model.name, item[1].train.global_batch)):
        expected = "" if config.expected_top1 is None else f"{config.expected_top1:g}"
        batch, epochs = f"{config.train.global_batch:,}", f"{config.train.epochs:g}"
        table.add_row(
            name, config.model.name, batch, epochs, expected, f"{config.description}\n{config.source}", end_section=True
        )
    Console(width=None if sys.stdout.isatty() else 140).print(table)


@recipes.command("show")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
@click.option("--keys", is_flag=True, help="Explain every key that can be set.")
def show_recipe(recipe: str, overrides: tuple[str, ...], keys: bool) -> None:
    """Print a recipe with all its values, as YAML that `hpctrain train` takes."""
    from hpctrain.config import describe_keys, load_config

    config = load_config(recipe, overrides)
    if not keys:
        from hpctrain.scaling.plan import recipe_facts

        for fact in recipe_facts(config):
            click.echo(f"# {fact}")
        click.echo(config.to_yaml(), nl=False)
        return
    values: Any = config.model_dump()
    for key, kind, _, text in describe_keys():
        value = values
        for part in key.split("."):
            value = value[part]
        click.echo(f"{key} = {value}\n    {kind}" + (f": {text}" if text else ""))


@cli.command("plan")
@click.option("--model", required=True, help="A model's name, such as alexnet or resnet50.")
@click.option("--epochs", type=click.FloatRange(min=0, min_open=True), required=True, help="Passes over the data set.")
@click.option("--batches", required=True, metavar="512,4K,...", help="Global batches to compare; K is 1,024.")
@click.option("--images", type=click.IntRange(min=1), default=1_280_000, show_default=True, help="Images an epoch.")
@click.option("--site", help="Estimate the time on this machine: a name from `hpctrain sites`, or a YAML file.")
@click.option("--nodes", type=click.IntRange(min=1), help="Of the site, for every batch; default: 16 images a node.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan_command(
    model: str, epochs: float, batches: str, images: int, site: str | None, nodes: int | None, as_json: bool
) -> None:
    """Compare batch sizes: iterations, bytes moved, accuracy to expect, and the time on a site's nodes."""
    import dataclasses
    import json

    from hpctrain.jobs.site import load_site
    from hpctrain.scaling import plan as planning

    profile = load_site(site) if site else None
    rows = planning.plan(model, epochs, planning.parse_batches(batches), images, profile, nodes)
    ratio, paper_ratio = planning.flops_per_parameter(model), planning.paper_flops_per_parameter(model)
    if as_json:
        table: Any = {"model": model, "epochs": epochs, "images": images, "flops_per_parameter": ratio}
        table |= {"paper_flops_per_parameter": paper_ratio, "batches": [dataclasses.asdict(row) for row in rows]}
        click.echo(json.dumps(table, indent=1))
        return
    click.echo(f"{model}, {epochs:g} epochs of {images:,} images; {planning.model_size(model).parameters:,} parameters")
    note = "" if paper_ratio is None else f" (the paper's rounded counts: {paper_ratio:.3g})"
    click.echo(f"computation to communication: {ratio:.1f} floating-point operations an image for each parameter{note}")
    times = f"{'nodes':>6} {'time':>8}  " if profile else ""
    click.echo(f"{'batch':>7} {'iterations':>11} {'gradients moved':>16}  {times}top-1 %  recipe")
    for row in rows:
        expected = "" if row.expected_top1 is None else f"{row.expected_top1:g}"
        moved = f"{row.gradient_bytes / 1e12:,.2f} TB"
        label = planning.batch_label(row.batch)
        if row.estimated_seconds is not None:
            times = f"{row.nodes:>6,} {planning.duration(row.estimated_seconds):>8}  "
        click.echo(f"{label:>7} {row.iterations:>11,} {moved:>16}  {times}{expected:>7}  {row.recipe or ''}")
    if profile:
        click.echo(
            f"time: {profile.images_per_second[model]:g} images/s a node and a ring allreduce that overlaps with "
            f"nothing; network: {profile.network.source}"
        )


@cli.group(invoke_without_command=True)
@click.pass_context
def sites(ctx: click.Context) -> None:
    """List the machines hpctrain has a profile of, or show one."""
    if ctx.invoked_subcommand is not None:
        return
    from hpctrain.jobs.site import load_site, site_names

    for name in site_names():
        click.echo(f"{name:<20} {load_site(name).description}")


@sites.command("show")
@click.argument("site")
def show_site(site: str) -> None:
    """Print a site's profile, as YAML to copy to ~/.config/hpctrain/sites/ and edit."""
    from hpctrain.jobs.site import find_site, load_site

    load_site(site)
    click.echo(find_site(site).read_text(encoding="utf-8"), nl=False)


@cli.command()
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN_DIR|STUDY_DIR...")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory for report.md and its plots.")
def report(paths: tuple[Path, ...], out: Path) -> None:
    """Write a report with plots of one or more runs, or of a study's runs, beside published results."""
    from rich.console import Console

    from hpctrain.scaling.report import summary_table, write_report
    from hpctrain.scaling.run_data import run_dirs_in

    run_dirs = [run_dir for path in paths for run_dir in run_dirs_in(path)]
    path = write_report(run_dirs, out)
    console = Console(width=None if sys.stdout.isatty() else 100)
    for run_dir in run_dirs:
        console.print(summary_table(run_dir))
    click.echo(f"report: {path} and {path.with_suffix('.html').name}")


def _run_rank(main: Any) -> None:
    from hpctrain.parallel.world import run_rank

    run_rank(main)


def _import_tensorflow() -> None:
    from hpctrain.parallel.quiet import import_tensorflow

    import_tensorflow()


def main() -> None:
    """Entry point of the `hpctrain` program. A user's mistake is one sentence and exit code 2."""
    try:
        code = cli.main(standalone_mode=False)
    except UserError as error:
        _fail(str(error))
    except click.exceptions.NoArgsIsHelpError as error:  # a bare `hpctrain` or `hpctrain data` asks for help
        click.echo(error.format_message())
        sys.exit(0)
    except click.UsageError as error:
        hint = f"; see `{error.ctx.command_path} --help`" if error.ctx else ""
        _fail(error.format_message().rstrip(".") + hint)
    except click.ClickException as error:
        _fail(error.format_message())
    except (click.Abort, KeyboardInterrupt):
        print("hpctrain: interrupted", file=sys.stderr)
        sys.exit(130)
    except PermissionError as error:
        if error.filename is None:
            raise
        _fail(not_permitted(error))
    except BrokenPipeError:  # `hpctrain ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(1)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    from hpctrain.parallel.world import end_with_mistake

    end_with_mistake(message)
