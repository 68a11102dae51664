"""One optimizer step over the whole world: micro-batches, their sum, the allreduce, the update.

What a rank adds up and reduces is one list of tensors, the payload of a micro-batch: the gradients, what batch norm
learned of its statistics, and a short vector of metrics. All of it is summed over the micro-batches of the global
batch in the same order. The loss that is differentiated is divided by their number, so that the gradients need not be.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from hpctrain.data.hashing import hash64
from hpctrain.optim.host import HostPart
from hpctrain.parallel.buckets import merge_plan
from hpctrain.parallel.reduce import Reducer
from hpctrain.training.host_weights import share_weights

Payload = list[Any]


class StepResult(NamedTuple):
    """What a step tells, the same on every rank: means over the global batch, and whether any rank wants to stop."""

    loss: float
    top1: float
    stop: bool


class TrainStep:
    """Runs training steps of a model; every rank calls it at the same time with its own micro-batches.

    A micro-batch is the batch-norm group. A rank sums `micro_batches` of them before the allreduce, so that fewer
    ranks do more of them and nothing else changes. Dropout draws from the micro-batch's number in the whole run.
    `forward_backward(images, labels, number)` and `update(payload, learning_rate)` are its parts, a graph each.
    """

    def __init__(
        self,
        model: keras.Model,
        optimizer: keras.optimizers.Optimizer,
        reducer: Reducer,
        *,
        micro_batches: int,
        label_smoothing: float = 0.0,
        seed: int = 0,
        deterministic: bool = False,
    ) -> None:
        self.model, self.optimizer, self.reducer = model, optimizer, reducer
        self.micro_batches = micro_batches
        self.global_micro_batches = micro_batches * reducer.world.size
        self.label_smoothing = label_smoothing
        self.merges = merge_plan(micro_batches, tree=deterministic)
        self.weights = model.trainable_variables
        self.state = model_state(model)
        self._moving: list[Any] = []
        self._seeds = [(v, hash64(seed, i)) for i, v in enumerate(_seed_variables(model))]
        optimizer.build(self.weights)
        self.forward_backward = graph(self._forward_backward)
        self._add = graph(_add)
        self._reduce_graph = graph(self._reduce)
        self.update = graph(self._update)
        self._last_micro_batch_and_update = graph(self._overlapped)
        # TensorFlow optimizes each graph as a whole, and what stands beside an operation can change its rounding. So
        # for equal bits the parts are graphs of their own, the same on any number of ranks.
        self._finish = self._in_parts if deterministic else self._last_micro_batch_and_update
        self._began = False
        self._host: HostPart | None = None

    def __call__(self, step: int, batches: Iterator[Any], learning_rate: float, stop: bool = False) -> StepResult:
        """Take optimizer step number `step` (from 1) with the next micro-batches of this rank.

        `stop` is this rank's vote for ending the run after this step; the result tells if anyone voted so.
        """
        if not self._began:
            self._host = share_weights(self.optimizer, self.reducer.world, summands=self.reducer.adds_plainly)
            self.reducer.leave_sums_to_the_update(self._host.give if self._host and self._host.adds_up else None)
            self._began = True
        first = (step - 1) * self.global_micro_batches + self.reducer.world.rank * self.micro_batches
        pending: list[Payload] = []
        for i in range(self.micro_batches - 1):
            images, labels = next(batches)
            pending.append(self.forward_backward(images, labels, tf.constant(first + i, tf.int64)))
            for _ in range(self.merges[i]):
                right = pending.pop()
                pending[-1] = self._add(pending[-1], right)
        images, labels = next(batches)
        number = tf.constant(first + self.micro_batches - 1, tf.int64)
        rate, vote = tf.constant(learning_rate, tf.float32), tf.constant([float(stop)])
        metrics = self._finish(images, labels, number, pending, rate, vote).numpy()
        return StepResult(float(metrics[0]), float(metrics[1]), bool(metrics[2] > 0))

    def _overlapped(self, images: Any, labels: Any, number: Any, pending: list[Payload], rate: Any, vote: Any) -> Any:
        """The last micro-batch, its sum with the others, allreduce and update as one graph, so that they overlap."""
        payload = self._forward_backward(images, labels, number)
        for left in reversed(pending):
            payload = _add(left, payload)
        return self._update(self._reduce([*payload, vote]), rate)

    def _in_parts(self, images: Any, labels: Any, number: Any, pending: list[Payload], rate: Any, vote: Any) -> Any:
        """The same one after the other, with a graph for each part."""
        payload = self.forward_backward(images, labels, number)
        for left in reversed(pending):
            payload = self._add(left, payload)
        return self.update(self._reduce_graph([*payload, vote]), rate)

    def _forward_backward(self, images: Any, labels: Any, number: Any) -> Payload:
        """Return the payload of one micro-batch: gradients, new batch-norm state, [loss, share correct]."""
        # In a stateless scope assignments of layers (moving averages, counters of dropout) go into the scope, so
        # that every micro-batch starts from the state of the last step.
        seeds = [(v, _seed_state(v, key, number)) for v, key in self._seeds]
        with tf.GradientTape() as tape, keras.StatelessScope(seeds, collect_losses=True) as scope:
            logits = self.model(images, training=True)
            loss = tf.reduce_mean(cross_entropy(logits, labels, self.label_smoothing))
            own_losses = self.model.losses  # regularizers and add_loss of a user's model; ours have none
            if own_losses:
                loss += tf.add_n([tf.cast(own, tf.float32) for own in own_losses])
            share = loss / self.global_micro_batches
        gradients = tape.gradient(share, [v.value for v in self.weights])
        gradients = [
            tf.zeros(v.shape) if g is None else tf.convert_to_tensor(g)
            for g, v in zip(gradients, self.weights, strict=True)
        ]
        # Known once the model has been traced: frozen weights are no state, only what the layers have assigned to.
        self._moving = [v for v in self.state if scope.get_current_value(v) is not None]
        state = [tf.convert_to_tensor(scope.get_current_value(v)) for v in self._moving]
        correct = tf.reduce_mean(tf.cast(is_correct(logits, labels, 1), tf.float32))
        return [*gradients, *state, tf.stack([loss, correct])]

    def _reduce(self, payload: Payload) -> Payload:
        """Sum the payload over all ranks: gradients by the bucket, the rest as one."""
        count = len(self.weights)
        sums = self.reducer.sum_gradients(payload[:count])
        with tf.control_dependencies(sums):  # so that when the rest is there, every rank is as far as that
            return [*sums, *self._sum_small(payload[count:])]

    def _update(self, total: Payload, rate: Any) -> Any:
        """Apply the summed payload to the variables; return [loss, share correct, stop votes]."""
        count = tf.constant(float(self.global_micro_batches))
        gradients = total[: len(self.weights)]
        *state, metrics, votes = total[len(self.weights) :]
        self.optimizer.learning_rate.assign(rate)
        self.optimizer.apply(gradients, self.weights)
        for variable, new in zip(self._moving, state, strict=True):
            variable.assign(new / count)
        return tf.concat([metrics / count, votes], 0)

    def _sum_small(self, tensors: list[Any]) -> list[Any]:
        """Sum many small tensors over ranks as one."""
        shapes = [tensor.shape for tensor in tensors]
        flat = self.reducer.sum(tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0), "small")
        parts = tf.split(flat, [shape.num_elements() for shape in shapes])
        return [tf.reshape(part, shape) for part, shape in zip(parts, shapes, strict=True)]


def graph(function: Callable[..., Any]) -> Any:
    """Return the function as a tf.function whose source is taken as it is.

    AutoGraph would rewrite each function that is called on the way, Horovod's too, which took three quarters of the
    tracing on two ranks. No `if` or loop here depends on a tensor, and into Keras' layers it does not look.
    """
    return tf.function(function, autograph=False)


def cross_entropy(logits: Any, labels: Any, label_smoothing: float = 0.0) -> Any:
    """Return float32[n]: softmax cross-entropy against one-hot targets mixed with the uniform distribution.

    `logits` is [n, classes], `labels` int32[n]; padding (label -1) has loss 0. With label smoothing s the target is
    (1 - s) * one_hot + s / classes (Szegedy et al., arXiv 1512.00567, section 7).
    """
    logits = tf.cast(logits, tf.float32)
    classes = logits.shape[-1]
    targets = tf.one_hot(labels, classes) * (1.0 - label_smoothing) + label_smoothing / classes
    losses = tf.nn.softmax_cross_entropy_with_logits(targets, logits)
    return tf.where(labels >= 0, losses, 0.0)


def is_correct(logits: Any, labels: Any, k: int) -> Any:
    """Return bool[n]: whether fewer than k classes score as high as the labeled one.

    Ties count against the model, and so do NaN logits and padding: a network that gives every class the same score
    is right about nothing.
    """
    logits = tf.cast(logits, tf.float32)
    own = tf.gather(logits, tf.maximum(labels, 0), axis=1, batch_dims=1)[:, tf.newaxis]
    as_high = tf.reduce_sum(tf.cast(~(logits < own), tf.int32), axis=1)  # written so that NaN is as high as any
    return (labels >= 0) & (as_high <= k) & ~tf.math.is_nan(own[:, 0])


def model_state(model: keras.Model) -> list[Any]:
    """Return the float weights that are not trained: moving statistics of batch norm, and those of frozen layers."""
    weights = {id(v) for v in model.non_trainable_weights}
    return [v for v in model.non_trainable_variables if id(v) in weights and "float" in str(v.dtype)]


def _seed_variables(model: keras.Model) -> list[Any]:
    """Return the states of the layers' random generators (dropout), two integers each."""
    state = {id(v) for v in model.non_trainable_weights}
    return [v for v in model.non_trainable_variables if id(v) not in state and tuple(v.shape) == (2,)]


def _seed_state(variable: Any, key: np.ndarray, number: Any) -> Any:
    """The generator's state for one micro-batch: a key of its own for each layer, counting up from the number."""
    high = tf.bitwise.bitwise_xor(
        tf.constant(int(key) & 0x7FFFFFFF, tf.int64), tf.bitwise.right_shift(number, tf.constant(16, tf.int64))
    )
    low = (
        tf.bitwise.bitwise_and(number, tf.constant(0xFFFF, tf.int64)) * 2**15
    )  # leaves room for 32,768 draws by one layer in one micro-batch
    return tf.cast(tf.stack([high, low]), variable.dtype)


def _add(left: Payload, right: Payload) -> Payload:
    return [a + b for a, b in zip(left, right, strict=True)]
