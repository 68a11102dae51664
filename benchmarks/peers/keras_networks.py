"""The networks of layers that Keras brings, as one would write them down."""

from typing import Any

import keras
from keras import layers


def build(model: str, image_size: int, classes: int) -> keras.Model:
    """Return `resnet50`, `alexnet_bn` or `resnet20`: NHWC images to float32 logits."""
    if model == "resnet50":
        shape = (image_size, image_size, 3)
        body = keras.applications.ResNet50(weights=None, include_top=False, pooling="avg", input_shape=shape)
        return keras.Model(body.input, layers.Dense(classes, dtype="float32")(body.output))
    image = keras.Input((image_size, image_size, 3))
    features = _alexnet_bn(image) if model == "alexnet_bn" else _resnet20(image)
    return keras.Model(image, layers.Dense(classes, dtype="float32")(features))


def _alexnet_bn(x: Any) -> Any:
    def convolution(x: Any, filters: int, size: int, **options: Any) -> Any:
        x = layers.Conv2D(filters, size, use_bias=False, **options)(x)
        return layers.ReLU()(layers.BatchNormalization(momentum=0.9, epsilon=1e-4)(x))

    x = layers.MaxPooling2D(3, 2)(convolution(x, 96, 11, strides=4))
    x = layers.MaxPooling2D(3, 2)(convolution(x, 256, 5, groups=2, padding="same"))
    x = convolution(x, 384, 3, padding="same")
    x = convolution(x, 384, 3, groups=2, padding="same")
    x = layers.MaxPooling2D(3, 2)(convolution(x, 256, 3, groups=2, padding="same"))
    x = layers.Flatten()(x)
    for _ in range(2):
        x = layers.Dropout(0.5)(layers.Dense(4096, activation="relu")(x))
    return x


def _resnet20(x: Any) -> Any:
    def convolution(x: Any, filters: int, stride: int = 1) -> Any:
        x = layers.Conv2D(filters, 3, stride, padding="same", use_bias=False)(x)
        return layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)

    x = layers.ReLU()(convolution(x, 16))
    for stage, filters in enumerate((16, 32, 64)):
        for block in range(3):
            stride = 2 if stage and not block else 1
            shortcut = x
            if stride == 2:  # every second pixel, and zeros for the new channels
                channels = x.shape[-1]
                shortcut = layers.Lambda(
                    lambda t, n=channels: keras.ops.pad(t[:, ::2, ::2], [[0, 0], [0, 0], [0, 0], [0, n]]),
                    output_shape=(x.shape[1] // 2, x.shape[2] // 2, 2 * channels),
                )(x)
            x = layers.ReLU()(convolution(x, filters, stride))
            x = layers.ReLU()(layers.Add()([convolution(x, filters), shortcut]))
    return layers.GlobalAveragePooling2D(dtype="float32")(x)
