"""`hpctrain bench allreduce`: the time of a sum over all ranks, through Horovod as the trainer does it and by raw MPI.

Each repeat is a loop of as many calls as fill some milliseconds, after a barrier; a repeat's time is the slowest rank's
mean over its calls (as OSU's osu_allreduce does), a size's time the median over repeats. For Horovod the loop is inside
of a graph, which takes the time itself: a train step is a graph with many reductions, each of which takes over the
memory of its summand, and that memory is there before.
"""

import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from hpctrain.bench.fit import bus_bandwidth, fit_ring
from hpctrain.errors import UserError
from hpctrain.parallel.world import World

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30}
_WARM_UP_CALLS, _WARM_UP_SECONDS = 3, 1.0  # whichever is done first, but one call at least
_REPEAT_SECONDS = 0.005
_MOST_CALLS = 200
_MOST_SUMS_A_GRAPH = 16  # one after the other, each of the last one's result
_GRAPH_SECONDS = 2.0  # what they should take at most, by the time of raw MPI
_ADDED_BYTES = 16 * 2**20  # larger than a core's own caches, as the gradients of a step are

Timed = Callable[[int], float]  # does so many calls and returns the seconds that they took


def parse_sizes(text: str) -> list[int]:
    """Return the bytes of `4K,64K,1M`, ascending and each once; K, M and G are powers of 1,024."""
    sizes = set()
    for part in map(str.strip, text.split(",")):
        match = re.fullmatch(r"(\d+)([KMG]?)(?:I?B)?", part.upper(), re.ASCII)
        num_bytes = int(match[1]) * _UNITS[match[2]] if match else 0
        if num_bytes == 0 or num_bytes % 4:
            raise UserError(
                f"{part!r} in --sizes is not a message size; expected bytes in multiples of 4, with K, M or G for "
                "powers of 1,024, such as 4K,1M,64M"
            )
        sizes.add(num_bytes)
    return sorted(sizes)


def measure_allreduce(world: World, sizes_bytes: Sequence[int], repeats: int, horovod: bool) -> dict[str, Any]:
    """Measure sums of float32 vectors of these sizes on all ranks; return the same result on every rank.

    Raw MPI comes first, before Horovod starts its thread: that polls MPI all the time. With `horovod` false neither
    Horovod nor TensorFlow is loaded. Raises UserError on a single rank.
    """
    if world.size < 2:
        raise UserError(
            "bench allreduce measures the communication between ranks and this is one alone; "
            "run it as `mpirun -n 2 hpctrain bench allreduce` or with more, or under srun"
        )
    paths = {"mpi": _mpi_calls(world, in_place=False), "mpi_in_place": _mpi_calls(world, in_place=True)}
    times = {path: [_repeat(world, calls(size), repeats) for size in sizes_bytes] for path, calls in paths.items()}
    gamma = _measure_addition(world, repeats)
    if horovod:
        calls = _horovod_calls(world)
        times["horovod"] = []
        for size, raw in zip(sizes_bytes, times["mpi_in_place"], strict=True):
            sums = max(2, min(_MOST_SUMS_A_GRAPH, int(_GRAPH_SECONDS / statistics.median(raw))))
            times["horovod"].append([seconds / sums for seconds in _repeat(world, calls(size, sums), repeats)])
    medians = {path: [statistics.median(repeated) for repeated in of_sizes] for path, of_sizes in times.items()}
    rows = [_row(size, {p: t[i] for p, t in times.items()}, world.size) for i, size in enumerate(sizes_bytes)]
    fit = fit_ring(sizes_bytes, world.size, medians["mpi_in_place"], medians.get("horovod"), gamma)
    return {
        "kind": "allreduce",
        "ranks": world.size,
        "hosts": len({place.host for place in world.places}),
        "mpi": world.mpi_version,
        "repeats": repeats,
        "sizes": rows,
        "fit": {"algorithm": "ring", **asdict(fit)},
    }


