"""Which part of the allreduces hides behind the backward pass, bucket by bucket as the trainer sends them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hpctrain.parallel.buckets import assign_buckets
from hpctrain.scaling.performance.layers import Layer


@dataclass(frozen=True)
class Communication:
    """Of one step: time on the wire, how much of it outlasts the backward pass, and the number of messages."""

    total_seconds: float
    exposed_seconds: float
    num_messages: int


def communicate(
    layers: Sequence[Layer],
    small_bytes: int,
    bucket_bytes: float,
    allreduce: Callable[[float], float],
    overlap: bool = True,
) -> Communication:
    """Lay the allreduces of a step beside its last backward pass.

    Gradients go in the buckets of `hpctrain.parallel.buckets`, from the last layer to the first; a bucket starts when
    the last of its gradients is there and the one before it is done. `small_bytes`, batch-norm statistics and metrics,
    are known when the backward pass begins and go first. `allreduce` is the time of one of so many bytes. Without
    `overlap` everything waits for the end of the backward pass.
    """
    ready: list[float] = []  # of each tensor in forward order, counted from the start of the backward pass
    now = 0.0
    for layer in reversed(layers):
        now += layer.backward_seconds
        ready = [now] * len(layer.tensor_bytes) + ready
    backward = now
    sizes = [size for layer in layers for size in layer.tensor_bytes]

    messages = [(0.0, small_bytes)] if small_bytes else []
    for bucket in assign_buckets(sizes, bucket_bytes):
        messages.append((max(ready[i] for i in bucket), sum(sizes[i] for i in bucket)))
    done = 0.0 if overlap else backward
    total = 0.0
    for start, num_bytes in messages:
        seconds = allreduce(num_bytes)
        done = max(done, start) + seconds
        total += seconds
    return Communication(total, max(0.0, done - backward), len(messages))
