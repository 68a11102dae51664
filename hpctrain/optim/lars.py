"""LARS, layer-wise adaptive rate scaling (You, Gitman, Ginsburg: arXiv 1708.03888), in the variants people run."""

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from hpctrain.errors import UserError, nearest
from hpctrain.optim import exclusion
from hpctrain.optim.exclusion import RANK_RULE, Exclusion
from hpctrain.optim.sgd import SGD, Update, check_at_least_zero, check_choice, with_decay

NORMS = ("separate", "combined")
ADAPTS = ("gradient", "update")

_NOTHING_LEFT_OUT = {"exclude_from_decay": None, "exclude_from_trust": None}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"norm": "separate", "rate": "inside", **_NOTHING_LEFT_OUT},
    "mlperf": {"norm": "separate", "rate": "inside", "exclude_from_decay": RANK_RULE, "exclude_from_trust": RANK_RULE},
    "tf_models": {"norm": "combined", "rate": "inside", **_NOTHING_LEFT_OUT},
    "tf_models_popular": {"norm": "combined", "rate": "outside", "adapt": "update", **_NOTHING_LEFT_OUT},
    "tf_contrib": {
        "norm": "separate",
        "rate": "outside",
        "adapt": "update",
        "decay_in_update": False,
        **_NOTHING_LEFT_OUT,
    },
    "optax": {"norm": "combined", "rate": "inside", **_NOTHING_LEFT_OUT},
}


