"""What a supervisor knows of the training program: its command line, its progress, what its sizes allow."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from hpctrain.config import Config, load_config
from hpctrain.errors import UserError

_STOP_MARGIN_SECONDS = 120.0
_TAIL_BYTES = 1 << 20  # the last record names all damaged images that were skipped


@dataclass(frozen=True)
class Training:
    """A command `hpctrain train RECIPE [key=value...] --run-dir DIR`, or another program with a --run-dir."""

    command: tuple[str, ...]
    run_dir: Path
    config: Config | None  # None for another program

    @property
    def stop_margin_seconds(self) -> float:
        """How long before the job's end it stops by itself."""
        return self.config.checkpoint.stop_margin_seconds if self.config else _STOP_MARGIN_SECONDS

    def again(self) -> tuple[str, ...]:
        """Return the command that goes on from the newest checkpoint, whatever the first one started from."""
        options, _ = _options(self.command)
        kept = [word for words in options if words[0].partition("=")[0] != "--resume" for word in words]
        return tuple(kept)

    def finished(self) -> bool:
        """Return whether the run directory says that the run is finished; True for another program.

        A launcher's exit code 0 is not enough: Open MPI 5's mpirun ends with it when it loses a node.
        """
        if self.config is None:
            return True
        last = _last_record(self.run_dir / "metrics.jsonl")
        if last.get("kind") == "end":
            return last.get("reason") == "finished"
        # A run that was finished before it was started again has no such record.
        from hpctrain.data.order import steps_in

        try:
            manifest = json.loads((self.run_dir / "manifest.json").read_text(encoding="utf-8"))
            train, records = self.config.train, int(manifest["data"]["num_records"])
        except (OSError, ValueError, KeyError, TypeError):
            return False
        total = steps_in(train.epochs, records, train.global_batch)
        return newest_checkpoint(self.run_dir) >= min(total, train.steps or total)

    def largest_count(self, most: int, least: int, ranks_per_node: int, wanted: int) -> int | None:
        """Return the largest number of nodes from `most` down to `least` over which the run divides, None if none.

        With train.deterministic only a power of two of ranks gives the same bits; a run that began on one stays there.
        """
        exact = self.config is not None and self.config.train.deterministic and _is_power(wanted * ranks_per_node)
        for nodes in range(most, least - 1, -1):
            ranks = nodes * ranks_per_node
            if (not exact or _is_power(ranks)) and self.divides(ranks):
                return nodes
        return None

    def divides(self, ranks: int) -> bool:
        """Whether the global batch divides over so many ranks in whole micro-batches; True if that is not known."""
        if self.config is None:
            return True
        try:
            self.config.micro_batches_a_rank(ranks)
        except UserError:
            return False
        return True


def read_command(command: Sequence[str]) -> Training:
    """Understand the command after `--`, or raise UserError: it needs a --run-dir and a valid configuration."""
    options, position = _options(command)
    run_dir = next(
        (words[-1].partition("=")[2] or words[-1] for words in reversed(options) if _is_run_dir(words)), None
    )
    if run_dir is None or run_dir.startswith("-"):
        raise UserError("the command after -- has no --run-dir DIR; supervise needs it to see how far the run is")
    names = [words[0] for words in options[position:] if not words[0].startswith("-")]
    config = load_config(names[0], names[1:]) if position and names else None
    return Training(tuple(command), Path(run_dir), config)


def newest_checkpoint(run_dir: Path) -> int:
    """Return the step of a run's newest checkpoint, 0 before the first: all that a further launch starts from."""
    names = [path.name.removeprefix("step-") for path in (run_dir / "checkpoints").glob("step-*")]
    return max((int(name) for name in names if name.isdigit()), default=0)


def last_sign_of_life(run_dir: Path) -> float:
    """Return when the run last wrote metrics or a checkpoint, in seconds since the epoch; 0 if never."""
    times = [0.0]
    for path in (run_dir / "metrics.jsonl", run_dir / "checkpoints"):
        try:
            times.append(path.stat().st_mtime)
        except OSError:
            continue
    return max(times)


def _last_record(path: Path) -> dict[str, Any]:
    """The last whole line of a metrics file; empty if there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
            lines = file.read().splitlines(keepends=True)
    except OSError:
        return {}
    for line in reversed(lines):
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            continue
        if isinstance(record, dict):
            return record
    return {}


def _options(command: Sequence[str]) -> tuple[list[tuple[str, ...]], int]:
    """The command's words, options together with their values, and the position after `hpctrain train`, 0 if none.

    Only the two options that take a value are of interest: --run-dir and --resume.
    """
    grouped: list[tuple[str, ...]] = []
    rest = iter(command)
    for word in rest:
        value = next(rest, None) if word in _VALUED else None
        grouped.append((word,) if value is None else (word, value))
    words = [group[0] for group in grouped]
    position = words.index("train") + 1 if "train" in words[1:] else 0
    return grouped, position if position and PurePath(words[position - 2]).name == "hpctrain" else 0


_VALUED = ("--run-dir", "--resume")


def _is_run_dir(words: tuple[str, ...]) -> bool:
    return words[0].partition("=")[0] == "--run-dir"


def _is_power(number: int) -> bool:
    return number & (number - 1) == 0
