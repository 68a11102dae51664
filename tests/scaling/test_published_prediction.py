"""The comparison with published times is recomputed from what ships, and the document is what it says today."""

import json

import pytest

from benchmarks.published_prediction import (
    CALIBRATIONS,
    CASES,
    DOCUMENT,
    calibrations,
    document,
    middle,
    outcomes,
)
from benchmarks.published_sources import PARAMETERS
from hpctrain.config import load_config
from hpctrain.jobs.site import load_site
from hpctrain.scaling import predict
from hpctrain.scaling.performance.predict import Prediction


def test_the_document_is_up_to_date() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "run `python -m benchmarks.published_prediction`"


XEON = "xeon-8160-alexnet_bn"
KNL = ("stampede2-knl", "stampede2-knl-flat", "nurion-knl", "cori-knl")


@pytest.mark.parametrize(
    ("site", "model", "name"),
    [*((site, "resnet50", "knl-7250-resnet50") for site in KNL), ("skylake-8160", "alexnet_bn", XEON)],
)
def test_the_profiles_have_the_seconds_of_the_comparison(site: str, model: str, name: str) -> None:
    steps = json.loads((CALIBRATIONS / f"{name}.json").read_text())["step"]
    assert load_site(site).micro_batch_seconds[model] == {
        step["micro_batch"]: step["forward_backward_seconds"] for step in steps
    }


def test_the_calibrations_are_up_to_date_and_predict_the_same_nodes() -> None:
    for name, text in calibrations().items():
        assert (CALIBRATIONS / name).read_text(encoding="utf-8") == text
    config = load_config("resnet50-32k-90epochs", ["train.micro_batch=16"])
    (found,) = predict(config, "stampede2-knl", [2048], CALIBRATIONS / "knl-7250-resnet50.json")
    assert isinstance(found, Prediction)
    step, _ = CASES[0].predict(middle())
    assert found.step.compute == pytest.approx(step.compute, rel=1e-4)
    assert found.step_seconds == pytest.approx(step.total, rel=0.02)


def test_every_parameter_has_a_source_and_lies_in_its_range() -> None:
    for parameter in PARAMETERS.values():
        assert parameter.low <= parameter.value <= parameter.high
        assert len(parameter.source) > 10


def test_no_reported_time_is_an_input() -> None:
    """Cases with the same machine and work differ in nothing but what they are compared with."""
    values = middle()
    you, kisti = (case for case in CASES if (case.nodes, case.epochs) == (2048, 90))
    assert you.minutes != kisti.minutes
    assert you.predict(values) == kisti.predict(values)


def test_most_cases_are_within_the_goal() -> None:
    errors = [abs(row.error) for row in outcomes(middle())]
    assert len(errors) == 5 and sorted(errors)[3] <= 0.15
