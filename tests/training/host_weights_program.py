"""What each rank of test_host_weights.py runs: steps with weights in common or without, and what they come to."""

import argparse
import dataclasses
import hashlib
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
    "sgd-nesterov-outside": {"name": "sgd", "learning_rate": 0.1, "nesterov": True, "rate": "outside"},
    "lars": {"name": "lars", "learning_rate": 2.0, "weight_decay": 0.01},
    "lars-combined": {"name": "lars", "learning_rate": 2.0, "norm": "combined", "exclude_from_trust": None},
}
NOT_IN_COMMON = {"lars-update": {"name": "lars", "learning_rate": 1.0, "rate": "outside", "adapt": "update"}}
BAD_STEP = 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hosts", required=True, help="a letter for each rank, which stands for its host")
    parser.add_argument("--without-memory", action="store_true", help="there is none that ranks could have in common")
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
    if options.without_memory:  # files and memory with a descriptor may not become longer than this
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))

    def make_step(settings: dict) -> GuardedStep:
        keras.backend.clear_session()
        inputs = keras.Input((FEATURES,))
        x = keras.layers.Dense(203, "relu", kernel_initializer=keras.initializers.GlorotUniform(1))(inputs)
        x = keras.layers.BatchNormalization()(x)
        x = keras.layers.Dense(CLASSES, kernel_initializer=keras.initializers.GlorotUniform(2))(x)
        return GuardedStep(keras.Model(inputs, x), make_optimizer(**settings), reducer, micro_batches=2)

    def batches(first: int, bad: bool = False):
        for number in range(first, first + 2):
            random = np.random.default_rng(100 * number + world.rank)
            images = random.standard_normal((MICRO_BATCH, FEATURES)).astype(np.float32)
            if bad:
                images[1, 5] = math.nan
            yield tf.constant(images), tf.constant(random.integers(0, CLASSES, MICRO_BATCH), tf.int32)

    def bits(train_step: GuardedStep) -> str:
        everything = [*train_step.model.variables, *train_step.optimizer.variables]
        return hashlib.sha256(b"".join(v.value.numpy().tobytes() for v in everything)).hexdigest()

    def in_common() -> bool:
        return "memfd:hpctrain" in Path("/proc/self/maps").read_text()

    for name, settings in {**NOT_IN_COMMON, **OPTIMIZERS}.items():
        train_step = make_step(settings)
        for step in range(1, 7):
            before = bits(train_step)
            result = train_step(step, batches(2 * step, bad=step == BAD_STEP and world.rank == 1), 0.05 * step)
            own_is_bad = not math.isfinite(train_step.own_loss)
            changed = bits(train_step) != before
            if step == BAD_STEP:
                assert not math.isfinite(result.loss) and not changed and own_is_bad == (world.rank == 1)
            else:
                assert math.isfinite(result.loss) and changed and not own_is_bad
            # Nobody goes on to change what others still look at.
            assert len(set(world.allgather(bits(train_step)))) == 1, f"step {step} of {name}: ranks have other weights"
        has_neighbor = options.hosts.count(world.host) > 1
        assert in_common() == (name in OPTIMIZERS and not options.without_memory and has_neighbor), name
        if world.is_root:
            print(f"{name} {bits(train_step)}")
    weight = train_step.weights[0].value
    if world.rank == 1:  # whoever assigns to a variable changes its own
        weight.assign(weight + 1e-3)
    for step in (7, 8):
        train_step(step, batches(2 * step), 0.1)
    different = world.allgather(bits(train_step))
    assert len(set(different)) == 2 and different[0] != different[1]
    if world.is_root:
        print(f"assigned {'-'.join(different)}")
    world.barrier()
    if world.is_root:
        print("all steps are right")


if __name__ == "__main__":
    main()
