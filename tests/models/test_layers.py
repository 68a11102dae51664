"""The layers against Keras's own or a NumPy reference, in values, gradients and what they leave in their variables."""

from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from hpctrain.models.layers import (
    FusedBatchNorm,
    GroupedConv2D,
    LocalResponseNormalization,
    SeededDropout,
    Subsample,
    SubsampleAndPad,
    random_states,
)


@pytest.fixture
def bfloat16() -> Iterator[None]:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    yield
    keras.config.set_dtype_policy(before)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.5, 2.0, shape).astype(np.float32)


def output_and_gradients(layer: keras.layers.Layer, x: np.ndarray, weights: np.ndarray, **options: bool) -> list:
    """The output, and the gradients of sum(output * weights) with respect to the input and the trainable variables."""
    inputs = tf.constant(x)
    variables = [variable.value for variable in layer.trainable_variables]
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        y = layer(inputs, **options)
        loss = tf.reduce_sum(tf.cast(y, tf.float32) * weights)
    return [value.numpy() for value in [y, *tape.gradient(loss, [inputs, *variables])]]


@pytest.mark.parametrize("shape", [(8, 5, 5, 6), (32, 6)])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_agrees_with_keras(shape: tuple[int, ...], training: bool) -> None:
    ours = FusedBatchNorm(momentum=0.9, epsilon=1e-3)
    theirs = keras.layers.BatchNormalization(momentum=0.9, epsilon=1e-3)
    start = [normal(6, seed=1), normal(6, seed=2), normal(6, seed=3), normal(6, seed=4) ** 2 + 0.5]
    for layer in (ours, theirs):
        layer.build(shape)
        layer.set_weights(start)
    x, weights = normal(*shape, seed=5), normal(*shape, seed=6)
    for mine, reference in zip(
        output_and_gradients(ours, x, weights, training=training),
        output_and_gradients(theirs, x, weights, training=training),
        strict=True,
    ):
        np.testing.assert_allclose(mine, reference, rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(ours.moving_mean.value, theirs.moving_mean.value, rtol=1e-5, atol=1e-6)
    if training:
        # The documented difference: the unbiased variance goes into the moving average.
        count = np.prod(shape[:-1])
        unbiased = x.var(axis=tuple(range(len(shape) - 1))) * count / (count - 1)
        np.testing.assert_allclose(ours.moving_variance.value, 0.9 * start[3] + 0.1 * unbiased, rtol=1e-5)
    else:
        np.testing.assert_array_equal(ours.moving_variance.value, start[3])


def test_batch_norm_update_lands_in_the_stateless_scope_only() -> None:
    layer = FusedBatchNorm(momentum=0.75)
    layer.build((None, None, None, 3))
    x = normal(4, 3, 3, 3)

    @tf.function
    def step(images: tf.Tensor) -> tuple[list, list, list]:
        with tf.GradientTape() as tape, keras.StatelessScope(state_mapping=[]) as scope:
            y = layer(images, training=True)
            loss = tf.reduce_sum(y**2)
        moved = [scope.get_current_value(variable) for variable in layer.non_trainable_variables]
        gradients = tape.gradient(loss, [variable.value for variable in layer.trainable_variables])
        untouched = [variable.value for variable in layer.non_trainable_variables]
        return moved, gradients, [tf.identity(value) for value in untouched]

    moved, gradients, untouched = step(tf.constant(x))
    np.testing.assert_allclose(moved[0], 0.25 * x.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(moved[1], 0.75 + 0.25 * x.var((0, 1, 2)) * 36 / 35, rtol=1e-5)
    for variables in (untouched, [v.value for v in layer.non_trainable_variables]):
        np.testing.assert_array_equal(variables[0], np.zeros(3))
        np.testing.assert_array_equal(variables[1], np.ones(3))
    # y has mean 0 and variance 1 here: the gradient of sum(y**2) is 2 * 36 for gamma and 0 for beta.
    np.testing.assert_allclose(gradients[0], np.full(3, 72.0), rtol=1e-3)
    np.testing.assert_allclose(gradients[1], np.zeros(3), atol=1e-3)


def test_batch_norm_uses_mapped_state() -> None:
    layer = FusedBatchNorm(momentum=0.5, epsilon=0.0)
    layer.build((None, 2))
    mapping = [(layer.moving_mean, tf.constant([1.0, 2.0])), (layer.moving_variance, tf.constant([4.0, 4.0]))]
    with keras.StatelessScope(state_mapping=mapping):
        y = layer(tf.constant([[3.0, 6.0]]), training=False)
    np.testing.assert_allclose(y, [[1.0, 2.0]])


def test_frozen_batch_norm_does_not_learn_from_the_batch() -> None:
    layer = FusedBatchNorm(epsilon=0.0)
    layer.build((None, 4))
    layer.trainable = False
    x = normal(8, 4)
    np.testing.assert_allclose(layer(x, training=True), x, rtol=1e-6)
    np.testing.assert_array_equal(layer.moving_mean.value, np.zeros(4))


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_keeps_float32_statistics_beside_bfloat16(bfloat16: None, training: bool) -> None:
    layer = FusedBatchNorm()
    x = normal(16, 4, 4, 8)
    layer.build(x.shape)
    y, _, gamma_gradient, beta_gradient = output_and_gradients(layer, x, np.ones(x.shape), training=training)
    assert y.dtype == tf.bfloat16.as_numpy_dtype
    assert gamma_gradient.dtype == beta_gradient.dtype == np.float32
    assert {str(variable.dtype) for variable in layer.variables} == {"float32"}
    rounded = tf.cast(tf.cast(x, tf.bfloat16), tf.float32).numpy()
    if training:
        np.testing.assert_allclose(layer.moving_mean.value, 0.1 * rounded.mean((0, 1, 2)), rtol=1e-4)
        rounded = (rounded - rounded.mean((0, 1, 2))) / rounded.std((0, 1, 2))
    np.testing.assert_allclose(y.astype(np.float32), rounded, atol=0.03)


@pytest.mark.parametrize("channels", [1, 3, 8])
def test_local_response_normalization_is_caffes(channels: int) -> None:
    x = 20 * normal(2, 3, 3, channels)
    expected = np.empty_like(x)
    for c in range(channels):
        window = x[..., max(0, c - 2) : c + 3]
        expected[..., c] = x[..., c] / (1.0 + 1e-4 / 5 * (window**2).sum(-1)) ** 0.75
    np.testing.assert_allclose(LocalResponseNormalization()(x), expected, rtol=1e-5)


def test_local_response_normalization_in_bfloat16(bfloat16: None) -> None:
    x = normal(2, 3, 3, 8)
    y = LocalResponseNormalization()(x)
    assert y.dtype == tf.bfloat16
    np.testing.assert_allclose(tf.cast(y, tf.float32), LocalResponseNormalization(dtype="float32")(x), rtol=0.02)


@pytest.mark.parametrize(
    ("groups", "size", "strides", "padding", "use_bias"),
    [(2, 5, 1, "same", True), (4, 3, 2, "same", False), (2, 3, 2, "valid", True), (1, 1, 1, "valid", True)],
)
def test_grouped_convolution_is_conv2d_with_groups(
    groups: int, size: int, strides: int, padding: str, use_bias: bool
) -> None:
    options: dict[str, Any] = {"groups": groups, "strides": strides, "padding": padding, "use_bias": use_bias}
    ours = GroupedConv2D(12, size, **options)
    theirs = keras.layers.Conv2D(12, size, **options)
    x = normal(2, 9, 9, 8)
    expected_shape = theirs(x).shape
    assert ours(x).shape == expected_shape == ours.compute_output_shape(x.shape)
    assert ours.compute_output_shape((None, None, None, 8)) == (None, None, None, 12)
    assert [v.shape for v in ours.weights] == [v.shape for v in theirs.weights]
    ours.set_weights(theirs.get_weights())
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("layer", "channels"), [(Subsample(2), 3), (SubsampleAndPad(5, 2), 5)], ids=["same", "pad"])
def test_subsampling_and_its_gradient(layer: keras.layers.Layer, channels: int) -> None:
    x = normal(2, 7, 8, 3)
    weights = normal(2, 4, 4, channels, seed=1)
    y, gradient = output_and_gradients(layer, x, weights)
    assert y.shape == layer.compute_output_shape(x.shape)
    np.testing.assert_array_equal(y[..., :3], x[:, ::2, ::2])
    np.testing.assert_array_equal(y[..., 3:], 0)
    expected = np.zeros_like(x)
    expected[:, ::2, ::2] = weights[..., :3]
    np.testing.assert_array_equal(gradient, expected)


def test_dropout_mask_is_a_function_of_its_state() -> None:
    image = keras.Input((64,))
    model = keras.Model(image, SeededDropout(0.5, seed=7, name="drop")(image))
    x = np.ones((4, 64), np.float32)
    (state,) = random_states(model)
    assert state.path == "drop_random/seed_generator_state"

    def masked(count: int) -> np.ndarray:
        with keras.StatelessScope([(state, tf.constant([7, count], state.dtype))]) as scope:
            y = model(x, training=True)
        np.testing.assert_array_equal(scope.get_current_value(state), [7, count + 1])
        return np.asarray(y)

    np.testing.assert_array_equal(masked(3), masked(3))
    assert not np.array_equal(masked(3), masked(4))
    assert set(np.unique(masked(3))) == {0.0, 2.0}
    np.testing.assert_array_equal(state.value, [7, 0])
    np.testing.assert_array_equal(model(x, training=True), masked(0))
    np.testing.assert_array_equal(state.value, [7, 1])
    np.testing.assert_array_equal(model(x, training=False), x)


@pytest.mark.parametrize(
    "layer",
    [
        FusedBatchNorm(0.8, 1e-3, gamma_initializer="zeros"),
        LocalResponseNormalization(3, 1e-3, 0.5, 2.0),
        GroupedConv2D(6, 3, 2, strides=2, padding="valid", kernel_initializer="he_normal"),
        Subsample(2),
        SubsampleAndPad(6, 2),
        SeededDropout(0.3, seed=5),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_survive_serialization(layer: keras.layers.Layer) -> None:
    copy = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(copy) is type(layer)
    assert copy.get_config() == layer.get_config()


@pytest.mark.parametrize(
    "make",
    [
        lambda: LocalResponseNormalization(4),
        lambda: GroupedConv2D(5, 3, 2),
        lambda: GroupedConv2D(4, 3, 2).build((None, 8, 8, 3)),
        lambda: FusedBatchNorm().build((None, 8, 3)),
        lambda: SeededDropout(1.0),
    ],
)
def test_layers_refuse_what_they_cannot_do(make: Callable[[], Any]) -> None:
    with pytest.raises(ValueError):
        make()
