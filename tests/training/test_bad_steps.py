"""What makes a step bad, judged from the losses so far."""

import math

import numpy as np

from hpctrain.training.bad_steps import BadSteps
from hpctrain.training.step import StepResult


def result(loss: float) -> StepResult:
    return StepResult(loss, 0.0, False)


def test_a_loss_that_is_no_number_is_bad_at_once() -> None:
    steps = BadSteps(None)
    assert steps.add(result(3.0)) == "" and steps.limit == math.inf
    assert "NaN or infinite" in steps.add(result(math.nan))
    assert "NaN or infinite" in steps.add(result(math.inf))
    assert steps.add(result(1e30)) == ""
    assert steps.count == 2


def test_a_spike_is_measured_by_the_median_of_the_last_fifty() -> None:
    steps = BadSteps(3.0)
    for i in range(9):
        assert steps.limit == math.inf
        assert steps.add(result(2.0)) == "", i
    steps.add(result(1e6))  # too early to tell
    assert steps.limit == 6.0 and steps.count == 0
    assert steps.add(result(6.0)) == ""
    assert "train.loss_spike=3 times the usual is 6" in steps.add(result(6.5)) and steps.count == 1
    for _ in range(60):
        steps.add(result(1.0))
    assert steps.limit == 3.0


def test_a_resumed_run_judges_like_one_that_never_stopped() -> None:
    losses = np.random.default_rng(0).uniform(1, 2, 80).tolist()
    whole = BadSteps(1.7)
    for loss in losses:
        whole.add(result(loss))
    assert BadSteps(1.7, losses[-50:]).limit == whole.limit == float(np.float32(1.7 * np.median(losses[-50:])))
    assert BadSteps(1.7, [None, *losses[-50:]]).limit == whole.limit


def test_too_many_in_a_row() -> None:
    steps = BadSteps(None)
    for _ in range(9):
        steps.add(result(math.nan))
    assert not steps.too_many
    steps.add(result(1.0))
    for _ in range(10):
        assert not steps.too_many
        steps.add(result(math.nan))
    assert steps.too_many and steps.count == 19
