"""`hpctrain bench step`: what a train step of a recipe costs a rank, and where the time goes.

The parts are measured in turn, round by round, so that a machine that slows down slows all of them. Every rank does the
same at the same time; with several, a figure is the median over ranks.
"""

import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from hpctrain import processor
from hpctrain.bench.input import batches_per_second
from hpctrain.bench.layers import LayerTime, profile_layers, scale_to
from hpctrain.config import Config
from hpctrain.data.synthetic import synthetic_batches
from hpctrain.models.flops import describe
from hpctrain.models.products import product_dtype
from hpctrain.parallel.reduce import Reducer
from hpctrain.parallel.world import World, alone
from hpctrain.training import session
from hpctrain.training.bad_steps import GuardedStep
from hpctrain.training.dataset import DataSet

_WARM_UP_ROUNDS = 2
_RATE = 1e-6  # keeps the weights where they are: what is timed must not turn into NaN
_INPUT_SECONDS = 2.0
_MATRIX_SIZE, _MATRIX_REPEATS = 2048, 10
_TRAINING_TO_FORWARD = 3  # the backward pass multiplies twice: once for the inputs, once for the weights

Call = Callable[[], object]
Times = dict[str, list[float]]


def measure_step(
    config: Config,
    world: World,
    data: DataSet,
    *,
    steps: int = 10,
    with_allreduce: bool = False,
    profile_seconds: float | None = 20.0,
) -> dict[str, Any]:
    """Measure `steps` steps of one micro-batch on each rank, and return the same result on every rank.

    To be called before TensorFlow runs anything. The batches are made up and in memory; the input pipeline is measured
    by itself if `data` has training records. `profile_seconds` None leaves the profile of the layers out.
    """
    session.configure_tensorflow(config, world)
    model = session.build_model(config, data.num_classes)
    batches = synthetic_batches(
        micro_batch=config.train.micro_batch,
        image_size=config.model.image_size,
        num_classes=data.num_classes,
        seed=config.train.seed,
    )
    own: dict[str, Any] = {"times": _measure(world, _parts(config, model, world, batches), steps)}
    own["peak_flops"] = _peak_flops(config.train.precision)
    own["input_seconds"] = None if data.train is None else _input_seconds(config, world, data)
    layers: list[LayerTime] = []
    if profile_seconds is not None:
        layers = profile_layers(model, config.train.micro_batch, profile_seconds)
    own["layers"] = layers
    if with_allreduce:
        # Last, because Horovod's thread is there from then on; one right after the other, to be compared.
        for name, reduced_over in (("lone_step", alone(world.plan.threads)), ("allreduce_step", world)):
            step = _train_step(config, model, reduced_over)
            own["times"] |= _measure(world, {name: _step_call(step, batches)}, steps)
    forward_flops = describe(model)["flops_per_image"]
    flops = None if forward_flops is None else float(_TRAINING_TO_FORWARD * forward_flops)
    return _summary(config, world, flops, world.allgather(own))


def _train_step(config: Config, model: keras.Model, world: World) -> GuardedStep:
    """The trainer's step, over all ranks of `world`."""
    reducer = Reducer(
        world,
        bucket_bytes=config.train.bucket_mb * 1e6,
        compression=config.train.compression,
        deterministic=config.train.deterministic,
    )
    return GuardedStep(
        model,
        session.build_optimizer(config),
        reducer,
        micro_batches=1,
        label_smoothing=config.train.label_smoothing,
        seed=config.train.seed,
        deterministic=config.train.deterministic,
    )


def _step_call(step: GuardedStep, batches: Iterator[Any]) -> Call:
    numbers = itertools.count(1)
    return lambda: step(next(numbers), batches, _RATE)


def _parts(config: Config, model: keras.Model, world: World, batches: Iterator[Any]) -> dict[str, Call]:
    """Return what is timed: the trainer's step on one rank, its two halves, and the loop to compare it with."""
    step = _train_step(config, model, alone(world.plan.threads))
    number, rate, no_vote = tf.constant(0, tf.int64), tf.constant(_RATE), tf.constant([0.0])
    images, labels = next(batches)
    payload = [*step.forward_backward(images, labels, number), no_vote]
    bare = _bare_keras_step(model)
    return {
        "step": _step_call(step, batches),
        "forward_backward": lambda: step.forward_backward(*next(batches), number),
        "update": lambda: step.update(payload, rate).numpy(),
        "bare_keras_step": lambda: bare(*next(batches)).numpy(),
    }


def _bare_keras_step(model: keras.Model) -> Callable[[Any, Any], Any]:
    """The shortest training loop one would write around the same model: a tape and Keras' SGD with momentum."""
    loss_of = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.SGD(_RATE, momentum=0.9)
    weights = model.trainable_variables
    optimizer.build(weights)

    @tf.function
    def step(images: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(images, training=True))
        optimizer.apply(tape.gradient(loss, [weight.value for weight in weights]), weights)
        return loss

    return step


