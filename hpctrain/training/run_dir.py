"""What a run leaves behind: config.yaml, manifest.json, metrics.jsonl, checkpoints/, tensorboard/. Rank 0 writes it."""

import contextlib
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hpctrain import __version__
from hpctrain.config import Config
from hpctrain.data.atomic import write_file
from hpctrain.environment import shown_environment
from hpctrain.errors import UserError
from hpctrain.parallel.world import World

_PACKAGES = ("tensorflow-cpu", "tensorflow", "keras", "horovod", "mpi4py", "h5py", "numpy")
# What explains how a run went. Everything else in the environment is left out, and with it every secret.
_ENVIRONMENT: tuple[str, ...] = (
    "OMPI_MCA_",
    "PRTE_MCA_",
    "I_MPI_",
    "MPIR_CVAR_",
    "FI_",
    "HOROVOD_",
    "OMP_",
    "KMP_",
    "TF_",
    "HPCTRAIN_",
)
_ENVIRONMENT += ("SLURM_JOB_ID", "SLURM_JOB_NAME", "SLURM_JOB_NUM_NODES", "SLURM_RESTART_COUNT", "PBS_JOBID")


def new_run_dir(name: str) -> Path:
    """Return a run directory's path that is not taken: runs/NAME-TIMESTAMP."""
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):
        path = Path("runs") / f"{name}-{stamp}{suffix}"
        if not path.exists():
            return path
    raise UserError(f"runs/{name}-{stamp} and 998 more exist already; give --run-dir")


def prepare_run_dir(path: Path, config: Config, world: World, reader_facts: Mapping[str, Any]) -> None:
    """Make the run directory and write config.yaml and manifest.json into it, or raise UserError."""
    try:
        (path / "checkpoints").mkdir(parents=True, exist_ok=True)
        resolved = config.model_copy(deep=True)
        if resolved.data.path is not None:  # so that config.yaml works from any folder
            resolved.data.path = os.path.abspath(resolved.data.path)
        write_file(path / "config.yaml", resolved.to_yaml().encode())
        manifest = _manifest(path, config, world, reader_facts)
        write_file(path / "manifest.json", (json.dumps(manifest, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(
            f"the run directory {path} cannot be written ({error.strerror or error}); choose another --run-dir"
        ) from None


def _manifest(path: Path, config: Config, world: World, data: Mapping[str, Any]) -> dict[str, Any]:
    earlier: list[Any] = []
    with contextlib.suppress(OSError, ValueError, KeyError):
        before = json.loads((path / "manifest.json").read_text())
        earlier = [*before.get("earlier_starts", []), {k: before[k] for k in ("started", "ranks", "hosts")}]
    hosts: dict[str, dict[str, Any]] = {}
    for rank, (place, plan) in enumerate(zip(world.places, world.plans, strict=True)):
        entry = hosts.setdefault(place.host, {"host": place.host, "ranks": [], "threads": plan.threads})
        entry["ranks"].append(rank)
    versions = {"hpctrain": __version__, "python": platform.python_version(), "mpi": world.mpi_version}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "ranks": world.size,
        "threads_per_rank": world.plan.threads,
        "hosts": list(hosts.values()),
        "placement": world.plan.note,
        "data": dict(data),
        "versions": versions,
        "git_commit": _git_commit(),
        "platform": platform.platform(),
        "environment": shown_environment(os.environ, _ENVIRONMENT),
        "earlier_starts": earlier,
    }


def _git_commit() -> str | None:
    """Return the commit of the source tree this package runs from, if it is one."""
    folder = Path(__file__).parents[2]
    if not (folder / ".git").exists():
        return None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    return None


class MetricsLog:
    """Appends to metrics.jsonl (and TensorBoard's event files), one JSON object a line."""

    def __init__(self, run_dir: Path, *, from_step: int, tensorboard: bool) -> None:
        """Open the log of a run that continues after step `from_step`; what an earlier try wrote beyond it goes."""
        self._path = run_dir / "metrics.jsonl"
        try:
            if self._path.exists():
                _drop_later(self._path, from_step)
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115 - open as long as the run
        except OSError as error:
            raise self._mistake(error) from None
        self._flushed = time.monotonic()
        self._tensorboard = None
        if tensorboard:
            import tensorflow as tf

            self._tensorboard = tf.summary.create_file_writer(str(run_dir / "tensorboard"))

    def write(self, kind: str, step: int, values: Mapping[str, Any], *, tensorboard: bool = False) -> None:
        """Append one line, and its numbers to TensorBoard where wanted. On disk within a second or so.

        JSON has no NaN and no infinity: such values are written as null, and `nonfinite` names their keys. Raises
        UserError when the file cannot be written.
        """
        record = {"kind": kind, "step": step, **{name: _finite(value) for name, value in values.items()}}
        bad = [name for name, value in values.items() if record[name] != value]
        if bad:
            record["nonfinite"] = bad
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
        except OSError as error:
            raise self._mistake(error) from None
        if tensorboard and self._tensorboard is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    _write_scalar(self._tensorboard, f"{kind}/{name}", value, step)
        if kind != "train" or time.monotonic() - self._flushed > 1.0:
            self.flush()

    def flush(self) -> None:
        """Hand everything written so far to the file system."""
        try:
            self._file.flush()
        except OSError as error:
            raise self._mistake(error) from None
        self._flushed = time.monotonic()
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        """Flush and close the files."""
        self.flush()
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def _mistake(self, error: OSError) -> UserError:
        return UserError(
            f"{self._path} could not be written ({error.strerror or error}); make room or choose another --run-dir, "
            "then start the run again: it resumes from its last checkpoint"
        )


def _finite(value: Any) -> Any:
    """The value with None for every NaN and infinity in it."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_scalar(writer: Any, tag: str, value: float, step: int) -> None:
    """What tf.summary.scalar does, which has moved to the tensorboard package; that is not needed to write."""
    import tensorflow as tf

    metadata = tf.compat.v1.SummaryMetadata(
        plugin_data=tf.compat.v1.SummaryMetadata.PluginData(plugin_name="scalars"),
        data_class=1,  # DATA_CLASS_SCALAR
    )
    with writer.as_default():
        tf.summary.write(tag, tf.constant(value, tf.float32), step=step, metadata=metadata)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl that are whole; a kill may have cut the last one."""
    lines = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
    return lines


def last_losses(run_dir: Path, step: int, count: int = 50) -> list[float | None]:
    """Return the losses of the last `count` training steps up to `step` that a run has logged, None for NaN."""
    path = run_dir / "metrics.jsonl"
    if step == 0 or not path.exists():
        return []
    return [line["loss"] for line in read_metrics(path) if line["kind"] == "train" and line["step"] <= step][-count:]


def _drop_later(path: Path, step: int) -> None:
    kept = [line for line in read_metrics(path) if line.get("step", 0) <= step]
    write_file(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
