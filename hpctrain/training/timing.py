"""Where the time of a step goes, on every rank: waiting for input, computing, waiting for the others, communicating.

Two clock readings are put into the step's own graph: one as soon as all of a rank's gradients are there (it arrives at
the reduction), one as soon as all sums are there (the reduction is done). With the time the rank has waited for input
they cut its step into three parts that add up to it:

    input    what it waited for the input pipeline
    compute  from the start of the step to its arrival without that wait, and the update after the reduction; what is
             reduced behind the backward pass is hidden in here, and costs nothing but the cores it takes
    reduce   from its arrival until the reduction is done

The reduction ends when the last rank has arrived and the rest of the data has moved. So the rank with the shortest
`reduce` came last, and its `reduce` is the exposed communication of the step; what another rank has more than that, it
has waited for the slowest. Clocks of different hosts are never compared.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hpctrain.parallel.reduce import Reducer
from hpctrain.parallel.world import World

_HOSTS_NAMED = 5
_SLOW_FACTOR = 1.5  # times the usual rank
_STEPS_HELD = 50  # of thousands of ranks, in rank 0's memory


class TimedReducer(Reducer):
    """A Reducer that takes the time of what it reduces. On one rank it adds nothing to the graph.

    `TrainStep` calls `sum_gradients` and then `sum` once a step, which is where the clock is read.
    """

    def __init__(self, world: World, **options: Any) -> None:
        self._sums: list[Any] | None = None  # of the gradients, while the last sum of the step is still to come
        super().__init__(world, **options)
        with tf.device("CPU:0"):
            self._arrived = tf.Variable(0.0, dtype=tf.float64, trainable=False)
            self._done = tf.Variable(0.0, dtype=tf.float64, trainable=False)

    def sum_gradients(self, gradients: Sequence[Any]) -> list[Any]:
        """See Reducer; also notes when the gradients are all there."""
        if self.world.size == 1:
            return super().sum_gradients(gradients)
        self._arrived.assign(self._clock(gradients))
        sums = super().sum_gradients(gradients)
        self._sums = sums
        return sums

    def sum(self, tensor: Any, name: str) -> Any:
        """See Reducer; also notes when this sum and those of the gradients are all there."""
        total = super().sum(tensor, name)
        if self._sums is not None:
            self._done.assign(self._clock([*self._sums, total]))
            self._sums = None
        return total

    @property
    def reduce_seconds(self) -> float:
        """The time between the two readings in the last step; 0 on one rank."""
        return float(self._done.numpy() - self._arrived.numpy())

    def _clock(self, after: Sequence[Any]) -> Any:
        """Return float64[], seconds since the epoch, read as soon as these tensors are there."""
        with tf.control_dependencies(list(after)):
            if self.deterministic:  # where TensorFlow refuses its own clock
                return tf.ensure_shape(tf.numpy_function(lambda: np.float64(time.time()), [], tf.float64), [])
            return tf.timestamp()


class StepTimes:
    """Collects each rank's times of some steps and tells what they mean for the job as a whole."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._steps: list[tuple[float, float, float]] = []

    def add(self, step_seconds: float, input_seconds: float, reduce_seconds: float) -> None:
        """Note this rank's times of one step."""
        compute = max(0.0, step_seconds - input_seconds - reduce_seconds)
        self._steps.append((input_seconds, compute, reduce_seconds))

    @property
    def full(self) -> bool:
        """Whether it is time to collect; the same on every rank."""
        return len(self._steps) >= _STEPS_HELD

    def collect(self) -> dict[str, Any]:
        """Return what the steps since the last call came to; every rank calls it after the same step."""
        own = np.array(self._steps, np.float32)
        self._steps = []
        gathered = self._world.allgather(own.tobytes())
        if not self._world.is_root:
            return {}
        times = np.frombuffer(b"".join(gathered), np.float32).reshape(self._world.size, len(own), 3)
        return breakdown(times.astype(np.float64), [place.host for place in self._world.places])


def breakdown(times: np.ndarray, hosts: Sequence[str]) -> dict[str, Any]:
    """Return the mean step of some steps, and the hosts that took longest.

    `times` is [ranks, steps, 3]: seconds of input, compute and reduce; `hosts` has the host of each rank. Keys: `steps`
    (how many); `input_seconds`, `compute_seconds`, `straggler_seconds`, `exposed_seconds`, means over ranks and steps,
    which add up to the mean step; `slowest_compute_seconds`, of the slowest rank of each step; `hosts`, at most five,
    the slowest first: `host`, `own_seconds` (input and compute of its slowest rank, mean of the steps), `last` (in how
    many steps a rank of it came last); to compare these with, `mean_own_seconds` and `usual_own_seconds` (the median)
    of all ranks.
    """
    wait, compute, reduce = times[..., 0], times[..., 1], times[..., 2]
    exposed = reduce.min(0)
    own = (wait + compute).mean(1)
    slowest: dict[str, float] = {}
    for host, seconds in zip(hosts, own, strict=True):
        slowest[host] = max(slowest.get(host, 0.0), float(seconds))
    last = [hosts[rank] for rank in reduce.argmin(0)] if len(hosts) > 1 else []
    ranking = sorted(slowest, key=lambda host: (-last.count(host), -slowest[host]))[:_HOSTS_NAMED]
    return {
        "steps": times.shape[1],
        "input_seconds": _seconds(wait.mean()),
        "compute_seconds": _seconds(compute.mean()),
        "straggler_seconds": _seconds((reduce - exposed).mean()),
        "exposed_seconds": _seconds(exposed.mean()),
        "slowest_compute_seconds": _seconds(compute.max(0).mean()),
        "hosts": [{"host": h, "own_seconds": _seconds(slowest[h]), "last": last.count(h)} for h in ranking],
        "mean_own_seconds": _seconds(own.mean()),
        "usual_own_seconds": _seconds(np.sort(own)[(len(own) - 1) // 2]),  # of two, the faster
    }


class SlowHosts:
    """Finds hosts that need much longer than the usual one; each is told of once, and again after it has recovered."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def find(self, timing: Mapping[str, Any]) -> list[str]:
        """Return a sentence for each host that has become slow, from what `breakdown` returned."""
        usual = timing["usual_own_seconds"]
        slow = {h["host"]: h["own_seconds"] for h in timing["hosts"] if h["own_seconds"] > _SLOW_FACTOR * usual}
        new = sorted(slow.keys() - self._told)
        self._told = set(slow)
        return [
            f"{host} is slow: {slow[host]:.3g} s a step for its input and computing, usual are {usual:.3g} s; "
            "all others wait for it (`hpctrain doctor` compares hosts)"
            for host in new
        ]


def _seconds(value: float) -> float:
    return round(float(value), 7)  # the clock tells microseconds
