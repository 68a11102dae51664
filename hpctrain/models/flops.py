"""How large a model is and how much arithmetic an image takes: what a communication model needs to know."""

import math
from typing import Any

import keras

from hpctrain.models.layers import GroupedConv2D

_COUNTED = (
    keras.layers.Conv2D,
    keras.layers.DepthwiseConv2D,
    keras.layers.Dense,
    GroupedConv2D,
)


def describe(model: keras.Model) -> dict[str, Any]:
    """Return the size of a model as plain numbers.

    - `name`
    - `trainable_parameters`, `trainable_tensors`: numbers of trainable weights, and of the arrays they are in
    - `gradient_bytes`: bytes of all gradients of one step, in the dtype of the variables (float32)
    - `multiply_adds_per_image`: of one forward pass through the convolutions and dense layers; everything else is
      a few percent more. `None` when a layer was never given a shape (a subclassed model).
    - `flops_per_image`: twice that, or `None`; training takes about three times as much
    """
    trainable = [(math.prod(variable.shape), variable.dtype) for variable in model.trainable_variables]
    multiply_adds = _multiply_adds(model)
    return {
        "name": model.name,
        "trainable_parameters": sum(size for size, _ in trainable),
        "trainable_tensors": len(trainable),
        "gradient_bytes": sum(size * _bytes_of(dtype) for size, dtype in trainable),
        "multiply_adds_per_image": multiply_adds,
        "flops_per_image": None if multiply_adds is None else 2 * multiply_adds,
    }


def _multiply_adds(model: keras.Model) -> int | None:
    """Each weight of a kernel is used once for every position of the layer's output."""
    total = 0
    for layer in model._flatten_layers(include_self=False):
        if not isinstance(layer, _COUNTED):
            continue
        try:
            positions = layer.output.shape[1:-1]
        except (AttributeError, ValueError):
            return None
        if None in positions:
            return None
        total += math.prod(positions) * math.prod(layer.kernel.shape)
    return total


def _bytes_of(dtype: str) -> int:
    return {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}[dtype]