@keras.saving.register_keras_serializable(package="hpctrain")
class LARS(SGD):
    """Momentum SGD in which each variable has a local rate, in proportion to the norm of its weights.

    For each variable w with gradient g, weight decay wd (0 if left out of decay), norms |.| over all its elements:

        norm="separate":  local = trust_coefficient * |w| / (|g| + wd * |w| + epsilon)
        norm="combined":  local = trust_coefficient * |w| / (|g + wd * w| + epsilon)
        clip=True:        local = min(local / lr, 1)                                   (LARC)
        local = 1 where a norm of the formula is 0, so a new layer of zeros moves by lr * (g + wd * w);
        local = 1 for a variable left out of trust

        rate="inside":    v = m * v + lr * local * (g + wd * w);   w = w - v
        rate="outside":   v = m * v + local * (g + wd * w);        w = w - lr * v
        rate="outside" and adapt="update":
                          v = m * v + (g + wd * w);                w = w - lr * local * v
                          and the combined norm is that of v (with Nesterov: of m * v + g + wd * w)

    Args:
        learning_rate, momentum, weight_decay, nesterov, rate, momentum_correction: as in `SGD`.
        trust_coefficient: the eta of the paper, at least 0.
        epsilon: added to the denominator; 0 means 0.
        norm: "separate" norms of weight and gradient (the paper), or the "combined" norm of the decayed gradient.
        exclude_from_decay, exclude_from_trust: which variables get no decay and which have no local rate; see `SGD`.
            By default scalars and vectors (biases, batch normalization) are left out of both. Without decay a
            variable has none in its local rate either.
        adapt: whether the local rate scales the "gradient" that enters the momentum buffer (the paper) or the
            "update" that leaves it, which needs rate="outside".
        clip: LARC, the local rate as a ceiling: the effective rate is min(local, lr).
        decay_in_update: False keeps wd in the separate norms' local rate but out of the update, as tf.contrib did.
        name, **kwargs: as every Keras optimizer takes.

    Norms are computed in float32 (float64 for float64 variables), whatever the variables' dtype. Gradients that are
    not finite, sparse or None are treated as in `SGD`. `LARS.preset` gives the settings of well-known implementations.
    """

    def __init__(
        self,
        learning_rate: Any,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        trust_coefficient: float = 1e-3,
        epsilon: float = 0.0,
        nesterov: bool = False,
        norm: str = "separate",
        rate: str = "inside",
        exclude_from_decay: Exclusion = RANK_RULE,
        exclude_from_trust: Exclusion = RANK_RULE,
        clip: bool = False,
        momentum_correction: bool = False,
        decay_in_update: bool = True,
        adapt: str = "gradient",
        name: str = "lars",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            learning_rate,
            momentum=momentum,
            weight_decay=weight_decay,
            nesterov=nesterov,
            rate=rate,
            exclude_from_decay=exclude_from_decay,
            momentum_correction=momentum_correction,
            name=name,
            **kwargs,
        )
        check_at_least_zero("trust_coefficient", trust_coefficient)
        check_at_least_zero("epsilon", epsilon)
        check_choice("norm", norm, NORMS)
        if norm == "combined" and not decay_in_update:
            raise UserError("decay_in_update=False needs norm='separate': the combined norm is that of the update.")
        check_choice("adapt", adapt, ADAPTS)
        if adapt == "update" and rate != "outside":
            raise UserError("adapt='update' needs rate='outside': what leaves the buffer has no rate in it yet.")
        self.trust_coefficient = float(trust_coefficient)
        self.epsilon = float(epsilon)
        self.norm = norm
        self.clip = bool(clip)
        self.decay_in_update = bool(decay_in_update)
        self.adapt = adapt
        self.exclude_from_trust = exclusion.normalize("exclude_from_trust", exclude_from_trust)

    @classmethod
    def preset(cls, name: str, learning_rate: Any, **overrides: Any) -> "LARS":
        """Return LARS as the implementation `name` computes it; `overrides` are further constructor arguments.

        A preset fixes the formula; momentum, weight decay and coefficients keep the defaults of `LARS` unless given.

        - "paper": Intel Caffe 1.0.7. Separate norms, rate inside, nothing left out. (In its fused update; built without
          that, its gradient norm already contains the decay. It corrects momentum during warm-up only.)
        - "mlperf": the MLPerf TensorFlow 2 reference. Separate norms with epsilon, rate inside; batch normalization
          and biases (here: rank 0 and 1) have neither decay nor local rate. The reference turns an epsilon of 0 into
          1e-7; give `epsilon=1e-7` for that.
        - "tf_models": official/modeling/optimization in tensorflow/models, classic momentum. Decay is added to the
          gradient before its norm, rate inside; its two lists of exclusions are the caller's and empty at first.
        - "tf_models_popular": the same with classic_momentum=False: the local rate and the rate outside, the norm
          that of the update.
        - "tf_contrib": tf.contrib.opt.LARSOptimizer of TensorFlow 1. Separate norms, the local rate and the rate
          outside; decay counts in the local rate only (its users add it to the loss); its skip list is empty at first.
        - "optax": optax.lars. As tf_models; its two masks are the caller's and select everything at first.
        """
        if name not in PRESETS:
            raise UserError(f"Unknown LARS preset {name!r}; {nearest(str(name), PRESETS)}")
        return cls(learning_rate, **{**PRESETS[name], **overrides})

    def build(self, variables: list[Any]) -> None:
        """Create the momentum buffers and settle which of `variables` decay and which have a local rate."""
        if self.built:
            return
        super().build(variables)
        self._trusted = tuple(not exclusion.is_left_out(self.exclude_from_trust, v) for v in variables)

    def changed_in_place(self) -> list[Any]:
        """See SGD."""
        return super().changed_in_place() if self.adapt == "gradient" else []

    def _apply_updates(self, updates: list[Update], learning_rate: Any) -> None:
        if self.adapt == "gradient":
            super()._apply_updates(updates, learning_rate)
            return
        steps = []
        for update in updates:
            gradient = self._decayed(update).gradient if self.decay_in_update else update.gradient
            moved = update.buffer.assign(self.momentum * update.buffer + gradient)
            steps.append(self.momentum * moved + gradient if self.nesterov else moved)
        if self.norm == "combined":
            updates = [u._replace(gradient=step, decay=0.0) for u, step in zip(updates, steps, strict=True)]
        local_rates = self._local_rates_by_position(updates, learning_rate)
        for update, step in zip(updates, steps, strict=True):
            rate = learning_rate * local_rates.get(update.position, 1.0)
            update.variable.assign_sub(tf.cast(rate, step.dtype) * step)

    def _with_factors(self, updates: list[Update], learning_rate: Any) -> list[tuple[Update, Any]]:
        if self.norm == "combined" and not self._adds_up:
            updates = [self._decayed(update) if self._trusted[update.position] else update for update in updates]
        factors = self._local_rates_by_position(updates, learning_rate, times_rate=self._rate_inside)
        if not self.decay_in_update:
            updates = [update._replace(decay=0.0) for update in updates]
        return [
            (update, factors.get(update.position, factor))
            for update, factor in super()._with_factors(updates, learning_rate)
        ]

    def _decayed(self, update: Update) -> Update:
        if not update.decay:
            return update
        return update._replace(gradient=with_decay(update.gradient, update.weight, update.decay), decay=0.0)

    def _local_rates_by_position(
        self, updates: list[Update], learning_rate: Any, times_rate: bool = False
    ) -> dict[int, Any]:
        """Return the local rates, or local rates times the learning rate, of the variables that have one."""
        trusted = [update for update in updates if self._trusted[update.position]]
        if not trusted:
            return {}
        rates = self._local_rates(trusted, learning_rate)
        if times_rate:
            rates *= tf.cast(learning_rate, rates.dtype)
        return dict(zip((u.position for u in trusted), tf.unstack(rates), strict=True))

    def _local_rates(self, updates: Sequence[Update], learning_rate: Any) -> Any:
        """Return the local rates of `updates` as one vector: scalar arithmetic once for all, not once a variable."""
        dtype = tf.float64 if any(update.weight.dtype == tf.float64 for update in updates) else tf.float32
        weights, gradients = [update.weight for update in updates], [update.gradient for update in updates]
        decays = tf.constant([update.decay for update in updates], dtype)  # zeros if they are in the gradients already
        if self._host and self._adds_up:
            squares = self._host.squares(gradients, weights, [update.position for update in updates])
            gradient_squares, weight_squares, products = tf.unstack(squares)
            if self.norm == "combined":  # |g + wd * w|^2
                wide = tf.cast(decays, tf.float64)
                gradient_squares += wide * (2.0 * products + wide * weight_squares)
                decays = tf.zeros_like(decays)
            weight_norms = tf.cast(tf.sqrt(weight_squares), dtype)
            gradient_norms = tf.cast(tf.sqrt(tf.maximum(gradient_squares, 0.0)), dtype)
        else:
            weight_norms, gradient_norms = _norms(weights, dtype), _norms(gradients, dtype)
        local = self.trust_coefficient * weight_norms / (gradient_norms + decays * weight_norms + self.epsilon)
        if self.clip:
            rate = tf.cast(learning_rate, dtype)
            local = tf.where(local < rate, local / rate, tf.ones_like(local))
        return tf.where((weight_norms > 0) & (gradient_norms > 0), local, tf.ones_like(local))

    def get_config(self) -> dict[str, Any]:
        """Return what the constructor needs to make the optimizer again, as JSON can hold it."""
        return {
            **super().get_config(),
            "trust_coefficient": self.trust_coefficient,
            "epsilon": self.epsilon,
            "norm": self.norm,
            "clip": self.clip,
            "decay_in_update": self.decay_in_update,
            "adapt": self.adapt,
            "exclude_from_trust": exclusion.to_config("exclude_from_trust", self.exclude_from_trust),
        }


def _norms(tensors: list[Any], dtype: Any) -> Any:
    """Return the Euclidean norms of `tensors` as a vector of `dtype`; L2Loss is one fused pass, half the squares' sum.

    Sums are taken in each tensor's dtype, 16-bit ones in float32.
    """
    wide = [t if t.dtype in (tf.float32, tf.float64) else tf.cast(t, tf.float32) for t in tensors]
    return tf.sqrt(2.0 * tf.stack([tf.cast(tf.nn.l2_loss(t), dtype) for t in wide]))
