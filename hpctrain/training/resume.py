"""What a run goes on from: its newest good checkpoint, and whether that belongs to a run of the same kind."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hpctrain.config import Config
from hpctrain.errors import UserError
from hpctrain.training.checkpoint import (
    Checkpoint,
    CheckpointError,
    latest_checkpoint,
    list_checkpoints,
    read_checkpoint,
)
from hpctrain.training.run_dir import read_metrics

CLASSES = "checksum of the class names"


def find_checkpoint(run_dir: Path, resume: str) -> tuple[Checkpoint | None, list[str]]:
    """Return the checkpoint to start from (None for a new run) and complaints about damaged ones passed over."""
    if resume == "none":
        if list_checkpoints(run_dir / "checkpoints"):
            raise UserError(
                f"{run_dir} already holds a run with checkpoints; choose another --run-dir, "
                "or --resume auto to continue"
            )
        return None, []
    if resume == "auto" or list_checkpoints(run_dir / "checkpoints"):
        # Where a run began from another one's checkpoint, its own are what it goes on from once it has any.
        checkpoint, complaints = latest_checkpoint(run_dir / "checkpoints")
        if checkpoint is None and complaints:
            raise UserError(
                f"no checkpoint of {run_dir} can be read: {complaints[0]}; to start anew use another --run-dir"
            )
        return checkpoint, complaints
    return load_checkpoint(Path(resume))


def load_checkpoint(path: Path) -> tuple[Checkpoint, list[str]]:
    """Read a checkpoint folder, or the newest good one of a run directory; return it and complaints about newer ones.

    Raises UserError when there is none.
    """
    if not path.exists():
        raise UserError(f"there is no checkpoint or run directory {path}")
    if (path / "state.json").exists():
        return read_checkpoint(path), []
    checkpoint, complaints = latest_checkpoint(path / "checkpoints")
    if checkpoint is None:
        raise CheckpointError(
            complaints[0] if complaints else f"{path} holds no checkpoint; expected a run directory or a step-* folder"
        )
    return checkpoint, complaints


def run_identity(config: Config, num_records: int, num_classes: int, classes_checksum: str) -> dict[str, Any]:
    """What must be the same for a run to go on exactly where a checkpoint left off. "" says nothing of the classes."""
    return {
        "model.name": config.model.name,
        "model.image_size": config.model.image_size,
        "train.global_batch": config.train.global_batch,
        "train.micro_batch": config.train.micro_batch,
        "train.seed": config.train.seed,
        "train.precision": config.train.precision,
        "optimizer.name": config.optimizer.name,
        "optimizer.options.rate (outside with momentum_correction)": _rate_of_buffers(config),
        "data.partitions": config.data.partitions,
        "data.shuffle_block": config.data.shuffle_block,
        "data.augmentation": config.data.augmentation,
        "number of training records": num_records,
        "model.num_classes": num_classes,
        **({CLASSES: classes_checksum} if classes_checksum else {}),
    }


def _rate_of_buffers(config: Config) -> str:
    """Return whether a momentum buffer holds the learning rate: what one holds means something else to the other."""
    options = config.optimizer.options
    return "outside" if options.get("momentum_correction") else str(options.get("rate", "inside"))


def check_identity(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UserError when a checkpoint belongs to a run of another kind. What it does not say is not compared."""
    for key, value in now.items():
        if key in before and before[key] != value:
            raise UserError(
                f"the checkpoint was made with {key} {before.get(key)}, now it is {value}; "
                "set it back, or start a new run in another --run-dir"
            )


def newest_checkpoint(run_dir: Path) -> str:
    """Return the name of the newest checkpoint, empty if there is none."""
    return next((path.name for path in reversed(list_checkpoints(run_dir / "checkpoints"))), "")


def has_evaluation(run_dir: Path, step: int) -> bool:
    """Whether the run has logged an evaluation after this step."""
    path = run_dir / "metrics.jsonl"
    return path.exists() and any(m["kind"] == "eval" and m["step"] == step for m in read_metrics(path))
