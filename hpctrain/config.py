"""The run configuration: typed, validated, read from a YAML recipe, with overrides `key.sub=value`.

Everything that decides the result of a run is here; nothing here depends on how many ranks it runs on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from hpctrain.errors import UserError, nearest
from hpctrain.models import registry
from hpctrain.yaml_file import Section, explain, parse_yaml, read_yaml

_MAX_KEY_DOTS = 10  # of an override below an `options` mapping


class DataConfig(Section):
    path: str | None = Field(None, description="directory with train/ and, for evaluation, val/")
    staged: str | None = Field(None, description="node-local directory whose shards are read first (`data stage`)")
    augmentation: Literal["none", "weak", "heavy"] = Field(
        "weak",
        description="none: central crop; weak: random crop of crop_fraction; heavy: random area and aspect ratio",
    )
    flip: bool = Field(True, description="mirror half of the training images (weak and heavy)")
    crop_fraction: float = Field(0.875, gt=0, le=1, description="side of the central or weak crop; 0.875 is 224 of 256")
    synthetic: bool = Field(False, description="train on made-up data of the right shape; no path is needed")
    synthetic_records: int = Field(1_281_167, gt=0, description="records an epoch of synthetic data stands for")
    shuffle_block: int = Field(1, gt=0, description="neighboring records that are shuffled and read as one piece")
    partitions: int = Field(1, gt=0, description="ranges of the data set that are shuffled apart; nodes, when staging")
    on_bad_record: Literal["error", "skip"] = Field("error", description="what a damaged record does to the run")
    read_ahead_batches: int = Field(2, gt=0, description="micro-batches that are ready before the step asks for them")
    page_cache: Literal["keep", "drop"] = Field(
        "keep", description="drop: ask the kernel to forget what was read, for data larger than a node's memory"
    )


class ModelConfig(Section):
    name: str = Field(description="a model of `hpctrain.models`, or package.module:function of your own")
    num_classes: int | None = Field(None, gt=0, description="size of the output layer; the data set's when unset")
    image_size: int = Field(224, gt=0, description="side of the square input in pixels")
    options: dict[str, Any] = Field(default_factory=dict, description="further arguments of the model's function")

    @field_validator("name")
    @classmethod
    def _name_is_known(cls, name: str) -> str:
        registry.check_name(name)
        return name


class TrainConfig(Section):
    global_batch: int = Field(gt=0, description="images a step, over all ranks")
    micro_batch: int = Field(gt=0, description="images that go through the network together: the batch-norm group")
    epochs: float = Field(gt=0, description="passes over the data set; the schedule spans them")
    steps: int | None = Field(None, gt=0, description="stop after this step; the schedule still spans the epochs")
    precision: Literal["float32", "mixed_bfloat16"] = Field("float32", description="of activations and convolutions")
    seed: int = Field(0, ge=0, lt=2**31, description="of initial weights, order, augmentation and dropout")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="weight of the uniform distribution in the target")
    deterministic: bool = Field(
        False, description="the same bits on 1, 2, 4, ... ranks and in every repetition (same threads a rank)"
    )
    threads: int | None = Field(None, gt=0, description="TensorFlow threads a rank; from the cores it has when unset")
    rotate_cpus: bool = Field(True, description="ranks of a host that share a cache take turns on their CPUs")
    compression: Literal["none", "bf16", "fp16"] = Field("none", description="number format of gradients on the wire")
    bucket_mb: float = Field(4.0, gt=0, description="megabytes of gradients that are reduced in one piece")
    on_bad_step: Literal["stop", "skip"] = Field(
        "stop", description="what a NaN or infinite loss or gradient, or a spike, does: end the run, or skip the update"
    )
    loss_spike: float | None = Field(
        None, gt=1, description="a loss of more than so many times the median of the last 50 is bad; unset: none is"
    )
    start_seconds: float = Field(600.0, gt=0, description="for all ranks to come up in MPI before the job ends")
    check_weights_every: int = Field(
        1000, ge=0, description="steps between two checks that all ranks have the same weights; 0: only at checkpoints"
    )
    stall_seconds: float = Field(60.0, gt=0, description="without progress, beyond a usual step, before the job ends")


class OptimizerConfig(Section):
    name: Literal["lars", "sgd", "lamb"] = Field("lars", description="the rule of the update")
    learning_rate: float = Field(gt=0, description="peak rate, for the global batch as it is")
    momentum: float = Field(0.9, ge=0, lt=1, description="share of the last update that the next one starts from")
    weight_decay: float = Field(1e-4, ge=0, description="times the weight is added to its gradient")
    trust_coefficient: float = Field(1e-3, gt=0, description="LARS: eta")
    options: dict[str, Any] = Field(
        default_factory=dict, description="further arguments of the optimizer, e.g. nesterov"
    )


class ScheduleConfig(Section):
    name: Literal["poly", "step", "cosine", "constant"] = Field("poly", description="what follows the warm-up")
    warmup_epochs: float = Field(0.0, ge=0, description="epochs in which the rate rises linearly to its peak")
    power: float = Field(2.0, gt=0, description="of poly")
    end_rate: float = Field(0.0, ge=0, description="rate of the last step, for poly and cosine")
    milestones: list[float] = Field(default_factory=list, description="epochs after which step multiplies the rate")
    factor: float = Field(0.1, gt=0, lt=1, description="what step multiplies the rate with")
    options: dict[str, Any] = Field(default_factory=dict, description="further arguments of the schedule")


class CheckpointConfig(Section):
    every_steps: int | None = Field(None, gt=0, description="write one each so many steps; once an epoch when unset")
    keep: int = Field(2, gt=0, description="the newest so many are kept")
    stop_margin_seconds: float = Field(120.0, ge=0, description="how long before the job's end the run stops by itself")


class EvaluateConfig(Section):
    every_epochs: float = Field(1.0, gt=0, description="a run also ends with an evaluation")
    micro_batch: int | None = Field(None, gt=0, description="images at a time; train.micro_batch when unset")


class LogConfig(Section):
    every_steps: int = Field(10, gt=0, description="a line on the log each so many steps; metrics.jsonl has every step")
    tensorboard: bool = Field(True, description="write TensorBoard event files too")


class Config(Section):
    name: str = Field(description="name of the recipe or run")
    description: str = Field("", description="what it is for")
    source: str = Field("", description="where its numbers come from")
    expected_top1: float | None = Field(None, description="published accuracy in percent")
    data: DataConfig = DataConfig()
    model: ModelConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    log: LogConfig = LogConfig()

    @field_validator("name")
    @classmethod
    def _name_is_a_file_name(cls, name: str) -> str:
        if not name or name.startswith(".") or not all(c.isalnum() or c in "._-" for c in name):
            raise ValueError("a name is made of letters, digits, '.', '_' and '-'")
        return name

    @model_validator(mode="after")
    def _sizes_fit(self) -> Config:
        batch, micro = self.train.global_batch, self.train.micro_batch
        if batch % micro:
            raise ValueError(f"train.global_batch {batch} is not a multiple of train.micro_batch {micro}")
        if batch % self.data.partitions:
            raise ValueError(f"train.global_batch {batch} does not divide over data.partitions {self.data.partitions}")
        if self.train.deterministic and self.train.compression != "none":
            raise ValueError(
                "train.deterministic promises the same bits on any number of ranks, and train.compression "
                f"{self.train.compression} rounds by rank; set one of them off"
            )
        if self.schedule.warmup_epochs > self.train.epochs:
            raise ValueError(
                f"schedule.warmup_epochs {self.schedule.warmup_epochs:g} is longer than "
                f"train.epochs {self.train.epochs:g}"
            )
        return self

    def micro_batches_a_rank(self, ranks: int) -> int:
        """Return how many micro-batches each of `ranks` ranks works through in a step, or raise UserError."""
        batch, micro = self.train.global_batch, self.train.micro_batch
        if batch % (ranks * micro):
            valid = [r for r in range(1, batch // micro + 1) if (batch // micro) % r == 0]
            near = sorted(sorted(valid, key=lambda r: abs(r - ranks))[:4])
            raise UserError(
                f"train.global_batch {batch} does not divide over {ranks} ranks in micro-batches of {micro}; "
                f"use {', '.join(map(str, near))} ranks, or change train.global_batch or train.micro_batch"
            )
        return batch // (ranks * micro)

    def to_yaml(self) -> str:
        """Return the whole configuration as YAML that `load_config` reads back to the same."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


