"""How far off a prediction may be, from how well each parameter of the machine is known."""

import math
from collections.abc import Callable

from hpctrain.scaling.performance.machine import PARAMETERS, Machine
from hpctrain.scaling.performance.scaled import scaled

LEVEL = 0.9  # of the intervals: the share of cases that they should hold
_DEVIATIONS = 1.645  # of a normal distribution, on either side
_STEP = 0.05


def relative_error(seconds: Callable[[Machine], float], machine: Machine) -> float:
    """Return the standard error of ln seconds(machine): the machine's covariance, carried to first order."""
    gradient = []
    for name in PARAMETERS:
        up, down = (seconds(scaled(machine, {name: math.exp(sign * _STEP)})) for sign in (1, -1))
        gradient.append((math.log(up) - math.log(down)) / (2 * _STEP))
    variance = machine.model_error**2
    if machine.covariance:
        for g, row in zip(gradient, machine.covariance, strict=True):
            variance += sum(g * c * h for c, h in zip(row, gradient, strict=True))
    return math.sqrt(max(0.0, variance))


def interval(seconds: Callable[[Machine], float], machine: Machine) -> tuple[float, float]:
    """Return the low and high end of the LEVEL interval around seconds(machine)."""
    factor = math.exp(_DEVIATIONS * relative_error(seconds, machine))
    middle = seconds(machine)
    return middle / factor, middle * factor
