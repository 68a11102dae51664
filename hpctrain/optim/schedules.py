"""Learning-rate schedules and scaling rules: pure functions of the step, in float64, without TensorFlow.

A schedule is a function from step to learning rate. Steps are numbered from 1: step 1 is the first update.
With base rate B, warm-up start S, W warm-up steps and T steps in all, every schedule begins with the linear
("gradual") warm-up of Goyal et al. (arXiv 1706.02677, section 2.2):

    rate(t) = S + (B - S) * t / W                                        for 1 <= t <= W

so step 1 gets S + (B - S) / W and step W gets exactly B. Step 0 is the point the curve starts from (S, or B without
warm-up). After the warm-up, each schedule has its own formula; steps beyond T keep the rate of step T.
"""

import itertools
import math
import numbers
import operator
from collections.abc import Callable, Sequence

from hpctrain.errors import UserError, nearest

Schedule = Callable[[int], float]

SCHEDULE_NAMES = ("poly", "step", "cosine", "constant")
DECAY_SPANS = ("after_warmup", "whole_run")


def warmup_poly(
    base_rate: float,
    total_steps: int,
    warmup_steps: int = 0,
    power: float = 2.0,
    end_rate: float = 0.0,
    warmup_start: float = 0.0,
    decay_over: str = "after_warmup",
) -> Schedule:
    """Return a schedule that warms up, then decays as a polynomial to exactly `end_rate` at step `total_steps`.

        rate(t) = E + (B - E) * (1 - p) ** power,    p = (t - W) / (T - W)  with decay_over="after_warmup" (MLPerf)
                                                     p = t / T              with decay_over="whole_run" (You et al.)

    "after_warmup" is continuous. "whole_run" is what the LARS papers ran in Caffe: the decay also counts the warm-up
    steps, so the rate drops from B to (about) B * (1 - W / T) ** power right after the warm-up.
    """
    _check(base_rate, total_steps, warmup_steps, warmup_start)
    _check_number("end_rate", end_rate)
    if not power > 0:
        raise UserError(f"schedule power is {power!r}; it must be greater than 0.")
    if decay_over not in DECAY_SPANS:
        raise UserError(f"Unknown decay_over {decay_over!r}; {nearest(str(decay_over), DECAY_SPANS)}")
    first = warmup_steps if decay_over == "after_warmup" else 0

    def decay(step: int) -> float:
        return _between(end_rate, base_rate, (1.0 - _fraction(step, first, total_steps)) ** power)

    return _after_warmup(decay, base_rate, total_steps, warmup_steps, warmup_start)


def warmup_step(
    base_rate: float,
    total_steps: int,
    warmup_steps: int = 0,
    milestones: Sequence[int] = (),
    factor: float = 0.1,
    warmup_start: float = 0.0,
) -> Schedule:
    """Return a schedule that warms up, then multiplies the rate by `factor` after each milestone (in steps).

        rate(t) = B * factor ** (number of milestones m with m < t)

    A milestone is the last step at the old rate: with `n` steps an epoch, `milestones=[30 * n, ...]` gives 30 whole
    epochs at the base rate. Milestones beyond the run are never reached; one within the warm-up is an error.
    """
    _check(base_rate, total_steps, warmup_steps, warmup_start)
    _check_number("step factor", factor)
    marks = tuple(_check_steps("milestone", mark, least=1) for mark in milestones)
    if any(later <= earlier for earlier, later in itertools.pairwise(marks)):
        raise UserError(f"Schedule milestones {list(marks)} are not in increasing order; list each step once, sorted.")
    if marks and marks[0] < warmup_steps:
        raise UserError(
            f"The first milestone, step {marks[0]}, lies within the warm-up of {warmup_steps} steps; "
            "shorten the warm-up or move the milestone."
        )

    def decay(step: int) -> float:
        return base_rate * factor ** sum(mark < step for mark in marks)

    return _after_warmup(decay, base_rate, total_steps, warmup_steps, warmup_start)


def warmup_cosine(
    base_rate: float, total_steps: int, warmup_steps: int = 0, end_rate: float = 0.0, warmup_start: float = 0.0
) -> Schedule:
    """Return a schedule that warms up, then follows half a cosine to exactly `end_rate` at step `total_steps`.

    rate(t) = E + (B - E) * (1 + cos(pi * p)) / 2,    p = (t - W) / (T - W)      (Loshchilov and Hutter, 1608.03983)
    """
    _check(base_rate, total_steps, warmup_steps, warmup_start)
    _check_number("end_rate", end_rate)

    def decay(step: int) -> float:
        share = (1.0 + math.cos(math.pi * _fraction(step, warmup_steps, total_steps))) / 2.0
        return _between(end_rate, base_rate, share)

    return _after_warmup(decay, base_rate, total_steps, warmup_steps, warmup_start)


