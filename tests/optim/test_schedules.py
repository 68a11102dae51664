"""Properties of the learning-rate schedules and scaling rules; no TensorFlow needed."""

import itertools
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.errors import UserError
from hpctrain.optim import (
    legw,
    linear_scaling,
    make_schedule,
    sqrt_scaling,
    warmup_constant,
    warmup_cosine,
    warmup_poly,
    warmup_step,
)
from hpctrain.optim.schedules import SCHEDULE_NAMES

base_rates = st.floats(1e-3, 50)
runs = st.integers(1, 400).flatmap(lambda total: st.tuples(st.just(total), st.integers(0, total)))
names = st.sampled_from(SCHEDULE_NAMES)


@given(name=names, base=base_rates, run=runs, start=st.floats(0, 1))
def test_warmup_is_a_straight_line_that_ends_exactly_at_the_base_rate(name, base, run, start):
    total, warmup = run
    schedule = make_schedule(name, base, total, warmup, warmup_start=start * base)
    assert schedule(warmup) == base  # also step 0 without warm-up
    for step in range(1, warmup + 1):
        assert math.isclose(schedule(step), start * base + (1 - start) * base * step / warmup, rel_tol=1e-12)


@given(name=names, base=base_rates, run=runs, end=st.floats(0, 1))
def test_rates_rise_through_the_warmup_then_never_rise(name, base, run, end):
    total, warmup = run
    schedule = make_schedule(name, base, total, warmup, end_rate=end * base, milestones=[warmup + 3, warmup + 9])
    rates = [schedule(step) for step in range(total + 5)]
    slack = 1e-12 * base
    assert all(b >= a - slack for a, b in itertools.pairwise(rates[: warmup + 1]))
    assert all(b <= a + slack for a, b in itertools.pairwise(rates[warmup:]))
    assert all(-slack <= rate <= base + slack for rate in rates)
    assert rates[total:] == [rates[total]] * 5


@given(name=st.sampled_from(["poly", "cosine"]), base=base_rates, run=runs, end=st.floats(0, 1))
def test_poly_and_cosine_end_exactly_at_the_end_rate(name, base, run, end):
    total, warmup = run
    if warmup < total:
        for span in ("after_warmup", "whole_run"):
            assert make_schedule(name, base, total, warmup, end_rate=end, decay_over=span)(total) == end


@given(
    base=base_rates, warmup=st.integers(1, 200), after=st.integers(200, 2000), name=st.sampled_from(["poly", "cosine"])
)
def test_no_jump_at_the_end_of_the_warmup(base, warmup, after, name):
    schedule = make_schedule(name, base, warmup + after, warmup)
    assert base >= schedule(warmup + 1) >= base * (1 - 2.5 / after)


def test_poly_by_hand():
    schedule = warmup_poly(8.0, total_steps=12, warmup_steps=4)
    assert [schedule(s) for s in (1, 2, 4, 8, 10, 12)] == [2.0, 4.0, 8.0, 2.0, 0.5, 0.0]
    whole = warmup_poly(8.0, total_steps=12, warmup_steps=4, decay_over="whole_run")
    assert whole(4) == 8.0 and whole(6) == 2.0 and math.isclose(whole(5), 8 * (7 / 12) ** 2)
    ends = warmup_poly(8.0, total_steps=12, power=1, end_rate=2.0)
    assert ends(6) == 5.0 and ends(12) == 2.0


def test_step_by_hand():
    schedule = warmup_step(1.0, total_steps=100, warmup_steps=5, milestones=[30, 60, 900], factor=0.1)
    assert schedule(30) == 1.0 and schedule(31) == 0.1 and schedule(60) == 0.1
    assert math.isclose(schedule(61), 0.01) and schedule(100) == schedule(61)


def test_cosine_and_constant_by_hand():
    assert math.isclose(warmup_cosine(2.0, 10, 2)(6), 1.0)
    assert warmup_constant(2.0, 10, 4, warmup_start=1.0)(1) == 1.25 and warmup_constant(2.0, 10)(10) == 2.0


@pytest.mark.parametrize(
    "arguments, part",
    [
        ({"name": "pol"}, "poly"),
        ({"warmup_steps": 101}, "longer than the run"),
        ({"warmup_steps": -1}, "warmup_steps"),
        ({"warmup_steps": 1.5}, "whole number"),
        ({"total_steps": 0}, "total_steps"),
        ({"base_rate": -1.0}, "learning rate"),
        ({"base_rate": float("nan")}, "learning rate"),
        ({"base_rate": "1"}, "learning rate"),
        ({"power": 0}, "power"),
        ({"end_rate": -1e-4}, "end_rate"),
        ({"decay_over": "whole"}, "whole_run"),
        ({"name": "step", "milestones": [30, 20]}, "increasing"),
        ({"name": "step", "milestones": [3], "warmup_steps": 10}, "within the warm-up"),
        ({"name": "step", "factor": -0.1}, "factor"),
    ],
)
def test_wrong_arguments_are_named(arguments, part):
    with pytest.raises(UserError, match=part):
        make_schedule(**{"name": "poly", "base_rate": 1.0, "total_steps": 100, **arguments})


def test_negative_steps_are_refused():
    with pytest.raises(ValueError, match="numbered from 1"):
        warmup_poly(1.0, 10)(-1)


def test_scaling_rules():
    assert math.isclose(linear_scaling(0.1, 256, 8192), 3.2)
    assert math.isclose(sqrt_scaling(8.0, 2048, 8192), 16.0)
    rate, epochs = legw(2**2.5, 1, 1024, 2048)
    assert math.isclose(rate, 8.0) and epochs == 2
    with pytest.raises(UserError, match="positive"):
        linear_scaling(0.1, 0, 8192)


def test_schedules_import_no_tensorflow():
    code = "import sys; from hpctrain.optim import warmup_poly; assert not {'tensorflow', 'keras'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
