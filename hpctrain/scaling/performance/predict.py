"""How long a recipe takes on so many nodes of a site: the model from end to end."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hpctrain.config import Config, load_config
from hpctrain.errors import UserError
from hpctrain.jobs.layout import layout
from hpctrain.jobs.site import Site, load_site
from hpctrain.scaling.performance.advice import Advice, advise, binding_resource
from hpctrain.scaling.performance.allreduce import best_algorithm
from hpctrain.scaling.performance.build import Case, build_case
from hpctrain.scaling.performance.calibration import Calibration, load_calibration
from hpctrain.scaling.performance.interval import interval
from hpctrain.scaling.performance.machine import Machine
from hpctrain.scaling.performance.run import RunTime, run_time
from hpctrain.scaling.performance.step import StepTime, step_time


@dataclass(frozen=True)
class Prediction:
    """What to expect on one node count.

    `step` and `run` say where the time goes, in seconds; `step_interval` and `train_interval` are (low, high), for 90
    cases of 100. `efficiency` is images a second over those of a single node times the nodes. `algorithm` is the
    allreduce's for a full bucket.
    """

    nodes: int
    ranks: int
    micro_batches: int
    step: StepTime
    step_interval: tuple[float, float]
    run: RunTime
    train_interval: tuple[float, float]
    images_per_second: float
    efficiency: float
    node_hours: float
    algorithm: str
    binding: str
    advice: tuple[Advice, ...]

    @property
    def step_seconds(self) -> float:
        """The time of an optimizer step."""
        return self.step.total

    @property
    def train_seconds(self) -> float:
        """The time of the whole job."""
        return self.run.total

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return {**asdict(self), "step_seconds": self.step_seconds, "train_seconds": self.train_seconds}


@dataclass(frozen=True)
class Impossible:
    """A node count the recipe cannot run on, and why, in a sentence."""

    nodes: int
    problem: str

    def to_json(self) -> dict[str, Any]:
        """Return plain data."""
        return asdict(self)


def predict(
    recipe: str | Path | Config,
    site: str | Site,
    nodes: Sequence[int],
    calibration: Path | Calibration | None = None,
    *,
    ranks_per_node: int | None = None,
    images: int | None = None,
) -> list[Prediction | Impossible]:
    """Predict step time, efficiency and time to train on each of several node counts.

    `recipe` and `site` are names, files or the objects. Without a calibration the rates and the network are those of
    the site's profile. `images` is the size of the training set, ImageNet's when not given. Raises UserError for what
    holds for all counts: an unknown recipe or site, no rate, a calibration of another model.
    """
    return predict_case(*prepare(recipe, site, calibration, ranks_per_node, images), nodes, ranks_per_node)


def prepare(
    recipe: str | Path | Config,
    site: str | Site,
    calibration: Path | Calibration | None,
    ranks_per_node: int | None,
    images: int | None,
) -> tuple[Config, Site, Case]:
    """Load what is given by name and put it together. Raises UserError."""
    config = recipe if isinstance(recipe, Config) else load_config(recipe)
    profile = site if isinstance(site, Site) else load_site(site)
    if isinstance(calibration, Path):
        calibration = load_calibration(calibration)
    return config, profile, build_case(config, profile, calibration or Calibration(), ranks_per_node, images)


def predict_case(
    config: Config, site: Site, case: Case, nodes: Sequence[int], ranks_per_node: int | None = None
) -> list[Prediction | Impossible]:
    """Predict what `prepare` has put together."""
    predictions: list[Prediction | Impossible] = []
    for count in nodes:
        try:
            ranks = count_ranks(site, count, ranks_per_node)
            config.micro_batches_a_rank(ranks)
        except UserError as error:
            predictions.append(Impossible(count, str(error)))
        else:
            predictions.append(predict_ranks(case, count, ranks))
    return predictions


def count_ranks(site: Site, nodes: int, ranks_per_node: int | None) -> int:
    """Return the ranks on so many nodes; on the site `local` nodes share this machine. Raises UserError."""
    if site.scheduler == "local":
        if nodes < 1:
            raise UserError(f"nodes is {nodes}; expected 1 or more")
        return nodes * (ranks_per_node or site.ranks_per_node)
    if nodes > site.nodes:
        raise UserError(f"{site.name} has {site.nodes:,} nodes, not {nodes:,}; ask for fewer")
    return layout(site, nodes, ranks_per_node).ranks


def predict_ranks(case: Case, nodes: int, ranks: int) -> Prediction:
    """Predict one node count that the recipe fits."""
    work, machine, plan = case.work, case.machine, case.plan

    def step_seconds(machine: Machine) -> float:
        return step_time(work, machine, ranks).total

    def train_seconds(machine: Machine) -> float:
        return run_time(plan, work, machine, step_time(work, machine, ranks), ranks).total

    step = step_time(work, machine, ranks)
    run = run_time(plan, work, machine, step, ranks)
    algorithm = machine.algorithm
    if algorithm == "best":
        algorithm = best_algorithm(ranks, min(work.bucket_bytes, work.gradient_bytes), machine.network)[0]
    return Prediction(
        nodes=nodes,
        ranks=ranks,
        micro_batches=work.global_batch // (ranks * work.micro_batch),
        step=step,
        step_interval=interval(step_seconds, machine),
        run=run,
        train_interval=interval(train_seconds, machine),
        images_per_second=work.global_batch / step.total,
        efficiency=_one_node_seconds(case, ranks // nodes) / (nodes * step.total),
        node_hours=nodes * run.total / 3600,
        algorithm="all-to-all and allgather" if work.compressed else algorithm,
        binding=binding_resource(work, machine, ranks),
        advice=tuple(advise(plan, work, machine, ranks)),
    )


def _one_node_seconds(case: Case, ranks: int) -> float:
    """The time of a step's whole batch on one node without communication; micro-batches need not divide."""
    work, machine = case.work, case.machine
    images = work.global_batch / ranks
    passes = images / work.micro_batch * machine.micro_batch_seconds(work.micro_batch)
    own = passes + machine.update_seconds + images * machine.input_seconds_per_image
    return own * machine.slowdown(ranks)
