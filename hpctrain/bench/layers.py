"""Where the time of a forward and backward pass goes, layer by layer.

A graph of the whole model cannot be timed in parts from outside. So each layer is cut out: a graph of it alone, on
made-up inputs of its real shape and type, forward, and forward with the vector-Jacobian product for its inputs and
weights. The difference of the two is its backward time. Layers of the same kind, settings and shapes are timed once.
"""

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from hpctrain.errors import UserError

_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 15
_SAMPLE_SECONDS = 0.004  # a sample is a loop of as many calls as fill this, for layers that take microseconds


@dataclass(frozen=True)
class LayerTime:
    """What one layer of a model costs by itself, for one micro-batch. `parameters` are the trainable ones."""

    name: str
    parameters: int
    gradient_bytes: int
    forward_seconds: float
    backward_seconds: float


def profile_layers(model: keras.Model, micro_batch: int, budget_seconds: float) -> list[LayerTime]:
    """Time each layer of a functional model by itself, in the order of the forward pass.

    It takes about `budget_seconds`, or as long as three calls of each kind of layer do. Layers without weights whose
    time is nothing beside that of a call are left out. A layer that is used several times is timed at its first place.
    Empty for a subclassed model, which cannot be cut. Raises UserError for a layer that cannot be called by itself.
    """
    try:
        images = {id(tensor) for tensor in model.inputs or ()}
        layers = [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]
        work = [_Work(layer, micro_batch, images) for layer in layers]
    except (AttributeError, ValueError):  # what Keras raises for the input of a layer that has none
        return []
    started = time.perf_counter()
    tensors: dict[tuple[Any, str], Any] = {}
    kinds = {item.kind: item for item in work}
    for item in kinds.values():
        try:
            item.prepare(tensors)
        except Exception as error:  # a user's layer that wants more than its inputs, whatever it raises then
            raise UserError(
                f"the layer {item.layer.name} cannot be timed by itself ({type(error).__name__}: "
                f"{str(error).strip().splitlines()[0]}); leave the profile out with --no-layers"
            ) from error
    empty = _Timed(lambda x: x, [tf.constant(0.0)])
    # Round by round rather than layer by layer: what else the machine does for a while then hits no layer every time.
    for done in range(_MOST_ROUNDS):
        if done >= _FEWEST_ROUNDS and time.perf_counter() - started > budget_seconds:
            break
        empty.sample()
        for item in kinds.values():
            item.sample()
    result = []
    for item in work:
        forward, backward = kinds[item.kind].times(empty.median)
        sizes = [(v.value.shape.num_elements(), v.value.dtype.size) for v in item.layer.trainable_variables]
        parameters, gradient_bytes = sum(size for size, _ in sizes), sum(size * width for size, width in sizes)
        if parameters or forward + backward > 0:
            result.append(LayerTime(item.layer.name, parameters, gradient_bytes, forward, backward))
    return result


def scale_to(layers: Sequence[LayerTime], forward_backward_seconds: float) -> tuple[list[LayerTime], float]:
    """Return the layers with all times multiplied so that they add up to the measured pass, and the factor.

    The factor is below 1 where one graph is faster than its parts (fused operations, nothing handed back to Python),
    above 1 where layers get in each other's way (caches). It is far from 1 where the machine was busy with something
    else meanwhile. Shares of the time are what the profile is about.
    """
    total = sum(layer.forward_seconds + layer.backward_seconds for layer in layers)
    if total <= 0:
        return list(layers), 1.0
    factor = forward_backward_seconds / total
    scaled = [
        LayerTime(
            layer.name,
            layer.parameters,
            layer.gradient_bytes,
            layer.forward_seconds * factor,
            layer.backward_seconds * factor,
        )
        for layer in layers
    ]
    return scaled, factor


class _Work:
    """One layer, cut out of its model."""

    def __init__(self, layer: keras.Layer, micro_batch: int, images: set[int]) -> None:
        self.layer = layer
        inputs = layer.input
        self.is_list = isinstance(inputs, list | tuple)
        tensors = list(inputs) if self.is_list else [inputs]
        self.shapes = [tuple(micro_batch if size is None else size for size in tensor.shape) for tensor in tensors]
        self.types = [str(tensor.dtype) for tensor in tensors]
        # Nobody asks for the gradient of the loss by the images.
        self.wanted = [i for i, t in enumerate(tensors) if id(t) not in images and "float" in str(t.dtype)]
        self.weights = [variable.value for variable in layer.trainable_variables]

    @property
    def kind(self) -> str:
        """Equal for layers that take equally long: initial values and names do not matter."""
        config = {k: v for k, v in self.layer.get_config().items() if k not in ("name", "seed")}
        settings = {key: value for key, value in config.items() if not key.endswith("_initializer")}
        weights = [tuple(weight.shape) for weight in self.weights]
        parts = [type(self.layer).__qualname__, settings, self.shapes, self.types, self.wanted, weights]
        return json.dumps(parts, sort_keys=True, default=str)

    def prepare(self, tensors: dict[tuple[Any, str], Any]) -> None:
        """Make the graphs and what goes into them; `tensors` keeps one made-up tensor for each shape and type."""

        def made_up(shape: Any, kind: str) -> Any:
            key = (tuple(shape), kind)
            if key not in tensors:
                tensors[key] = tf.cast(tf.random.normal(shape), kind)
            return tensors[key]

        inputs = [made_up(shape, kind) for shape, kind in zip(self.shapes, self.types, strict=True)]
        self.forward = _Timed(self._forward, [inputs])
        self.both: _Timed | None = None
        if self.wanted or self.weights:
            vector = tf.nest.map_structure(lambda y: made_up(y.shape, y.dtype.name), self.forward.graph(inputs))
            self.both = _Timed(self._forward_backward, [inputs, vector])

    def sample(self) -> None:
        """Time both graphs once."""
        self.forward.sample()
        if self.both is not None:
            self.both.sample()

    def times(self, empty_seconds: float) -> tuple[float, float]:
        """Return the layer's forward and backward time; `empty_seconds` is what calling any graph takes."""
        forward = self.forward.median
        backward = 0.0 if self.both is None else self.both.median - max(forward, empty_seconds)
        return max(0.0, forward - empty_seconds), max(0.0, backward)

    def _forward(self, inputs: list[Any]) -> Any:
        with keras.StatelessScope():  # as in the train step: moving averages and dropout's counters stay
            return self.layer(inputs if self.is_list else inputs[0], training=True)

    def _forward_backward(self, inputs: list[Any], vector: Any) -> Any:
        with tf.GradientTape() as tape:
            sources = [*(inputs[i] for i in self.wanted), *self.weights]
            tape.watch(sources)
            output = self._forward(inputs)
        gradients = tape.gradient(output, sources, output_gradients=vector)
        return output, [gradient for gradient in gradients if gradient is not None]


class _Timed:
    """A function's graph with its arguments, and how long calls of it took."""

    def __init__(self, function: Callable[..., Any], arguments: list[Any]) -> None:
        self.graph, self.arguments = tf.function(function).get_concrete_function(*arguments), arguments
        self.samples: list[float] = []
        self.graph(*arguments)
        started = time.perf_counter()
        self.graph(*arguments)
        self.calls = 1 + int(_SAMPLE_SECONDS / (time.perf_counter() - started))

    def sample(self) -> None:
        """Take the mean of some calls."""
        started = time.perf_counter()
        for _ in range(self.calls):
            self.graph(*self.arguments)
        self.samples.append((time.perf_counter() - started) / self.calls)

    @property
    def median(self) -> float:
        """Seconds of a call."""
        return statistics.median(self.samples)
