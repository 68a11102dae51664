"""Gradient sizes and times of a model's layers: what decides when which gradients can be sent."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.errors import UserError
from hpctrain.scaling.performance.architecture import LayerShape

# Of a layer's forward and backward pass: the backward pass multiplies twice as often, by the transposed weights for
# the gradients of the layer's input and by the input for those of the weights.
_BACKWARD_SHARE = 2 / 3


@dataclass(frozen=True)
class Layer:
    """A layer in forward order: the bytes of its gradients, and its times for one micro-batch."""

    tensor_bytes: tuple[int, ...]
    forward_seconds: float
    backward_seconds: float


def layers_from_arithmetic(shapes: Sequence[LayerShape], image_seconds: float, fixed_seconds: float) -> list[Layer]:
    """Share out a micro-batch's time among its layers, where only the whole is known.

    `image_seconds`, what grows with the images, goes by multiply-adds; `fixed_seconds`, what does not, by the bytes of
    the weights, which are read and whose gradients are written however few images there are.
    """
    multiply_adds = sum(shape.multiply_adds for shape in shapes)
    weight_bytes = sum(sum(shape.tensor_bytes) for shape in shapes)
    layers = []
    for shape in shapes:
        seconds = image_seconds * shape.multiply_adds / multiply_adds
        seconds += fixed_seconds * sum(shape.tensor_bytes) / weight_bytes
        layers.append(Layer(shape.tensor_bytes, seconds * (1 - _BACKWARD_SHARE), seconds * _BACKWARD_SHARE))
    return layers


def layers_from_profile(
    rows: Sequence[Mapping[str, Any]], seconds: float, shapes: Sequence[LayerShape] = ()
) -> list[Layer]:
    """Return the layers in the `layers` of `hpctrain bench step --json`, scaled to take `seconds` in all.

    A profile has a layer's bytes, not those of each of its tensors; where `shapes` knows the layer, it tells.
    Raises UserError for rows without the keys of that JSON or without any time.
    """
    tensors = {shape.name: shape.tensor_bytes for shape in shapes}
    try:
        layers = [
            Layer(
                tensors.get(row["name"], (int(row["gradient_bytes"]),) if row["gradient_bytes"] else ()),
                float(row["forward_seconds"]),
                float(row["backward_seconds"]),
            )
            for row in rows
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"the calibration's step.layers cannot be read ({error!r}); give what `hpctrain bench step --json` prints"
        ) from None
    total = sum(layer.forward_seconds + layer.backward_seconds for layer in layers)
    if total <= 0:
        raise UserError("the calibration's step.layers take no time; measure them again with `hpctrain bench step`")
    scale = seconds / total
    return [Layer(a.tensor_bytes, a.forward_seconds * scale, a.backward_seconds * scale) for a in layers]
