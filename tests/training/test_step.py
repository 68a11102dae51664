"""The training step on one rank, against the same worked out step by step; losses and accuracy against NumPy."""

from collections.abc import Iterator
from itertools import repeat

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from hpctrain.models.layers import FusedBatchNorm, SeededDropout
from hpctrain.parallel.reduce import Reducer
from hpctrain.parallel.world import World
from hpctrain.training.step import TrainStep, cross_entropy, is_correct, model_state

CLASSES, MICRO_BATCH, SIDE = 5, 6, 8
Batch = tuple[NDArray[np.float32], NDArray[np.int32]]


def expected_losses(logits: NDArray[np.floating], labels: NDArray[np.integer], smoothing: float) -> NDArray[np.float64]:
    """Softmax cross-entropy by its definition, in float64."""
    logits = np.asarray(logits, np.float64)
    classes = logits.shape[1]
    highest = logits.max(axis=1, keepdims=True)
    log_shares = logits - highest - np.log(np.exp(logits - highest).sum(axis=1, keepdims=True))
    targets = np.eye(classes)[np.maximum(labels, 0)] * (1 - smoothing) + smoothing / classes
    return np.where(labels >= 0, -(targets * log_shares).sum(axis=1), 0.0)


@given(
    arrays(np.float32, (7, 4), elements=st.floats(-80, 80, width=32)),
    arrays(np.int32, 7, elements=st.integers(-1, 3)),
    st.sampled_from([0.0, 0.1, 0.9]),
)
def test_cross_entropy(logits: NDArray[np.float32], labels: NDArray[np.int32], smoothing: float) -> None:
    found = cross_entropy(tf.constant(logits), tf.constant(labels), smoothing)
    assert found.dtype == tf.float32
    np.testing.assert_allclose(found.numpy(), expected_losses(logits, labels, smoothing), rtol=1e-5, atol=1e-5)


def test_cross_entropy_of_short_numbers_is_worked_out_in_float32() -> None:
    logits = tf.cast(tf.random.stateless_normal((4, 1000), [1, 2]), tf.bfloat16)
    labels = np.arange(4, dtype=np.int32)
    expected = expected_losses(logits.numpy().astype(np.float64), labels, 0.1)
    np.testing.assert_allclose(cross_entropy(logits, tf.constant(labels), 0.1).numpy(), expected, rtol=1e-6)


def test_a_network_that_knows_nothing_loses_the_logarithm_of_the_classes() -> None:
    for smoothing in (0.0, 0.1):
        loss = cross_entropy(tf.zeros((1, 1000)), tf.constant([3]), smoothing)
        np.testing.assert_allclose(loss.numpy(), [np.log(1000)], rtol=1e-6)


@given(
    arrays(np.float32, (9, 6), elements=st.sampled_from([-1.0, 0.0, 0.5, 2.0, np.inf, -np.inf, np.nan])),
    arrays(np.int32, 9, elements=st.integers(-1, 5)),
    st.integers(1, 6),
)
@settings(max_examples=150)
def test_is_correct(logits: NDArray[np.float32], labels: NDArray[np.int32], k: int) -> None:
    """In the worst order of equal scores, and with NaN above all others, the label is among the first k."""
    expected = []
    for row, label in zip(logits, labels, strict=True):
        above = sum(1 for c, score in enumerate(row) if c != label and not score < row[label])
        expected.append(label >= 0 and not np.isnan(row[label]) and above < k)
    assert is_correct(tf.constant(logits), tf.constant(labels), k).numpy().tolist() == expected


def test_equal_scores_are_right_about_nothing() -> None:
    labels = tf.constant([0, 1, 2, -1])
    for k in (1, 5):
        assert not is_correct(tf.fill([4, 10], 0.3), labels, k).numpy().any()
        assert not is_correct(tf.fill([4, 10], float("nan")), labels, k).numpy().any()
    assert is_correct(tf.one_hot([0, 1, 2, 3], 10), labels, 1).numpy().tolist() == [True, True, True, False]


