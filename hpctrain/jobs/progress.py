"""How far a run is, from what it has written. Never imports TensorFlow."""

import json
import statistics
from pathlib import Path
from typing import Any

from hpctrain.config import load_config
from hpctrain.data.order import steps_in
from hpctrain.errors import UserError
from hpctrain.scaling.run_data import number, read_metrics

_RECENT_STEPS = 50


def describe_progress(run_dir: Path) -> list[str]:
    """Return lines for people: the last step, speed, time left, last evaluation and how the last session ended."""
    if not (run_dir / "metrics.jsonl").is_file():
        return ["no step has been logged yet"]
    records = read_metrics(run_dir / "metrics.jsonl")
    steps = [record for record in records if record.get("kind") == "train" and number(record.get("step")) is not None]
    if not steps:
        return ["no step has been logged yet"]
    last = steps[-1]
    step, total = int(last["step"]), _total_steps(run_dir)
    recent = steps[-_RECENT_STEPS:]
    text = f"step {step:,}" + (f" of {total:,} ({step / total:.0%})" if total else "")
    text += "".join(
        f", {label} {last[key]:.4g}" for key, label in (("epoch", "epoch"), ("loss", "loss")) if _has(last, key)
    )
    rates = [record["images_per_second"] for record in recent if _has(record, "images_per_second")]
    text += f", {statistics.median(rates):,.1f} images/s" if rates else ""
    seconds = [record["step_seconds"] for record in recent if _has(record, "step_seconds")]
    if total and step < total and seconds:
        text += f", about {_duration((total - step) * statistics.median(seconds))} of training left"
    lines = [text]
    evaluations = [record for record in records if record.get("kind") == "eval" and _has(record, "top1")]
    if evaluations:
        lines.append(f"evaluation at step {evaluations[-1].get('step')}: top-1 {evaluations[-1]['top1']:.2%}")
    if records[-1].get("kind") == "end":
        lines.append(f"the last session ended: {records[-1].get('reason')}")
    return lines


def _has(record: dict[str, Any], key: str) -> bool:
    return number(record.get(key)) is not None


def _total_steps(run_dir: Path) -> int | None:
    """Return the step a run ends after, if its configuration and manifest tell."""
    try:
        config = load_config(run_dir / "config.yaml")
        records = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))["data"]["num_records"]
        total = steps_in(config.train.epochs, int(records), config.train.global_batch)
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return None
    return min(total, config.train.steps or total)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
