"""ResNets of He, Zhang, Ren, Sun 2015 (arXiv 1512.03385): the ImageNet family and the one for small images.

Version 1 is the paper's: the first 1x1 convolution of a bottleneck carries the stride. Version 1.5, MLPerf's and most
libraries' ResNet-50, moves it to the 3x3: about half a point of top-1 better for 6 % more arithmetic.

Strided convolutions are padded alike on both sides, as in the authors' Caffe models; TensorFlow's "same" would shift
them by a pixel. The pooling after the first convolution is padded after the image only, which is what Caffe's rounding
up does.

Convolutions have no bias. Initial weights: He normal by fan-out (arXiv 1502.01852), the classifier Gaussian 0.01 (in
the small networks He normal too), batch normalization 1 and 0. Input: (N, size, size, 3) float32, normalized; output:
(N, num_classes) float32 logits.
"""

from dataclasses import dataclass
from typing import Any

import keras

from hpctrain.errors import UserError
from hpctrain.models.layers import FastConv2D, FusedBatchNorm, Subsample, SubsampleAndPad
from hpctrain.models.seeds import layer_seed

# Table 1 of the paper: blocks in each of the four stages, of 64, 128, 256 and 512 filters.
BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
BOTTLENECK_DEPTHS = (50, 101, 152)
SMALLEST_IMAGE = 32
SMALLEST_CIFAR_IMAGE = 8


def resnet(
    depth: int,
    stride_in_3x3: bool,
    num_classes: int,
    image_size: int,
    *,
    seed: int = 0,
    zero_init_residual: bool = False,
    batch_norm_momentum: float = 0.9,
    batch_norm_epsilon: float = 1e-5,
) -> keras.Model:
    """Return ResNet-`depth` for ImageNet-like images (depth 18, 34, 50, 101 or 152).

    `stride_in_3x3` chooses version 1.5 of the bottleneck; basic blocks have one version only. `zero_init_residual`
    starts the last batch normalization of each block with gamma 0, so that every block begins as the identity
    (Goyal et al. 2017, section 5.1).
    """
    if image_size < SMALLEST_IMAGE:
        raise UserError(
            f"model.image_size={image_size} is too small for resnet{depth}, which halves the image five times; "
            f"use {SMALLEST_IMAGE} or more, or resnet20 for small images."
        )
    net = _Parts(seed, zero_init_residual, batch_norm_momentum, batch_norm_epsilon)
    bottleneck = depth in BOTTLENECK_DEPTHS

    image = keras.Input((image_size, image_size, 3), name="image", dtype="float32")
    x = net.conv_bn(image, 64, 7, 2, "stem_", "")
    x = keras.layers.MaxPooling2D(3, 2, padding="same", data_format="channels_last", name="stem_pool")(x)
    fork = [x, x]
    for stage, blocks in enumerate(BLOCKS[depth], start=1):
        filters = 64 * 2 ** (stage - 1)
        for block in range(1, blocks + 1):
            stride = 2 if stage > 1 and block == 1 else 1
            name = f"stage{stage}_block{block}_"
            is_last, strides_first = stage == len(BLOCKS[depth]), bottleneck and not stride_in_3x3
            copies = 1 if block == blocks and (is_last or strides_first) else 2
            if bottleneck:
                fork = net.bottleneck_block(fork, filters, stride, stride_in_3x3, name, copies)
            else:
                fork = net.basic_block(fork, filters, stride, name, copies)
    version = "_v15" if stride_in_3x3 else ""
    initializer = keras.initializers.RandomNormal(0.0, 0.01, layer_seed(seed, "logits"))
    logits = net.classifier(fork[0], num_classes, initializer)
    return keras.Model(image, logits, name=f"resnet{depth}{version}")


def cifar_resnet(
    depth: int,
    num_classes: int,
    image_size: int,
    *,
    seed: int = 0,
    zero_init_residual: bool = False,
    batch_norm_momentum: float = 0.9,
    batch_norm_epsilon: float = 1e-5,
) -> keras.Model:
    """Return the ResNet of section 4.2 of the paper for small images (CIFAR's 32x32), depth 6n + 2: 20 or 56.

    Three stages of n basic blocks with 16, 32 and 64 filters; shortcuts without parameters (option A).
    """
    if image_size < SMALLEST_CIFAR_IMAGE:
        raise UserError(
            f"model.image_size={image_size} is too small for resnet{depth}; use {SMALLEST_CIFAR_IMAGE} or more."
        )
    net = _Parts(seed, zero_init_residual, batch_norm_momentum, batch_norm_epsilon)

    image = keras.Input((image_size, image_size, 3), name="image", dtype="float32")
    fork = net.conv_bn(image, 16, 3, 1, "stem_", "", copies=2)
    blocks = (depth - 2) // 6
    for stage, filters in enumerate((16, 32, 64), start=1):
        for block in range(1, blocks + 1):
            stride = 2 if stage > 1 and block == 1 else 1
            copies = 1 if stage == 3 and block == blocks else 2
            fork = net.basic_block(fork, filters, stride, f"stage{stage}_block{block}_", copies, projection=False)
    # Section 4.2 starts all weights by arXiv 1502.01852. The small Gaussian of the large networks would stall here:
    # with 64 inputs its norm, and with it the classifier's local rate under LARS, is too small to get going.
    logits = net.classifier(fork[0], num_classes, keras.initializers.HeNormal(layer_seed(seed, "logits")))
    return keras.Model(image, logits, name=f"resnet{depth}")


