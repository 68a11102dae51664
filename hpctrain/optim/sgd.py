"""Momentum SGD with weight decay inside the gradient: what LARS becomes when every local rate is 1, and its base."""

import numbers
from typing import Any, NamedTuple

import keras
import tensorflow as tf

from hpctrain import native
from hpctrain.errors import UserError, nearest
from hpctrain.optim import exclusion
from hpctrain.optim.exclusion import RANK_RULE, Exclusion
from hpctrain.optim.host import HostPart

RATES = ("inside", "outside")


class Update(NamedTuple):
    """One variable's part of a step."""

    variable: Any  # tf.Variable to change
    buffer: Any  # tf.Variable holding its momentum, of the same shape and dtype
    weight: Any  # the variable's value before the step
    gradient: Any  # dense, in the variable's dtype
    decay: float  # weight decay not yet in `gradient`; 0.0 for a variable left out
    position: int  # the variable's position in the list the optimizer was built with


@keras.saving.register_keras_serializable(package="hpctrain")
class SGD(keras.optimizers.Optimizer):
    """Momentum SGD whose weight decay is coupled: it is added to the gradient, as in Goyal et al. and Caffe.

    (Keras' own SGD subtracts `learning_rate * weight_decay * w` past the momentum, which is another method.)

        rate="inside":   v = m * v + lr * (g + wd * w);   w = w - v            (Caffe, MLPerf, Keras)
        rate="outside":  v = m * v + (g + wd * w);        w = w - lr * v       (PyTorch)

    The two differ only while the rate changes. With `nesterov`, w moves by m * v plus the new term instead of by v.

    Args:
        learning_rate: number, Keras LearningRateSchedule or callable. A number becomes a variable:
            `optimizer.learning_rate = value` before each step sets it, also for a compiled step.
        momentum: m, from 0 up to but without 1.
        weight_decay: wd, at least 0. Not Keras' decoupled `weight_decay`.
        nesterov: Nesterov's momentum.
        rate: whether the rate is inside the momentum buffer or outside it.
        exclude_from_decay: which variables get no decay: "rank<=1" (the default: biases and batch normalization),
            a regular expression or a list of them, searched for in the variable's path, a function of the variable
            that returns True to leave it out, or None for no exclusion. A function can only be saved with a model if
            it is registered with Keras (`keras.saving.register_keras_serializable`).
        momentum_correction: Goyal et al., equation 10: with the rate inside, the buffer is multiplied by the ratio of
            the new rate to the last, v = m * (lr / last lr) * v + lr * (g + wd * w). That yields the very weights of
            rate="outside", so it is computed in that form, which also stands a rate of 0. With rate="outside" it
            changes nothing.
        name, **kwargs: as every Keras optimizer takes (clipnorm, use_ema, gradient_accumulation_steps, ...).

    A gradient that is not finite is not hidden: its variable becomes NaN. Sparse gradients (tf.IndexedSlices) are
    made dense first, so rows that were not looked up decay and move by momentum too. A variable whose gradient is
    None is skipped with Keras' warning. `tf.distribute` strategies with several replicas are refused.
    """

    def __init__(
        self,
        learning_rate: Any = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        nesterov: bool = False,
        rate: str = "inside",
        exclude_from_decay: Exclusion = RANK_RULE,
        momentum_correction: bool = False,
        name: str = "sgd",
        **kwargs: Any,
    ) -> None:
        super().__init__(float_rate(learning_rate), name=name, **kwargs)
        if not 0 <= momentum < 1:
            raise UserError(f"Optimizer momentum is {momentum!r}; it must be at least 0 and less than 1.")
        check_at_least_zero("weight_decay", weight_decay)
        check_choice("rate", rate, RATES)
        self.momentum = float(momentum)
        self.weight_decay = float(weight_decay)
        self.nesterov = bool(nesterov)
        self.rate = rate
        self.momentum_correction = bool(momentum_correction)
        self.exclude_from_decay = exclusion.normalize("exclude_from_decay", exclude_from_decay)
        self._host: HostPart | None = None

    def changed_in_place(self) -> list[Any]:
        """Return the tf.Variables that a step changes, number by number and in place; empty if it does not."""
        variables = [v.value for v in [*self._trainable_variables, *self._buffers]]
        alone = self.use_ema or self.gradient_accumulation_steps or any(v.constraint for v in self._trainable_variables)
        there = native.momentum() and native.host_meeting() and native.host_summands()
        return variables if there and not alone and all(v.dtype == tf.float32 for v in variables) else []

    @property
    def may_add_up(self) -> bool:
        """Whether gradients come to the update as they are, so that it may get summands instead of sums."""
        return not (self.clipnorm or self.global_clipnorm or self.clipvalue or self.loss_scale_factor)

    def share_host(self, host: HostPart) -> None:
        """Change only a part of each variable in a step, as all ranks of the host do.

        What `changed_in_place` returned lies in memory that they have in common. Each of them takes the next steps,
        with the same gradients, which all that reads the variables has come before. What somebody has read from them
        without a copy changes then. To be called before a step is traced.
        """
        self._host = host

    @property
    def _adds_up(self) -> bool:
        return self._host is not None and self._host.adds_up

    @property
    def _rate_inside(self) -> bool:
        return self.rate == "inside" and not self.momentum_correction

    def build(self, variables: list[Any]) -> None:
        """Create the momentum buffers and settle which of `variables` decay."""
        if self.built:
            return
        super().build(variables)
        self._buffers = self.add_optimizer_variables(variables, "momentum")
        self._decays = tuple(
            0.0 if exclusion.is_left_out(self.exclude_from_decay, v) else self.weight_decay for v in variables
        )

    def _apply_weight_decay(self, variables: list[Any]) -> None:
        """Do nothing where Keras would decay the weights: decay is part of the gradient here."""

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Refuse Keras' way of naming exclusions, which would have no effect."""
        raise UserError("This optimizer takes its exclusions as the argument exclude_from_decay=... when it is made.")

    def _backend_update_step(self, grads: list[Any], trainable_variables: list[Any], learning_rate: Any) -> None:
        """Update all variables at once: fewer operations than one `update_step` a variable."""
        if self._distribution_strategy.num_replicas_in_sync > 1:
            raise UserError(
                f"{type(self).__name__} does not work under a tf.distribute strategy of several replicas; "
                "leave the strategy out: hpctrain train runs one process a replica."
            )
        learning_rate = tf.convert_to_tensor(learning_rate)
        self._apply_updates(
            [self._update_of(g, v) for g, v in zip(grads, trainable_variables, strict=True)], learning_rate
        )

    def _apply_updates(self, updates: list[Update], learning_rate: Any) -> None:
        gradients, positions = [u.gradient for u in updates], [u.position for u in updates]
        if self._host and self._adds_up:  # all ranks have laid out their gradients, so they have done with the weights
            self._host.meet_and_look(gradients, positions)
        with_factors = self._with_factors(updates, learning_rate)
        if self._host and not self._adds_up:
            # When its gradients and factors are there, a rank has done with the old weights.
            used = [*(factor for _, factor in with_factors if factor is not None), *gradients]
            with tf.control_dependencies(used):
                self._host.meet_and_look(gradients, positions)
        for update, factor in with_factors:
            self._apply_update(update, factor, learning_rate)
        if self._host:
            self._host.meet()

    def _update_of(self, gradient: Any, variable: Any) -> Update:
        position = self._get_variable_index(variable)
        variable = variable.value if isinstance(variable, keras.Variable) else variable
        weight = tf.convert_to_tensor(variable)
        gradient = tf.cast(tf.convert_to_tensor(gradient), weight.dtype)
        return Update(variable, self._buffers[position].value, weight, gradient, self._decays[position], position)

    def _with_factors(self, updates: list[Update], learning_rate: Any) -> list[tuple[Update, Any]]:
        """Return each update with the scalar that its gradient is multiplied by on entering the momentum buffer."""
        return [(update, learning_rate if self._rate_inside else None) for update in updates]

    def _apply_update(self, update: Update, factor: Any, learning_rate: Any) -> None:
        """Change one variable and its buffer in place. `factor` is a scalar tensor or None for 1.

        With the rate inside, the buffer holds -v, as in Keras' SGD.
        """
        variable, buffer, weight, gradient, decay, position = update
        dtype = weight.dtype
        factor = tf.ones((), dtype) if factor is None else tf.cast(factor, dtype)
        learning_rate = tf.cast(learning_rate, dtype)
        if dtype == tf.float32 and not _is_for_xla() and (fused := native.momentum()):
            fused(
                variable.handle,
                buffer.handle,
                gradient,
                factor=-factor if self._rate_inside else factor,
                rate=-tf.ones(()) if self._rate_inside else learning_rate,
                memory=[self._host.memory.handle] if self._host else [],
                **(self._host.summands_of(position) if self._host else {"summands": []}),
                part=self._host.part if self._host else 0,
                parts=self._host.parts if self._host else 1,
                momentum=self.momentum,
                decay=decay,
                nesterov=self.nesterov,
            )
            return
        gradient = with_decay(gradient, weight, decay) if decay else gradient
        settings = {"momentum": tf.constant(self.momentum, dtype), "use_nesterov": self.nesterov}
        handles = {"var": variable.handle, "accum": buffer.handle}
        if self._rate_inside:
            tf.raw_ops.ResourceApplyKerasMomentum(**handles, lr=factor, grad=gradient, **settings)
        else:
            tf.raw_ops.ResourceApplyMomentum(**handles, lr=learning_rate, grad=factor * gradient, **settings)

    def get_config(self) -> dict[str, Any]:
        """Return what the constructor needs to make the optimizer again, as JSON can hold it."""
        return {
            **super().get_config(),
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "nesterov": self.nesterov,
            "rate": self.rate,
            "momentum_correction": self.momentum_correction,
            "exclude_from_decay": exclusion.to_config("exclude_from_decay", self.exclude_from_decay),
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: dict[str, Any] | None = None) -> "SGD":
        """Return the optimizer that `get_config` described."""
        rules = {key: exclusion.from_config(config[key]) for key in config if key.startswith("exclude_from_")}
        return super().from_config({**config, **rules}, custom_objects=custom_objects)


