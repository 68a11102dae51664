"""Batch normalization with the statistics of the batch, a residual added and ReLU, forward and backward.

Where our own operation is compiled (`hpctrain/native/batch_norm.cc`) all of it is done in two passes over memory each
way; else by TensorFlow's operations, one after the other, with equal results up to rounding.
"""

import functools
from typing import Any

import tensorflow as tf

from hpctrain import native


def batch_norm(
    x: Any, gamma: Any, beta: Any, residual: Any | None, *, epsilon: float, relu: bool, copies: int = 1
) -> tuple[list[Any], Any, Any]:
    """Return ([y] * copies, batch mean, unbiased batch variance) for x (..., C) in float32 or bfloat16.

    `y = relu((x - mean) / sqrt(biased variance + epsilon) * gamma + beta + residual)`, of the type of x; `residual` is
    like x or None, and ReLU is left out with `relu=False`, which a residual cannot be. gamma, beta and the statistics
    are float32 (C,). The gradient is of y: there is none through the mean and variance that are returned.

    Handing each of two readers a copy of its own spares the pass that adds their gradients: the copies are the same
    memory, and the operation's backward pass reads one gradient for each. `copies` is 1 or 2.
    """
    operation = _operation()
    if operation is None:
        y, mean, variance = normalize(x, gamma, beta, epsilon=epsilon)
        return [add_relu(y, residual, relu)] * copies, mean, variance
    residuals = [] if residual is None else [residual]
    y, mean, variance, _ = operation(
        x=x, gamma=gamma, beta=beta, residual=residuals, copies=copies, epsilon=epsilon, relu=relu
    )
    return y, tf.stop_gradient(mean), tf.stop_gradient(variance)


def normalize(
    x: Any, gamma: Any, beta: Any, mean: Any | None = None, variance: Any | None = None, *, epsilon: float
) -> tuple[Any, Any, Any]:
    """Return (y, mean, unbiased variance) by TensorFlow's kernel, with the statistics given, or else the batch's."""
    shape = tf.shape(x)
    images = x if len(x.shape) == 4 else tf.reshape(x, [-1, 1, 1, x.shape[-1]])
    # In training the kernel takes no statistics (empty tensors) and returns those of the batch.
    no_statistics = tf.zeros((0,), tf.float32)
    y, batch_mean, batch_variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=images,
        scale=gamma,
        offset=beta,
        mean=no_statistics if mean is None else mean,
        variance=no_statistics if variance is None else variance,
        epsilon=epsilon,
        exponential_avg_factor=1.0,
        data_format="NHWC",
        is_training=mean is None,
    )
    y = y if images is x else tf.reshape(y, shape)
    return y, tf.stop_gradient(batch_mean), tf.stop_gradient(batch_variance)


def add_relu(y: Any, residual: Any | None, relu: bool) -> Any:
    """Return relu(y + residual), each if asked for."""
    y = y if residual is None else y + residual
    return tf.nn.relu(y) if relu else y


@functools.cache
def _operation() -> Any:
    library = native.batch_norm()
    if library is None:
        return None

    @tf.RegisterGradient("HpctrainBatchNorm")
    def _gradient(op: Any, *output_gradients: Any) -> list[Any]:
        x, gamma, beta, *residual = op.inputs
        copies = op.get_attr("copies")
        *_, mean, _, reciprocal_deviation = op.outputs
        gradients = [gradient for gradient in output_gradients[:copies] if gradient is not None]
        dx, dgamma, dbeta, dresidual = library.hpctrain_batch_norm_grad(
            dy=gradients or [tf.zeros_like(x)],
            x=x,
            gamma=gamma,
            beta=beta,
            mean=mean,
            reciprocal_deviation=reciprocal_deviation,
            y=[op.outputs[0]] if residual else [],
            relu=op.get_attr("relu"),
        )
        return [dx, dgamma, dbeta, *dresidual]

    return library.hpctrain_batch_norm
