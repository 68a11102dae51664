"""The layers of the project's models as plain numbers: tensors and multiply-adds, without Keras.

What `hpctrain.models` builds, in the same order of trainable tensors; a test compares the two.
"""

import math
from dataclasses import dataclass

from hpctrain.errors import UserError, nearest

_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
_CIFAR_DEPTHS = (20, 56)
_BYTES = 4  # gradients are float32 under every precision


@dataclass(frozen=True)
class LayerShape:
    """A layer with weights: elements of its trainable tensors, of its moving statistics, multiply-adds an image."""

    name: str
    tensors: tuple[int, ...]
    multiply_adds: int = 0
    state: int = 0

    @property
    def tensor_bytes(self) -> tuple[int, ...]:
        """Bytes of each gradient."""
        return tuple(_BYTES * elements for elements in self.tensors)


def architecture(model: str, num_classes: int = 1000, image_size: int | None = None) -> list[LayerShape]:
    """Return the layers with weights of a model of `hpctrain.models` in the order of its trainable tensors.

    `image_size` is the model's usual one when not given. Raises UserError for a model that is not the project's own.
    """
    if model in ("alexnet", "alexnet_bn"):
        return _alexnet(model == "alexnet_bn", num_classes, image_size or 227)
    family, _, version = model.partition("_")
    depth = int(family[6:]) if family.startswith("resnet") and family[6:].isdigit() else 0
    if depth in _CIFAR_DEPTHS and not version:
        return _cifar_resnet(depth, num_classes, image_size or 32)
    if depth in _BLOCKS and (not version or (version == "v15" and depth >= 50)):
        return _resnet(depth, version == "v15", num_classes, image_size or 224)
    raise UserError(
        f"the layers of the model {model} are not known without building it; give the JSON of `hpctrain bench step` "
        f"with --calibration; {nearest(model, MODELS)}"
    )


MODELS = (
    "alexnet",
    "alexnet_bn",
    *(f"resnet{depth}" for depth in (*_CIFAR_DEPTHS, *_BLOCKS)),
    *(f"resnet{depth}_v15" for depth in (50, 101, 152)),
)


def _alexnet(batch_norm: bool, num_classes: int, size: int) -> list[LayerShape]:
    layers = []

    def conv(name: str, number: int, side: int, kernel: int, channels: int, filters: int, groups: int) -> None:
        weights = kernel * kernel * (channels // groups) * filters
        layers.append(LayerShape(name, (weights,) if batch_norm else (weights, filters), side * side * weights))
        if batch_norm:
            layers.append(LayerShape(f"bn{number}", (filters, filters), 0, 2 * filters))

    def dense(name: str, inputs: int, units: int) -> None:
        layers.append(LayerShape(name, (inputs * units, units), inputs * units))

    side = (size - 11) // 4 + 1
    conv("conv1", 1, side, 11, 3, 96, 1)
    side = _pooled(side)
    conv("conv2", 2, side, 5, 96, 256, 2)
    side = _pooled(side)
    conv("conv3", 3, side, 3, 256, 384, 1)
    conv("conv4", 4, side, 3, 384, 384, 2)
    conv("conv5", 5, side, 3, 384, 256, 2)
    dense("fc6", _pooled(side) ** 2 * 256, 4096)
    dense("fc7", 4096, 4096)
    dense("fc8", 4096, num_classes)
    return layers


def _pooled(side: int) -> int:
    return (side - 3) // 2 + 1


def _conv_bn(name: str, side: int, kernel: int, channels: int, filters: int) -> list[LayerShape]:
    """A convolution without bias to side x side pixels, then batch norm; `name` holds {} for "conv" and "bn"."""
    weights = kernel * kernel * channels * filters
    return [
        LayerShape(name.format("conv"), (weights,), side * side * weights),
        LayerShape(name.format("bn"), (filters, filters), 0, 2 * filters),
    ]


def _resnet(depth: int, stride_in_3x3: bool, num_classes: int, size: int) -> list[LayerShape]:
    bottleneck = depth >= 50
    side = math.ceil(size / 2)
    layers = _conv_bn("stem_{}", side, 7, 3, 64)
    side, channels = math.ceil(side / 2), 64
    for stage, blocks in enumerate(_BLOCKS[depth], start=1):
        filters = 64 * 2 ** (stage - 1)
        outputs = 4 * filters if bottleneck else filters
        for block in range(1, blocks + 1):
            name = f"stage{stage}_block{block}_"
            before = side
            if stage > 1 and block == 1:
                side = math.ceil(side / 2)
            shortcut = _conv_bn(name + "shortcut_{}", side, 1, channels, outputs) if channels != outputs else []
            if bottleneck:
                first = before if stride_in_3x3 else side
                parts = [
                    *_conv_bn(name + "{}1", first, 1, channels, filters),
                    *_conv_bn(name + "{}2", side, 3, filters, filters),
                ]
                last = _conv_bn(name + "{}3", side, 1, filters, outputs)
            else:
                parts = _conv_bn(name + "{}1", side, 3, channels, filters)
                last = _conv_bn(name + "{}2", side, 3, filters, filters)
            layers += [*parts, *_side_by_side(shortcut, last)]
            channels = outputs
    return [*layers, LayerShape("logits", (channels * num_classes, num_classes), channels * num_classes)]


def _side_by_side(shortcut: list[LayerShape], last: list[LayerShape]) -> list[LayerShape]:
    """Keras sorts layers by their distance from the output, and the last batch norm takes the shortcut as an input."""
    if not shortcut:
        return last
    return [shortcut[0], last[0], shortcut[1], last[1]]


def _cifar_resnet(depth: int, num_classes: int, side: int) -> list[LayerShape]:
    layers = _conv_bn("stem_{}", side, 3, 3, 16)
    channels = 16
    for stage, filters in enumerate((16, 32, 64), start=1):
        for block in range(1, (depth - 2) // 6 + 1):
            if stage > 1 and block == 1:
                side = math.ceil(side / 2)
            name = f"stage{stage}_block{block}_"
            layers += _conv_bn(name + "{}1", side, 3, channels, filters)
            layers += _conv_bn(name + "{}2", side, 3, filters, filters)
            channels = filters
    return [*layers, LayerShape("logits", (channels * num_classes, num_classes), channels * num_classes)]