@dataclass(frozen=True)
class _Parts:
    """The pieces both families are made of, with the settings every piece shares."""

    seed: int
    zero_init_residual: bool
    momentum: float
    epsilon: float

    def conv_bn(
        self,
        x: Any,
        filters: int,
        size: int,
        stride: int,
        prefix: str,
        suffix: str,
        relu: bool = True,
        residual: Any | None = None,
        copies: int = 1,
    ) -> Any:
        """Convolution without bias, batch normalization, `residual` added, ReLU; a list if `copies` is 2.

        `prefix` and `suffix` surround "conv" and "bn" in the layers' names.
        """
        name = f"{prefix}conv{suffix}"
        padding = "same"
        if stride > 1 and size == 1:
            x, stride = self.subsample(x, stride, f"{prefix}subsample{suffix}"), 1
        elif stride > 1:
            pad_name = f"{prefix}pad{suffix}"
            x = keras.layers.ZeroPadding2D(size // 2, data_format="channels_last", name=pad_name)(x)
            padding = "valid"
        x = FastConv2D(
            filters,
            size,
            stride,
            padding,
            data_format="channels_last",
            use_bias=False,
            kernel_initializer=keras.initializers.VarianceScaling(
                2.0, "fan_out", "untruncated_normal", seed=layer_seed(self.seed, name)
            ),
            name=name,
        )(x)
        gamma = "zeros" if residual is not None and self.zero_init_residual else "ones"
        normalize = FusedBatchNorm(
            self.momentum, self.epsilon, gamma, "relu" if relu else None, copies, name=f"{prefix}bn{suffix}"
        )
        return normalize(x if residual is None else [x, residual])

    def subsample(self, x: Any, stride: int, name: str) -> Any:
        """Only the pixels that a 1x1 convolution with a stride reads: kernels with strides are slower."""
        return Subsample(stride, name=name)(x)

    # Blocks take a list of two equal tensors, one for the branch and one for the shortcut, and return as many as the
    # next ones want. See `FusedBatchNorm`, which ends each. A bottleneck whose branch and shortcut leave out the same
    # pixels takes one.

    def basic_block(
        self, fork: list[Any], filters: int, stride: int, name: str, copies: int, projection: bool = True
    ) -> Any:
        """Two 3x3 convolutions around a shortcut: a projection (option B), or padded with zeros (option A)."""
        x, shortcut = fork
        if stride != 1 or x.shape[-1] != filters:
            if projection:
                shortcut = self.conv_bn(shortcut, filters, 1, stride, f"{name}shortcut_", "", relu=False)
            else:
                shortcut = SubsampleAndPad(filters, stride, name=f"{name}shortcut")(shortcut)
        x = self.conv_bn(x, filters, 3, stride, name, "1")
        return _list(self.conv_bn(x, filters, 3, 1, name, "2", residual=shortcut, copies=copies))

    def bottleneck_block(
        self, fork: list[Any], filters: int, stride: int, stride_in_3x3: bool, name: str, copies: int
    ) -> Any:
        """1x1, 3x3 and 1x1 to four times the filters; the stride is in the first 1x1 (v1) or the 3x3 (v1.5)."""
        x, shortcut = fork[0], fork[-1]
        if stride != 1 and not stride_in_3x3:
            x = shortcut = self.subsample(x, stride, f"{name}subsample")
            stride = 1
        if stride != 1 or x.shape[-1] != 4 * filters:
            shortcut = self.conv_bn(shortcut, 4 * filters, 1, stride, f"{name}shortcut_", "", relu=False)
        x = self.conv_bn(x, filters, 1, 1, name, "1")
        x = self.conv_bn(x, filters, 3, stride, name, "2")
        return _list(self.conv_bn(x, 4 * filters, 1, 1, name, "3", residual=shortcut, copies=copies))

    def classifier(self, x: Any, num_classes: int, initializer: keras.initializers.Initializer) -> Any:
        """Global average and one dense layer, both in float32 under any dtype policy."""
        x = keras.layers.GlobalAveragePooling2D(data_format="channels_last", dtype="float32", name="pool")(x)
        return keras.layers.Dense(num_classes, kernel_initializer=initializer, dtype="float32", name="logits")(x)


def _list(x: Any) -> list[Any]:
    return x if isinstance(x, list) else [x]
