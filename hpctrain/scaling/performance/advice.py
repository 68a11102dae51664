"""What binds a step and what would shorten the training, by running the model again with something changed."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hpctrain.scaling.performance.allreduce import ALGORITHMS
from hpctrain.scaling.performance.machine import Machine
from hpctrain.scaling.performance.run import RunPlan, run_time
from hpctrain.scaling.performance.scaled import scaled
from hpctrain.scaling.performance.step import Work, step_time

_WORTH_TELLING = 0.01  # of the training time
_BUCKET_BYTES = (1e6, 4e6, 16e6, 64e6)


@dataclass(frozen=True)
class Advice:
    """A change, and the share of the whole training time that it saves."""

    change: str
    saving: float


def binding_resource(work: Work, machine: Machine, ranks: int) -> str:
    """Return what shortens the step most when it becomes twice as good."""
    changed = {
        "compute": scaled(machine, {"compute": 0.5}),
        "network latency": scaled(machine, {"alpha": 0.5}),
        "network bandwidth": scaled(machine, {"beta": 0.5}),
        "stragglers": scaled(machine, {"straggler_sigma": 0.5}),
        "input": replace(machine, input_seconds_per_image=machine.input_seconds_per_image / 2),
    }
    seconds = {name: step_time(work, other, ranks).total for name, other in changed.items()}
    return min(seconds, key=lambda name: seconds[name])


def advise(plan: RunPlan, work: Work, machine: Machine, ranks: int) -> list[Advice]:
    """Return the changes that save at least a hundredth of the training time on so many ranks, the best first."""

    def total(work: Work, machine: Machine) -> float:
        return run_time(plan, work, machine, step_time(work, machine, ranks), ranks).total

    before = total(work, machine)
    found = [Advice(change, 1 - total(*case) / before) for change, case in _changes(work, machine, ranks)]
    buckets = [each for each in found if each.change.startswith("train.bucket_mb")]
    best_bucket = max(buckets, key=lambda each: each.saving, default=None)
    kept = [each for each in found if each not in buckets or each is best_bucket]
    return sorted((a for a in kept if a.saving >= _WORTH_TELLING), key=lambda a: -a.saving)


def _changes(work: Work, machine: Machine, ranks: int) -> Iterator[tuple[str, tuple[Work, Machine]]]:
    doubled = replace(work, global_batch=2 * work.global_batch)
    yield f"train.global_batch={doubled.global_batch}, if the accuracy holds", (doubled, machine)
    if ranks > 1:
        yield from _communication_changes(work, machine)
    if work.global_batch % (2 * work.micro_batch * ranks) == 0 and machine.fixed_seconds > 0:
        larger = replace(work, micro_batch=2 * work.micro_batch)
        yield f"train.micro_batch={larger.micro_batch}, which changes the batch-norm group", (larger, machine)
    if machine.input_seconds_per_image > 0:
        yield "input that costs nothing", (work, replace(machine, input_seconds_per_image=0.0))


def _communication_changes(work: Work, machine: Machine) -> Iterator[tuple[str, tuple[Work, Machine]]]:
    if not work.compressed and work.overlap:
        yield "train.compression=bf16", (replace(work, compressed=True), machine)
    if not work.overlap:
        overlapping = replace(machine, algorithm="best")
        yield (
            "train.deterministic=false: overlap, and MPI's choice of algorithm",
            (replace(work, overlap=True), overlapping),
        )
    if not work.compressed:
        for name in ALGORITHMS:
            if machine.algorithm not in ("best", name) and work.overlap:
                yield f"another allreduce algorithm of MPI: {name}", (work, replace(machine, algorithm=name))
    for bucket_bytes in _BUCKET_BYTES:
        if bucket_bytes != work.bucket_bytes:
            yield f"train.bucket_mb={bucket_bytes / 1e6:g}", (replace(work, bucket_bytes=bucket_bytes), machine)
