"""The gradient of kernels by tiles, with AMX and without, against float64, and where it is used."""

import hashlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from hpctrain import native, processor
from hpctrain.models.convolution import convolve
from hpctrain.models.layers import FastConv2D, FastDense, GroupedConv2D
from tests.threads import digests

pytestmark = pytest.mark.skipif(native.kernel_grad() is None, reason="this is for CPUs with AMX or AVX512_BF16")

Case = tuple[int, int, int, int, int, int, int, int, str]
# (images, height, width, input channels, output channels, kernel height and width, stride, padding): whole tiles and
# cut ones, one to four sums at a time, images that share borders and that cannot, kernels larger than their stride and
# smaller, rows taken for pixels with and without a border, more positions than are laid out at once.
CASES: list[Case] = [
    (1, 1, 1, 16, 16, 1, 1, 1, "VALID"),
    (9, 1, 1, 33, 1000, 1, 1, 1, "VALID"),
    (2, 3, 5, 16, 48, 1, 1, 1, "SAME"),
    (5, 9, 8, 48, 33, 1, 1, 3, "SAME"),
    (2, 7, 7, 80, 144, 3, 3, 1, "SAME"),
    (5, 4, 4, 16, 16, 3, 3, 1, "SAME"),
    (5, 4, 4, 32, 16, 3, 3, 1, "VALID"),
    (3, 8, 9, 32, 64, 3, 3, 2, "SAME"),
    (3, 8, 9, 25, 70, 3, 3, 2, "VALID"),
    (5, 9, 8, 16, 33, 2, 2, 3, "SAME"),
    (1, 40, 40, 16, 16, 7, 3, 3, "SAME"),
    (2, 2, 2, 16, 16, 5, 5, 1, "SAME"),
    (2, 30, 31, 3, 20, 7, 7, 2, "SAME"),
    (2, 47, 47, 3, 96, 11, 11, 4, "VALID"),
    (3, 9, 9, 5, 7, 3, 3, 1, "SAME"),
    (4, 56, 56, 64, 64, 3, 3, 1, "SAME"),
    (2, 1, 2, 3, 4, 3, 3, 2, "SAME"),
]


def problem(case: Case, seed: int = 0) -> tuple[Any, Any]:
    """Images with an offset, as activations have, and the gradient of the convolution."""
    images, height, width, channels, filters, rows, columns, stride, padding = case
    rng = np.random.default_rng(seed)
    x = tf.cast(rng.normal(0.5, 1.0, (images, height, width, channels)), tf.bfloat16)
    shape = tf.nn.conv2d(tf.cast(x, tf.float32), tf.zeros((rows, columns, channels, filters)), stride, padding).shape
    return x, tf.cast(rng.normal(0.0, 1.0, shape), tf.bfloat16)


def computed(case: Case, x: Any, dy: Any, amx: bool = True) -> np.ndarray:
    return native.kernel_grad()(x=x, dy=dy, kernel_size=case[5:7], stride=case[7], padding=case[8], amx=amx).numpy()


def expected(case: Case, x: Any, dy: Any) -> np.ndarray:
    _, _, _, channels, filters, rows, columns, stride, padding = case
    return tf.raw_ops.Conv2DBackpropFilter(
        input=tf.cast(x, tf.float64),
        filter_sizes=[rows, columns, channels, filters],
        out_backprop=tf.cast(dy, tf.float64),
        strides=[1, stride, stride, 1],
        padding=padding,
    ).numpy()


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_what_float64_says(case: Case, amx: bool) -> None:
    x, dy = problem(case)
    found, wanted = computed(case, x, dy, amx), expected(case, x, dy)
    assert found.dtype == np.float32 and found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 1e-5 * np.sqrt(np.mean(wanted**2))


def test_no_images_are_no_gradient() -> None:
    x, dy = tf.zeros((0, 6, 6, 16), tf.bfloat16), tf.zeros((0, 6, 6, 32), tf.bfloat16)
    np.testing.assert_array_equal(computed((0, 6, 6, 16, 32, 3, 3, 1, "SAME"), x, dy), np.zeros((3, 3, 16, 32)))


def test_numbers_that_are_not_finite_are_not_hidden() -> None:
    case = (2, 5, 5, 16, 16, 3, 3, 1, "SAME")
    x, dy = (value.numpy() for value in problem(case))
    x[1, 2, 2, 3] = np.nan
    found = computed(case, x, dy)
    assert np.isnan(found[:, :, 3]).all()
    assert np.isfinite(np.delete(found, 3, axis=2)).all()


def test_what_no_tap_reads_does_not_matter() -> None:
    case = (2, 6, 8, 16, 16, 3, 3, 2, "VALID")  # of 6 rows and 8 columns the first 5 and 7 are read
    x, dy = (value.numpy() for value in problem(case))
    wanted = computed(case, x, dy)
    x[:, 5], x[:, :, 7] = np.inf, np.nan
    np.testing.assert_array_equal(computed(case, x, dy), wanted)


