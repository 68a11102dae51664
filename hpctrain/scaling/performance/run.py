"""The time of a whole run: its steps, and what comes between them."""

from dataclasses import dataclass

from hpctrain.data.order import steps_in
from hpctrain.scaling.performance.machine import Machine
from hpctrain.scaling.performance.step import StepTime, Work

_FORWARD_SHARE = 1 / 3  # of a forward and backward pass, which an evaluation saves two thirds of
_CHECKPOINT_COPIES = 2  # weights and momentum


@dataclass(frozen=True)
class RunPlan:
    """How long a run trains and what it does between steps; `evaluation_images` 0 is no evaluation."""

    epochs: float
    images: int
    evaluation_images: int = 0
    evaluation_every_epochs: float = 1.0
    checkpoint_every_steps: int | None = None  # once an epoch
    steps: int | None = None  # stop earlier


@dataclass(frozen=True)
class RunTime:
    """Seconds of a whole run, by what they go to."""

    num_steps: int
    training: float
    evaluation: float
    checkpoint: float
    start: float

    @property
    def total(self) -> float:
        """The run."""
        return self.training + self.evaluation + self.checkpoint + self.start


def run_time(plan: RunPlan, work: Work, machine: Machine, step: StepTime, ranks: int) -> RunTime:
    """Return the time of a run whose steps take `step`.

    Ranks evaluate equal parts of the held-out images, in whole micro-batches, forward only; the slowest decides, as in
    a step. A checkpoint keeps rank 0, and with it all, as long as copying weights and momentum takes; writing the copy
    goes on beside the next steps.
    """
    num_steps = steps_in(plan.epochs, plan.images, work.global_batch)
    num_steps = min(num_steps, plan.steps or num_steps)
    epochs = num_steps * work.global_batch / plan.images
    evaluation = 0.0
    if plan.evaluation_images:
        micro_batches = -(-plan.evaluation_images // (ranks * work.micro_batch))
        once = micro_batches * machine.micro_batch_seconds(work.micro_batch) * _FORWARD_SHARE * machine.slowdown(ranks)
        slowest = 1 + step.straggler / step.compute
        evaluation = max(1, int(epochs / plan.evaluation_every_epochs)) * once * slowest
    every = plan.checkpoint_every_steps or max(1, round(plan.images / work.global_batch))
    copying = _CHECKPOINT_COPIES * work.gradient_bytes / machine.copy_bytes_per_second
    checkpoint = -(-num_steps // every) * copying
    return RunTime(num_steps, num_steps * step.total, evaluation, checkpoint, machine.start_seconds)