def load_config(recipe: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Config:
    """Return the configuration of a recipe's name, a YAML file or a mapping, with overrides `key.sub=value` applied.

    Values of overrides are read as YAML: `train.steps=20`, `data.path=/scratch/imagenet`, `train.steps=null`.
    Raises UserError, in one sentence, for an unknown recipe, key or value.
    """
    if isinstance(recipe, Mapping):
        values, where = _copy(recipe), "the configuration"
    else:
        path = find_recipe(recipe)
        values, where = read_yaml(path), str(path)
    for override in overrides:
        _apply(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, where, [row[0] for row in describe_keys()])) from None


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package, sorted."""
    folder = resources.files("hpctrain") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def find_recipe(recipe: str | Path) -> Path:
    """Return the YAML file of a recipe's name or path, or raise UserError with the nearest names."""
    text = str(recipe)
    if text.endswith((".yaml", ".yml")) or "/" in text:
        path = Path(text)
        if path.is_dir():
            raise UserError(f"{text} is a directory, expected a recipe's YAML file; a run's is {text}/config.yaml")
        if not path.is_file():
            raise UserError(f"there is no file {text}; give a YAML file or one of the names in `hpctrain recipes`")
        return path
    if text in recipe_names():
        return Path(str(resources.files("hpctrain") / "recipes" / f"{text}.yaml"))
    raise UserError(f"there is no recipe named {text!r}; {nearest(text, recipe_names())}")


