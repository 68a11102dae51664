"""Configurations and site profiles that somebody else has made: read, or one sentence; never code, never gigabytes."""

import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.config import ModelConfig, find_recipe, load_config
from hpctrain.errors import UserError
from hpctrain.jobs.site import find_site, load_site
from hpctrain.yaml_file import parse_yaml, read_yaml
from tests.security.conftest import bounded_memory, mutated_bytes, mutated_json, refused_or

DEMO = find_recipe("demo").read_bytes()
ANY_TEXT = st.text(st.characters(exclude_characters="\0"), max_size=40)

LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("configuration") / "recipe.yaml"


def read_back(place: Path) -> Any:
    config = load_config(place)
    assert load_config(yaml.safe_load(config.to_yaml())) == config
    return config


@given(data=st.data())
@settings(max_examples=100)
def test_mutated_recipes(data: st.DataObject, place: Path) -> None:
    place.write_bytes(data.draw(st.one_of(mutated_bytes(DEMO), st.binary(max_size=100))))
    refused_or(lambda: read_back(place))


@given(data=st.data())
@settings(max_examples=100)
def test_hostile_values(data: st.DataObject, place: Path) -> None:
    changed = data.draw(mutated_json(load_config("demo").model_dump(mode="json")))
    place.write_text(yaml.safe_dump(changed, allow_unicode=False))
    refused_or(lambda: read_back(place))


@given(st.sampled_from(["train.steps", "model.options.x", "data.path", "name", "optimizer.options"]), ANY_TEXT)
def test_any_override(key: str, text: str) -> None:
    config = refused_or(lambda: load_config("demo", [f"{key}={text}"]))
    if config is not None and key == "data.path" and text and not text.isspace():
        assert config.data.path in (text, None) or yaml.safe_load(text) == config.data.path


@given(st.one_of(ANY_TEXT, st.text("{}[]!&*<|>?:-#'\"%@`,~=\n 01.ex_ab", max_size=60)))
@settings(max_examples=200)
def test_any_yaml(text: str) -> None:
    with bounded_memory():
        try:
            parse_yaml(text)
        except yaml.YAMLError as error:
            assert str(error)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAUGHS, "aliases"),
        ("a: &a [*a]", "aliases"),
        ("a: &a {b: 1}\nc:\n  <<: *a", "aliases"),
        ("name: " + "[" * 5000, "levels"),
        ("name: " + "{a: " * 5000, "levels"),
        ("- " * 3000 + "x", "levels"),
        ("name: x\nname: y", "given twice"),
        ("? [a, b]\n: c", "a key is a list"),
        ("? {a: b}\n: c", "a key is a list"),
        ("name: 0x" + "f" * 10_000, "digits"),
        ("name: " + "9" * 10_000, "digits"),
        ("name: 0x_", "not valid YAML"),
        ("name: 2024-13-01", "not valid YAML"),
        ('name: "\\ud800"', "control characters"),
        ('name: "a\\0b"', "control characters"),
        ('name: "\\e[2J"', "control characters"),
        ("--- a\n--- b", "not valid YAML"),
        ("x" * (1 << 20) + "y", "1,048,576 bytes"),
    ],
)
def test_files_made_to_harm(text: str, reason: str, place: Path) -> None:
    place.write_text(text)
    started = time.monotonic()
    with bounded_memory(50 << 20), pytest.raises(UserError, match=reason) as caught:
        load_config(place)
    assert time.monotonic() - started < 30
    assert len(str(caught.value)) < 1000


def test_long_values_and_keys_are_shortened_in_errors(place: Path) -> None:
    for text in ("train: {steps: " + "x" * 100_000 + "}", "x" * 500 + ": 1", '"\\e[2J": 1', "x:\n  y: 1"):
        place.write_text(text)
        with pytest.raises(UserError) as caught:
            load_config(place)
        assert len(str(caught.value)) < 2000 and "\x1b" not in str(caught.value)


def test_text_at_any_depth_is_plain() -> None:
    with pytest.raises(UserError, match="control characters"):
        load_config("demo", ['model.options={a: ["\\x07"]}'])
    with pytest.raises(UserError, match="control characters"):
        load_config("demo", ["data.path=/data/\udcff"])  # a byte of the command line that is no UTF-8


def test_deep_overrides_are_refused() -> None:
    with pytest.raises(UserError, match="more than 10 dots"):
        load_config("demo", ["model.options" + ".a" * 5000 + "=1"])
    with pytest.raises(UserError):
        load_config("demo", ["model.options=" + "[" * 5000])


@given(data=st.data())
def test_mutated_site_profiles(data: st.DataObject, place: Path) -> None:
    known = read_yaml(find_site("cori-knl"))
    place.write_text(yaml.safe_dump(data.draw(mutated_json(known)), allow_unicode=False))
    refused_or(lambda: load_site(str(place)))


def test_a_model_of_ones_own_comes_only_from_the_key_for_it() -> None:
    """No other text of the configuration is ever taken as the name of code."""
    from hpctrain.models import registry

    assert set(ModelConfig.model_fields) == {"name", "num_classes", "image_size", "options"}
    with pytest.raises(UserError, match="no model named"):
        registry.build("os.system")
    with pytest.raises(UserError, match=r"cannot be called|returned|fails"):
        registry.build("os:getcwd", num_classes=2)
