"""The run configuration: recipes, overrides, and a sentence for every mistake."""

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from hpctrain.config import (
    Config,
    OptimizerConfig,
    ScheduleConfig,
    describe_keys,
    find_recipe,
    load_config,
    recipe_names,
)
from hpctrain.errors import UserError, nearest

MINIMAL: dict[str, Any] = {
    "name": "mine",
    "model": {"name": "resnet20"},
    "train": {"global_batch": 64, "micro_batch": 16, "epochs": 2},
    "optimizer": {"learning_rate": 0.1},
}


def with_value(key: str, value: object) -> dict[str, Any]:
    """The minimal configuration with one more key."""
    *sections, last = key.split(".")
    values = inner = {k: dict(v) if isinstance(v, dict) else v for k, v in MINIMAL.items()}
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[last] = value
    return values


def value_of(config: Config, key: str) -> object:
    value: Any = config.model_dump()
    for part in key.split("."):
        value = value[part]
    return value


def error_of(recipe: Any, *overrides: str) -> str:
    """The one sentence that a mistake is answered with."""
    with pytest.raises(UserError) as caught:
        load_config(recipe, overrides)
    text = str(caught.value)
    assert text and "\n" not in text and "Traceback" not in text
    return text


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_loads_and_reads_back_from_its_own_yaml(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    assert config.name == name == find_recipe(name).stem
    assert config.description and config.source
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert load_config(path) == config
    assert config.micro_batches_a_rank(1) >= 1


def test_there_is_a_demo_and_every_key_of_it_can_be_overridden() -> None:
    assert "demo" in recipe_names() and recipe_names() == sorted(recipe_names())
    config = load_config("demo")
    for key, _, _, _ in describe_keys():
        same = yaml.safe_dump(value_of(config, key), default_flow_style=True).removesuffix("\n...\n").strip()
        assert load_config("demo", [f"{key}={same}"]) == config


@given(
    st.floats(1e-12, 1e6, allow_nan=False),
    st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=30),
    st.lists(st.floats(0, 1e3, allow_nan=False), max_size=4),
    st.dictionaries(st.text("abc_", min_size=1, max_size=4), st.one_of(st.booleans(), st.integers(), st.text("xy:{"))),
)
def test_yaml_round_trip(rate: float, text: str, milestones: list[float], options: dict[str, object]) -> None:
    config = load_config(
        MINIMAL
        | {
            "description": text,
            "data": {"path": text},
            "optimizer": {"learning_rate": rate, "options": options},
            "schedule": {"milestones": milestones},
        }
    )
    assert load_config(yaml.safe_load(config.to_yaml())) == config


def test_overrides_are_yaml_values() -> None:
    config = load_config(
        MINIMAL,
        [
            "train.steps=20",
            "optimizer.learning_rate=1e-4",
            "optimizer.weight_decay=5.e-05",
            "train.deterministic=true",
            "data.path=/scratch/imagenet",
            "schedule.milestones=[30, 60, 8e1]",
            "optimizer.options.nesterov=true",
            "model.options={dropout: 0.5}",
            "model.options.depth.of=3",
            "train.steps=30",
        ],
    )
    assert config.train.steps == 30  # the last one counts
    assert config.optimizer.learning_rate == 1e-4 and config.optimizer.weight_decay == 5e-5
    assert config.train.deterministic is True
    assert config.data.path == "/scratch/imagenet"
    assert config.schedule.milestones == [30, 60, 80]
    assert config.optimizer.options == {"nesterov": True}
    assert config.model.options == {"dropout": 0.5, "depth": {"of": 3}}
    assert load_config(MINIMAL | {"train": config.train.model_dump()}, ["train.steps=null"]).train.steps is None


@pytest.mark.parametrize("path", ["12", "2024-05-01", "2024-13-45", "1e5", "yes", "[x", "a: b", "*x", "a=b=c", "~/x y"])
def test_a_path_is_a_path_whatever_it_looks_like(path: str) -> None:
    assert load_config(MINIMAL, [f"data.path={path}"]).data.path == path


