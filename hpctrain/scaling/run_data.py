"""What a run directory says: its metrics, configuration and manifest, read tolerantly, and their summary.

A run may have been killed while it wrote, resumed on other nodes, or copied without half of its files; what is there is
read, and what is missing or broken is told in `RunData.notes`.
"""

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hpctrain.errors import UserError
from hpctrain.yaml_file import parse_yaml

Record = dict[str, Any]

# The first steps trace the graph, fill the input pipeline and open connections; they say nothing about speed.
WARM_UP_SHARE = 0.1
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class RunData:
    """A run directory that has been read.

    `records` are the metrics in order of step, each (kind, step) once; `config` is flat, with keys such as
    `train.global_batch`; `manifest` is empty when there is none; `notes` are sentences about what was amiss.
    """

    path: Path
    records: list[Record]
    config: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the run directory."""
        return self.path.resolve().name

    def of_kind(self, kind: str) -> list[Record]:
        """Return the records of one kind, such as `train` or `eval`."""
        return [record for record in self.records if record.get("kind") == kind]

    def series(self, kind: str, x: str, y: str) -> tuple[list[float], list[float]]:
        """Return (x, y) of the records of a kind that have both as numbers."""
        points = [(number(record.get(x)), number(record.get(y))) for record in self.of_kind(kind)]
        present = [(a, b) for a, b in points if a is not None and b is not None]
        return [a for a, _ in present], [b for _, b in present]


def number(value: Any) -> float | None:
    """Return `value` as a float, None if it is not a number (a bool is not). NaN and infinity are numbers."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def parse_metrics(text: str) -> tuple[list[Record], int]:
    """Return the records of a metrics.jsonl text and how many lines are broken.

    A last line that cannot be read was cut by a kill and is not counted.
    """
    records: list[Record] = []
    num_broken = 0
    lines = [line for line in text.split("\n") if line.strip()]
    for position, line in enumerate(lines):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif position < len(lines) - 1:
            num_broken += 1
    return records, num_broken


def read_metrics(path: Path) -> list[Record]:
    """Return the records of a metrics.jsonl file as they were written; lines that cannot be read are left out.

    Raises UserError if the file cannot be read.
    """
    return parse_metrics(_read_metrics_text(path))[0]


def effective_records(records: Iterable[Record]) -> list[Record]:
    """Return the records in order of step, each (kind, step) once.

    A run that was killed and resumed from an earlier checkpoint logs some steps again: the last time counts. Of the
    sessions all `resume` and `end` records are kept.
    """
    latest: dict[tuple[Any, ...], Record] = {}
    for position, record in enumerate(records):
        kind, step = record.get("kind"), number(record.get("step"))
        key = (position,) if step is None or kind in ("resume", "end") else (kind, step)
        latest[key] = record
    return sorted(latest.values(), key=lambda record: number(record.get("step")) or 0.0)


def read_run(run_dir: Path) -> RunData:
    """Read a run directory.

    Raises UserError if it is missing, is not a directory, or holds no metrics. A missing or broken config.yaml or
    manifest.json only gives a note.
    """
    if not run_dir.is_dir():
        raise UserError(
            f"there is no run directory {run_dir}: give the directory that `hpctrain train` wrote (--run-dir)"
        )
    records, num_broken = parse_metrics(_read_metrics_text(run_dir / "metrics.jsonl"))
    if not records:
        raise UserError(f"{run_dir / 'metrics.jsonl'} holds no record: the run ended before its first step was logged")
    notes = []
    if num_broken:
        notes.append(f"metrics.jsonl: {num_broken} broken line{'s' if num_broken > 1 else ''} left out")
    config = _read_mapping(run_dir / "config.yaml", notes)
    manifest = _read_mapping(run_dir / "manifest.json", notes)
    return RunData(run_dir, effective_records(records), _flatten(config), manifest, tuple(notes))


def run_dirs_in(path: Path) -> list[Path]:
    """Return the run directories that a path stands for: itself, or a study's runs that have begun, by node count."""
    runs = [metrics.parent for metrics in path.glob("nodes-*/metrics.jsonl")]
    if not runs or (path / "metrics.jsonl").exists():
        return [path]
    return sorted(runs, key=lambda run: ([int(word) for word in run.name.split("-") if word.isdigit()], run.name))


