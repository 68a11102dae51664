"""The held-out comparison on measurements drawn from the model itself, where the right answer is known."""

import random
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.emulated_prediction import MODELS, WARM_UP_STEPS, settings
from benchmarks.held_out_prediction import document, predictions, studies
from hpctrain.config import load_config
from hpctrain.jobs.site import load_site
from hpctrain.scaling.performance.allreduce import Link, Network
from hpctrain.scaling.performance.build import build_case
from hpctrain.scaling.performance.calibration import parse_calibration
from hpctrain.scaling.performance.step import step_time


def measured(model: str, rate_mbit: int, counts: tuple[int, ...]) -> dict[str, Any]:
    """Trainings on emulated hosts that behave just as the model says."""
    rng = random.Random(5)
    step = {"model": "resnet20", "micro_batch": MODELS[model].micro_batch, "forward_backward_seconds": 0.3}
    trainings = {}
    for hosts in counts:
        config = load_config("demo", settings(model, hosts))
        case = build_case(config, load_site("local"), parse_calibration({"step": step}), 1, cores=2)
        link = Link(2e-4, 8 / (rate_mbit * 1e6))
        machine = replace(case.machine, network=Network(link, link), straggler_sigma=0.03)
        seconds = step_time(case.work, machine, hosts).total
        steps = [10.0] * WARM_UP_STEPS + [seconds * rng.gauss(1, 0.02) for _ in range(12)]
        trainings[f"{model}/{hosts}/{rate_mbit}"] = {"step_seconds": steps}
    return {"machine": {"cores": 2}, "trainings": trainings}


def test_the_largest_count_is_foretold() -> None:
    found = measured("small", 100, (2, 4, 8))
    (result,) = predictions(found).values()
    assert (result.fitted_on, result.measurement.nodes) == ((2, 4), 8)
    assert abs(result.relative_error) < 0.1
    text = document(found)
    assert f"| small | 100 | 2, 4 | 8 | {result.measurement.median_step_seconds:.3f} |" in text
    assert f"{abs(result.relative_error):.1%}" in text


def test_the_largest_count_is_not_looked_at() -> None:
    found = measured("small", 100, (2, 4, 8))
    before = predictions(found)["small", 100].prediction.step_seconds
    found["trainings"]["small/8/100"]["step_seconds"] = [99.0] * 15
    after = predictions(found)["small", 100]
    assert after.prediction.step_seconds == pytest.approx(before) and after.relative_error < -0.5


def test_two_counts_are_no_study() -> None:
    assert studies(measured("small", 100, (2, 8))) == {}