def test_overrides_leave_what_they_are_applied_to_as_it_was() -> None:
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in MINIMAL.items()}
    load_config(values, ["train.epochs=3", "model.options.dropout=0.1", "data.path=x"])
    assert values == MINIMAL


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.global_bach=64", ["no configuration key train.global_bach", "did you mean train.global_batch"]),
        ("trian.steps=64", ["trian.steps", "did you mean train.steps"]),
        ("steps=3", ["train.steps"]),
        ("qqqq=3", ["no configuration key qqqq", "valid: ", "train.steps"]),
        ("train.steps.x=3", ["train.steps.x"]),
        ("train=3", ["train is a section", "train.global_batch"]),
        ("train.steps", ["'train.steps'", "expected key.sub=value"]),
        ("=3", ["expected key.sub=value"]),
        ("train.steps=many", ["train.steps", "'many'", "integer"]),
        ("train.steps=1.5", ["train.steps", "1.5", "integer"]),
        ("train.steps=0", ["train.steps", "greater than 0"]),
        ("train.steps=true", ["train.steps", "True"]),
        ("train.epochs=.nan", ["train.epochs", "finite"]),
        ("train.epochs=1e999", ["train.epochs", "finite"]),
        ("train.deterministic=perhaps", ["train.deterministic", "'perhaps'"]),
        ("data.augmentation=strong", ["data.augmentation", "'none', 'weak' or 'heavy'"]),
        ("schedule.milestones=[1, x]", ["schedule.milestones.1", "'x'"]),
        ("model.options=3", ["model.options"]),
        ("name=a/b", ["name", "'a/b'", "letters"]),
        ("model.name=resnt20", ["no model named 'resnt20'", "package.module:function", "did you mean resnet20"]),
        ("optimizer.name=larss", ["optimizer.name", "'larss'", "'lars', 'sgd' or 'lamb'"]),
        ("schedule.name=plly", ["schedule.name", "'plly'", "'poly', 'step', 'cosine' or 'constant'"]),
        ("train.global_batch=100", ["global_batch 100", "multiple of train.micro_batch 16"]),
        ("data.partitions=3", ["global_batch 64", "data.partitions 3"]),
        ("schedule.warmup_epochs=3", ["warmup_epochs 3", "train.epochs 2"]),
        ("train.label_smoothing=1", ["train.label_smoothing", "less than 1"]),
    ],
)
def test_mistakes_in_overrides(override: str, words: list[str]) -> None:
    text = error_of(MINIMAL, override)
    assert all(word in text for word in words), text


def test_names_that_are_accepted_are_those_there_are() -> None:
    from hpctrain.models import registry
    from hpctrain.optim.factory import OPTIMIZER_NAMES
    from hpctrain.optim.schedules import SCHEDULE_NAMES

    assert get_args(OptimizerConfig.model_fields["name"].annotation) == OPTIMIZER_NAMES
    assert get_args(ScheduleConfig.model_fields["name"].annotation) == SCHEDULE_NAMES
    for name in (*registry.names(), "my_models.nets:small"):
        assert load_config(MINIMAL, [f"model.name={name}"]).model.name == name


def test_deterministic_and_compressed_gradients_exclude_each_other() -> None:
    text = error_of(MINIMAL, "train.deterministic=true", "train.compression=bf16")
    assert "train.deterministic" in text and "train.compression" in text
    load_config(MINIMAL, ["train.compression=bf16"])
    load_config(MINIMAL, ["train.deterministic=true"])


def test_unknown_keys_at_any_depth_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(with_value("optimizer.momentun", 0.9)))
    text = error_of(path)
    assert "optimizer.momentun" in text and str(path) in text and "optimizer.momentum" in text
    assert "optimiser" in error_of(with_value("optimiser.momentum", 0.9))
    assert "extra" in error_of(with_value("extra", 1))
    assert "train" in error_of(MINIMAL | {"train": 5})


