#!/usr/bin/env python3
"""What an update by LARS costs beside Keras' own SGD with momentum, on the tensors of ResNet-50 and AlexNet.

Both run in turn in one process on one thread; printed are medians in milliseconds and their ratio. The goal is 1.25.
"""

import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf

from hpctrain.models import build
from hpctrain.optim import LARS

ROUNDS = 20


def step_of(optimizer: keras.optimizers.Optimizer, shapes: list[tuple[int, ...]]) -> Callable[[], object]:
    """Return a compiled update of variables of these shapes by fixed gradients."""
    random = np.random.default_rng(0)
    variables = [keras.Variable(random.standard_normal(shape, np.float32) * 0.05) for shape in shapes]
    gradients = [tf.constant(random.standard_normal(shape, np.float32) * 0.01) for shape in shapes]
    optimizer.build(variables)
    return tf.function(lambda: optimizer.apply(gradients, variables))


def main() -> None:
    """Measure and print."""
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    for name in ("resnet50", "alexnet"):
        model = build(name, image_size=227 if name == "alexnet" else 224)
        shapes = [tuple(variable.shape) for variable in model.trainable_variables]
        del model
        sgd, lars = step_of(keras.optimizers.SGD(0.1, momentum=0.9), shapes), step_of(LARS(1.0), shapes)
        seconds: dict[str, list[float]] = {"sgd": [], "lars": []}
        for _ in range(ROUNDS):
            for kind, step in (("sgd", sgd), ("lars", lars)):
                started = time.perf_counter()
                step()
                seconds[kind].append(time.perf_counter() - started)
        sgd_ms, lars_ms = (1e3 * statistics.median(seconds[kind][2:]) for kind in ("sgd", "lars"))
        print(
            f"{name}: {len(shapes)} tensors, LARS {lars_ms:.1f} ms, SGD {sgd_ms:.1f} ms, ratio {lars_ms / sgd_ms:.2f}"
        )


if __name__ == "__main__":
    main()