def summarize(run: Path | RunData) -> dict[str, Any]:
    """Return what a run came to, as plain data; what is not known is None.

    Keys: run, recipe, model, data (text); ranks, threads_per_rank, num_hosts, global_batch, steps, num_sessions (int);
    epochs, train_loss (last logged), eval_loss, top1, top5 (last evaluation, fractions), best_top1, images_per_second
    (median over the logged steps without the warm-up), wall_seconds (training time of the sessions that came to an end;
    num_sessions counts the others too); end (text, of the last session).
    """
    run = run if isinstance(run, RunData) else read_run(run)
    config, manifest = run.config, run.manifest
    ends = run.of_kind("end")
    last_eval = (run.of_kind("eval") or [{}])[-1]
    top1s = [value for value in run.series("eval", "step", "top1")[1] if math.isfinite(value)]
    train_losses = run.series("train", "step", "loss")[1]
    return {
        "run": run.name,
        "recipe": _text(config.get("name")),
        "model": _text(config.get("model.name")),
        "data": "synthetic" if config.get("data.synthetic") is True else _text(config.get("data.path")),
        "ranks": _whole(manifest.get("ranks")),
        "threads_per_rank": _whole(manifest.get("threads_per_rank")),
        "num_hosts": len(manifest["hosts"]) if isinstance(manifest.get("hosts"), list) else None,
        "global_batch": _whole(config.get("train.global_batch")),
        "steps": _whole(_largest(run.records, "step")),
        "epochs": _largest(run.records, "epoch"),
        "train_loss": train_losses[-1] if train_losses else None,
        "eval_loss": number(last_eval.get("loss")),
        "top1": number(last_eval.get("top1")),
        "top5": number(last_eval.get("top5")),
        "best_top1": max(top1s) if top1s else None,
        "images_per_second": steady_images_per_second(run.series("train", "step", "images_per_second")[1]),
        "wall_seconds": _wall_seconds(ends),
        "num_sessions": _num_sessions(run),
        "end": how_it_ended(run),
    }


def _num_sessions(run: RunData) -> int:
    """Each session but a run's first begins with a `resume` record, and each that was not killed ends with an `end`."""
    resumed = len(run.of_kind("resume"))
    has_first = any(record.get("kind") == "train" for record in run.records[:1])
    return max(len(run.of_kind("end")), resumed + has_first)


def how_it_ended(run: RunData) -> str | None:
    """Return the reason that the last session gave for its end; None while it runs, or if it was killed."""
    last = [record for record in run.records if record.get("kind") in ("resume", "train", "end")][-1:]
    return _text(last[0].get("reason")) if last and last[0]["kind"] == "end" else None


def num_warm_up(num_steps: int) -> int:
    """Return how many logged steps at the start are warm-up: the first tenth, and at least two."""
    return max(WARM_UP_STEPS, math.ceil(WARM_UP_SHARE * num_steps))


def steady_images_per_second(rates: list[float]) -> float | None:
    """Return the median rate after the warm-up, None if no logged step is left."""
    steady = rates[num_warm_up(len(rates)) :]
    return statistics.median(steady) if steady else None


def _wall_seconds(ends: list[Record]) -> float | None:
    """Each session logs its own training time at its end; None if none did."""
    seconds = [value for value in (number(end.get("train_seconds")) for end in ends) if value is not None]
    return sum(seconds) if seconds else None


def _largest(records: list[Record], key: str) -> float | None:
    values = [value for value in (number(record.get(key)) for record in records) if value is not None]
    return max(values) if values else None


def _whole(value: Any) -> int | None:
    as_number = number(value)
    return None if as_number is None or not math.isfinite(as_number) else int(as_number)


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _read_metrics_text(path: Path) -> str:
    try:
        # A kill may cut a line within a character.
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise UserError(
            f"{path.parent} holds no metrics.jsonl: give the directory that `hpctrain train` wrote (--run-dir)"
        ) from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its permissions") from None


def _read_mapping(path: Path, notes: list[str]) -> dict[str, Any]:
    """Return the mapping in a YAML or JSON file; what is missing or broken gives an empty one and a note."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else parse_yaml(text)
    except FileNotFoundError:
        notes.append(f"{path.name} is missing")
        return {}
    except (OSError, ValueError, yaml.YAMLError):
        notes.append(f"{path.name} cannot be read")
        return {}
    if not isinstance(content, dict):
        notes.append(f"{path.name} holds no mapping")
        return {}
    return content


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {"train.steps": 3} for {"train": {"steps": 3}}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
