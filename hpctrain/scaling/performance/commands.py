"""`hpctrain predict`. Imports nothing heavy until it runs."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from hpctrain.errors import UserError

if TYPE_CHECKING:
    from hpctrain.scaling.performance.predict import Impossible, Prediction

_MOST_ADVICE = 3


@click.command()
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
@click.option("--site", required=True, help="A name from `hpctrain sites`, or a YAML file.")
@click.option("--nodes", required=True, metavar="1,64,2048", help="Node counts to compare.")
@click.option("--ranks-per-node", type=click.IntRange(min=1), help="Ranks on a node; the site's own when not given.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="JSON of `hpctrain bench step`, `bench allreduce`, or of `study report`.",
)
@click.option("--images", type=click.IntRange(min=1), help="Images of the training set; ImageNet's when not given.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def predict(
    recipe: str,
    overrides: tuple[str, ...],
    site: str,
    nodes: str,
    ranks_per_node: int | None,
    calibration: Path | None,
    images: int | None,
    as_json: bool,
) -> None:
    """Predict the time of a recipe on some nodes of a machine: where it goes, what binds, what would help.

    RECIPE is a name from `hpctrain recipes` or a YAML file; each key can be overridden: train.global_batch=8192.
    """
    from hpctrain.config import load_config
    from hpctrain.scaling.performance.predict import Prediction, predict_case, prepare

    counts = parse_counts(nodes)
    config = load_config(recipe, overrides)
    config, profile, case = prepare(config, site, calibration, ranks_per_node, images)
    predictions = predict_case(config, profile, case, counts, ranks_per_node)
    if as_json:
        content = {
            "recipe": config.name,
            "site": profile.name,
            "sources": list(case.notes),
            "predictions": [prediction.to_json() for prediction in predictions],
        }
        click.echo(json.dumps(content, indent=1))
    else:
        title = f"{config.name}: {config.model.name}, batch {config.train.global_batch:,}, on {profile.name}"
        _print(title, predictions, case.notes)
    if not any(isinstance(prediction, Prediction) for prediction in predictions):
        raise UserError("none of these node counts fits the recipe; see the sentence on each")


def parse_counts(text: str) -> list[int]:
    """Return the node counts in `1,64,2048`. Raises UserError."""
    try:
        counts = [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(
            f"--nodes {text} is not a list of counts; give numbers with commas, such as 1,64,2048"
        ) from None
    if min(counts) < 1:
        raise UserError(f"--nodes {text} holds a count below 1; give numbers with commas, such as 1,64,2048")
    return counts


def _print(title: str, predictions: "list[Prediction | Impossible]", notes: tuple[str, ...]) -> None:
    from rich.console import Console
    from rich.table import Table

    from hpctrain.scaling.performance.predict import Prediction
    from hpctrain.scaling.plan import duration

    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table(title=title, title_justify="left", show_edge=False)
    for name in ("nodes", "step ms", "90 % interval", "compute", "exposed", "slowest", "input"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("images/s", "efficiency", "to train", "node-hours"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("binds")
    possible = [each for each in predictions if isinstance(each, Prediction)]
    for each in possible:
        step = each.step
        parts = (step.compute, step.exposed_communication, step.straggler, step.input)
        low, high = each.step_interval
        table.add_row(
            f"{each.nodes:,}",
            _milliseconds(step.total),
            f"{_milliseconds(low)} - {_milliseconds(high)}",
            *(_milliseconds(part) for part in parts),
            f"{each.images_per_second:,.0f}",
            f"{each.efficiency:.1%}",
            duration(each.train_seconds),
            f"{each.node_hours:,.1f}",
            each.binding,
        )
    if possible:
        console.print(table)
        click.echo("exposed: communication that outlasts the backward pass; slowest: the wait for the slowest rank")
    for each in possible:
        _print_rest(each)
    for missing in predictions:
        if not isinstance(missing, Prediction):
            click.echo(f"{_nodes(missing.nodes)}: {missing.problem}")
    for note in notes:
        click.echo(note)


def _print_rest(each: "Prediction") -> None:
    """Between the steps, and what would help."""
    from hpctrain.scaling.plan import duration

    run = each.run
    low, high = each.train_interval
    click.echo(
        f"{_nodes(each.nodes)}: {run.num_steps:,} steps; {duration(low)} to {duration(high)} in all; evaluation "
        f"{duration(run.evaluation)}, checkpoints {duration(run.checkpoint)}, start {duration(run.start)}; "
        f"allreduce: {each.algorithm if each.ranks > 1 else 'none'}"
    )
    for advice in each.advice[:_MOST_ADVICE]:
        click.echo(f"  would save {advice.saving:.0%}: {advice.change}")


def _nodes(count: int) -> str:
    return f"{count:,} node{'s' * (count > 1)}"


def _milliseconds(seconds: float) -> str:
    value = 1e3 * seconds
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
