"""The networks: published sizes, names, initial weights, precision, and a training step without side effects."""

from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from hpctrain.models import build, describe, names


def cifar_parameters(depth: int, num_classes: int) -> int:
    """By hand from the paper's section 4.2: 3x3 convolutions without bias, two parameters a channel of batch norm."""
    blocks = (depth - 2) // 6
    convolutions, channels = 9 * 3 * 16, 16  # the first convolution and the channels it normalizes
    for inputs, filters in ((16, 16), (16, 32), (32, 64)):
        convolutions += 9 * inputs * filters + (2 * blocks - 1) * 9 * filters * filters
        channels += 2 * blocks * filters
    return convolutions + 2 * channels + 64 * num_classes + num_classes


PUBLISHED = [
    ("alexnet", 227, 60_965_224, 16),
    # No convolution biases, scale and offset for each of their channels, dense layers as they are.
    ("alexnet_bn", 227, 60_965_224 + 96 + 256 + 384 + 384 + 256, 21),
    ("resnet18", 224, 11_689_512, 62),
    ("resnet34", 224, 21_797_672, 110),
    ("resnet50", 224, 25_557_032, 161),
    ("resnet50_v15", 224, 25_557_032, 161),
    ("resnet101", 224, 44_549_160, 314),
    ("resnet101_v15", 224, 44_549_160, 314),
    ("resnet152", 224, 60_192_808, 467),
    ("resnet152_v15", 224, 60_192_808, 467),
]


def test_every_model_has_its_size_checked() -> None:
    assert {name for name, *_ in PUBLISHED} | {"resnet20", "resnet56"} == set(names())


@pytest.mark.parametrize(("name", "size", "parameters", "tensors"), PUBLISHED)
def test_published_sizes(name: str, size: int, parameters: int, tensors: int) -> None:
    model = build(name, image_size=size)
    size_of = describe(model)
    assert model.name == size_of["name"] == name
    assert size_of["trainable_parameters"] == parameters
    assert size_of["trainable_tensors"] == len(model.trainable_variables) == tensors
    assert size_of["gradient_bytes"] == 4 * parameters
    assert model.output_shape == (None, 1000)


@pytest.mark.parametrize("depth", [20, 56])
def test_cifar_sizes(depth: int) -> None:
    model = build(f"resnet{depth}", num_classes=10, image_size=32)
    assert describe(model)["trainable_parameters"] == cifar_parameters(depth, 10)
    assert cifar_parameters(20, 10) == 269_722
    # 6n + 2 weighted layers: every one a kernel, batch norm's two for all but the dense layer, and that one's bias.
    assert len(model.trainable_variables) == 3 * (depth - 1) + 2


def test_arithmetic() -> None:
    # He et al. 2015, table 1: 3.8e9; version 1.5 is the 4.1e9 that libraries quote. AlexNet: 0.72e9.
    version1 = describe(build("resnet50"))
    assert version1["multiply_adds_per_image"] == pytest.approx(3.86e9, rel=0.01)
    assert version1["flops_per_image"] == 2 * version1["multiply_adds_per_image"]
    assert describe(build("resnet50_v15"))["multiply_adds_per_image"] == pytest.approx(4.09e9, rel=0.01)
    # By hand: output positions times kernel weights, layer by layer.
    by_hand = 55**2 * 96 * 363 + 27**2 * 256 * 1200 + 13**2 * (384 * 2304 + 384 * 1728 + 256 * 1728)
    by_hand += 9216 * 4096 + 4096 * 4096 + 4096 * 1000
    assert describe(build("alexnet", image_size=227))["multiply_adds_per_image"] == by_hand
    assert by_hand == pytest.approx(0.72e9, rel=0.01)


