"""Keras layers that are fast on CPUs where Keras's own are not, and the ones Keras lacks.

All take NHWC activations and follow the global dtype policy; all can be saved and loaded with a Keras model.
"""

from typing import Any

import keras
import tensorflow as tf

from hpctrain.models.batch_norm import add_relu, batch_norm, normalize
from hpctrain.models.convolution import convolve
from hpctrain.models.products import multiply_matrices

Shape = tuple[int | None, ...]


@keras.saving.register_keras_serializable(package="hpctrain")
class FusedBatchNorm(keras.layers.Layer):
    """Batch normalization over the last axis, and what mostly follows it, in as few passes over memory as there can be.

    Input: x of shape (N, H, W, C) or (N, C), float32 or bfloat16, or a pair [x, residual] of like tensors. Output: the
    same shape and dtype. Scale, offset and all statistics are float32 whatever the dtype policy. With
    `activation="relu"` the output is relu(normalized x + residual); a residual must be followed by ReLU.

    With `copies=2` the output is a list of two equal tensors, for two layers that read it: one each. They share their
    memory, and their gradients need no pass to be added.

    In training it normalizes with the statistics of the batch it is given and moves the averages:
    `moving = momentum * moving + (1 - momentum) * batch`. As TensorFlow's kernel does (and cuDNN's), the variance
    that goes into the moving average is the unbiased one, times N/(N-1) for N = batch * height * width, while the
    one that normalizes the batch is the biased one. `keras.layers.BatchNormalization` keeps the biased one in both.

    The update is a plain `assign` on the two moving averages: inside a `keras.StatelessScope` it lands in the scope
    and the variables stay as they are. With `trainable = False` the layer always uses the moving averages.

    Source: Ioffe and Szegedy 2015 (arXiv 1502.03167); how it is computed is in `batch_norm.py`.
    """

    def __init__(
        self,
        momentum: float = 0.9,
        epsilon: float = 1e-5,
        gamma_initializer: Any = "ones",
        activation: str | None = None,
        copies: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if activation not in (None, "relu"):
            raise ValueError(f"The activation of FusedBatchNorm is None or 'relu', not {activation!r}.")
        if copies not in (1, 2):
            raise ValueError(f"FusedBatchNorm gives 1 or 2 copies of its output, not {copies}.")
        self.momentum = momentum
        self.epsilon = epsilon
        self.gamma_initializer = keras.initializers.get(gamma_initializer)
        self.activation = activation
        self.copies = copies

    def build(self, input_shape: Any) -> None:
        shape, *residual = _each(input_shape)
        if len(shape) not in (2, 4):
            raise ValueError(f"FusedBatchNorm takes (N, H, W, C) or (N, C) inputs, not shape {shape}.")
        if residual and (self.activation is None or residual != [shape]):
            raise ValueError(
                f"FusedBatchNorm takes one residual of the input's shape {shape}, and with activation='relu' only; "
                f"the activation is {self.activation!r} and the shape {residual}."
            )
        # autocast=False: the kernel wants float32 parameters beside bfloat16 activations.
        float32: dict[str, Any] = {"shape": (shape[-1],), "dtype": "float32", "autocast": False}
        self.gamma = self.add_weight(name="gamma", initializer=self.gamma_initializer, **float32)
        self.beta = self.add_weight(name="beta", initializer="zeros", **float32)
        self.moving_mean = self.add_weight(name="moving_mean", initializer="zeros", trainable=False, **float32)
        self.moving_variance = self.add_weight(name="moving_variance", initializer="ones", trainable=False, **float32)

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        x, residual = inputs if isinstance(inputs, list | tuple) else (inputs, None)
        gamma, beta = tf.convert_to_tensor(self.gamma), tf.convert_to_tensor(self.beta)
        relu = self.activation == "relu"
        if training and self.trainable:
            outputs, batch_mean, batch_variance = batch_norm(
                x, gamma, beta, residual, epsilon=self.epsilon, relu=relu, copies=self.copies
            )
            self._move(self.moving_mean, batch_mean)
            self._move(self.moving_variance, batch_variance)
        else:
            mean, variance = tf.convert_to_tensor(self.moving_mean), tf.convert_to_tensor(self.moving_variance)
            y, *_ = normalize(x, gamma, beta, mean, variance, epsilon=self.epsilon)
            outputs = [add_relu(y, residual, relu)] * self.copies
        return outputs[0] if self.copies == 1 else list(outputs)

    def _move(self, moving: Any, batch: Any) -> None:
        moving.assign(self.momentum * tf.convert_to_tensor(moving) + (1.0 - self.momentum) * batch)

    def compute_output_shape(self, input_shape: Any) -> Any:
        shape = _each(input_shape)[0]
        return shape if self.copies == 1 else [shape] * self.copies

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "epsilon": self.epsilon,
            "gamma_initializer": keras.initializers.serialize(self.gamma_initializer),
            "activation": self.activation,
            "copies": self.copies,
        }


