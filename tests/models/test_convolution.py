"""Winograd's convolution against float64 and TensorFlow's, and where it is used and where not."""

import hashlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from hpctrain import native, processor
from hpctrain.models import convolution as module
from hpctrain.models.convolution import convolve
from hpctrain.models.layers import FastConv2D
from hpctrain.models.registry import build
from tests.threads import digests

# (images, height, width, input channels, output channels): whole tiles of 4 and cut ones, panels of 32 and half ones,
# blocks of 64 channels and cut ones, more tiles than a chunk has; fewer tiles than channels and more, of more rows than
# are multiplied at once, and more tiles than are transformed in advance.
SHAPES = [
    (1, 1, 1, 16, 16),
    (2, 3, 5, 16, 48),
    (3, 4, 4, 32, 16),
    (1, 9, 6, 80, 144),
    (2, 7, 7, 128, 64),
    (40, 14, 13, 16, 32),
    (1, 9, 6, 320, 272),
    (60, 13, 14, 80, 96),
]

needs_avx512 = pytest.mark.skipif(native.winograd() is None, reason="Winograd's operation is for CPUs with AVX-512")


def problem(shape: tuple[int, ...], seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images with an offset, as activations have, kernels, and the gradient of the output."""
    images, height, width, channels, filters = shape
    rng = np.random.default_rng(seed)
    x = rng.normal(0.5, 1.0, (images, height, width, channels))
    kernel = rng.normal(0.0, (9 * channels) ** -0.5, (3, 3, channels, filters))
    dy = rng.normal(0.0, 1.0, (images, height, width, filters))
    return x.astype(np.float32), kernel.astype(np.float32), dy.astype(np.float32)


def computed(x: Any, kernel: Any, dy: Any, graph: bool = True) -> dict[str, np.ndarray]:
    def run() -> dict[str, Any]:
        sources = {"dx": tf.constant(x), "dkernel": tf.constant(kernel)}
        with tf.GradientTape() as tape:
            tape.watch(list(sources.values()))
            y = convolve(sources["dx"], sources["dkernel"], 1, "same")
        return {"y": y, **tape.gradient(y, sources, output_gradients=tf.constant(dy))}

    return {name: np.asarray(value) for name, value in (tf.function(run) if graph else run)().items()}


def expected(x: np.ndarray, kernel: np.ndarray, dy: np.ndarray) -> dict[str, np.ndarray]:
    """By the definition, in float64."""
    x, kernel, dy = (array.astype(np.float64) for array in (x, kernel, dy))
    _, height, width, _ = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    y, padded_dx, dkernel = np.zeros(dy.shape), np.zeros(padded.shape), np.zeros(kernel.shape)
    for i in range(3):
        for j in range(3):
            window = padded[:, i : i + height, j : j + width]
            y += window @ kernel[i, j]
            dkernel[i, j] = np.tensordot(window, dy, ([0, 1, 2], [0, 1, 2]))
            padded_dx[:, i : i + height, j : j + width] += dy @ kernel[i, j].T
    return {"y": y, "dx": padded_dx[:, 1:-1, 1:-1], "dkernel": dkernel}


@needs_avx512
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_what_the_definition_says(shape: tuple[int, ...], graph: bool) -> None:
    arguments = problem(shape)
    found, wanted = computed(*arguments, graph=graph), expected(*arguments)
    for name, values in wanted.items():
        assert found[name].shape == values.shape
        error = np.abs(found[name] - values).max() / np.sqrt(np.mean(values**2))
        assert error < 4e-5, name


@needs_avx512
def test_errors_are_those_of_float32_and_not_of_less() -> None:
    arguments = problem((4, 16, 16, 256, 64))
    found, wanted = computed(*arguments), expected(*arguments)
    for name, values in wanted.items():
        assert np.sqrt(np.mean((found[name] - values) ** 2) / np.mean(values**2)) < 4e-6, name


@needs_avx512
def test_what_an_image_has_does_not_reach_another_one() -> None:
    x, kernel, dy = problem((9, 6, 6, 16, 16))  # more tiles than channels, and one image of fewer
    alone = computed(x[1:2], kernel, dy[1:2])
    x[0], x[2:], dy[0], dy[2:] = np.nan, np.inf, np.nan, np.inf
    among = computed(x, kernel, dy)
    for name in ("y", "dx"):
        np.testing.assert_array_equal(among[name][1:2], alone[name])
        assert np.isnan(among[name][0]).all()
    assert np.isnan(among["dkernel"]).all()


@needs_avx512
def test_no_images_are_no_results_and_no_gradient() -> None:
    x, kernel, dy = problem((0, 6, 6, 16, 32))
    found = computed(x, kernel, dy)
    assert found["y"].shape == (0, 6, 6, 32) and found["dx"].shape == (0, 6, 6, 16)
    np.testing.assert_array_equal(found["dkernel"], 0.0)


@needs_avx512
def test_the_gradient_of_the_inputs_gradient_is_right() -> None:
    # sum(dx * v) is linear in dy and in the kernel: convolution of v, and the kernel's gradient with v for the images.
    x, kernel, dy = (tf.constant(array) for array in problem((2, 5, 6, 16, 32)))
    v = tf.constant(problem((2, 5, 6, 16, 32), seed=1)[0])
    with tf.GradientTape() as outer:
        outer.watch([kernel, dy])
        with tf.GradientTape() as inner:
            inner.watch(x)
            y = convolve(x, kernel, 1, "same")
        dx = inner.gradient(y, x, output_gradients=dy)
    of_kernel, of_dy = outer.gradient(dx, [kernel, dy], output_gradients=v)
    wanted = expected(*(np.asarray(array) for array in (v, kernel, dy)))
    np.testing.assert_allclose(of_dy, wanted["y"], atol=5e-5)
    np.testing.assert_allclose(of_kernel, wanted["dkernel"], atol=1e-3)


def operation(x: Any, kernel: Any, **attributes: Any) -> Any:
    return native.winograd().hpctrain_winograd(x=x, kernel=kernel, **attributes)


@needs_avx512
@pytest.mark.parametrize(
    "call",
    [
        lambda: operation(tf.zeros((1, 4, 4, 16)), tf.zeros((3, 3, 32, 16))),
        lambda: operation(tf.zeros((1, 4, 4, 16)), tf.zeros((3, 3, 16, 32)), turned=True),
        lambda: operation(tf.zeros((1, 4, 4, 16)), tf.zeros((5, 5, 16, 16))),
        lambda: operation(tf.zeros((1, 4, 4, 8)), tf.zeros((3, 3, 8, 16))),
        lambda: operation(tf.zeros((4, 4, 16)), tf.zeros((3, 3, 16, 16))),
        lambda: native.winograd().hpctrain_winograd_kernel_grad(tf.zeros((1, 4, 4, 16)), tf.zeros((1, 4, 5, 16))),
        lambda: native.winograd().hpctrain_winograd_kernel_grad(tf.zeros((1, 4, 4, 16)), tf.zeros((1, 4, 4, 24))),
    ],
)
def test_shapes_that_do_not_fit_are_an_error(call: Callable[[], Any]) -> None:
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError), match=r"expected|rank"):
        call()


@needs_avx512
def test_shapes_are_known_before_it_runs() -> None:
    @tf.function(input_signature=[tf.TensorSpec((None, 4, None, 16)), tf.TensorSpec((3, 3, 16, 32))])
    def graph(x: Any, kernel: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            y = convolve(x, kernel, 1, "same")
        dx, dkernel = tape.gradient(y, [x, kernel])
        assert y.shape.as_list() == [None, 4, None, 32]
        assert dx.shape.as_list() == [None, 4, None, 16] and dkernel.shape == (3, 3, 16, 32)
        return dx

    graph.get_concrete_function()


def digest() -> str:
    """A digest of all results for shapes of many pieces."""
    everything = hashlib.sha256()
    for shape in ((8, 30, 31, 16, 48), (5, 14, 14, 128, 96), (40, 14, 14, 128, 96), (2, 56, 56, 64, 64)):
        for name, values in sorted(computed(*problem(shape)).items()):
            everything.update(name.encode() + values.tobytes())
    return everything.hexdigest()


@needs_avx512
def test_the_number_of_threads_does_not_matter() -> None:
    assert len(digests("from tests.models.test_convolution import digest; print(digest())", 1, 2, 5)) == 1


def operations_of(call: Callable[..., Any], *shapes: tuple[int, ...], dtype: str = "float32") -> set[str]:
    graph = tf.function(call).get_concrete_function(*(tf.TensorSpec(shape, dtype) for shape in shapes)).graph
    return {operation.type for operation in graph.get_operations()}


@needs_avx512
@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_it_is_used_for_what_it_can_do_and_nothing_else(has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "has_bfloat16", lambda: has_bfloat16)
    image, kernel = (2, 8, 8, 16), (3, 3, 16, 32)

    def by(stride: int, padding: str, *shapes: tuple[int, ...], dtype: str = "float32") -> bool:
        types = operations_of(lambda x, k: convolve(x, k, stride, padding), *shapes, dtype=dtype)
        assert ("HpctrainWinograd" in types) != ("Conv2D" in types)
        return "HpctrainWinograd" in types

    assert by(1, "same", image, kernel) and by(1, "SAME", image, kernel)
    assert not by(2, "same", image, kernel)
    assert not by(1, "valid", image, kernel)
    assert by(1, "same", image, kernel, dtype="bfloat16") is not has_bfloat16
    assert not by(2, "same", image, kernel, dtype="bfloat16")
    assert not by(1, "same", image, (1, 1, 16, 32))
    assert not by(1, "same", (2, 8, 8, 3), (3, 3, 3, 32))
    assert not by(1, "same", image, (3, 3, 16, 24))


@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"dilation_rate": 2}, {"strides": 2}, {"use_bias": False}])
def test_the_layer_is_keras_own(options: dict[str, Any]) -> None:
    ours, theirs = (kind(32, 3, padding="same", **options) for kind in (FastConv2D, keras.layers.Conv2D))
    x = np.random.default_rng(0).normal(size=(2, 9, 9, 16)).astype(np.float32)
    wanted = theirs(x)
    ours.build(x.shape)
    ours.set_weights(theirs.get_weights())
    np.testing.assert_allclose(ours(x), wanted, rtol=1e-4, atol=1e-5)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(ours))
    assert type(again) is FastConv2D and again.get_config() == ours.get_config()


@needs_avx512
@pytest.mark.parametrize("name", ["resnet20", "alexnet_bn"])
def test_a_models_gradient_is_that_of_tensorflows_convolutions(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = {"resnet20": 16, "alexnet_bn": 67}[name]
    images = np.random.default_rng(0).normal(0, 1, (16, size, size, 3)).astype(np.float32)
    options = {"dropout": 0.0} if name == "alexnet_bn" else {}

    def gradients() -> np.ndarray:
        model = build(name, num_classes=10, image_size=size, seed=1, **options)

        @tf.function
        def run() -> Any:
            with tf.GradientTape() as tape, keras.StatelessScope():
                logits = model(images, training=True)
                loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(tf.range(16) % 10, logits))
            return tape.gradient(loss, [v.value for v in model.trainable_variables])

        return np.concatenate([np.ravel(g) for g in run()])

    found = gradients()
    monkeypatch.setattr(module, "_winograd", lambda: None)
    wanted = gradients()
    assert np.linalg.norm(found - wanted) < 0.01 * np.linalg.norm(wanted)
    assert not np.array_equal(found, wanted)  # it was another way