@pytest.mark.parametrize("key", ["train.epochs", "optimizer.learning_rate", "model.name", "model", "name"])
def test_what_every_recipe_needs(key: str) -> None:
    values = with_value("name", "mine")
    *sections, last = key.split(".")
    inner = values
    for section in sections:
        inner = inner[section]
    del inner[last]
    text = error_of(values)
    assert f"does not set {key}" in text


def test_recipes_that_are_not_there(tmp_path: Path) -> None:
    text = error_of("dmo")
    assert "no recipe named 'dmo'" in text and "did you mean demo?" in text
    assert "resnet50-8k" in error_of("resnet50-8")
    assert str(tmp_path / "none.yaml") in error_of(tmp_path / "none.yaml")
    assert "config.yaml" in error_of(f"{tmp_path}/")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"train: [1, 2", ["not valid YAML", "line 1"]),
        (b"a: 1\n\tb: 2", ["not valid YAML", "line 2"]),
        (b"", ["no `key: value` lines"]),
        (b"- a\n- b", ["no `key: value` lines"]),
        (b"name: \xff\xfe", ["cannot be read"]),
        (b"name: 2024-13-01", ["not valid YAML", "month"]),
        (b"name: !!python/object/apply:os.getcwd []", ["not valid YAML"]),
        (b"1: 2", ["no configuration key 1"]),
    ],
)
def test_files_that_are_no_recipes(content: bytes, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    text = error_of(path)
    assert all(word in text for word in words), text


def test_numbers_without_a_point_are_numbers_in_files_too(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(MINIMAL) + "schedule:\n  end_rate: 1e-4\n  power: 2E+0\n")
    config = load_config(path)
    assert (config.schedule.end_rate, config.schedule.power) == (1e-4, 2.0)


def test_micro_batches_a_rank() -> None:
    config = load_config(MINIMAL, ["train.global_batch=96", "train.micro_batch=8"])
    assert [config.micro_batches_a_rank(ranks) for ranks in (1, 2, 3, 4, 6, 12)] == [12, 6, 4, 3, 2, 1]
    for ranks, near in ((5, "3, 4, 6"), (24, "12"), (7, "4, 6")):
        with pytest.raises(UserError) as caught:
            config.micro_batches_a_rank(ranks)
        text = str(caught.value)
        assert f"global_batch 96 does not divide over {ranks} ranks in micro-batches of 8" in text
        assert near in text


def test_every_key_is_described() -> None:
    rows = {key: (kind, default, text) for key, kind, default, text in describe_keys()}
    config = load_config(MINIMAL)

    def leaves(model: Any, prefix: str) -> set[str]:
        found: set[str] = set()
        for name in type(model).model_fields:
            value = getattr(model, name)
            found |= leaves(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else {prefix + name}
        return found

    assert set(rows) == leaves(config, "")
    for key, (kind, default, text) in rows.items():
        assert kind and text, key
        assert default == "required" or str(value_of(config, key)) == default or key.split(".")[0] in MINIMAL
    assert rows["train.global_batch"][:2] == ("int", "required")
    assert rows["train.steps"][:2] == ("int | None", "None")


@given(st.lists(st.text("abcdef", min_size=1, max_size=6), min_size=1, max_size=8), st.text("abcdef", max_size=6))
def test_nearest_names_are_names(choices: list[str], name: str) -> None:
    """What is suggested exists, and a name that is nearly right is suggested."""
    words = nearest(name, choices).removeprefix("did you mean ").removeprefix("valid: ").removesuffix("?")
    assert set(words.replace(" or ", ", ").split(", ")) <= set(choices)
    assert choices[0] in nearest(choices[0], choices)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text("name: twice\ntrain:\n  epochs: 3\n  epochs: 4\n")
    with pytest.raises(UserError, match=r"line 4.*epochs is given twice"):
        load_config(path)
