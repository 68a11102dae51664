"""Products of bfloat16 numbers, with and without instructions for them."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from hpctrain import native, processor
from hpctrain.models.convolution import convolve
from hpctrain.models.layers import FastDense
from hpctrain.models.products import multiply_matrices, product_dtype
from hpctrain.models.registry import build

KINDS = [True, False]  # whether the processor has instructions for bfloat16


@pytest.fixture
def has_bfloat16(request: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(processor, "has_bfloat16", lambda: request.param)
    return request.param


def bfloat16(*shape: int, seed: int) -> Any:
    return tf.cast(np.random.default_rng(seed).normal(size=shape), tf.bfloat16)


def assert_rounded(found: Any, wanted: np.ndarray) -> None:
    """Half a unit in the last of bfloat16's 8 bits, and what float32's sums may add to that."""
    assert found.dtype == tf.bfloat16 and found.shape == wanted.shape
    error = np.abs(tf.cast(found, tf.float64).numpy() - wanted)
    assert np.all(error <= np.abs(wanted) * 2.0**-8 * 1.01 + 1e-5 * np.sqrt(np.mean(wanted**2)))


def assert_gradient_of_weights(found: Any, wanted: np.ndarray, has_bfloat16: bool) -> None:
    """float32's sums, not rounded any more; but TensorFlow's own, which may be taken where there is no AMX, are."""
    assert found.dtype == tf.float32 and found.shape == wanted.shape
    if has_bfloat16 and not (native.kernel_grad() and processor.has_amx()):
        assert_rounded(tf.cast(found, tf.bfloat16), wanted)
    else:
        assert np.abs(found - wanted).max() <= 1e-5 * np.sqrt(np.mean(wanted**2))


@pytest.mark.parametrize("has_bfloat16", KINDS, indirect=True)
def test_a_matrix_product_and_its_gradients_are_exact_products(has_bfloat16: bool) -> None:
    x, dy = bfloat16(24, 96, seed=0), bfloat16(24, 40, seed=2)
    weights = tf.constant(np.random.default_rng(1).normal(size=(96, 40)), tf.float32)
    with tf.GradientTape() as tape:
        tape.watch([x, weights])
        y = multiply_matrices(x, weights)
    dx, dweights = tape.gradient(y, [x, weights], output_gradients=dy)
    weights = tf.cast(weights, tf.bfloat16)
    x, weights, dy = (tf.cast(value, tf.float64).numpy() for value in (x, weights, dy))
    assert_rounded(y, x @ weights)
    assert_rounded(dx, dy @ weights.T)
    assert_gradient_of_weights(dweights, x.T @ dy, has_bfloat16)


@pytest.mark.parametrize("has_bfloat16", KINDS, indirect=True)
@pytest.mark.parametrize(("size", "stride", "channels"), [(3, 1, 16), (3, 2, 16), (1, 1, 16), (5, 1, 3)])
def test_a_convolution_and_its_gradients_are_exact_products(
    has_bfloat16: bool, size: int, stride: int, channels: int
) -> None:
    x = bfloat16(2, 8, 8, channels, seed=0)
    kernel = tf.constant(np.random.default_rng(1).normal(size=(size, size, channels, 32)), tf.float32)
    dy = bfloat16(2, 8 // stride, 8 // stride, 32, seed=2)

    def all_of(of: Any, x: Any, kernel: Any, dy: Any) -> list[Any]:
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            y = of(x, kernel, stride, "SAME")
        return [y, *tape.gradient(y, [x, kernel], output_gradients=dy)]

    found = tf.function(lambda *given: all_of(convolve, *given))(x, kernel, dy)
    kernel = tf.cast(kernel, tf.bfloat16)
    y, dx, dkernel = all_of(tf.nn.conv2d, *(tf.cast(value, tf.float64) for value in (x, kernel, dy)))
    assert_rounded(found[0], y.numpy())
    assert_rounded(found[1], dx.numpy())
    assert_gradient_of_weights(found[2], dkernel.numpy(), has_bfloat16)


@pytest.mark.parametrize("has_bfloat16", KINDS, indirect=True)
def test_only_bfloat16_without_instructions_is_multiplied_in_another_dtype(has_bfloat16: bool) -> None:
    assert product_dtype(tf.bfloat16) == (tf.bfloat16 if has_bfloat16 else tf.float32)
    for dtype in (tf.float16, tf.float32, tf.float64):
        assert product_dtype(dtype) == dtype


@pytest.mark.parametrize("has_bfloat16", [False], indirect=True)
@pytest.mark.parametrize("model", ["alexnet", "alexnet_bn", "resnet20"])
def test_no_product_of_a_model_is_left_to_be_emulated(has_bfloat16: bool, model: str) -> None:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        network = build(model, image_size=67 if model.startswith("alexnet") else 16, num_classes=10)
    finally:
        keras.config.set_dtype_policy(before)
    images = tf.zeros((2, *network.input_shape[1:]))

    @tf.function
    def step(x: Any) -> list[Any]:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(network(x, training=True))
        return tape.gradient(loss, network.trainable_variables)

    operations = step.get_concrete_function(images).graph.get_operations()
    products = [one for one in operations if any(kind in one.type for kind in ("Conv2D", "MatMul", "Winograd"))]
    assert len(products) > 20
    assert {one.outputs[0].dtype for one in products} == {tf.float32}
    assert tf.bfloat16 in {one.outputs[0].dtype for one in operations if "BatchNorm" in one.type or one.type == "Relu"}


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_the_dense_layer_is_keras_own(activation: str | None, use_bias: bool) -> None:
    options: dict[str, Any] = {"activation": activation, "use_bias": use_bias, "bias_initializer": "ones"}
    ours, keras_own = FastDense(8, **options), keras.layers.Dense(8, **options)
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    ours(x), keras_own(x)
    keras_own.set_weights(ours.get_weights())
    np.testing.assert_allclose(ours(x), keras_own(x), rtol=1e-6)
    again = keras.layers.deserialize(keras.layers.serialize(ours))
    assert type(again) is FastDense and again.get_config() == ours.get_config()


@pytest.mark.parametrize(
    ("text", "known", "found"),
    [
        ("processor\t: 0\nmodel name\t: A CPU @ 2 GHz\nflags\t\t: fpu avx512f avx512_bf16\n", "A CPU @ 2 GHz", True),
        (
            "processor\t: 0\nmodel name\t: B\nflags\t\t: fpu avx512f avx512_bf16x\n\nflags\t\t: avx512_bf16\n",
            "B",
            False,
        ),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", "", True),
        ("cpu\t\t: POWER9, altivec supported\n", "POWER9, altivec supported", False),
        (None, "", False),
    ],
)
def test_what_the_kernel_says_of_the_processor(
    text: str | None, known: str, found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert processor.has_bfloat16.__wrapped__() is found
    assert processor.name() == known or (not known and processor.name())
