"""What a scaling study measured at one node count: the input of `fit`."""

import statistics
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """Step times of one run, warm-up left out.

    `step_seconds` are the times of whole optimizer steps as the training loop logs them, in order; every rank has
    waited for the slowest in each. `global_batch` is the images of a step over all ranks: with it weak and strong
    scaling need no distinction. `input_seconds`, one value for each step, is what a step waited for its images and is
    part of `step_seconds`; empty when it was not recorded.
    """

    nodes: int
    ranks: int
    global_batch: int
    step_seconds: list[float]
    input_seconds: list[float] = field(default_factory=list)
    run: str = ""  # where it comes from, for messages and tables

    @property
    def median_step_seconds(self) -> float:
        """The typical step."""
        return statistics.median(self.step_seconds)

    @property
    def median_input_seconds(self) -> float:
        """What a typical step waited for its images; 0 when it was not recorded."""
        return statistics.median(self.input_seconds) if self.input_seconds else 0.0

    @property
    def ranks_per_node(self) -> int:
        """Ranks on each node."""
        return self.ranks // self.nodes

    def to_json(self) -> dict[str, Any]:
        """Return the measurement as plain data that `from_json` reads back."""
        return {
            "nodes": self.nodes,
            "ranks": self.ranks,
            "global_batch": self.global_batch,
            "step_seconds": self.step_seconds,
            "input_seconds": self.input_seconds,
            "run": self.run,
        }

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Measurement":
        """Return the measurement in what `to_json` returned."""
        return Measurement(**values)