def _row(num_bytes: int, times: dict[str, list[float]], ranks: int) -> dict[str, Any]:
    row: dict[str, Any] = {"bytes": num_bytes}
    for path in ("horovod", "mpi", "mpi_in_place"):
        repeated = times.get(path)
        seconds = statistics.median(repeated) if repeated else None
        row[f"{path}_seconds"] = seconds
        row[f"{path}_range_seconds"] = [min(repeated), max(repeated)] if repeated else None
        row[f"{path}_busbw_bytes_per_second"] = bus_bandwidth(num_bytes, seconds, ranks) if seconds else None
    return row


def _repeat(world: World, timed: Timed, repeats: int) -> list[float]:
    """Return the seconds a call takes, one number a repeat: the slowest rank's. The same on every rank."""
    started = time.perf_counter()
    for _ in range(_WARM_UP_CALLS):
        timed(1)
        if world.broadcast(time.perf_counter() - started) > _WARM_UP_SECONDS:
            break
    world.barrier()
    count = world.broadcast(min(_MOST_CALLS, 1 + int(_REPEAT_SECONDS / timed(1))))
    own = []
    for _ in range(repeats):
        world.barrier()
        own.append(timed(count) / count)
    return [max(ranks) for ranks in zip(*world.allgather(own), strict=True)]


def _timed(call: Callable[[], object]) -> Timed:
    def run(count: int) -> float:
        started = time.perf_counter()
        for _ in range(count):
            call()
        return time.perf_counter() - started

    return run


def _mpi_calls(world: World, in_place: bool) -> Callable[[int], Timed]:
    """Return a function of a size that returns the allreduce to time."""
    from mpi4py import MPI

    def make(num_bytes: int) -> Timed:
        summand = np.ones(num_bytes // 4, np.float32)
        total = np.empty_like(summand)
        world.comm.Allreduce(summand, total)
        _check("MPI", total[[0, -1]], world)
        if not in_place:
            return _timed(lambda: world.comm.Allreduce(summand, total))
        total.fill(0.0)  # zeros stay zeros, however often they are added; ones would overflow
        return _timed(lambda: world.comm.Allreduce(MPI.IN_PLACE, total))

    return make


def _horovod_calls(world: World) -> Callable[[int, int], Timed]:
    """The same by the trainer's reducer; a call is a graph of as many sums, one after the other, like a train step."""
    from hpctrain.parallel.quiet import import_tensorflow, without_chatter

    import_tensorflow()
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(world.plan.threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    with without_chatter():
        tf.constant(0)
    from hpctrain.parallel.reduce import Reducer

    reducer = Reducer(world)

    def make(num_bytes: int, sums: int) -> Timed:
        gradient = tf.ones([num_bytes // 4])

        @tf.function
        def once(ones: Any) -> Any:
            return reducer.sum_gradients([ones])[0]

        @tf.function
        def chain(ones: Any) -> Any:
            total = ones - 1.0  # zeros stay zeros
            with tf.control_dependencies([total]):
                meeting = reducer.sum(tf.zeros([1]), "start")  # otherwise the first sum waits for the slowest rank
            with tf.control_dependencies([meeting]):
                started = tf.timestamp()
            with tf.control_dependencies([started]):
                for _ in range(sums):
                    [total] = reducer.sum_gradients([total])
            with tf.control_dependencies([total]):
                seconds = tf.timestamp() - started
            return seconds, total[0]  # what nobody asks for is not computed

        # Traced for this size on purpose: TensorFlow warns of functions that are traced at each call.
        _check("Horovod", once.get_concrete_function(gradient)(gradient).numpy()[[0, -1]], world)
        timed = chain.get_concrete_function(gradient)
        return lambda count: sum(float(timed(gradient)[0]) for _ in range(count))

    return make


def _check(path: str, ends: np.ndarray, world: World) -> None:
    if not np.all(ends == world.size):
        raise RuntimeError(f"the sum of ones over {world.size} ranks came out as {ends} through {path}")


def _measure_addition(world: World, repeats: int) -> float:
    """Return seconds a byte of adding one vector to another in memory by MPI's own kernel, on all ranks at once."""
    from mpi4py import MPI

    summand = np.zeros(_ADDED_BYTES // 4, np.float32)
    summand.fill(0.0)  # np.zeros alone maps every page to the same one
    total = summand.copy()
    repeated = _repeat(world, _timed(lambda: MPI.SUM.Reduce_local(summand, total)), repeats)
    return statistics.median(repeated) / _ADDED_BYTES
