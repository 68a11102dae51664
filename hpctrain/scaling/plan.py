"""What a batch size costs and brings: the arithmetic of the paper's tables, before any node-hour is spent.

With a fixed number of epochs E over n images, a batch of B takes E n / B iterations. Each moves the gradients of all
parameters once, so a larger batch means fewer messages and fewer bytes for the same arithmetic (You et al., arXiv
1709.05011). How well a network scales is the ratio of its arithmetic an image to its parameters.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hpctrain.config import Config, load_config, recipe_names
from hpctrain.data.order import steps_in
from hpctrain.errors import UserError, nearest
from hpctrain.jobs.site import Site
from hpctrain.models.sizes import SIZES, ModelSize
from hpctrain.scaling.performance.allreduce import Link, Network, allreduce_seconds

IMAGENET_IMAGES = 1_281_167
PAPER_IMAGES = 1_280_000  # as the paper rounds it
PAPER_IMAGES_A_NODE = 16  # 32K over 2,048 KNL nodes
BYTES_A_GRADIENT = 4


@dataclass(frozen=True)
class PaperCount:
    """How arXiv 1709.05011 counts a network: parameters, and floating-point operations an image."""

    parameters: float
    flops_per_image: float


PAPER_COUNTS = {"alexnet": PaperCount(61e6, 1.5e9), "resnet50": PaperCount(25e6, 7.7e9)}


@dataclass(frozen=True)
class PlanRow:
    """One batch size: iterations (as many as allreduces of all gradients), bytes of gradients, what to expect."""

    batch: int
    iterations: int
    gradient_bytes: int
    expected_top1: float | None  # percent, best published with LARS
    recipe: str | None
    nodes: int | None = None
    estimated_seconds: float | None = None  # of all iterations, on `nodes` nodes of a site


def plan(
    model: str,
    epochs: float,
    batches: Sequence[int],
    images: int = PAPER_IMAGES,
    site: Site | None = None,
    nodes: int | None = None,
) -> list[PlanRow]:
    """Return a row for each batch size, with a site also the time it takes there.

    Without `nodes` each batch is spread so that a node has 16 images, the paper's 32K on 2,048 nodes, but at most over
    all nodes there are. Raises UserError for an unknown model, a batch larger than the data set, or too many nodes.
    """
    parameters = model_size(model).parameters
    if nodes is not None and site is None:
        raise UserError("--nodes needs a --site, whose network and rates the estimated time comes from")
    if site is not None and nodes is not None and nodes > site.nodes:
        raise UserError(f"{site.name} has {site.nodes:,} nodes, not {nodes:,}")
    rows = []
    for batch in batches:
        if not 1 <= batch <= images:
            raise UserError(f"a batch of {batch} does not fit a data set of {images} images; choose 1 to {images}")
        iterations = steps_in(epochs, images, batch)
        top1, recipe = _published(model, batch)
        size = parameters * BYTES_A_GRADIENT
        used, seconds = None, None
        if site is not None:
            used = nodes or min(max(1, batch // PAPER_IMAGES_A_NODE), site.nodes)
            seconds = iterations * step_seconds(site, model, batch, used, size)
        rows.append(PlanRow(batch, iterations, iterations * size, top1, recipe, used, seconds))
    return rows


def step_seconds(site: Site, model: str, batch: int, nodes: int, gradient_bytes: int) -> float:
    """Return the time of one iteration: the nodes' share of the batch at their published rate, then a ring allreduce.

    Nothing overlaps, and a node is as fast on a few images as on many: what it says is neither a bound nor a promise,
    but the balance of the two terms. `hpctrain.scaling.predict` goes into more. Raises UserError for a model the site
    has no rate of.
    """
    if model not in site.images_per_second:
        raise UserError(f"{site.name} has no rate for {model}; {nearest(model, site.images_per_second)}")
    compute = batch / nodes / site.images_per_second[model]
    link = Link(site.network.latency_seconds, site.network.seconds_per_byte)
    return compute + allreduce_seconds("ring", nodes, gradient_bytes, Network(link, link))


def flops_per_parameter(model: str) -> float:
    """Return floating-point operations an image (a multiply-add is two) over parameters, of the model as built here."""
    size = model_size(model)
    return 2 * size.multiply_adds / size.parameters


def paper_flops_per_parameter(model: str) -> float | None:
    """Return the same ratio from the paper's rounded counts: 24.6 for AlexNet, 308 for ResNet-50; else None."""
    count = PAPER_COUNTS.get(model)
    return count.flops_per_image / count.parameters if count else None


def model_size(model: str) -> ModelSize:
    """Return the ModelSize of a model's name, or raise UserError."""
    if model not in SIZES:
        raise UserError(f"there is no model {model!r} to plan for; {nearest(model, SIZES)}")
    return SIZES[model]


def parse_batches(text: str) -> list[int]:
    """Return the batch sizes in `512,4K,32k`; K is 1,024. Raises UserError."""
    batches = []
    for word in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*([kK]?)\s*", word)
        if not match:
            raise UserError(f"{word.strip()!r} is not a batch size; expected numbers such as 512 or 32K, with commas")
        batches.append(int(match[1]) * (1024 if match[2] else 1))
    return batches


def batch_label(batch: int) -> str:
    """Return a batch as people say it: 512, 32K."""
    return f"{batch // 1024}K" if batch % 1024 == 0 else str(batch)


def duration(seconds: float) -> str:
    """Return a time as people say it: 35 s, 12 min, 3.4 h, 5.1 d."""
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def recipe_facts(config: Config, images: int = IMAGENET_IMAGES) -> list[str]:
    """Return lines on what a recipe amounts to on ImageNet: accuracy, iterations, warm-up, gradient bytes."""
    batch, epochs, warmup = config.train.global_batch, config.train.epochs, config.schedule.warmup_epochs
    iterations = steps_in(epochs, images, batch)
    facts = []
    if config.expected_top1 is not None:
        facts.append(f"expected top-1: {config.expected_top1:g} %")
    facts.append(f"iterations: {iterations:,} ({epochs:g} epochs of ImageNet's {images:,} images)")
    facts.append(f"warm-up: {round(warmup * images / batch):,} iterations ({warmup:g} epochs)")
    if config.model.name in SIZES:
        moved = SIZES[config.model.name].parameters * BYTES_A_GRADIENT
        facts.append(f"gradients: {moved / 1e6:,.1f} MB an iteration, {iterations * moved / 1e12:,.2f} TB in all")
    return facts


def _published(model: str, batch: int) -> tuple[float | None, str | None]:
    """The best published top-1 among the LARS recipes of this model and batch, and the recipe's name."""
    configs = [load_config(name) for name in recipe_names() if name.startswith(f"{model}-")]
    fitting = [c for c in configs if c.train.global_batch == batch and c.optimizer.name == "lars"]
    if not fitting:
        return None, None
    best = max(fitting, key=lambda config: config.expected_top1 or 0)
    return best.expected_top1, best.name
