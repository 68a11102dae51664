"""A schedule as Keras wants it, for `model.compile(LARS(KerasSchedule(...)))`."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hpctrain.optim.schedules import make_schedule


@keras.saving.register_keras_serializable(package="hpctrain")
class KerasSchedule(keras.optimizers.schedules.LearningRateSchedule):
    """`make_schedule(name, base_rate, total_steps, warmup_steps, **options)` for a Keras optimizer.

    Keras passes the number of updates already made, so its step k gets the rate of our step k + 1. The rates are
    tabulated once (four bytes a step) and looked up: they are the pure function's values, rounded to float32.
    """

    def __init__(self, name: str, base_rate: float, total_steps: int, warmup_steps: int = 0, **options: Any) -> None:
        self.config = {
            "name": name,
            "base_rate": base_rate,
            "total_steps": total_steps,
            "warmup_steps": warmup_steps,
            **options,
        }
        schedule = make_schedule(name, base_rate, total_steps, warmup_steps, **options)
        self._rates = np.array([schedule(step) for step in range(1, total_steps + 1)], np.float32)

    def __call__(self, step: Any) -> Any:
        """Return the rate of the update after `step` updates, a float32 scalar; past the end, that of the last."""
        position = tf.minimum(tf.cast(tf.convert_to_tensor(step), tf.int64), len(self._rates) - 1)
        return tf.gather(tf.constant(self._rates), position)

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return dict(self.config)
