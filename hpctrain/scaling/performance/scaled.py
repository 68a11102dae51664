"""A machine with some of its parameters multiplied: what intervals, fits and what-ifs are made of."""

from collections.abc import Mapping
from dataclasses import replace

from hpctrain.scaling.performance.allreduce import Link, Network
from hpctrain.scaling.performance.machine import Machine


def scaled(machine: Machine, factors: Mapping[str, float]) -> Machine:
    """Return the machine with parameters (of PARAMETERS) multiplied by `factors`; what is not named stays.

    `compute` is everything a rank does by itself but input; `beta` takes the adding up of the bytes, gamma, with it.
    """
    compute, alpha, beta = (factors.get(name, 1.0) for name in ("compute", "alpha", "beta"))

    def link(old: Link) -> Link:
        return Link(old.alpha_seconds * alpha, old.beta_seconds_per_byte * beta, old.gamma_seconds_per_byte * beta)

    network = machine.network
    return replace(
        machine,
        network=Network(link(network.between), link(network.within), network.ranks_per_node),
        seconds_per_image=machine.seconds_per_image * compute,
        fixed_seconds=machine.fixed_seconds * compute,
        update_seconds=machine.update_seconds * compute,
        message_overhead_seconds=machine.message_overhead_seconds * alpha,
        straggler_sigma=machine.straggler_sigma * factors.get("straggler_sigma", 1.0),
    )
