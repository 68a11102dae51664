"""Where the time of hpctrain's train step goes: TensorFlow's profiler around some steps, by kind of operation.

Prints a line of JSON: milliseconds a step of each kind, and of the whole step. It is for one thread a process, so that
operations run one after the other and their times add up.
"""

import re
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.hpctrain_step import make_step
from benchmarks.peers.work import parse_work, print_line

# The first that fits, by the operation's type. What runs beside the others (Horovod's) is not part of their sum.
KINDS = {
    "convolutions": r"Conv2D|Winograd|KernelGrad",  # in bfloat16 with the kernels of dense layers
    "matrix products": r"MatMul",
    "batch norm": r"BatchNorm",
    "pooling": r"Pool",
    "update of the weights": r"ResourceApply|AssignVariable|AssignAdd|AssignSub|Momentum|Lars|ApplyGradient",
    "activations and additions": r"Relu|^_?(Mkl|Fused)?Add|BiasAdd|Dropout|SelectV2|GreaterEqual|^Mul$|Softmax",
    "allreduce: copies before and after": r"^Concat|^Split|^Pack$|^Unpack$|^Reshape$|^Cast$|^Bitcast$",
    "check of the gradients": r"^Sum$|IsFinite|L2Loss|^Square",
}
REST, ALL = "other operations", "whole step"
WAITING = "no operation: Python, the allreduce that is waited for"
ASYNCHRONOUS = r"Horovod"
# Operations that only hold others: their time is that of what is inside.
_HOLDERS = r"^(StatefulPartitionedCall|PartitionedCall|If|StatelessIf|While|Case)$"


def kind_of(operation: str) -> str | None:
    """Return what an operation's type counts as; None for one that does not keep the thread."""
    if re.search(_HOLDERS, operation) or re.search(ASYNCHRONOUS, operation):
        return None
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, operation)), REST)


def main() -> None:
    """Take the steps."""
    work = parse_work()
    step, _ = make_step(work)
    import tensorflow as tf

    for _ in range(1 + work.warm_up):
        step()
    folder = tempfile.mkdtemp(prefix="profile-")
    try:
        tf.profiler.experimental.start(folder)
        started = time.perf_counter()
        for _ in range(work.steps):
            step()
        seconds = (time.perf_counter() - started) / work.steps
        tf.profiler.experimental.stop()
        operations = read_operations(Path(folder), work.steps)
    finally:
        shutil.rmtree(folder)
    print_line(**summarize(operations, 1e3 * seconds), operations=dict(operations.most_common(40)))


def summarize(operations: Mapping[str, float], step_ms: float) -> dict[str, Any]:
    """Return milliseconds of each kind and of what is not an operation, which add up to the step."""
    kinds = dict.fromkeys([*KINDS, REST], 0.0)
    for operation, milliseconds in operations.items():
        if kind := kind_of(operation):
            kinds[kind] += milliseconds
    return {"milliseconds": {**kinds, WAITING: max(0.0, step_ms - sum(kinds.values())), ALL: step_ms}}


def read_operations(folder: Path, steps: int) -> Counter[str]:
    """Return milliseconds a step of each type of operation in the profile in a folder."""
    from tensorflow.tsl.profiler.protobuf import xplane_pb2

    space = xplane_pb2.XSpace()
    space.ParseFromString(max(folder.rglob("*.xplane.pb")).read_bytes())
    found: Counter[str] = Counter()
    for plane in space.planes:
        if "CPU" not in plane.name:
            continue
        for line in plane.lines:
            for event in line.events:
                # Operations are called NAME:TYPE, functions of Python $FILE:LINE, those of C++ CLASS::FUNCTION.
                name, _, operation = plane.event_metadata[event.metadata_id].name.rpartition(":")
                if name and not name.startswith("$") and not name.endswith(":") and not operation.startswith(" "):
                    found[operation] += event.duration_ps / 1e9 / steps
    return found


if __name__ == "__main__":
    main()
