"""Models by name: what is refused, in which words, and a user's own function."""

import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from hpctrain.errors import UserError
from hpctrain.models import build, names, registry


def test_names_cost_no_import_of_keras() -> None:
    program = "import sys; from hpctrain.models import names; names(); print('keras' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


def test_names() -> None:
    assert names() == sorted(names())
    expected = {"alexnet", "alexnet_bn", "resnet18", "resnet20", "resnet34", "resnet50", "resnet56", "resnet101"}
    assert expected | {"resnet152", "resnet50_v15", "resnet101_v15", "resnet152_v15"} == set(names())


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("resnet_50", {}, "did you mean resnet50"),
        ("vgg", {}, "valid: alexnet"),
        ("resnet50", {"image_size": 31}, "use 32 or more"),
        ("resnet20", {"image_size": 7}, "use 8 or more"),
        ("alexnet", {"image_size": 66}, "use 67 or more"),
        ("alexnet_bn", {"image_size": 66}, "too small for alexnet_bn"),
        ("resnet50", {"image_size": 0}, "model.image_size must be a positive whole number"),
        ("resnet50", {"num_classes": 2.5}, "model.num_classes must be a positive whole number"),
        ("resnet50", {"dropout": 0.5}, "batch_norm_epsilon, batch_norm_momentum, zero_init_residual"),
        ("alexnet", {"drop": 0.5}, "no option 'drop'; it takes: dropout"),
        ("resnet50", {"stride_in_3x3": True}, "no option 'stride_in_3x3'"),
        ("alexnet", {"dropout": 1}, "up to but not including 1"),
        ("resnet50", {"zero_init_residual": "yes"}, "must be true or false, not 'yes'"),
        ("resnet50", {"batch_norm_momentum": -0.1}, "up to but not including 1"),
        ("alexnet_bn", {"batch_norm_epsilon": 0}, "greater than 0"),
    ],
)
def test_mistakes_are_named(name: str, arguments: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(name, **arguments)


def test_every_option_has_a_check() -> None:
    for module, function, _ in registry._MODELS.values():
        parameters = inspect.signature(getattr(__import__(module, fromlist=[function]), function)).parameters
        options = {p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY} - {"seed"}
        assert options <= set(registry._OPTION_CHECKS)


USER_MODULE = """
import keras

def linear(num_classes, image_size, width=4):
    image = keras.Input((image_size, image_size, 3))
    x = keras.layers.Dense(width)(keras.layers.Flatten()(image))
    return keras.Model(image, keras.layers.Dense(num_classes)(x))

def seeded(num_classes, image_size, seed):
    model = linear(num_classes, image_size)
    model.name = f"seed{seed}"
    return model

class Subclassed(keras.Model):
    def __init__(self, num_classes, image_size):
        super().__init__()
        self.head = keras.Sequential([keras.layers.Flatten(), keras.layers.Dense(num_classes)])

    def call(self, x):
        return self.head(x)

def nothing(**options):
    return None

def wrong_head(num_classes, image_size):
    return linear(num_classes + 1, image_size)

def fixed_size(num_classes, image_size):
    return linear(num_classes, 8)

number = 3
"""


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "my_models.py").write_text(USER_MODULE)
    (tmp_path / "needs_more.py").write_text("import a_package_nobody_has\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield "my_models"
    for module in ("my_models", "needs_more", "broken"):
        sys.modules.pop(module, None)


def test_users_model(user_module: str) -> None:
    first = build("my_models:linear", num_classes=7, image_size=4, seed=1, width=5)
    assert first.output_shape == (None, 7)
    assert first.layers[2].units == 5
    # The function takes no seed, so the global one is set for it: its weights are still a function of the arguments.
    again = build("my_models:linear", num_classes=7, image_size=4, seed=1, width=5)
    for ours, reference in zip(first.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, reference)
    assert build("my_models:seeded", num_classes=7, image_size=4, seed=9).name == "seed9"
    assert len(build("my_models:Subclassed", num_classes=7, image_size=4).trainable_variables) == 2


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("no_such_module_here:f", {}, "was not found; put the folder it is in on PYTHONPATH"),
        ("my_models.deeper:f", {}, "was not found"),
        ("needs_more:f", {}, "imports 'a_package_nobody_has', which is not installed"),
        ("broken:f", {}, "fails when imported: SyntaxError"),
        ("my_models:linaer", {}, "did you mean linear"),
        ("my_models:number", {}, "is a int, but must be a function"),
        ("my_models:nothing", {}, "returned a NoneType, but must return a keras.Model"),
        ("my_models:wrong_head", {}, "one logit for each class"),
        ("my_models:fixed_size", {}, "fails on a batch of shape .1, 4, 4, 3.: ValueError"),
        ("my_models:linear", {"depth": 3}, "unexpected keyword argument 'depth'; its parameters are .*width"),
        (":linear", {}, "write package.module:function"),
        ("my_models:", {}, "write package.module:function"),
    ],
)
def test_users_mistakes(user_module: str, name: str, options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build(name, num_classes=7, image_size=4, **options)