def _each(shape: Any) -> list[Shape]:
    """Return the shapes of a layer's inputs, of which there may be one, or a list."""
    return [tuple(one) for one in shape] if isinstance(shape[0], list | tuple) else [tuple(shape)]


@keras.saving.register_keras_serializable(package="hpctrain")
class LocalResponseNormalization(keras.layers.Layer):
    """Local response normalization across channels, with Caffe's meaning of the parameters.

    `y[c] = x[c] / (k + alpha / size * sum(x[j]**2 for j within size // 2 of c)) ** beta`, on (N, H, W, C) inputs.

    Caffe divides alpha by the window size (`alpha_over_size` in BVLC Caffe's src/caffe/layers/lrn_layer.cpp);
    TensorFlow's op does not, nor does Krizhevsky et al. 2012, section 3.3 (k=2, alpha=1e-4). The defaults are those
    of BVLC's models/bvlc_alexnet. Computed in float32 under any dtype policy: the sum is of squares.
    """

    def __init__(self, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if size < 1 or size % 2 == 0:
            raise ValueError(f"The window of LocalResponseNormalization must be odd, not {size}.")
        self.size, self.alpha, self.beta, self.k = size, alpha, beta, k

    def call(self, x: Any) -> Any:
        y = tf.nn.local_response_normalization(
            tf.cast(x, tf.float32),
            depth_radius=self.size // 2,
            bias=self.k,
            alpha=self.alpha / self.size,
            beta=self.beta,
        )
        return tf.cast(y, x.dtype)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "size": self.size, "alpha": self.alpha, "beta": self.beta, "k": self.k}


class _WithKernelAsItIs(keras.layers.Layer):
    """A layer whose kernel Keras does not cast to the dtype of its inputs: `products.py` does."""

    def add_weight(self, *args: Any, name: str | None = None, **options: Any) -> Any:
        return super().add_weight(*args, name=name, autocast=name != "kernel", **options)


@keras.saving.register_keras_serializable(package="hpctrain")
class FastConv2D(_WithKernelAsItIs, keras.layers.Conv2D):
    """Keras' convolution of (N, H, W, C) images by the fastest kernel there is (`convolution.py`), but for rounding.

    Groups, dilation and other layouts are left to Keras.
    """

    def convolution_op(self, inputs: Any, kernel: Any) -> Any:
        kernel = tf.convert_to_tensor(kernel)
        stride, *others = set(self.strides)
        if others or self.groups != 1 or set(self.dilation_rate) != {1} or self.data_format != "channels_last":
            return super().convolution_op(inputs, tf.cast(kernel, inputs.dtype))
        return convolve(inputs, kernel, stride, self.padding)


@keras.saving.register_keras_serializable(package="hpctrain")
class FastDense(_WithKernelAsItIs, keras.layers.Dense):
    """Keras' dense layer, multiplied in the dtype that is fast here (`products.py`)."""

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        y = multiply_matrices(inputs, tf.convert_to_tensor(self.kernel))
        if self.bias is not None:
            y = tf.nn.bias_add(y, tf.convert_to_tensor(self.bias))
        return y if self.activation is None else self.activation(y)


