"""A small network for `model.name`, whose module breaks something in the rank that loads it.

HPCTRAIN_TEST_FAULT is `ACTION@PLACE:NUMBER:RANK`, such as `kill@step:3:1`. Places: `start` (before the model is built),
`step` (at the beginning of step NUMBER), `evaluate` (at the beginning of the NUMBER-th evaluation of this try), `save`
(rank 0 has written half of the first checkpoint from step NUMBER on), `saving` (the step after NUMBER, while rank 0
writes for a second). RANK may be `*`. `nan`, `spike` and `drift` change what is computed in step NUMBER only;
`slow` makes every step from NUMBER on a tenth of a second longer. The moment of the fault goes to the file
HPCTRAIN_TEST_FAULT_TIME.
"""

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from hpctrain.training import step as step_module
from hpctrain.training.evaluate import Evaluator

_SIGNALS = {"kill": "SIGKILL", "stop": "SIGSTOP", "term": "SIGTERM", "usr1": "SIGUSR1", "int": "SIGINT"}
RANK = int(os.environ.get("PMIX_RANK", "0"))


def model(num_classes: int, image_size: int) -> keras.Model:
    """Two convolutions with batch norm between them: all kinds of state, and a graph that is built in a moment."""
    inputs = keras.Input((image_size, image_size, 3))
    x = keras.layers.Conv2D(8, 3, strides=2, use_bias=False)(inputs)
    x = keras.layers.ReLU()(keras.layers.BatchNormalization()(x))
    x = keras.layers.Conv2D(16, 3, strides=2)(x)
    x = keras.layers.GlobalAveragePooling2D()(keras.layers.ReLU()(x))
    return keras.Model(inputs, keras.layers.Dense(num_classes)(x))


def act(action: str) -> None:
    """Do it, in this process."""
    if moment := os.environ.get("HPCTRAIN_TEST_FAULT_TIME"):
        Path(moment).write_text(str(time.monotonic()))
    if action in _SIGNALS:
        os.kill(os.getpid(), signal.Signals[_SIGNALS[action]])
    elif action == "raise":
        raise RuntimeError("the memory of this node is broken")
    elif action == "hang":
        time.sleep(1e6)
    elif action == "full":  # what a quota or a full disk does: no file may grow beyond so many bytes
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    elif action == "memory":  # the limit of a container or a batch system on address space
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**20, resource.RLIM_INFINITY))
        bytearray(2**30)
    elif action == "clock":
        now = time.time
        time.time = lambda: now() - 86_400.0
    elif action not in ("nan", "spike", "drift", "slow"):
        raise ValueError(f"no action {action}")


def inject(action: str, place: str, number: int) -> None:
    """Arrange for the action to happen at its place."""
    at_step, at_evaluation, save = step_module.TrainStep.__call__, Evaluator.__call__, np.savez
    state = {"step": 0, "evaluations": 0, "done": False}

    def once() -> None:
        if not state["done"]:
            state["done"] = True
            act(action)

    def step(self: Any, step: int, batches: Iterator[Any], *rest: Any) -> Any:
        state["step"] = step
        if (place == "step" and step >= number) or (place == "saving" and step > number):
            once()
            if action == "slow":
                time.sleep(0.1)
            if action == "nan" and step == number:
                batches = ((images * float("nan"), labels) for images, labels in batches)
            if action == "spike" and step == number:  # certain of one class, for this step
                bias = self.weights[-1]
                before = bias.value.numpy()
                bias.assign(before + np.array([1000, 0, 0, 0], np.float32))
                result = at_step(self, step, batches, *rest)
                bias.assign(before)
                return result
            if action == "drift" and step == number:
                self.weights[-2].assign_add(self.weights[-2].value * 1e-6)
        return at_step(self, step, batches, *rest)

    def evaluate(self: Any) -> Any:
        state["evaluations"] += 1
        if place == "evaluate" and state["evaluations"] >= number:
            once()
        return at_evaluation(self)

    def half(file: Any, **arrays: Any) -> None:
        save(file, **arrays)
        if state["step"] >= number:
            if place == "saving":
                time.sleep(1.0)
            else:
                file.truncate(file.tell() // 2)
                once()

    replaced: list[tuple[Any, str, Callable[..., Any]]] = [(step_module.TrainStep, "__call__", step)]
    if place == "evaluate":
        replaced.append((Evaluator, "__call__", evaluate))
    if place in ("save", "saving"):
        replaced.append((np, "savez", half))
    for where, name, function in replaced:
        setattr(where, name, function)
    if place == "start":
        once()


def read_fault() -> None:
    """Arrange for what the environment asks for."""
    what, _, where = os.environ.get("HPCTRAIN_TEST_FAULT", "").partition("@")
    if not what:
        return
    place, number, rank = where.split(":")
    if place == "saving" and RANK == 0:  # the slow writer, while another rank meets its fault
        inject("slow", place, int(number))
    elif rank in ("*", str(RANK)):
        inject(what, place, int(number))


read_fault()
