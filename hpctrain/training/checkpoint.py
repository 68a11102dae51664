"""Checkpoints: complete or absent, never half-written; the newest few are kept.

A checkpoint is a folder `step-00001234` with `model.npz` and `optimizer.npz` (plain arrays by variable path, no
pickled code) and `state.json` (step, what the run was, size and checksum of each array file). It is written into
a hidden folder, flushed to disk and renamed. Rank 0 copies the variables and goes on training; a thread writes.
"""

import contextlib
import json
import os
import re
import shutil
import threading
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpctrain.errors import UserError
from hpctrain.training.npz import read_npz

Arrays = dict[str, np.ndarray]
_PREFIX = "step-"


class CheckpointError(UserError):
    """A checkpoint that cannot be read or does not fit the run."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds: arrays by variable path, and the JSON-serializable state of the run."""

    step: int
    model: Arrays
    optimizer: Arrays
    run: Mapping[str, Any]


class CheckpointWriter:
    """Writes the checkpoints of one run directory from a thread of rank 0, and removes old ones."""

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory, self.keep = directory, keep
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint in the background, after the one before is done. Its arrays must not change any more."""
        self.wait()
        self._thread = threading.Thread(target=self._write, args=(checkpoint,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is being written; raise as `check` does."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise what went wrong in the background so far as UserError, without waiting."""
        if self._error is not None:
            error, self._error = self._error, None
            if isinstance(error, OSError):
                raise CheckpointError(
                    f"the checkpoint in {self.directory} could not be written ({error.strerror or error}); "
                    "make room or choose another --run-dir, then start the run again: it resumes from the last one"
                ) from error
            raise error

    def _write(self, checkpoint: Checkpoint) -> None:
        try:
            bad = [name for name, array in [*checkpoint.model.items(), *checkpoint.optimizer.items()] if _is_bad(array)]
            if bad:
                raise CheckpointError(
                    f"{bad[0]} holds NaN or infinite values after step {checkpoint.step}, which is not saved; lower "
                    "optimizer.learning_rate, then start the run again: it resumes from the last checkpoint"
                )
            write_checkpoint(self.directory, checkpoint)
            # Later ones are of a try that this run has turned back from: they are not its newest.
            found = list_checkpoints(self.directory)
            newest = [folder for folder in found if _step_of(folder) <= checkpoint.step][-self.keep :]
            for folder in found:
                if folder not in newest:
                    _remove(folder)
        except BaseException as error:  # raised in the main thread
            self._error = error
            if isinstance(error, OSError):
                _remove_unfinished(self.directory)  # it takes room that the metrics of this run may need


def write_checkpoint(directory: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint below `directory` and return its folder, which appears complete or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"{_PREFIX}{checkpoint.step:08d}"
    temporary = directory / f".{final.name}.tmp"
    _remove_unfinished(directory)  # of a run that was killed
    temporary.mkdir()
    files = {}
    for name, arrays in (("model.npz", checkpoint.model), ("optimizer.npz", checkpoint.optimizer)):
        with open(temporary / name, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        files[name] = {"bytes": (temporary / name).stat().st_size, "crc32": _crc32(temporary / name)}
    state = {"format": "hpctrain-checkpoint", "version": 1, "step": checkpoint.step, "files": files}
    state["run"] = dict(checkpoint.run)
    with open(temporary / "state.json", "w", encoding="utf-8") as text:
        json.dump({**state, "crc32": _crc32_of_state(state)}, text, indent=1)
        text.flush()
        os.fsync(text.fileno())
    _fsync_directory(temporary)
    if final.exists():  # the same step again, after resuming from an earlier one
        _remove(final)
    os.rename(temporary, final)
    _fsync_directory(directory)
    return final


def list_checkpoints(directory: Path) -> list[Path]:
    """Return the checkpoint folders of a run's `checkpoints/`, oldest first."""
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if re.fullmatch(_PREFIX + "[0-9]+", path.name)]
    return sorted(found, key=_step_of)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint and check it, or raise CheckpointError that says what is wrong with it."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state.get("format") != "hpctrain-checkpoint" or state.get("version") != 1:
            raise CheckpointError(f"{folder} is not a checkpoint that this version of hpctrain reads")
        if state.pop("crc32") != _crc32_of_state(state):
            raise CheckpointError(f"{folder / 'state.json'} is damaged: its content does not match its checksum")
        arrays = {}
        for name in ("model.npz", "optimizer.npz"):
            expected = state["files"][name]
            if (folder / name).stat().st_size != expected["bytes"] or _crc32(folder / name) != expected["crc32"]:
                raise CheckpointError(f"{folder / name} is damaged: its size or checksum is not the one written")
            arrays[name] = read_npz(folder / name)
        step, run = state["step"], state["run"]
        if type(step) is not int or step < 0 or not isinstance(run, dict):
            raise CheckpointError(f"{folder / 'state.json'} holds no step and run as hpctrain writes them")
        return Checkpoint(step, arrays["model.npz"], arrays["optimizer.npz"], run)
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{folder} is not a complete checkpoint ({error}); choose another one") from None


def latest_checkpoint(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that reads well (None when there is none), and why newer ones were passed over."""
    complaints: list[str] = []
    for folder in reversed(list_checkpoints(directory)):
        try:
            return read_checkpoint(folder), complaints
        except CheckpointError as error:
            complaints.append(str(error))
    return None, complaints


def variables_to_arrays(variables: Sequence[Any]) -> Arrays:
    """Copy Keras variables into arrays by path; a path that comes twice gets a number, in order."""
    return {name: np.array(variable.value.numpy()) for name, variable in _named(variables)}


def arrays_to_variables(arrays: Arrays, variables: Sequence[Any], what: str) -> None:
    """Set Keras variables from arrays by path. Raises CheckpointError when names or shapes do not match."""
    named = _named(variables)
    missing = [name for name, _ in named if name not in arrays]
    extra = sorted(set(arrays) - {name for name, _ in named})
    if missing or extra:
        raise CheckpointError(
            f"the checkpoint's {what} does not fit: "
            + (f"it lacks {missing[0]}" if missing else f"it has {extra[0]}, which is not there now")
            + f" ({len(missing)} missing, {len(extra)} extra); resume with the configuration the run was started with"
        )
    for name, variable in named:
        if tuple(arrays[name].shape) != tuple(variable.shape):
            raise CheckpointError(
                f"{name} has shape {tuple(arrays[name].shape)} in the checkpoint and {tuple(variable.shape)} in the "
                f"{what}; resume with the configuration the run was started with"
            )
        variable.assign(arrays[name])


def _named(variables: Sequence[Any]) -> list[tuple[str, Any]]:
    seen: dict[str, int] = {}
    named = []
    for variable in variables:
        count = seen[variable.path] = seen.get(variable.path, 0) + 1
        named.append((variable.path if count == 1 else f"{variable.path}#{count}", variable))
    return named


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(_PREFIX))


def _remove(folder: Path) -> None:
    """Remove a checkpoint; a kill in the middle of it leaves nothing that looks like one."""
    hidden = folder.with_name(f".{folder.name}.removed")
    with contextlib.suppress(OSError):
        os.rename(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _remove_unfinished(directory: Path) -> None:
    for leftover in directory.glob(f".{_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _is_bad(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" and not np.isfinite(array).all()


def _crc32_of_state(state: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(state, sort_keys=True).encode())


def _crc32(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _fsync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        pass  # some file systems cannot sync a folder; the rename itself is still atomic
    finally:
        os.close(descriptor)