def network(dropout: float = 0.0) -> keras.Model:
    """A small network with batch norm, always with the same initial weights."""
    inputs = keras.Input((SIDE, SIDE, 3))
    x = keras.layers.Conv2D(4, 3, use_bias=False, kernel_initializer=keras.initializers.GlorotUniform(1))(inputs)
    x = FusedBatchNorm()(x)
    x = keras.layers.ReLU()(x)
    x = SeededDropout(dropout, seed=9)(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dense(CLASSES, kernel_initializer=keras.initializers.GlorotUniform(2))(x)
    return keras.Model(inputs, x)


def micro_batches(count: int, first: int = 0) -> list[Batch]:
    found = []
    for number in range(first, first + count):
        random = np.random.default_rng(number)
        images = random.standard_normal((MICRO_BATCH, SIDE, SIDE, 3), np.float32) + number
        found.append((images, random.integers(0, CLASSES, MICRO_BATCH, dtype=np.int32)))
    return found


def as_tensors(batches: list[Batch]) -> Iterator[tuple[tf.Tensor, tf.Tensor]]:
    return iter([(tf.constant(images), tf.constant(labels)) for images, labels in batches])


def make_step(world: World, model: keras.Model, count: int, momentum: float = 0.9, **options: bool) -> TrainStep:
    optimizer = keras.optimizers.SGD(1.0, momentum=momentum)
    return TrainStep(model, optimizer, Reducer(world), micro_batches=count, label_smoothing=0.1, seed=3, **options)


def values_of(model: keras.Model) -> list[NDArray[np.float32]]:
    return [v.value.numpy() for v in (*model.trainable_variables, *model_state(model))]


def reference_steps(model: keras.Model, steps: list[list[Batch]], rates: list[float]) -> list[tuple[float, float]]:
    """Train plainly: each micro-batch from the same state, the mean of the gradients, one SGD update, mean state."""
    weights, state = model.trainable_variables, model_state(model)
    velocity = [np.zeros(w.shape) for w in weights]
    results = []
    for batches, rate in zip(steps, rates, strict=True):
        before = [s.value.numpy() for s in state]
        gradients, states, losses, correct = [], [], [], []
        for images, labels in batches:
            for variable, value in zip(state, before, strict=True):
                variable.assign(value)
            with tf.GradientTape() as tape:
                logits = model(images, training=True)
                targets = tf.one_hot(labels, CLASSES) * 0.9 + 0.1 / CLASSES
                loss = tf.reduce_mean(tf.nn.softmax_cross_entropy_with_logits(targets, logits))
            gradients.append([g.numpy() for g in tape.gradient(loss, [w.value for w in weights])])
            states.append([s.value.numpy() for s in state])
            losses.append(expected_losses(logits.numpy(), labels, 0.1).mean())
            correct.append((logits.numpy().argmax(axis=1) == labels).mean())
        for i, weight in enumerate(weights):
            velocity[i] = 0.9 * velocity[i] - rate * np.mean([g[i] for g in gradients], axis=0)
            weight.assign(weight.value + velocity[i])
        for i, variable in enumerate(state):
            variable.assign(np.mean([s[i] for s in states], axis=0))
        results.append((float(np.mean(losses)), float(np.mean(correct))))
    return results


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("count", [1, 3, 4])
def test_a_step_is_the_mean_over_its_micro_batches(lone_world: World, count: int, deterministic: bool) -> None:
    steps = [micro_batches(count, first) for first in (0, count, 2 * count)]
    rates = [0.05, 0.2, 0.1]
    reference, model = network(), network()
    expected = reference_steps(reference, steps, rates)
    step = make_step(lone_world, model, count, deterministic=deterministic)
    batches = as_tensors([batch for batches in steps for batch in batches])
    results = [step(number, batches, rate) for number, rate in enumerate(rates, 1)]
    assert next(batches, None) is None
    np.testing.assert_allclose([(r.loss, r.top1) for r in results], expected, rtol=2e-5)
    assert not any(r.stop for r in results)
    for found, wanted in zip(values_of(model), values_of(reference), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)
    for found, initial in zip(values_of(model), values_of(network()), strict=True):
        assert not np.allclose(found, initial), "something did not move"


def test_deterministic_steps_have_the_same_bits_every_time(lone_world: World) -> None:
    outcomes = []
    for _ in range(2):
        model = network(dropout=0.3)
        step = make_step(lone_world, model, 4, deterministic=True)
        batches = as_tensors(micro_batches(8))
        losses = [step(number, batches, 0.1).loss for number in (1, 2)]
        outcomes.append([np.array(losses).tobytes(), *(value.tobytes() for value in values_of(model))])
    assert outcomes[0] == outcomes[1]


def test_fast_and_deterministic_steps_agree_but_for_rounding(lone_world: World) -> None:
    models = [network(dropout=0.3), network(dropout=0.3)]
    for model, deterministic in zip(models, (False, True), strict=True):
        step, batches = make_step(lone_world, model, 4, deterministic=deterministic), as_tensors(micro_batches(8))
        for number in (1, 2):
            step(number, batches, 0.1)
    for fast, exact in zip(*map(values_of, models), strict=True):
        np.testing.assert_allclose(fast, exact, rtol=1e-4, atol=1e-5)


def test_a_dropout_mask_belongs_to_a_micro_batch_of_the_run(lone_world: World) -> None:
    """Each has its own, always the same, whoever works on it and however many a rank has in a step."""
    model = network(dropout=0.5)
    ((images, labels),) = as_tensors(micro_batches(1))
    same = repeat((images, labels))
    one, two = make_step(lone_world, model, 1), make_step(lone_world, model, 2)
    before = values_of(model)
    weights = len(model.trainable_variables)

    def losses_of(step: TrainStep, numbers: list[int]) -> list[float]:
        """Losses with the initial weights and state."""
        found = []
        for number in numbers:
            found.append(step(number, same, 0.0).loss)
            for variable, value in zip(model_state(model), before[weights:], strict=True):
                variable.assign(value)
        return found

    losses = losses_of(one, [1, 2, 3, 4, 70_000, 1])
    assert len(set(losses)) == 5 and losses[0] == losses[-1]
    pairs = losses_of(two, [1, 2])
    np.testing.assert_allclose(pairs, [np.mean(losses[:2]), np.mean(losses[2:4])], rtol=1e-6)
    assert all(np.array_equal(a, b) for a, b in zip(before, values_of(model), strict=True))


def test_another_seed_gives_other_masks(lone_world: World) -> None:
    model = network(dropout=0.5)
    losses = []
    for seed in (0, 1):
        step = TrainStep(model, keras.optimizers.SGD(1.0), Reducer(lone_world), micro_batches=1, seed=seed)
        losses.append(step(1, as_tensors(micro_batches(1)), 0.0).loss)
    assert losses[0] != losses[1]


def test_a_vote_to_stop_is_told(lone_world: World) -> None:
    step = make_step(lone_world, network(), 1)
    batches = as_tensors(micro_batches(3))
    assert [step(number, batches, 0.1, vote).stop for number, vote in enumerate([False, True, False], 1)] == [
        False,
        True,
        False,
    ]


def test_padding_has_no_part_in_loss_and_gradient(lone_world: World) -> None:
    """A skipped record leaves the others' share of the step as it was."""
    ((images, labels),) = micro_batches(1)
    labels[2] = -1
    model = keras.Sequential([keras.Input((SIDE, SIDE, 3)), keras.layers.Flatten(), keras.layers.Dense(CLASSES)])
    logits = model(images).numpy()
    step = make_step(lone_world, model, 1, momentum=0.0)
    before = values_of(model)
    result = step(1, as_tensors([(images, labels)]), 0.1)
    assert result.loss == pytest.approx(expected_losses(logits, labels, 0.1).sum() / MICRO_BATCH, rel=1e-5)
    other = images.copy()
    other[2] = 77.0
    again = keras.models.clone_model(model)
    again.set_weights(before)
    make_step(lone_world, again, 1, momentum=0.0)(1, as_tensors([(other, labels)]), 0.1)
    for found, wanted in zip(values_of(again), values_of(model), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_state_is_the_moving_statistics_and_no_counter() -> None:
    model = network(dropout=0.5)
    assert [v.name for v in model_state(model)] == ["moving_mean", "moving_variance"]
