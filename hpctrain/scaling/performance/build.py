"""From a recipe, a site's profile and a calibration to what the model computes with."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.config import Config
from hpctrain.data.processes import available_cores
from hpctrain.errors import UserError, nearest
from hpctrain.jobs.site import Site
from hpctrain.scaling.performance.allreduce import Link, Network
from hpctrain.scaling.performance.architecture import MODELS, architecture
from hpctrain.scaling.performance.calibration import Calibration, line_through
from hpctrain.scaling.performance.machine import Covariance, Machine, independent
from hpctrain.scaling.performance.run import RunPlan
from hpctrain.scaling.performance.step import Work

IMAGENET_IMAGES, IMAGENET_HELD_OUT = 1_281_167, 50_000

# What is assumed where neither the profile nor a calibration tells; docs/prediction.md names them.
NOMINAL_WITHIN = Link(5e-7, 1e-10)  # shared memory between ranks of a node
NOMINAL_GAMMA = 2.5e-10  # adding float32 on one core: 12 bytes move for 4, at 12 GB/s
NOMINAL_OVERHEAD_SECONDS = 1e-3  # Horovod's cycle: how often it looks what there is to reduce
NOMINAL_SIGMA = 0.024  # docs/prediction-published.md has its source
NOMINAL_START_SECONDS = 60.0
_NOMINAL_ERRORS = {"compute": 0.1, "alpha": 0.7, "beta": 0.3, "straggler_sigma": 0.7}
_MEASURED_ERROR = 0.03
_ALIKE = 4.0  # times the arithmetic: a network within it is about as efficient as its relative
_MODEL_ERROR = 0.05


@dataclass(frozen=True)
class Case:
    """A recipe on a machine, with sentences on what its numbers come from."""

    work: Work
    machine: Machine
    plan: RunPlan
    notes: tuple[str, ...]


def build_case(
    config: Config,
    site: Site,
    calibration: Calibration,
    ranks_per_node: int | None = None,
    images: int | None = None,
    cores: int | None = None,
) -> Case:
    """Put together what is known. `images` is the size of the training set, ImageNet's when not given.

    `cores` are those that the ranks of the site `local` share, this machine's when not given.
    Raises UserError when nobody tells the model's rate, or the calibration is of another model.
    """
    per_node = ranks_per_node or site.ranks_per_node
    steps = _fitting_steps(config, calibration)
    shapes = (
        architecture(config.model.name, config.model.num_classes or 1000, config.model.image_size)
        if config.model.name in MODELS
        else []
    )
    profile: Sequence[dict[str, Any]] = next((s["layers"] for s in steps if s.get("layers")), ())
    if not shapes and not profile:
        architecture(config.model.name)  # says why
    work = Work(
        shapes,
        config.train.global_batch,
        config.train.micro_batch,
        config.train.bucket_mb * 1e6,
        config.train.compression != "none",
        not config.train.deterministic,
        profile,
    )
    notes: list[str] = []
    errors = dict(_NOMINAL_ERRORS)
    if steps:
        fixed, per_image = line_through(steps)
        errors["compute"] = max(_MEASURED_ERROR, _median_error(steps[0].get("step_seconds_all") or ()))
        notes.append(f"compute: {calibration.source}")
    elif config.model.name in site.micro_batch_seconds:
        sizes = site.micro_batch_seconds[config.model.name]
        fixed, per_node_image = line_through(
            [{"micro_batch": images, "forward_backward_seconds": seconds} for images, seconds in sizes.items()]
        )
        per_image = per_node * per_node_image
        notes.append(f"compute: seconds of micro-batches of {', '.join(map(str, sizes))} images, from {site.name}")
    else:
        fixed, per_image = 0.0, per_node / _site_rate(site, config, notes)
        notes.append(
            "a node is taken to be as fast on few images as on many: measure it with `hpctrain bench step` at two "
            "sizes of train.micro_batch for a --calibration"
        )
    known = steps[0] if steps else {}
    machine = Machine(
        network=_network(site, calibration, per_node, errors, notes),
        seconds_per_image=per_image,
        fixed_seconds=fixed,
        update_seconds=_update_seconds(known),
        input_seconds_per_image=_input_seconds(config, known),
        straggler_sigma=_sigma(calibration, errors, notes),
        message_overhead_seconds=_overhead(calibration),
        algorithm="halving_doubling" if config.train.deterministic else _algorithm(calibration),
        start_seconds=NOMINAL_START_SECONDS if calibration.start_seconds is None else calibration.start_seconds,
        shared_cores=(cores or available_cores()) if site.scheduler == "local" else None,
        threads_per_rank=int(known.get("threads") or 1),
        covariance=_covariance(calibration, errors),
        model_error=float((calibration.fitted or {}).get("model_error") or _MODEL_ERROR),
    )
    plan = _plan(config, images)
    if images is None and not config.data.synthetic:
        notes.append(f"images: ImageNet's {plan.images:,}; --images tells another number")
    return Case(work, machine, plan, tuple(notes))


def _fitting_steps(config: Config, calibration: Calibration) -> list[dict[str, Any]]:
    names = {str(step.get("model")) for step in calibration.steps}
    fitting = [step for step in calibration.steps if step.get("model") == config.model.name]
    if names and not fitting:
        raise UserError(
            f"{calibration.source} was measured with {', '.join(sorted(names))}, and the recipe trains "
            f"{config.model.name}; run `hpctrain bench step` with this recipe"
        )
    return fitting


def _site_rate(site: Site, config: Config, notes: list[str]) -> float:
    """A node's images a second, as published; of a close relative, by its arithmetic, when there is no other."""
    name = config.model.name
    if name in site.images_per_second:
        notes.append(f"compute: {site.images_per_second[name]:g} images/s a node, from the profile {site.name}")
        return site.images_per_second[name]
    relatives = {
        relative: _multiply_adds(relative) / _multiply_adds(name)
        for relative in site.images_per_second
        if name in MODELS and relative in MODELS and relative[:6] == name[:6]
    }
    relative = min(relatives, key=lambda each: abs(math.log(relatives[each])), default=None)
    if relative is not None and 1 / _ALIKE <= relatives[relative] <= _ALIKE:
        rate = site.images_per_second[relative]
        notes.append(f"compute: {relative}'s {rate:g} images/s a node of {site.name}, by multiply-adds")
        return rate * relatives[relative]
    hint = nearest(name, site.images_per_second) if site.images_per_second else "it has none of any model"
    raise UserError(
        f"the profile {site.name} has no rate for {name} ({hint}); give the JSON of `hpctrain bench step` "
        "with --calibration"
    )


