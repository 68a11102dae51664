"""The time of one optimizer step: compute, communication that outlasts it, the slowest rank, input."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.scaling.performance.allreduce import allreduce_seconds, rounds_seconds, scatter_gather
from hpctrain.scaling.performance.architecture import LayerShape
from hpctrain.scaling.performance.layers import Layer, layers_from_arithmetic, layers_from_profile
from hpctrain.scaling.performance.machine import Machine
from hpctrain.scaling.performance.overlap import Communication, communicate
from hpctrain.scaling.performance.straggler import straggler_seconds

_METRIC_BYTES = 12  # loss, accuracy and the vote to stop, float32


@dataclass(frozen=True)
class Work:
    """What a step has to do, apart from where: the model, the batch and how gradients travel.

    `shapes` may be empty where `profile`, the layers of `hpctrain bench step`, is there; one of them has to be.
    """

    shapes: Sequence[LayerShape]
    global_batch: int
    micro_batch: int
    bucket_bytes: float = 4e6
    compressed: bool = False
    overlap: bool = True
    profile: Sequence[dict[str, Any]] = ()

    @property
    def gradient_bytes(self) -> int:
        """Bytes of all gradients."""
        if self.shapes:
            return sum(sum(shape.tensor_bytes) for shape in self.shapes)
        return sum(int(row["gradient_bytes"]) for row in self.profile)

    @property
    def small_bytes(self) -> int:
        """Bytes of batch-norm statistics and metrics, which are reduced in one piece."""
        return _METRIC_BYTES + sum(4 * shape.state for shape in self.shapes)

    def layers(self, machine: Machine) -> list[Layer]:
        """Return the layers with the times that one micro-batch takes on a machine."""
        seconds = machine.micro_batch_seconds(self.micro_batch)
        if self.profile:
            return layers_from_profile(self.profile, seconds, self.shapes)
        return layers_from_arithmetic(self.shapes, seconds - machine.fixed_seconds, machine.fixed_seconds)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by what they go to."""

    compute: float  # forward and backward passes and the update, of a typical rank
    exposed_communication: float
    straggler: float  # wait for the slowest rank
    input: float
    communication: Communication  # all of it, for information

    @property
    def total(self) -> float:
        """The step."""
        return self.compute + self.exposed_communication + self.straggler + self.input


def step_time(work: Work, machine: Machine, ranks: int) -> StepTime:
    """Return the time of a step on `ranks` ranks, each with its equal part of the global batch.

    Only the last micro-batch's backward pass has communication beside it: the gradients of those before are added up
    on the rank first.
    """
    micro_batches = work.global_batch // (ranks * work.micro_batch)
    slowdown = machine.slowdown(ranks)
    layers = work.layers(machine)
    if slowdown != 1.0:
        layers = [Layer(a.tensor_bytes, a.forward_seconds * slowdown, a.backward_seconds * slowdown) for a in layers]
    passes = micro_batches * sum(layer.forward_seconds + layer.backward_seconds for layer in layers)
    compute = passes + machine.update_seconds * slowdown
    input_seconds = micro_batches * work.micro_batch * machine.input_seconds_per_image * slowdown
    if ranks == 1:
        return StepTime(compute, 0.0, 0.0, input_seconds, Communication(0.0, 0.0, 0))

    def allreduce(num_bytes: float) -> float:
        if work.compressed:
            seconds = rounds_seconds(scatter_gather(ranks, num_bytes), ranks, machine.network)
        else:
            seconds = allreduce_seconds(machine.algorithm, ranks, num_bytes, machine.network)
        return machine.message_overhead_seconds + seconds

    # Ranks that share their cores have none left that could send and add while the others compute.
    overlap = work.overlap and machine.shared_cores is None
    communication = communicate(layers, work.small_bytes, work.bucket_bytes, allreduce, overlap)
    waiting = straggler_seconds(compute + input_seconds, machine.straggler_sigma, ranks)
    return StepTime(compute, communication.exposed_seconds, waiting, input_seconds, communication)
