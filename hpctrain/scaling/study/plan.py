"""What a study runs, and what became of it: DIR/study.json, from the user's arguments. Never imports TensorFlow.

A study measures speed. It says nothing about learning: a weak study's batches are not tuned, and no run is long enough.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from hpctrain.config import load_config
from hpctrain.data.atomic import make_folder, write_file
from hpctrain.data.manifest import Manifest
from hpctrain.data.order import steps_in
from hpctrain.errors import UserError

FILE_NAME = "study.json"
FORMAT = 1
WARM_UP_STEPS = 10
# Followed by the user's overrides, which overrule them. The one checkpoint of a run comes after the last measured step.
# Training logs where the time went once in `log.every_steps`.
QUIET = (
    "checkpoint.every_steps=1000000000",
    "log.every_steps=10",
    "log.tensorboard=false",
)
_SET_BY_STUDY = {"train.steps": "--steps"}

Mode = Literal["weak", "strong"]
How = Literal["separate", "chain", "together"]


@dataclass(frozen=True)
class Arguments:
    """What the user asks for."""

    recipe: str
    overrides: tuple[str, ...]
    nodes: tuple[int, ...]  # ascending
    mode: Mode
    site: str
    repeats: int = 1
    steps: int = 50  # measured
    warm_up: int = WARM_UP_STEPS
    walltime: str = "01:00:00"
    account: str | None = None
    partition: str | None = None
    ranks_per_node: int | None = None
    cores: int | None = None
    how: How = "separate"


@dataclass
class Try:
    """One attempt at a run: its directory below the study's, and its job, or how it ended on a local site."""

    run_dir: str
    scheduler: str
    job: str | None = None
    exit_code: int | None = None


@dataclass
class Run:
    """One node count once, tried until it worked."""

    nodes: int
    repeat: int  # from 1
    global_batch: int
    tries: list[Try] = field(default_factory=list)

    def next_dir(self) -> str:
        """Return the name of the directory of the next try."""
        name = f"nodes-{self.nodes}" + (f"-repeat-{self.repeat}" if self.repeat > 1 else "")
        return name + (f"-try-{len(self.tries) + 1}" if self.tries else "")


@dataclass
class Study:
    """A study directory's plan.

    `config` is the recipe as it is resolved, with the user's overrides alone; `overrides` are those of all its runs.
    """

    out: Path
    arguments: Arguments
    config: dict[str, Any]
    overrides: list[str]
    runs: list[Run]

    def save(self) -> None:
        """Write study.json, or raise UserError."""
        values = {
            "format": FORMAT,
            "arguments": asdict(self.arguments),
            "config": self.config,
            "overrides": self.overrides,
            "runs": [asdict(run) for run in self.runs],
        }
        make_folder(self.out)
        try:
            write_file(self.out / FILE_NAME, (json.dumps(values, indent=1) + "\n").encode())
        except OSError as error:
            raise UserError(f"cannot write {self.out / FILE_NAME}: {error.strerror}; give another --out") from None


def make_study(arguments: Arguments, out: Path) -> Study:
    """Return a new study. Raises UserError for what cannot be run; whether ranks and batch fit the site is not checked.

    Weak: the recipe's global batch is that of the smallest count, and grows with the nodes. Strong: all have it.
    Where a run is longer than the recipe's epochs, epochs are added, so that it does all its steps. Runs see only the
    training split, so that none ends with an evaluation, unless the user sets a key of `evaluate`.
    """
    for override in arguments.overrides:
        key = override.partition("=")[0]
        if key in _SET_BY_STUDY:
            raise UserError(f"{key} of a study's runs is set by {_SET_BY_STUDY[key]}; leave {override} out")
    config = load_config(arguments.recipe, arguments.overrides)
    if config.data.path is not None:
        config.data.path = os.path.abspath(config.data.path)
    records = config.data.synthetic_records if config.data.synthetic else num_records(config.data.path)
    steps, smallest = arguments.warm_up + arguments.steps, arguments.nodes[0]
    batches = dict.fromkeys(arguments.nodes, config.train.global_batch)
    if arguments.mode == "weak":
        for nodes, batch in batches.items():
            if batch * nodes % smallest:
                raise UserError(
                    f"train.global_batch {batch} does not divide over the {smallest} nodes of the smallest count, so "
                    f"that it could grow to {nodes} nodes; choose a multiple of {smallest}"
                )
            batches[nodes] = batch * nodes // smallest
    overrides = [*QUIET, *arguments.overrides, f"train.steps={steps}"]
    asked = any(text.startswith("evaluate.") for text in arguments.overrides)
    if not config.data.synthetic and not asked:
        overrides.append(f"data.path={_training_split(config.data.path)}")
    largest = max(batches.values())
    if steps_in(config.train.epochs, records, largest) < steps:
        overrides.append(f"train.epochs={math.ceil(steps * largest / records)}")
    repeats = range(1, arguments.repeats + 1)
    runs = [Run(nodes, repeat, batch) for repeat in repeats for nodes, batch in batches.items()]
    return Study(out, arguments, config.model_dump(mode="json"), overrides, runs)


def load_study(out: Path) -> Study | None:
    """Return the study in a directory, or None if there is none yet. Raises UserError if it cannot be read."""
    path = out / FILE_NAME
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise UserError(
                f"{path} is of format {values['format']}, expected {FORMAT}; use the hpctrain it was made by"
            )
        given = values["arguments"]
        arguments = Arguments(**{**given, "overrides": tuple(given["overrides"]), "nodes": tuple(given["nodes"])})
        runs = [Run(**{**run, "tries": [Try(**each) for each in run["tries"]]}) for run in values["runs"]]
        return Study(out, arguments, values["config"], values["overrides"], runs)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is no study that can be read; move it away, or give another --out") from None


def check_same(before: Study, now: Study) -> None:
    """Raise UserError when a directory holds a study of other arguments."""
    old, new = asdict(before.arguments), asdict(now.arguments)
    for key, value in new.items():
        if old[key] != value:
            raise UserError(
                f"{before.out} holds a study with {_option(key)} {_shown(old[key])}, not {_shown(value)}; "
                "call it with the same arguments to go on with it, or give another --out"
            )
    if before.config != now.config:
        raise UserError(
            f"the recipe {now.arguments.recipe} has changed since the study in {before.out} began; give another --out"
        )


def num_records(path: str | None) -> int:
    """Return how many training records a data set has. Raises UserError if it is not there."""
    if path is None:
        raise UserError("the recipe names no data set; give data.path=DIR, or data.synthetic=true")
    return Manifest.load(_training_split(path)).num_records


def _training_split(path: str | None) -> Path:
    folder = Path(path or "")
    return folder / "train" if (folder / "train").is_dir() else folder


def parse_nodes(text: str) -> tuple[int, ...]:
    """Return the node counts in `1,2,4`, ascending. Raises UserError."""
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"--nodes is {text!r}; expected node counts with commas, such as 1,2,4")
    counts = sorted({int(word) for word in words})
    if len(counts) < len(words):
        raise UserError(f"--nodes is {text!r} and names a count twice; --repeats measures each count several times")
    return tuple(counts)


def _option(key: str) -> str:
    names = {"recipe": "the recipe", "overrides": "the overrides", "walltime": "--time", "how": "its jobs"}
    return names.get(key, "--" + key.replace("_", "-"))


def _shown(value: Any) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(str, value)) or "(none)"
    return "(none)" if value is None else str(value)
