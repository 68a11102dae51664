"""Products of images and matrices with weights, in the dtype and by the instructions that are fast on this processor.

Weights are float32 and are rounded to the dtype of what they are multiplied with, bfloat16 with mixed precision. Their
gradient is float32, and nothing but TensorFlow's own operations rounds it.

Instructions for bfloat16 (AVX512_BF16, AMX) multiply bfloat16 numbers exactly and add the products up in float32. So do
float32 instructions with float32 copies: 8 bits times 8 bits fit into 24. Where there are no others, on KNL or a
Skylake, TensorFlow's bfloat16 kernels emulate them, and float32 copies are several times as fast; activations and
what the backward pass keeps of them stay bfloat16 otherwise.

Where there is AMX, TensorFlow's gradients of weights take several times as long as the products themselves; there an
operation of our own (`hpctrain/native/kernel_grad.cc`) computes them. With AVX512_BF16 alone it is faster for kernels
of several pixels, above all with strides and on small images.
"""

import math
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from hpctrain import native, processor

_CHANNELS = 16  # of a tile, or a vector, that fewer leave partly empty


def product_dtype(dtype: tf.DType) -> tf.DType:
    """Return the dtype of the numbers that are multiplied for operands, and a result, of the given one."""
    return tf.float32 if dtype == tf.bfloat16 and not processor.has_bfloat16() else dtype


def convolve_images(
    convolution: Callable[[Any, Any, int, str], Any], x: Any, kernel: Any, stride: int, padding: str
) -> Any:
    """Return convolution(x, kernel, stride, padding) in the dtype of x; `padding` is "SAME" or "VALID"."""
    *size, channels, _ = kernel.shape

    def by_tiles(x: Any, dy: Any) -> Any:
        return native.kernel_grad()(x=x, dy=dy, kernel_size=size, stride=stride, padding=padding)

    faster = processor.has_amx() or (math.prod(size) > 1 and channels >= _CHANNELS)
    return _multiply(lambda x, kernel: convolution(x, kernel, stride, padding), x, kernel, by_tiles if faster else None)


def multiply_matrices(x: Any, weights: Any) -> Any:
    """Return x (N, in) times weights (in, out), in the dtype of x."""

    def by_tiles(x: Any, dy: Any) -> Any:
        dweights = native.kernel_grad()(x=x[:, None, None], dy=dy[:, None, None], kernel_size=[1, 1], padding="VALID")
        return dweights[0, 0]

    return _multiply(tf.matmul, x, weights, by_tiles if processor.has_amx() else None)


def _multiply(
    product: Callable[[Any, Any], Any], x: Any, weights: Any, by_tiles: Callable[[Any, Any], Any] | None
) -> Any:
    """Return product(x, weights).

    `by_tiles`, where that is faster than TensorFlow, returns the gradient of weights from x and that of the product.
    """
    dtype = product_dtype(x.dtype)
    if dtype != tf.bfloat16 or native.kernel_grad() is None:
        by_tiles = None
    if by_tiles is None and dtype == x.dtype:
        return product(x, tf.cast(weights, dtype))

    def rounded(x: Any, weights: Any) -> Any:
        return tf.cast(product(tf.cast(x, dtype), weights), x.dtype)

    @tf.custom_gradient
    def with_gradient(x: Any, weights: Any) -> tuple[Any, Callable[[Any], Any]]:
        as_multiplied = tf.cast(tf.cast(weights, x.dtype), dtype)

        def gradient(dy: Any) -> Any:
            sources = [x] if by_tiles else [x, as_multiplied]
            # x is copied anew when dy is there, so that no copy of an activation waits for the backward pass.
            with tf.control_dependencies([dy]), tf.GradientTape() as tape:
                tape.watch(sources)
                y = rounded(x, as_multiplied)  # in a graph nobody reads it, so it is not computed
            dx, *others = tape.gradient(y, sources, output_gradients=dy)
            dweights = by_tiles(x, dy) if by_tiles else others[0]
            return dx, tf.cast(dweights, weights.dtype)

        return rounded(x, as_multiplied), gradient

    return with_gradient(x, weights)