def _multiply_adds(model: str) -> int:
    return sum(shape.multiply_adds for shape in architecture(model))


def _network(
    site: Site, calibration: Calibration, per_node: int, errors: dict[str, float], notes: list[str]
) -> Network:
    between = Link(site.network.latency_seconds, site.network.seconds_per_byte, NOMINAL_GAMMA)
    within = Link(NOMINAL_WITHIN.alpha_seconds, NOMINAL_WITHIN.beta_seconds_per_byte, NOMINAL_GAMMA)
    if calibration.allreduce is None:
        notes.append(f"network: {site.network.source}")
        return Network(between, between if site.scheduler == "local" else within, per_node)
    fit = calibration.allreduce["fit"]
    measured = Link(
        float(fit.get("alpha_seconds") or 0.0),
        float(fit["beta_seconds_per_byte"]),
        float(fit.get("gamma_seconds_per_byte") or 0.0),
    )
    notes.append(f"network: {calibration.source}")
    errors["alpha"] = errors["beta"] = max(_MEASURED_ERROR, float(fit.get("relative_error") or 0.0))
    if site.scheduler != "local" and calibration.allreduce.get("hosts") == 1:
        notes.append("the allreduce was measured on one host: it tells nothing of the network between nodes")
        return Network(between, measured, per_node)
    return Network(measured, measured if site.scheduler == "local" else within, per_node)


def _algorithm(calibration: Calibration) -> str:
    """Alpha and beta that were fitted with one algorithm's formula hold in that formula."""
    if calibration.allreduce is None:
        return "best"
    return str(calibration.allreduce["fit"].get("algorithm", "ring"))


def _overhead(calibration: Calibration) -> float:
    if calibration.allreduce is None:
        return NOMINAL_OVERHEAD_SECONDS
    return float(calibration.allreduce["fit"].get("horovod_overhead_seconds") or 0.0)


def _sigma(calibration: Calibration, errors: dict[str, float], notes: list[str]) -> float:
    if calibration.straggler_sigma is not None:
        errors["straggler_sigma"] = 0.2
        return float(calibration.straggler_sigma)
    notes.append(f"a rank's time varies by {NOMINAL_SIGMA:.1%}: assumed")
    return NOMINAL_SIGMA


def _median_error(seconds: Sequence[float]) -> float:
    """The relative standard error of a median, from the median distance from it; 0 for no times."""
    if not seconds:
        return 0.0
    middle = statistics.median(seconds)
    deviation = 1.4826 * statistics.median(abs(each - middle) for each in seconds)
    return 1.2533 * deviation / middle / math.sqrt(len(seconds))


def _update_seconds(step: dict[str, Any]) -> float:
    """All that a step has beside both passes: the optimizer, and what it takes to start and end a step."""
    whole = step.get("step_seconds")
    return max(0.0, float(whole) - float(step["forward_backward_seconds"])) if whole else 0.0


def _input_seconds(config: Config, step: dict[str, Any]) -> float:
    seconds = step.get("input_seconds")
    return 0.0 if config.data.synthetic or not seconds else float(seconds) / float(step["micro_batch"])


def _covariance(calibration: Calibration, errors: dict[str, float]) -> Covariance:
    if calibration.fitted and calibration.fitted.get("covariance"):
        return tuple(tuple(float(value) for value in row) for row in calibration.fitted["covariance"])
    return independent(errors)


def _plan(config: Config, images: int | None) -> RunPlan:
    records = images or (config.data.synthetic_records if config.data.synthetic else IMAGENET_IMAGES)
    return RunPlan(
        config.train.epochs,
        records,
        0 if config.data.synthetic else round(records * IMAGENET_HELD_OUT / IMAGENET_IMAGES),
        config.evaluate.every_epochs,
        config.checkpoint.every_steps,
        config.train.steps,
    )