def describe_keys() -> list[tuple[str, str, str, str]]:
    """Return (key, type, default, description) of every configuration key, in order."""
    rows: list[tuple[str, str, str, str]] = []
    for name, section in Config.model_fields.items():
        fields = _fields_of(name)
        for key, info in (fields or {"": section}).items():
            annotation = info.annotation
            kind = annotation.__name__ if isinstance(annotation, type) else str(annotation)
            kind = kind.replace("typing.", "").replace("NoneType", "None")
            default = "required" if info.is_required() else str(info.get_default(call_default_factory=True))
            rows.append((f"{name}.{key}" if key else name, kind, default, info.description or ""))
    return rows


def _text_keys() -> set[str]:
    return {key for key, kind, _, _ in describe_keys() if kind in ("str", "str | None")}


def _fields_of(section: str) -> dict[str, Any]:
    annotation = Config.model_fields[section].annotation
    return annotation.model_fields if isinstance(annotation, type) and issubclass(annotation, Section) else {}


def _copy(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"{override!r} is not an override; expected key.sub=value, such as train.steps=20")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        value = text
    *sections, last = key.split(".")
    _check_key(key)
    if value is not None and key in _text_keys():
        value = value if isinstance(value, str) else text  # a directory may be called 2024-05-01, or 12
    inner = values
    for section in sections:
        if not isinstance(inner.get(section), dict):
            inner[section] = {}
        inner = inner[section]
    inner[last] = value


def _check_key(key: str) -> None:
    """Raise UserError for a key that no configuration has; keys below an `options` mapping are free."""
    known = {row[0] for row in describe_keys()}
    free = {name + "." for name in known if name.endswith(".options")}
    if key.count(".") > _MAX_KEY_DOTS:
        raise UserError(f"{key[:60]}... is no configuration key: it has more than {_MAX_KEY_DOTS} dots")
    if key not in known and not any(key.startswith(prefix) for prefix in free):
        if key in Config.model_fields:
            raise UserError(f"{key} is a section; set one of its keys, such as {key}.{next(iter(_fields_of(key)))}")
        raise UserError(f"there is no configuration key {key}; {nearest(key, known)}")
