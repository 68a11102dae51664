"""The compiled update: the formula, in place unless someone holds the variable, the same for any number of threads."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.native import momentum
from tests.threads import digests

tf = pytest.importorskip("tensorflow")

RULE: dict[str, Any] = {"momentum": 0.9, "decay": 0.01, "nesterov": False}


def update(variable: Any, buffer: Any, gradient: Any, factor: Any = 0.5, rate: Any = 2.0, **rule: Any) -> None:
    operation = momentum()
    assert operation is not None, "run `python -m hpctrain.native.build`"
    operation(variable.handle, buffer.handle, gradient, factor, rate, [], [], **{**RULE, **rule})


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(0, 40), max_size=3),
    factor=st.floats(-2, 2),
    rate=st.floats(-2, 2),
    mass=st.floats(0, 0.99),
    decay=st.floats(0, 0.1),
    nesterov=st.booleans(),
)
def test_it_computes_the_formula(
    shape: list[int], factor: float, rate: float, mass: float, decay: float, nesterov: bool
) -> None:
    random = np.random.default_rng(0)
    w, v, g = (random.standard_normal(shape).astype(np.float32) for _ in range(3))
    variable, buffer = tf.Variable(w), tf.Variable(v)
    update(variable, buffer, g, factor, rate, momentum=mass, decay=decay, nesterov=nesterov)
    term = factor * (g.astype(np.float64) + decay * w.astype(np.float64))
    moved = mass * v.astype(np.float64) + term
    step = mass * moved + term if nesterov else moved
    np.testing.assert_allclose(buffer.numpy(), moved, rtol=0, atol=1e-5)
    np.testing.assert_allclose(variable.numpy(), w - rate * step, rtol=0, atol=1e-5)


def test_who_has_read_the_variable_keeps_what_was_read() -> None:
    variable, buffer = tf.Variable(tf.ones([1000])), tf.Variable(tf.zeros([1000]))
    before, moved_before = variable.read_value(), buffer.read_value()
    update(variable, buffer, tf.ones([1000]), 1.0, 1.0, decay=0.0)
    assert np.all(before.numpy() == 1) and np.all(moved_before.numpy() == 0)
    assert np.all(variable.numpy() == 0) and np.all(buffer.numpy() == 1)


def test_in_a_graph_it_waits_for_the_readers_before_it_and_those_after_it_wait() -> None:
    variable, buffer = tf.Variable(tf.ones([100_000])), tf.Variable(tf.zeros([100_000]))

    @tf.function
    def step() -> tuple[Any, Any]:
        before = tf.reduce_sum(variable)
        update(variable, buffer, tf.ones([100_000]), 1.0, 1.0, momentum=0.0, decay=0.0)
        return before, tf.reduce_sum(variable)

    for i in range(20):
        before, after = step()
        assert (float(before), float(after)) == ((1 - i) * 1e5, -i * 1e5)


@pytest.mark.parametrize(
    ("variable", "buffer", "gradient", "words"),
    [
        ([3], [3], [4], "variable"),
        ([3], [4], [3], "buffer"),
        ([3], [3, 1], [3], "buffer"),
    ],
)
def test_shapes_that_differ_are_an_error(
    variable: list[int], buffer: list[int], gradient: list[int], words: str
) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match=words):
        update(tf.Variable(tf.ones(variable)), tf.Variable(tf.ones(buffer)), tf.ones(gradient))


def test_other_arguments_are_an_error() -> None:
    one, other = tf.Variable(tf.ones([3])), tf.Variable(tf.ones([3]))
    with pytest.raises(tf.errors.InvalidArgumentError, match="of its own"):
        update(one, one, tf.ones([3]))
    with pytest.raises(tf.errors.InvalidArgumentError, match="one number"):
        update(one, other, tf.ones([3]), factor=[1.0, 2.0])
    with pytest.raises(tf.errors.FailedPreconditionError, match="float32"):
        update(tf.Variable(tf.ones([3], tf.float64)), other, tf.ones([3]))
    assert np.all(one.numpy() == 1) and np.all(other.numpy() == 1)


_DIGEST = """
import hashlib
import numpy as np
from hpctrain.native import momentum
random = np.random.default_rng(0)
w, v, g = (random.standard_normal(1_000_003).astype(np.float32) for _ in range(3))
variable, buffer = tf.Variable(w), tf.Variable(v)
momentum()(variable.handle, buffer.handle, g, 0.3, 0.7, [], [], momentum=0.9, decay=0.01, nesterov=True)
print(hashlib.sha256(variable.numpy().tobytes() + buffer.numpy().tobytes()).hexdigest())
"""


def test_the_number_of_threads_does_not_matter() -> None:
    assert len(digests(_DIGEST, 1, 2, 5)) == 1