@keras.saving.register_keras_serializable(package="hpctrain")
class GroupedConv2D(_WithKernelAsItIs):
    """A grouped convolution, done as one plain convolution per group on slices of the channels, then concatenated.

    Input (N, H, W, Cin), output (N, H', W', filters). The weights are those of `keras.layers.Conv2D(groups=...)`:
    one kernel (kh, kw, Cin / groups, filters) and, if asked for, one bias (filters,). Only the way it is computed
    differs: TensorFlow's own grouped kernel is several times slower on CPUs.
    """

    def __init__(
        self,
        filters: int,
        kernel_size: int,
        groups: int,
        strides: int = 1,
        padding: str = "same",
        use_bias: bool = True,
        kernel_initializer: Any = "glorot_uniform",
        bias_initializer: Any = "zeros",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if filters % groups != 0:
            raise ValueError(f"GroupedConv2D: {filters} filters do not divide into {groups} groups.")
        self.filters, self.kernel_size, self.groups, self.strides = filters, kernel_size, groups, strides
        self.padding = padding
        self.use_bias = use_bias
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)

    def build(self, input_shape: Shape) -> None:
        channels = input_shape[-1]
        if len(input_shape) != 4 or channels is None or channels % self.groups != 0:
            raise ValueError(f"GroupedConv2D: input {input_shape} is not (N, H, W, C) with C in {self.groups} groups.")
        kernel_shape = (self.kernel_size, self.kernel_size, channels // self.groups, self.filters)
        self.kernel = self.add_weight(name="kernel", shape=kernel_shape, initializer=self.kernel_initializer)
        if self.use_bias:
            self.bias = self.add_weight(name="bias", shape=(self.filters,), initializer=self.bias_initializer)

    def call(self, x: Any) -> Any:
        inputs = tf.split(x, self.groups, axis=-1)
        kernels = tf.split(tf.convert_to_tensor(self.kernel), self.groups, axis=-1)
        outputs = [convolve(inputs[group], kernels[group], self.strides, self.padding) for group in range(self.groups)]
        y = tf.concat(outputs, axis=-1)
        return tf.nn.bias_add(y, tf.convert_to_tensor(self.bias)) if self.use_bias else y

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        def length(size: int | None) -> int | None:
            if size is None:
                return None
            return -(-(size if self.padding == "same" else size - self.kernel_size + 1) // self.strides)

        return (input_shape[0], length(input_shape[1]), length(input_shape[2]), self.filters)

    def get_config(self) -> dict[str, Any]:
        return {
            **super().get_config(),
            "filters": self.filters,
            "kernel_size": self.kernel_size,
            "groups": self.groups,
            "strides": self.strides,
            "padding": self.padding,
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
        }


@keras.saving.register_keras_serializable(package="hpctrain")
class Subsample(keras.layers.Layer):
    """Every `stride`-th pixel of every `stride`-th row: (N, H, W, C) to (N, ceil(H / stride), ceil(W / stride), C).

    It is a pooling with a window of one pixel, which has a threaded kernel; slices take ten times as long.
    """

    def __init__(self, stride: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.stride = stride

    def call(self, x: Any) -> Any:
        return tf.nn.avg_pool2d(x, ksize=1, strides=self.stride, padding="SAME")

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        height, width = (None if size is None else -(-size // self.stride) for size in input_shape[1:3])
        return (input_shape[0], height, width, input_shape[3])

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "stride": self.stride}


@keras.saving.register_keras_serializable(package="hpctrain")
class SubsampleAndPad(Subsample):
    """The parameter-free shortcut of He et al. 2015, section 3.3, option A: every `stride`-th pixel, zero new channels.

    Input (N, H, W, C), output (N, ceil(H / stride), ceil(W / stride), filters) with `filters` >= C; the new channels
    are the last ones.
    """

    def __init__(self, filters: int, stride: int, **kwargs: Any) -> None:
        super().__init__(stride, **kwargs)
        self.filters = filters

    def call(self, x: Any) -> Any:
        return tf.pad(super().call(x), [[0, 0], [0, 0], [0, 0], [0, self.filters - x.shape[-1]]])

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return (*super().compute_output_shape(input_shape)[:3], self.filters)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "filters": self.filters}


@keras.saving.register_keras_serializable(package="hpctrain")
class SeededDropout(keras.layers.Layer):
    """Dropout whose masks are a function of two integers, [seed, count], kept in one variable named for the layer.

    Each training call draws with the present count and adds one to it; inside a `keras.StatelessScope` the new count
    lands in the scope. Mapping the variable to `[seed, n]` in that scope makes the mask a function of n: see
    `random_states`. `keras.layers.Dropout` does the same, but numbers its variable by what the process built before,
    so its path cannot name a tensor of a checkpoint.
    """

    def __init__(self, rate: float, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"The rate of SeededDropout must be in [0, 1), not {rate}.")
        self.rate, self.seed = rate, seed
        self.seed_generator = keras.random.SeedGenerator(seed, name=f"{self.name}_random")

    def call(self, x: Any, training: bool | None = None) -> Any:
        if not training or self.rate == 0.0:
            return x
        return keras.random.dropout(x, self.rate, seed=self.seed_generator)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "rate": self.rate, "seed": self.seed}


def random_states(model: keras.Model) -> list[Any]:
    """Return the variables that random layers (dropout) draw from: each an integer vector [seed, count].

    To make a step's masks depend on, say, the micro-batch's number `n` and nothing else, call the model inside
    `keras.StatelessScope([(state, [seed, n]) for each state])`; see `SeededDropout`.
    """
    return [variable for variable in model.non_trainable_variables if variable.name == "seed_generator_state"]
