"""The planner repeats the paper's tables where they are arithmetic."""

import pytest

from hpctrain.config import load_config
from hpctrain.errors import UserError
from hpctrain.jobs.site import Network, Site
from hpctrain.models.sizes import SIZES
from hpctrain.scaling.plan import (
    duration,
    flops_per_parameter,
    paper_flops_per_parameter,
    parse_batches,
    plan,
    recipe_facts,
    step_seconds,
)


def test_iterations_and_bytes_are_those_of_the_paper() -> None:
    rows = {row.batch: row for row in plan("alexnet", 100, parse_batches("512,1K,4K,8k,32K"))}
    iterations = {batch: row.iterations for batch, row in rows.items()}
    assert iterations == {512: 250_000, 1024: 125_000, 4096: 31_250, 8192: 15_625, 32768: 3_907}
    assert rows[512].gradient_bytes == 250_000 * 60_965_224 * 4
    assert rows[512].expected_top1 == 58.7 and rows[512].recipe == "alexnet-512"
    assert rows[1024].expected_top1 is None and rows[1024].recipe is None


def test_ratios_of_computation_to_communication() -> None:
    alexnet, resnet50 = paper_flops_per_parameter("alexnet"), paper_flops_per_parameter("resnet50")
    assert alexnet is not None and resnet50 is not None
    assert round(alexnet, 1) == 24.6 and resnet50 == 308
    assert round(resnet50 / alexnet, 1) == 12.5
    assert flops_per_parameter("alexnet") == pytest.approx(alexnet, rel=0.05)
    assert flops_per_parameter("resnet50") == pytest.approx(resnet50, rel=0.05)
    assert paper_flops_per_parameter("resnet18") is None


def test_the_best_published_accuracy_of_a_batch_is_named() -> None:
    (row,) = plan("resnet50", 90, [32768])
    assert (row.expected_top1, row.recipe) == (75.4, "resnet50-32k-90epochs")


def test_a_recipe_without_a_published_figure_is_named_too() -> None:
    (row,) = plan("resnet50", 90, [65536])
    assert (row.expected_top1, row.recipe) == (None, "resnet50-64k")


SITE = Site(
    name="two-by-two",
    description="",
    source="",
    nodes=8,
    network=Network(latency_seconds=1e-3, seconds_per_byte=1e-9, source=""),
    images_per_second={"resnet50": 50.0},
)


def test_the_time_of_a_step_is_compute_and_a_ring() -> None:
    # 4 nodes: 6 messages of a quarter of 400 bytes; 100 images on 4 nodes at 50 a second
    assert step_seconds(SITE, "resnet50", 100, 4, 400) == pytest.approx(0.5 + 6 * (1e-3 + 100e-9))
    assert step_seconds(SITE, "resnet50", 100, 1, 400) == pytest.approx(2.0)


def test_a_site_gives_nodes_and_times() -> None:
    small, large = plan("resnet50", 1, [64, 1024], images=1024, site=SITE)
    assert (small.nodes, large.nodes) == (4, 8)  # 16 images a node, as far as there are nodes
    assert small.estimated_seconds == pytest.approx(16 * step_seconds(SITE, "resnet50", 64, 4, 25_557_032 * 4))
    (fixed,) = plan("resnet50", 1, [64], images=1024, site=SITE, nodes=2)
    assert fixed.nodes == 2
    (without,) = plan("resnet50", 1, [64], images=1024)
    assert without.nodes is None and without.estimated_seconds is None


def test_what_a_site_cannot_do_is_said() -> None:
    with pytest.raises(UserError, match="8 nodes"):
        plan("resnet50", 1, [64], site=SITE, nodes=9)
    with pytest.raises(UserError, match="no rate for alexnet"):
        plan("alexnet", 1, [64], site=SITE)
    with pytest.raises(UserError, match="--site"):
        plan("resnet50", 1, [64], nodes=2)


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.14159, "3.14 s"), (89, "89 s"), (786, "13.1 min"), (49320, "13.7 h"), (4e6, "46.3 d")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("text", ["", "512,", "big", "4M", "-5"])
def test_bad_batches_are_named(text: str) -> None:
    with pytest.raises(UserError, match="not a batch size"):
        parse_batches(text)


def test_mistakes_are_one_sentence() -> None:
    with pytest.raises(UserError, match="resnet50"):
        plan("resnet5", 90, [512])
    with pytest.raises(UserError, match="does not fit"):
        plan("resnet50", 90, [512], images=100)
    with pytest.raises(UserError, match="does not fit"):
        plan("resnet50", 90, [0])


def test_what_a_recipe_amounts_to() -> None:
    facts = recipe_facts(load_config("resnet50-32k-90epochs"))
    assert facts[0] == "expected top-1: 75.4 %"
    assert facts[1].startswith("iterations: 3,519 (90 epochs")
    assert facts[2].startswith("warm-up: 469 iterations")
    assert facts[3].startswith("gradients: 102.2 MB an iteration, 0.36 TB")


@pytest.mark.parametrize("name", sorted(set(SIZES) - {"resnet101", "resnet152", "resnet101_v15", "resnet152_v15"}))
def test_sizes_are_those_of_the_models(name: str) -> None:
    from hpctrain.models import build, describe

    facts = describe(build(name, image_size=227 if name.startswith("alexnet") else 224))
    assert SIZES[name].parameters == facts["trainable_parameters"]
    assert SIZES[name].multiply_adds == facts["multiply_adds_per_image"]