def _is_for_xla() -> bool:
    """Return whether what is traced now will be compiled by XLA, which knows TensorFlow's operations only."""
    from tensorflow.python.ops import control_flow_util  # there is no public way to ask

    return bool(control_flow_util.GraphOrParentsInXlaContext(tf.compat.v1.get_default_graph()))


def with_decay(gradient: Any, weight: Any, decay: float) -> Any:
    """Return gradient + decay * weight, in the weight's dtype but computed in at least float32."""
    wide = weight.dtype if weight.dtype == tf.float64 else tf.float32
    return tf.cast(tf.cast(gradient, wide) + decay * tf.cast(weight, wide), weight.dtype)


def float_rate(learning_rate: Any) -> Any:
    """Return a number as the float Keras insists on (an int or a NumPy number is refused), anything else as it is."""
    return float(learning_rate) if isinstance(learning_rate, numbers.Real) else learning_rate


def check_at_least_zero(option: str, value: float) -> None:
    """Raise UserError unless `value` is a number of at least 0."""
    if not (isinstance(value, numbers.Real) and 0 <= value < float("inf")):
        raise UserError(f"Optimizer {option} is {value!r}; it must be a finite number of at least 0.")


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise UserError unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(f"Unknown optimizer {option} {value!r}; {nearest(str(value), choices)}")
