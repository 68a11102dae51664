"""Products of matrices and images in the dtype in which this processor has them.

Instructions for bfloat16 (AVX512_BF16, AMX) multiply bfloat16 numbers exactly and add the products up in float32. So do
float32 instructions with float32 copies: 8 bits times 8 bits fit into 24. Where there are no others, on KNL or a
Skylake, TensorFlow's bfloat16 kernels emulate them, and float32 copies are several times as fast; activations and
what the backward pass keeps of them stay bfloat16 otherwise.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from hpctrain import processor


def product_dtype(dtype: tf.DType) -> tf.DType:
    """Return the dtype of the numbers that are multiplied for operands, and a result, of the given one."""
    return tf.float32 if dtype == tf.bfloat16 and not processor.has_bfloat16() else dtype


def multiply(product: Callable[..., Any], x: Any, weights: Any, *options: Any) -> Any:
    """Return product(x, weights, *options), computed in `product_dtype` and rounded to the dtype of x."""
    dtype = product_dtype(x.dtype)
    if dtype == x.dtype:
        return product(x, weights, *options)

    def rounded(x: Any, weights: Any) -> Any:
        return tf.cast(product(tf.cast(x, dtype), weights, *options), x.dtype)

    @tf.custom_gradient
    def with_gradient(x: Any, weights: Any) -> tuple[Any, Callable[[Any], Any]]:
        def gradient(dy: Any) -> Any:
            # x is copied anew when dy is there, so that no copy of an activation waits for the backward pass.
            with tf.control_dependencies([dy]), tf.GradientTape() as tape:
                tape.watch([x, weights])
                y = rounded(x, weights)  # in a graph nobody reads it, so it is not computed
            return tape.gradient(y, [x, weights], output_gradients=dy)

        return rounded(x, weights), gradient

    return with_gradient(x, tf.cast(weights, dtype))
