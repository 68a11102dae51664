"""Reading calibration files: what `hpctrain bench step`, `bench allreduce` and `study report` have measured."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpctrain.errors import UserError

_EXPECTED = "what `hpctrain bench step --json`, `bench allreduce --json` or `study report` write, or several of them"


@dataclass(frozen=True)
class Calibration:
    """Measured parts of the model's parameters; what is empty or None comes from the site's profile."""

    source: str = ""
    steps: list[dict[str, Any]] = field(default_factory=list)
    allreduce: dict[str, Any] | None = None
    straggler_sigma: float | None = None
    start_seconds: float | None = None
    fitted: dict[str, Any] | None = None


def load_calibration(path: Path) -> Calibration:
    """Read a JSON file that holds one of the measured objects, a list of them, or {"step": ..., "allreduce": ...}.

    Raises UserError for a file that cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the calibration {path} cannot be read ({error.strerror}); give {_EXPECTED}") from None
    except ValueError:
        raise UserError(f"the calibration {path} is not JSON; give {_EXPECTED}") from None
    return parse_calibration(content, str(path))


def parse_calibration(content: Any, source: str = "calibration") -> Calibration:
    """Return the calibration in what a file held. Raises UserError."""
    steps: list[dict[str, Any]] = []
    rest: dict[str, Any] = {}
    for item in content if isinstance(content, list) else [content]:
        if not isinstance(item, dict):
            raise UserError(f"{source} holds a {type(item).__name__} where an object was expected; give {_EXPECTED}")
        if item.get("kind") == "step":
            steps.append(item)
        elif item.get("kind") == "allreduce":
            rest["allreduce"] = item
        elif item.keys() & {"step", "allreduce", "straggler_sigma", "start_seconds", "fitted"}:
            inner = item.get("step")
            steps += inner if isinstance(inner, list) else [inner] if inner else []
            rest |= {key: value for key, value in item.items() if key != "step"}
        else:
            raise UserError(f"{source} holds an object that is no measurement; give {_EXPECTED}")
    for step in steps:
        for key in ("micro_batch", "forward_backward_seconds"):
            _check(step.get(key) if isinstance(step, dict) else None, f"{source}: step.{key}")
    if rest.get("allreduce"):
        fit = rest["allreduce"].get("fit")
        if not isinstance(fit, dict):
            raise UserError(f"{source}: allreduce.fit is missing; it takes at least two ranks to measure an allreduce")
        for key in ("alpha_seconds", "beta_seconds_per_byte", "gamma_seconds_per_byte"):
            _check(fit.get(key), f"{source}: allreduce.fit.{key}", zero_is_fine=True)
    for key in ("straggler_sigma", "start_seconds"):
        if rest.get(key) is not None:
            _check(rest[key], f"{source}: {key}", zero_is_fine=True)
    fitted = rest.get("fitted")
    if fitted is not None and not isinstance(fitted, dict):
        raise UserError(f"{source}: fitted is {fitted!r}, expected what `hpctrain study report` writes there")
    return Calibration(
        source,
        steps,
        rest.get("allreduce"),
        rest.get("straggler_sigma"),
        rest.get("start_seconds"),
        fitted,
    )


def _check(value: Any, name: str, zero_is_fine: bool = False) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
    if not good or (value == 0 and not zero_is_fine):
        raise UserError(f"{name} is {value!r}, expected a number above 0; measure it again")


def line_through(steps: list[dict[str, Any]]) -> tuple[float, float]:
    """Return (fixed_seconds, seconds_per_image) of a micro-batch, by least squares through steps of several sizes.

    From one size alone the fixed part cannot be told, and is 0 unless the step names it. Neither is ever negative.
    """
    points = [(float(s["micro_batch"]), float(s["forward_backward_seconds"])) for s in steps]
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    through_origin = sum(x * y for x, y in points) / sum(x * x for x, _ in points)
    if spread == 0:
        fixed = float(steps[0].get("fixed_seconds") or 0.0)
        return fixed, (mean_y - fixed) / mean_x
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread
    fixed = mean_y - slope * mean_x
    return (fixed, slope) if fixed > 0 and slope > 0 else (0.0, through_origin)