@pytest.mark.parametrize(
    ("x", "dy", "options"),
    [
        ((2, 4, 4, 16), (2, 4, 5, 16), {}),
        ((2, 4, 4, 16), (3, 4, 4, 16), {}),
        ((2, 4, 4, 16), (2, 2, 2, 16), {}),
        ((4, 4, 16), (4, 4, 16), {}),
        ((2, 4, 4, 16), (2, 4, 4, 16), {"kernel_size": [3]}),
        ((2, 4, 4, 16), (2, 4, 4, 16), {"kernel_size": [3, 0]}),
        ((2, 4, 4, 16), (2, 4, 4, 16), {"stride": 0}),
        ((2, 4, 4, 16), (2, 4, 4, 16), {"padding": "EXPLICIT"}),
    ],
)
def test_shapes_that_do_not_fit_are_an_error(x: Any, dy: Any, options: dict[str, Any]) -> None:
    given = {"kernel_size": [3, 3], "padding": "SAME", **options}
    with pytest.raises((tf.errors.InvalidArgumentError, ValueError), match=r"expected|rank|padding"):
        native.kernel_grad()(x=tf.zeros(x, tf.bfloat16), dy=tf.zeros(dy, tf.bfloat16), **given)


def digest() -> str:
    """A digest of the results of all cases."""
    everything = hashlib.sha256()
    for case in CASES:
        for amx in (True, False):
            everything.update(computed(case, *problem(case), amx=amx).tobytes())
    return everything.hexdigest()


def test_the_number_of_threads_does_not_matter() -> None:
    assert len(digests("from tests.models.test_kernel_grad import digest; print(digest())", 1, 2, 5)) == 1


def layer(kind: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return kind(*arguments, dtype="mixed_bfloat16", **options)


LAYERS: list[tuple[Callable[[], Any], tuple[int, ...], bool]] = [  # the last: also where there is no AMX
    (lambda: layer(FastConv2D, 32, 3, padding="same"), (2, 6, 6, 16), True),
    (lambda: layer(GroupedConv2D, 32, 3, 2), (2, 6, 6, 32), True),
    (lambda: layer(FastConv2D, 32, 1), (2, 6, 6, 16), False),
    (lambda: layer(FastConv2D, 24, 5, 2), (2, 9, 9, 3), False),
    (lambda: layer(FastDense, 10), (4, 20), False),
]


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize(("make", "shape", "always"), LAYERS)
def test_layers_use_it_where_it_is_faster_and_do_not_round_it(
    make: Callable[[], Any], shape: tuple[int, ...], always: bool, amx: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "has_amx", lambda: amx)
    of_layer = make()
    x = tf.cast(np.random.default_rng(0).normal(size=shape), tf.bfloat16)
    of_layer(x)

    @tf.function
    def gradient() -> Any:
        with tf.GradientTape() as tape:
            y = of_layer(x)
            assert y.dtype == tf.bfloat16
            loss = tf.reduce_sum(tf.cast(y, tf.float32) ** 2)
        return tape.gradient(loss, of_layer.kernel.value)

    types = {operation.type for operation in gradient.get_concrete_function().graph.get_operations()}
    assert ("HpctrainKernelGrad" in types) == (amx or always)
    found = gradient()
    assert found.dtype == tf.float32
    rounded = np.all(found == tf.cast(tf.cast(found, tf.bfloat16), tf.float32))
    assert rounded != ("HpctrainKernelGrad" in types)


def test_shapes_are_known_before_it_runs() -> None:
    @tf.function(input_signature=[tf.TensorSpec((None, None, 9, 16), tf.bfloat16), tf.TensorSpec((3, 3, 16, 32))])
    def graph(x: Any, kernel: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch([x, kernel])
            y = convolve(x, kernel, 2, "same")
        dx, dkernel = tape.gradient(y, [x, kernel])
        assert y.shape.as_list() == [None, None, 5, 32] and dkernel.shape == (3, 3, 16, 32)
        return dx, dkernel

    dx, dkernel = graph(tf.ones((2, 4, 9, 16), tf.bfloat16), tf.ones((3, 3, 16, 32)))
    assert dx.shape == (2, 4, 9, 16) and np.isfinite(dkernel).all()


def test_a_layer_saved_and_loaded_keeps_its_kernel_in_float32() -> None:
    of_layer = layer(FastConv2D, 16, 3, padding="same")
    x = tf.ones((1, 4, 4, 16), tf.bfloat16)
    of_layer(x)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(of_layer))
    again(x)
    again.set_weights(of_layer.get_weights())
    assert again.kernel.dtype == "float32"
    np.testing.assert_array_equal(tf.cast(again(x), tf.float32), tf.cast(of_layer(x), tf.float32))
