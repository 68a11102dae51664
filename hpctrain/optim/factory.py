"""The optimizer a configuration names."""

from typing import Any

import keras

from hpctrain.errors import UserError, nearest
from hpctrain.optim.exclusion import RANK_RULE, Exclusion
from hpctrain.optim.lars import LARS
from hpctrain.optim.sgd import SGD, float_rate

OPTIMIZER_NAMES = ("lars", "sgd", "lamb")


def make_optimizer(
    name: str,
    learning_rate: Any,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    trust_coefficient: float = 1e-3,
    *,
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
) -> keras.optimizers.Optimizer:
    """Return the optimizer called `name`: "lars", "sgd" (both hpctrain's) or "lamb" (Keras' own).

    Every option may be given for every name, as one configuration section serves all; an optimizer takes what it
    needs. For lamb, `momentum` is beta_1 and `weight_decay` is Keras' decoupled decay, which leaves out variables
    named bias, gamma or beta unless `exclude_from_decay` is None; other exclusions are an error there. (Keras does
    not save that exclusion in a .keras file: make the optimizer anew rather than loading it.)
    """
    momentum_options: dict[str, Any] = {
        "momentum": momentum,
        "weight_decay": weight_decay,
        "nesterov": nesterov,
        "rate": rate,
        "exclude_from_decay": exclude_from_decay,
        "momentum_correction": momentum_correction,
    }
    if name == "lars":
        return LARS(
            learning_rate,
            trust_coefficient=trust_coefficient,
            epsilon=epsilon,
            norm=norm,
            exclude_from_trust=exclude_from_trust,
            clip=clip,
            decay_in_update=decay_in_update,
            adapt=adapt,
            **momentum_options,
        )
    if name == "sgd":
        return SGD(learning_rate, **momentum_options)
    if name == "lamb":
        lamb = keras.optimizers.Lamb(
            float_rate(learning_rate), beta_1=momentum, weight_decay=weight_decay or None, name="lamb"
        )
        if exclude_from_decay == RANK_RULE:
            lamb.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
        elif exclude_from_decay:
            raise UserError("lamb takes exclude_from_decay='rank<=1' or nothing; use lars or sgd for other exclusions.")
        return lamb
    raise UserError(f"Unknown optimizer {name!r}; {nearest(str(name), OPTIMIZER_NAMES)}")