def warmup_constant(base_rate: float, total_steps: int, warmup_steps: int = 0, warmup_start: float = 0.0) -> Schedule:
    """Return a schedule that warms up and then stays at `base_rate`, also at step `total_steps`."""
    _check(base_rate, total_steps, warmup_steps, warmup_start)
    return _after_warmup(lambda step: float(base_rate), base_rate, total_steps, warmup_steps, warmup_start)


def make_schedule(
    name: str,
    base_rate: float,
    total_steps: int,
    warmup_steps: int = 0,
    *,
    power: float = 2.0,
    end_rate: float = 0.0,
    warmup_start: float = 0.0,
    decay_over: str = "after_warmup",
    milestones: Sequence[int] = (),
    factor: float = 0.1,
) -> Schedule:
    """Return the schedule called `name`: poly, step, cosine or constant.

    Every option may be given for every name, as one configuration section serves all; a schedule takes what it needs.
    """
    if name == "poly":
        return warmup_poly(base_rate, total_steps, warmup_steps, power, end_rate, warmup_start, decay_over)
    if name == "step":
        return warmup_step(base_rate, total_steps, warmup_steps, milestones, factor, warmup_start)
    if name == "cosine":
        return warmup_cosine(base_rate, total_steps, warmup_steps, end_rate, warmup_start)
    if name == "constant":
        return warmup_constant(base_rate, total_steps, warmup_steps, warmup_start)
    raise UserError(f"Unknown schedule {name!r}; {nearest(str(name), SCHEDULE_NAMES)}")


def linear_scaling(base_rate: float, base_batch: int, batch: int) -> float:
    """Return the rate for `batch` images: proportional to the batch (Goyal et al.: 0.1 for each 256 images)."""
    return base_rate * _batch_ratio(base_batch, batch)


def sqrt_scaling(base_rate: float, base_batch: int, batch: int) -> float:
    """Return the rate for `batch` images: proportional to the square root of the batch (Krizhevsky, 1404.5997)."""
    return base_rate * math.sqrt(_batch_ratio(base_batch, batch))


def legw(base_rate: float, base_warmup_epochs: float, base_batch: int, batch: int) -> tuple[float, float]:
    """Return (rate, warm-up epochs) for `batch` images by linear-epoch gradual warm-up (You et al., 1901.08256).

    The rate grows with the square root of the batch and the warm-up epochs in proportion to it, so that the number
    of warm-up steps stays the same: per doubling of the batch, rate * sqrt(2) and epochs * 2.
    """
    ratio = _batch_ratio(base_batch, batch)
    return base_rate * math.sqrt(ratio), base_warmup_epochs * ratio


def _after_warmup(
    decay: Schedule, base_rate: float, total_steps: int, warmup_steps: int, warmup_start: float
) -> Schedule:
    """Return the schedule that is the warm-up ramp for steps 1 to `warmup_steps` and `decay` from then on."""

    def rate(step: int) -> float:
        step = operator.index(step)
        if step < 0:
            raise ValueError(f"step {step} is negative; steps are numbered from 1")
        step = min(step, total_steps)
        if step <= warmup_steps and warmup_steps > 0:
            return _between(warmup_start, base_rate, step / warmup_steps)
        return decay(step)

    return rate


def _between(start: float, end: float, share: float) -> float:
    """Return `start` at share 0 and `end` at share 1, both exactly, and the straight line between."""
    return start * (1.0 - share) + end * share


def _fraction(step: int, first: int, last: int) -> float:
    """Return how far `step` is from `first` (0.0) to `last` (1.0)."""
    return (step - first) / (last - first)


def _check(base_rate: float, total_steps: int, warmup_steps: int, warmup_start: float) -> None:
    """Raise UserError unless the run has steps, the warm-up fits into it and the rates are numbers of at least 0."""
    _check_number("learning rate", base_rate)
    _check_number("warmup_start", warmup_start)
    _check_steps("total_steps", total_steps, least=1)
    _check_steps("warmup_steps", warmup_steps, least=0)
    if warmup_steps > total_steps:
        raise UserError(
            f"The warm-up of {warmup_steps} steps is longer than the run of {total_steps} steps; "
            "lower schedule.warmup_epochs or train for more epochs."
        )


def _check_number(what: str, value: float) -> None:
    if not (isinstance(value, numbers.Real) and math.isfinite(value) and value >= 0):
        raise UserError(f"The {what} is {value!r}; it must be a finite number of at least 0.")


def _check_steps(what: str, value: int, least: int) -> int:
    try:
        steps = operator.index(value)
    except TypeError:
        raise UserError(f"{what} is {value!r}; it must be a whole number of steps.") from None
    if steps < least:
        raise UserError(f"{what} is {steps}; it must be at least {least}.")
    return steps


def _batch_ratio(base_batch: int, batch: int) -> float:
    if base_batch <= 0 or batch <= 0:
        raise UserError(f"Batch sizes must be positive to scale a rate; got {base_batch} and {batch}.")
    return batch / base_batch