def test_arithmetic_of_a_model_without_shapes_is_unknown() -> None:
    class Subclassed(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(3)

        def call(self, x):
            return self.dense(x)

    model = Subclassed()
    model(np.zeros((1, 4), np.float32))
    assert describe(model)["multiply_adds_per_image"] is None
    assert describe(model)["trainable_parameters"] == 15


def test_where_the_stride_is() -> None:
    for name, first_is_small in (("resnet50", True), ("resnet50_v15", False)):
        model = build(name, num_classes=2, image_size=64)
        for stage, size in ((2, 8), (3, 4), (4, 2)):
            layers = [model.get_layer(f"stage{stage}_block1_{name}") for name in ("conv1", "conv2", "conv3")]
            layers.append(model.get_layer(f"stage{stage}_block1_shortcut_conv"))
            first = size if first_is_small else 2 * size
            assert [layer.output.shape[1] for layer in layers] == [first, size, size, size]
        assert model.get_layer("stage4_block3_bn3").output.shape == (None, 2, 2, 2048)


def all_bits(model: keras.Model) -> dict[str, bytes]:
    return {variable.path: variable.value.numpy().tobytes() for variable in model.variables}


@pytest.mark.parametrize(("name", "size"), [("resnet20", 16), ("resnet18", 32), ("alexnet", 67), ("alexnet_bn", 67)])
def test_initial_weights_and_names_depend_on_nothing_but_the_arguments(name: str, size: int) -> None:
    keras.utils.set_random_seed(1)
    first = all_bits(build(name, num_classes=10, image_size=size, seed=3))
    keras.utils.set_random_seed(2)
    build("resnet20", num_classes=3, image_size=8)
    again = build(name, num_classes=10, image_size=size, seed=3)
    assert all_bits(again) == first
    assert len(first) == len(again.variables)  # paths are unique
    other = all_bits(build(name, num_classes=10, image_size=size, seed=4))
    assert list(other) == list(first)
    kernels = [path for path in first if path.endswith("kernel")]
    assert all(first[path] != other[path] for path in kernels)
    assert len({first[path] for path in kernels}) == len(kernels)


def test_weight_names_are_readable() -> None:
    paths = [variable.path for variable in build("resnet18", num_classes=2, image_size=32).variables]
    assert paths[0] == "stem_conv/kernel"
    assert "stage1_block1_conv1/kernel" in paths
    assert "stage2_block1_shortcut_bn/moving_mean" in paths
    assert paths[-2:] == ["logits/kernel", "logits/bias"]


def test_initial_distributions() -> None:
    resnet = build("resnet18", num_classes=100, image_size=32)
    kernel = resnet.get_layer("stage4_block2_conv2").kernel.value.numpy()
    assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 512)), rel=0.01)
    assert resnet.get_layer("logits").kernel.value.numpy().std() == pytest.approx(0.01, rel=0.02)
    alexnet = build("alexnet", num_classes=100, image_size=67)
    deviations = {"conv1": 0.01, "conv2": 0.01, "conv5": 0.01, "fc6": 0.005, "fc7": 0.005, "fc8": 0.01}
    for name, deviation in deviations.items():
        assert alexnet.get_layer(name).kernel.value.numpy().std() == pytest.approx(deviation, rel=0.02)
    biases = {"conv1": 0, "conv2": 0.1, "conv3": 0, "conv4": 0.1, "conv5": 0.1, "fc6": 0.1, "fc7": 0.1, "fc8": 0}
    for name, bias in biases.items():
        np.testing.assert_array_equal(alexnet.get_layer(name).bias.value, np.float32(bias))


def test_zero_init_residual_is_for_the_last_batch_norm_of_a_block() -> None:
    model = build("resnet50", num_classes=2, image_size=32, zero_init_residual=True)
    zeros = [v.path for v in model.trainable_variables if v.name == "gamma" and not np.any(v.value)]
    assert len(zeros) == 16
    assert all(path.endswith("_bn3/gamma") for path in zeros)
    plain = build("resnet50", num_classes=2, image_size=32)
    assert all(np.all(v.value) for v in plain.trainable_variables if v.name == "gamma")


@pytest.fixture
def bfloat16() -> Iterator[None]:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    yield
    keras.config.set_dtype_policy(before)


SMALL = [("resnet20", 16), ("resnet18", 32), ("resnet50_v15", 32), ("alexnet", 67), ("alexnet_bn", 67)]


@pytest.mark.parametrize(("name", "size"), SMALL)
def test_mixed_precision(bfloat16: None, name: str, size: int) -> None:
    model = build(name, num_classes=5, image_size=size)
    assert model.inputs[0].dtype == model.outputs[0].dtype == "float32"
    assert {variable.dtype for variable in model.trainable_variables} == {"float32"}
    first = model.get_layer("conv1" if name.startswith("alexnet") else "stem_conv")
    assert first.compute_dtype == first.output.dtype == "bfloat16"
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(np.ones((2, size, size, 3), np.float32), training=True) ** 2)
    gradients = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
    assert all(g.dtype == tf.float32 and np.all(np.isfinite(g)) for g in gradients)


@pytest.mark.parametrize(("name", "size"), [("resnet20", 16), ("alexnet_bn", 67)])
def test_a_stateless_step_changes_nothing(name: str, size: int) -> None:
    """In a StatelessScope the moving averages land in the scope, and gradients are those of an ordinary call."""
    model = build(name, num_classes=5, image_size=size)
    before = all_bits(model)
    images = tf.constant(np.random.default_rng(0).normal(size=(4, size, size, 3)).astype(np.float32))
    trainable = [variable.value for variable in model.trainable_variables]

    @tf.function
    def stateless(x: tf.Tensor) -> tuple[list, list]:
        with tf.GradientTape() as tape, keras.StatelessScope(state_mapping=[]) as scope:
            loss = tf.reduce_mean(model(x, training=True) ** 2)
        return tape.gradient(loss, trainable), [scope.get_current_value(v) for v in model.non_trainable_variables]

    gradients, moved = stateless(images)
    assert all_bits(model) == before

    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(images, training=True) ** 2)
    for ours, reference in zip(gradients, tape.gradient(loss, trainable), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-3, atol=1e-5)
    for ours, variable in zip(moved, model.non_trainable_variables, strict=True):
        np.testing.assert_allclose(ours, variable.value, rtol=1e-4, atol=1e-6)
    assert all_bits(model) != before


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # inside Keras
def test_a_saved_model_gives_the_same_bits(tmp_path: Path) -> None:
    model = build("resnet20", num_classes=5, image_size=16)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    x = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)
    np.testing.assert_array_equal(model(x), loaded(x))
    assert all_bits(loaded) == all_bits(model)


def test_alexnet_at_its_smallest() -> None:
    assert build("alexnet", image_size=67).get_layer("pool5").output.shape == (None, 1, 1, 256)
    assert build("alexnet", image_size=227).get_layer("pool5").output.shape == (None, 6, 6, 256)
