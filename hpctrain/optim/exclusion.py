"""Which variables an optimizer leaves out of weight decay or of the trust ratio."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from hpctrain.errors import UserError

RANK_RULE = "rank<=1"
"""Leaves out scalars and vectors: biases and the scale and offset of batch normalization."""

Exclusion = str | Sequence[str] | Callable[[Any], bool] | None
"""RANK_RULE; a regular expression or several, searched for in the variable's path; a predicate of the variable; or
None or empty: nothing is left out."""


def normalize(option: str, rule: Exclusion) -> Exclusion:
    """Return `rule` with lists made tuples and emptiness made None; raise UserError if it is no valid exclusion."""
    if rule is None or rule is False or callable(rule):
        return rule or None
    if not isinstance(rule, str | list | tuple):
        raise UserError(f"{option} is {rule!r}; expected {RANK_RULE!r}, regular expressions, or false for none.")
    patterns = (rule,) if isinstance(rule, str) else tuple(rule)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UserError(f"{option}: {pattern!r} is not a regular expression ({error}).") from None
    if isinstance(rule, str):
        return rule or None
    return patterns or None


def is_left_out(rule: Exclusion, variable: Any) -> bool:
    """Return whether the normalized `rule` leaves out `variable` (a Keras or TensorFlow variable)."""
    if rule is None:
        return False
    if callable(rule):
        return bool(rule(variable))
    path = getattr(variable, "path", variable.name)
    patterns = (rule,) if isinstance(rule, str) else rule
    return any(len(variable.shape) <= 1 if p == RANK_RULE else re.search(p, path) is not None for p in patterns)


def to_config(option: str, rule: Exclusion) -> Any:
    """Return `rule` as JSON can hold it. A predicate must be registered with Keras to be saved; else UserError."""
    import keras

    if callable(rule):
        name = keras.saving.get_registered_name(rule)
        if keras.saving.get_registered_object(name) is None:
            raise UserError(
                f"{option}: the function {name!r} cannot be saved; register it with "
                "@keras.saving.register_keras_serializable(), or give a regular expression instead."
            )
        return keras.saving.serialize_keras_object(rule)
    return list(rule) if isinstance(rule, tuple) else rule


def from_config(value: Any) -> Exclusion:
    """Return the rule that `to_config` wrote."""
    import keras

    return keras.saving.deserialize_keras_object(value) if isinstance(value, dict) else value