def _measure(world: World, parts: dict[str, Call], rounds: int) -> Times:
    """Return this rank's seconds of each part in each round."""
    times: Times = {name: [] for name in parts}
    for done in range(-_WARM_UP_ROUNDS, rounds):
        world.barrier()  # ranks that share a host's memory are to be slow together, as in a job
        for name, call in parts.items():
            started = time.perf_counter()
            call()
            if done >= 0:
                times[name].append(time.perf_counter() - started)
    return times


def _peak_flops(precision: str) -> float:
    """Return the most floating-point operations a second that a product of two square matrices reached."""
    kind = product_dtype(tf.bfloat16 if precision == "mixed_bfloat16" else tf.float32)
    matrix = tf.cast(tf.random.normal([_MATRIX_SIZE, _MATRIX_SIZE]), kind)
    multiply = tf.function(tf.matmul)
    times = []
    for _ in range(_MATRIX_REPEATS):
        started = time.perf_counter()
        multiply(matrix, matrix)
        times.append(time.perf_counter() - started)
    return 2 * _MATRIX_SIZE**3 / min(times)


def _input_seconds(config: Config, world: World, data: DataSet) -> float:
    """Return how long the input pipeline takes for a micro-batch when nothing is behind it."""
    batches, _ = session.training_batches(
        config, data, world, first_step=1, last_step=sys.maxsize, threads=world.plan.threads
    )
    for _ in itertools.islice(batches, _WARM_UP_ROUNDS):
        pass
    return 1 / batches_per_second(batches, _INPUT_SECONDS)


def _summary(config: Config, world: World, flops: float | None, ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the figures of all ranks together."""

    def all_rounds(name: str) -> list[float]:
        return [statistics.median(values) for values in zip(*(own["times"][name] for own in ranks), strict=True)]

    def seconds(name: str) -> float:
        return statistics.median(all_rounds(name))

    def middle(name: str) -> float:
        return statistics.median(own[name] for own in ranks)

    step_seconds, forward_backward_seconds = seconds("step"), seconds("forward_backward")
    micro_batch = config.train.micro_batch
    layers, factor = scale_to(_median_layers([own["layers"] for own in ranks]), forward_backward_seconds)
    of_ranks = [statistics.median(own["times"]["step"]) for own in ranks]
    slowest = max(range(len(ranks)), key=lambda rank: of_ranks[rank])
    peak = middle("peak_flops")
    result = {
        "kind": "step",
        "model": config.model.name,
        "image_size": config.model.image_size,
        "precision": config.train.precision,
        "micro_batch": micro_batch,
        "threads": world.plan.threads,
        "ranks": world.size,
        "host": world.host,
        "cpu": processor.name(),
        "step_seconds": step_seconds,
        "step_seconds_all": all_rounds("step"),
        "images_per_second": micro_batch / step_seconds,
        "forward_backward_seconds": forward_backward_seconds,
        "update_seconds": seconds("update"),
        "input_seconds": None if ranks[0]["input_seconds"] is None else middle("input_seconds"),
        "bare_keras_step_seconds": seconds("bare_keras_step"),
        "framework_overhead": step_seconds / seconds("bare_keras_step"),
        "flops_per_image": flops,
        "peak_flops": peak,
        "peak_share": None if flops is None else flops * micro_batch / step_seconds / peak,
        "slowest_rank": {"rank": slowest, "host": world.places[slowest].host, "step_seconds": of_ranks[slowest]},
        "layers": [dataclasses.asdict(layer) for layer in layers],
        "layer_scale": factor,
    }
    if "allreduce_step" in ranks[0]["times"]:
        result["allreduce_step_seconds"] = seconds("allreduce_step")
        result["allreduce_step_seconds_all"] = all_rounds("allreduce_step")
        result["parallel_efficiency"] = seconds("lone_step") / seconds("allreduce_step")
    return result


def _median_layers(profiles: list[list[LayerTime]]) -> list[LayerTime]:
    """Return the profile whose times are the medians over ranks; a layer too fast for some rank took it no time."""
    of_ranks = [{layer.name: layer for layer in profile} for profile in profiles]
    names = list(dict.fromkeys(layer.name for profile in profiles for layer in profile))
    result = []
    for name in names:
        found = [layers[name] for layers in of_ranks if name in layers]
        missing = [0.0] * (len(profiles) - len(found))
        forward = statistics.median([*(layer.forward_seconds for layer in found), *missing])
        backward = statistics.median([*(layer.backward_seconds for layer in found), *missing])
        result.append(dataclasses.replace(found[0], forward_seconds=forward, backward_seconds=backward))
    return result
