"""Layers cut out of a model and timed one by one."""

from typing import Any

import keras
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.bench.layers import LayerTime, profile_layers, scale_to
from hpctrain.errors import UserError
from hpctrain.models.layers import FusedBatchNorm, SeededDropout


def small_network() -> keras.Model:
    """All kinds of layers that matter: weights, none, several inputs, state, random numbers."""
    image = keras.Input((16, 16, 3), name="image")
    x = keras.layers.Conv2D(8, 3, padding="same", name="conv1")(image)
    x = FusedBatchNorm(name="bn1")(x)
    y = keras.layers.ReLU(name="relu1")(x)
    x = keras.layers.Conv2D(8, 3, padding="same", name="conv2")(y)
    x = keras.layers.Add(name="add")([x, y])
    x = SeededDropout(0.5, name="drop")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    return keras.Model(image, keras.layers.Dense(10, name="logits")(x))


def test_layers_come_in_forward_order_with_their_gradients() -> None:
    model = small_network()
    before = [variable.numpy() for variable in model.variables]
    layers = profile_layers(model, micro_batch=2, budget_seconds=0)
    parameters = {layer.name: layer.parameters for layer in layers if layer.parameters}
    assert parameters == {"conv1": 224, "bn1": 16, "conv2": 584, "logits": 20_490}
    assert all(layer.gradient_bytes == 4 * layer.parameters for layer in layers)
    names = [layer.name for layer in model.layers]
    assert [layer.name for layer in layers] == [name for name in names if name in {layer.name for layer in layers}]
    for variable, old in zip(model.variables, before, strict=True):
        assert (variable.numpy() == old).all(), f"{variable.path} has changed"


def test_a_subclassed_model_has_no_profile() -> None:
    class Own(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(3)

        def call(self, x: Any) -> Any:
            return self.dense(x)

    own = Own()
    own(keras.ops.zeros((1, 4)))
    assert profile_layers(own, 2, 0) == []


def test_a_layer_that_wants_more_than_its_inputs_is_named() -> None:
    class Scale(keras.layers.Layer):
        def call(self, x: Any, factor: float) -> Any:
            return x * factor

    image = keras.Input((4,))
    model = keras.Model(image, Scale(name="scale_it")(image, factor=2.0))
    with pytest.raises(UserError, match=r"scale_it .*--no-layers"):
        profile_layers(model, 2, 0)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(1e-6, 1)), min_size=1, max_size=20), st.floats(1e-4, 10))
def test_scaled_times_add_up_and_keep_their_shares(times: list[tuple[float, float]], whole: float) -> None:
    layers = [LayerTime(str(i), i, 4 * i, *pair) for i, pair in enumerate(times)]
    scaled, factor = scale_to(layers, whole)
    assert sum(layer.forward_seconds + layer.backward_seconds for layer in scaled) == pytest.approx(whole)
    for layer, old in zip(scaled, layers, strict=True):
        assert layer.backward_seconds == pytest.approx(old.backward_seconds * factor)
        assert (layer.name, layer.parameters, layer.gradient_bytes) == (old.name, old.parameters, old.gradient_bytes)


def test_nothing_to_scale() -> None:
    assert scale_to([], 1.0) == ([], 1.0)
