"""What each rank of test_host_weights.py runs: steps with weights in common or without, and what they come to."""

import argparse
import dataclasses
import math
import resource
from pathlib import Path

import numpy as np

from hpctrain.parallel.launch import set_environment
from hpctrain.parallel.quiet import import_tensorflow
from hpctrain.parallel.world import start

CLASSES, MICRO_BATCH, FEATURES = 7, 4, 301
OPTIMIZERS = {
    "sgd": {"name": "sgd", "learning_rate": 0.1},
    "sgd-clipped": {"name": "sgd", "learning_rate": 0.1, "clipnorm": 0.2},
    "sgd-nesterov-outside": {"name": "sgd", "learning_rate": 0.1, "nesterov": True, "rate": "outside"},
    "lars": {"name": "lars", "learning_rate": 2.0, "weight_decay": 0.01},
    "lars-clipped": {"name": "lars", "learning_rate": 2.0, "clip": True, "decay_in_update": False},
    "lars-combined": {"name": "lars", "learning_rate": 2.0, "norm": "combined", "exclude_from_trust": None},
}
NOT_IN_COMMON = {"lars-update": {"name": "lars", "learning_rate": 1.0, "rate": "outside", "adapt": "update"}}
BAD_STEP = 4
BEFORE_ASSIGNING = 6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hosts", required=True, help="a letter for each rank, which stands for its host")
    parser.add_argument("--without-memory", action="store_true", help="there is none that ranks could have in common")
    parser.add_argument("--out", type=Path, required=True, help="folder for <optimizer>-<rank>.npz")
    parser.add_argument("--with-sums", action="store_true", help="but Horovod's sums have theirs")
    parser.add_argument("--bucket-bytes", type=float, default=4e6)
    options = parser.parse_args()
    set_environment(deterministic=False)
    world = start(threads=1)
    hosts = zip(world.places, options.hosts, strict=True)
    places = tuple(dataclasses.replace(place, host=host) for place, host in hosts)
    world = dataclasses.replace(world, host=places[world.rank].host, places=places)
    import_tensorflow()
    import keras
    import tensorflow as tf

    from hpctrain.optim.factory import make_optimizer
    from hpctrain.parallel.reduce import Reducer
    from hpctrain.training.bad_steps import GuardedStep

    reducer = Reducer(world, bucket_bytes=options.bucket_bytes)
    if options.with_sums:
        reducer.sum(tf.zeros(10_000), "first")
    _, unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if options.without_memory:  # files and memory with a descriptor may not become longer than this
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, unlimited))

    def make_step(settings: dict) -> GuardedStep:
        keras.backend.clear_session()
        inputs = keras.Input((FEATURES,))
        x = keras.layers.Dense(203, "relu", kernel_initializer=keras.initializers.GlorotUniform(1))(inputs)
        x = keras.layers.BatchNormalization()(x)
        x = keras.layers.Dense(CLASSES, kernel_initializer=keras.initializers.GlorotUniform(2))(x)
        optimizer = make_optimizer(**{key: value for key, value in settings.items() if key != "clipnorm"})
        optimizer.clipnorm = settings.get("clipnorm")
        return GuardedStep(keras.Model(inputs, x), optimizer, reducer, micro_batches=2)

    def batches(first: int, bad: bool = False):
        for number in range(first, first + 2):
            random = np.random.default_rng(100 * number + world.rank)
            images = random.standard_normal((MICRO_BATCH, FEATURES)).astype(np.float32)
            if bad:
                images[1, 5] = math.nan
            yield tf.constant(images), tf.constant(random.integers(0, CLASSES, MICRO_BATCH), tf.int32)

    def everything(train_step: GuardedStep) -> list[np.ndarray]:
        return [v.value.numpy() for v in [*train_step.model.variables, *train_step.optimizer.variables]]

    def bits(train_step: GuardedStep) -> bytes:
        return b"".join(array.tobytes() for array in everything(train_step))

    def in_common() -> bool:
        return "memfd:hpctrain" in Path("/proc/self/maps").read_text()

    found = {}
    for name, settings in {**NOT_IN_COMMON, **OPTIMIZERS}.items():
        train_step = make_step(settings)
        for step in range(1, BEFORE_ASSIGNING + 1):
            before = bits(train_step)
            train_step.norms.want(step in (3, BAD_STEP))
            result = train_step(step, batches(2 * step, bad=step == BAD_STEP and world.rank == 1), 0.05 * step)
            own_is_bad = not math.isfinite(train_step.own_loss)
            changed = bits(train_step) != before
            if step == 3:
                norms = train_step.norms.norms()
            if step == BAD_STEP:
                assert not math.isfinite(result.loss) and not changed and own_is_bad == (world.rank == 1)
            else:
                assert math.isfinite(result.loss) and changed and not own_is_bad, (name, step, result, changed)
            # Nobody goes on to change what others still look at.
            assert len(set(world.allgather(bits(train_step)))) == 1, f"step {step} of {name}: ranks have other weights"
        has_neighbor = options.hosts.count(world.host) > 1
        assert in_common() == (name in OPTIMIZERS and not options.without_memory and has_neighbor), name
        on_one_host = has_neighbor and len(set(options.hosts)) == 1
        adds_up = train_step._host is not None and train_step._host.adds_up
        assert adds_up == (in_common() and on_one_host and "clipnorm" not in settings), name
        common = everything(train_step)
        weight = train_step.weights[0].value
        if world.rank == 1:  # whoever assigns to a variable changes its own
            weight.assign(weight + 1e-3)
        for step in range(BEFORE_ASSIGNING + 1, BEFORE_ASSIGNING + 4):
            train_step.norms.want(step == BEFORE_ASSIGNING + 3)
            train_step(step, batches(2 * step), 0.1)
        assert len(set(world.allgather(bits(train_step)))) == 2
        found[name] = [*common, *everything(train_step), norms, train_step.norms.norms()]
    resource.setrlimit(resource.RLIMIT_FSIZE, (unlimited, unlimited))
    for name, arrays in found.items():
        np.savez(options.out / f"{name}-{world.rank}.npz", *arrays)
    world.barrier()
    if world.is_root:
        print("all steps are right")


if __name__ == "__main__":
    main()
