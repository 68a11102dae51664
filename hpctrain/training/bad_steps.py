"""Steps that must not change the weights: a loss or gradient that is NaN or infinite, or a loss far above the usual."""

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from hpctrain.errors import UserError
from hpctrain.parallel.world import World
from hpctrain.training.step import StepResult, TrainStep
from hpctrain.training.watch import NormWatch

_NAMED = 8
_MOST_IN_A_ROW = 10  # updates left out, after which nothing will bring the run back
_HISTORY_STEPS = 50  # of whose losses the median is the usual one
_FEWEST_STEPS = 10  # before which there is no usual loss


class GuardedStep(TrainStep):
    """A TrainStep that leaves weights and optimizer as they are when a step is bad, on all ranks.

    A step is bad if any rank's loss or gradient is not finite, whereupon its loss is NaN, or if its loss is above
    `limit`. A loss alone does not tell: the rectifiers of some libraries turn NaN into zero. Each rank looks through
    its own gradients, on its own or as it sums them, and its finding travels in the loss that is reduced anyway.
    `norms` takes down those of the steps that are shown.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.norms = NormWatch(self.weights)
        with tf.device("CPU:0"):
            self._own_loss = tf.Variable(0.0, trainable=False)
            self._limit = tf.Variable(math.inf, dtype=tf.float32, trainable=False)

    @property
    def own_loss(self) -> float:
        """Of the last step, this rank's sum of its micro-batches' losses; NaN if that or a gradient is not finite."""
        return float(self._own_loss.numpy())

    def set_limit(self, limit: float) -> None:
        """Set the loss above which the next steps are bad; the same on all ranks."""
        self._limit.assign(limit)

    def _reduce(self, payload: list[Any]) -> list[Any]:
        *gradients_and_state, metrics, vote = payload
        gradients, state = gradients_and_state[: len(self.weights)], gradients_and_state[len(self.weights) :]
        if self.reducer.looks:
            sums = self.reducer.sum_gradients(gradients)
            finite = self.reducer.summands_finite(sums)
        else:
            totals = [tf.reduce_sum(gradient) for gradient in gradients]
            finite = tf.math.is_finite(tf.add_n(totals))
            # Read before it is reduced, so that the sum over ranks can take its place in memory.
            gradients = [_after(total, gradient) for total, gradient in zip(totals, gradients, strict=True)]
            sums = self.reducer.sum_gradients(gradients)
        loss = tf.where(tf.math.is_finite(metrics[0]) & finite, metrics[0], float("nan"))
        self._own_loss.assign(loss)
        small = self._sum_small([*state, tf.stack([loss, metrics[1]]), vote])
        if self.reducer.looks:
            self.reducer.summands_finite(small)  # what is in those is not to count in the next step
        with tf.control_dependencies(small):
            recorded = self.norms.record(sums, self._host)
        # Other ranks may change the weights as soon as this one goes on to the update.
        with tf.control_dependencies([recorded]):
            return [*sums, *map(tf.identity, small)]

    def _update(self, total: list[Any], rate: Any) -> Any:
        *_, metrics, votes = total
        means = metrics / float(self.global_micro_batches)
        return tf.cond(
            tf.math.is_finite(means[0]) & (means[0] <= self._limit),
            lambda: TrainStep._update(self, total, rate),
            lambda: tf.concat([means, votes], 0),
        )


def _after(first: Any, tensor: Any) -> Any:
    with tf.control_dependencies([first]):
        return tf.identity(tensor)


class BadSteps:
    """Knows from the losses so far which loss is too high, and counts the steps whose update was left out.

    `spike` is how many times the median of the last losses is too high, None for any. `earlier` are the losses of the
    steps before, the newest last, so that a run that is resumed judges as one that never stopped.
    """

    def __init__(self, spike: float | None, earlier: Sequence[float | None] = ()) -> None:
        self._spike = spike
        self._losses = deque((x for x in earlier if x is not None and math.isfinite(x)), maxlen=_HISTORY_STEPS)
        self.count = 0
        self._in_a_row = 0

    @property
    def limit(self) -> float:
        """The loss above which the next step is bad, a float32 value."""
        if self._spike is None or len(self._losses) < _FEWEST_STEPS:
            return math.inf
        return float(np.float32(self._spike * np.median(self._losses)))

    @property
    def too_many(self) -> bool:
        """Whether so many steps in a row were bad that going on makes no sense."""
        return self._in_a_row >= _MOST_IN_A_ROW

    def add(self, result: StepResult) -> str:
        """Note a step; return what is wrong with it, empty if nothing."""
        limit = self.limit
        finite = math.isfinite(result.loss)
        if finite:
            self._losses.append(result.loss)
        if finite and result.loss <= limit:
            self._in_a_row = 0
            return ""
        self.count += 1
        self._in_a_row += 1
        if not finite:
            return "the loss or a gradient is NaN or infinite"
        assert self._spike is not None
        return f"the loss is {result.loss:.4g}, train.loss_spike={self._spike:g} times the usual is {limit:.4g}"


def bad_step_error(step: int, wrong: str, train_step: GuardedStep, world: World, saved: str) -> UserError:
    """Return the error that ends a run after a bad step; all ranks call it together.

    `wrong` is what BadSteps said, `saved` the name of the newest checkpoint, empty if there is none.
    """
    bad = [rank for rank, good in enumerate(world.allgather(math.isfinite(train_step.own_loss))) if not good]
    start = f"it resumes from {saved}" if saved else "there is no checkpoint yet"
    remedy = f"lower optimizer.learning_rate or raise schedule.warmup_epochs, then start again: {start}"
    where = ""
    if len(bad) == world.size:
        where = " on all ranks"
    elif bad:
        more = f" and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        where = " on " + ", ".join(f"rank {rank} on {world.places[rank].host}" for rank in bad[:_NAMED]) + more
        remedy += "; if it is always the same host, leave that out (`hpctrain doctor` checks it)"
    return UserError(f"step {step}: {wrong}{where}; {remedy}")
