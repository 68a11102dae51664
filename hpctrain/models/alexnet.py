"""AlexNet as BVLC Caffe has it, and AlexNet-BN, with batch normalization in place of local response normalization.

`alexnet`: Krizhevsky, Sutskever, Hinton 2012 in the form of BVLC Caffe's models/bvlc_alexnet/train_val.prototxt: two
groups in conv2, conv4 and conv5; normalization before pooling; dropout 0.5. Gaussian initial weights of deviation 0.01
(0.005 in fc6 and fc7); biases 0 in conv1, conv3 and fc8 and, as in that file, 0.1 elsewhere (the paper has 1).

`alexnet_bn`: B. Ginsburg's variant that the LARS paper trains (You, Gitman, Ginsburg 2017), in the form of
models/alexnet_bn/train_val.prototxt of his fork of Caffe: after each of the five convolutions batch normalization
with scale and offset (momentum 0.9, epsilon 1e-4) and then ReLU; no local response normalization; convolutions
without bias, which the offset replaces (his file keeps one in conv5 alone, where it has no effect); dense layers and
dropout as above.

Made for 227x227 images: only there does fc6 have its published size. Input: (N, size, size, 3) float32,
normalized; output: (N, num_classes) float32 logits. Other sizes change the width of fc6, and where pooling does not
divide evenly the last row and column are dropped (Caffe would round up).
"""

from typing import Any

import keras

from hpctrain.errors import UserError
from hpctrain.models.layers import (
    FastConv2D,
    FastDense,
    FusedBatchNorm,
    GroupedConv2D,
    LocalResponseNormalization,
    SeededDropout,
)
from hpctrain.models.seeds import layer_seed

SMALLEST_IMAGE = 67  # leaves one pixel after the last pooling


def alexnet(num_classes: int, image_size: int, *, seed: int = 0, dropout: float = 0.5) -> keras.Model:
    """Return AlexNet; at 227x227 and 1000 classes it has 60,965,224 parameters in 16 tensors."""
    image = _image(image_size, "alexnet")
    x = _conv(image, 96, 11, 1, "conv1", seed, bias=0.0, strides=4, padding="valid")
    x = _relu(x, 1)
    x = LocalResponseNormalization(name="norm1")(x)
    x = _pool(x, 1)
    x = _conv(x, 256, 5, 2, "conv2", seed, bias=0.1)
    x = _relu(x, 2)
    x = LocalResponseNormalization(name="norm2")(x)
    x = _pool(x, 2)
    x = _conv(x, 384, 3, 1, "conv3", seed, bias=0.0)
    x = _relu(x, 3)
    x = _conv(x, 384, 3, 2, "conv4", seed, bias=0.1)
    x = _relu(x, 4)
    x = _conv(x, 256, 3, 2, "conv5", seed, bias=0.1)
    x = _relu(x, 5)
    x = _pool(x, 5)
    return keras.Model(image, _classifier(x, num_classes, seed, dropout), name="alexnet")


def alexnet_bn(
    num_classes: int,
    image_size: int,
    *,
    seed: int = 0,
    dropout: float = 0.5,
    batch_norm_momentum: float = 0.9,
    batch_norm_epsilon: float = 1e-4,
) -> keras.Model:
    """Return AlexNet-BN."""

    def normalize_relu(x: Any, number: int) -> Any:
        return FusedBatchNorm(batch_norm_momentum, batch_norm_epsilon, activation="relu", name=f"bn{number}")(x)

    image = _image(image_size, "alexnet_bn")
    x = _conv(image, 96, 11, 1, "conv1", seed, bias=None, strides=4, padding="valid")
    x = normalize_relu(x, 1)
    x = _pool(x, 1)
    x = _conv(x, 256, 5, 2, "conv2", seed, bias=None)
    x = normalize_relu(x, 2)
    x = _pool(x, 2)
    x = _conv(x, 384, 3, 1, "conv3", seed, bias=None)
    x = normalize_relu(x, 3)
    x = _conv(x, 384, 3, 2, "conv4", seed, bias=None)
    x = normalize_relu(x, 4)
    x = _conv(x, 256, 3, 2, "conv5", seed, bias=None)
    x = normalize_relu(x, 5)
    x = _pool(x, 5)
    return keras.Model(image, _classifier(x, num_classes, seed, dropout), name="alexnet_bn")


def _image(image_size: int, name: str) -> Any:
    if image_size < SMALLEST_IMAGE:
        raise UserError(
            f"model.image_size={image_size} is too small for {name}; use {SMALLEST_IMAGE} or more (it is made for 227)."
        )
    return keras.Input((image_size, image_size, 3), name="image", dtype="float32")


def _conv(
    x: Any,
    filters: int,
    size: int,
    groups: int,
    name: str,
    seed: int,
    bias: float | None,
    strides: int = 1,
    padding: str = "same",
) -> Any:
    """A convolution with Gaussian 0.01 weights, and a bias that starts at `bias` unless that is None."""
    options: dict[str, Any] = {
        "strides": strides,
        "padding": padding,
        "use_bias": bias is not None,
        "kernel_initializer": keras.initializers.RandomNormal(0.0, 0.01, seed=layer_seed(seed, name)),
        "bias_initializer": keras.initializers.Constant(bias or 0.0),
        "name": name,
    }
    if groups > 1:
        return GroupedConv2D(filters, size, groups, **options)(x)
    return FastConv2D(filters, size, data_format="channels_last", **options)(x)


def _relu(x: Any, number: int) -> Any:
    return keras.layers.ReLU(name=f"relu{number}")(x)


def _pool(x: Any, number: int) -> Any:
    return keras.layers.MaxPooling2D(3, 2, data_format="channels_last", name=f"pool{number}")(x)


def _classifier(x: Any, num_classes: int, seed: int, dropout: float) -> Any:
    """fc6, fc7 with dropout, and fc8, the float32 logits."""
    x = keras.layers.Flatten(data_format="channels_last", name="flatten")(x)
    for number in (6, 7):
        x = _dense(x, 4096, f"fc{number}", seed, deviation=0.005, bias=0.1)
        x = _relu(x, number)
        x = SeededDropout(dropout, layer_seed(seed, f"drop{number}"), name=f"drop{number}")(x)
    return _dense(x, num_classes, "fc8", seed, deviation=0.01, bias=0.0, dtype="float32")


def _dense(x: Any, units: int, name: str, seed: int, deviation: float, bias: float, dtype: str | None = None) -> Any:
    return FastDense(
        units,
        kernel_initializer=keras.initializers.RandomNormal(0.0, deviation, seed=layer_seed(seed, name)),
        bias_initializer=keras.initializers.Constant(bias),
        dtype=dtype,
        name=name,
    )(x)
