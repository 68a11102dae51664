"""A watch over a run's numbers: whether all ranks have the same weights, and how gradients and local rates stand."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from hpctrain.data.checksum import crc32
from hpctrain.optim import LARS
from hpctrain.optim.host import HostPart
from hpctrain.parallel.world import World

_NAMED = 8  # ranks in an error


class WeightsDiffer(RuntimeError):
    """Ranks whose weights should be the same have different ones."""


def weight_checksums(variables: Sequence[Any]) -> NDArray[np.uint32]:
    """Return uint32[n]: the CRC-32 of the bits of each Keras variable. Reads every weight once."""
    arrays = (np.ascontiguousarray(variable.value.numpy()) for variable in variables)
    return np.fromiter((crc32(array.reshape(-1).view(np.uint8)) for array in arrays), np.uint32, len(variables))


def check_same_weights(step: int, variables: Sequence[Any], world: World) -> None:
    """Raise WeightsDiffer on every rank unless all ranks have the same bits in all `variables`; all call it together.

    All ranks add the same sums to the same weights, so a difference means that a host computes or communicates wrongly,
    or in another way than the others. The error names the ranks that are unlike most, and the first variable in which
    they are. Ranks of a host that have weights in common can only be unlike those of other hosts. One allgather of
    eight bytes a rank while all is well.
    """
    if world.size == 1:
        return
    own = weight_checksums(variables)
    digest = crc32(own.tobytes())
    digests = world.allgather(digest)
    if len(set(digests)) == 1:
        return
    by_rank = np.stack(world.allgather(own))  # uint32[ranks, variables]
    # Those of a host may have their weights in common, right or wrong, and so are one witness.
    witnesses = Counter(bits for _, bits in {(p.host, bits) for p, bits in zip(world.places, digests, strict=True)})
    ranks = Counter(digests)
    usual = max(ranks, key=lambda bits: (witnesses[bits], ranks[bits]))
    reference = by_rank[digests.index(usual)]
    unlike = [rank for rank, other in enumerate(digests) if other != usual]
    first = min(int(np.flatnonzero(by_rank[rank] != reference)[0]) for rank in unlike)
    named = ", ".join(f"rank {rank} on {world.places[rank].host}" for rank in unlike[:_NAMED])
    named += f" and {len(unlike) - _NAMED} more" if len(unlike) > _NAMED else ""
    if 2 * witnesses[usual] > witnesses.total():
        who = f"the weights of {named} are not those of the other {ranks[usual]} ranks"
        cure = "leave that host out"
    else:
        who = f"the weights of {named} are not those of rank {digests.index(usual)}"
        cure = "leave out the host that is unlike the others"
    raise WeightsDiffer(
        f"after step {step} {who}, first in {variables[first].path}: a host computes or communicates wrongly, or has "
        f"another kind of processor; {cure} (`hpctrain doctor` compares them) and start the run again: it resumes from "
        "the last checkpoint, which was written before"
    )


class NormWatch:
    """Takes down the norms of gradients and weights in the steps in which somebody wants to know.

    `record` is a part of the training step's graph, behind the reduction, and does nothing there until `wanted` is
    set: norms cost a pass over all gradients and weights. It only reads, so weights keep their bits.
    """

    def __init__(self, weights: Sequence[Any]) -> None:
        self.weights = list(weights)
        with tf.device("CPU:0"):
            self._wanted = tf.Variable(False, trainable=False)
            self._norms = tf.Variable(tf.zeros([3, len(self.weights)]), trainable=False)

    def want(self, wanted: bool) -> None:
        """Say whether the next steps are to be taken down."""
        self._wanted.assign(wanted)

    def record(self, gradients: Sequence[Any], host: HostPart | None = None) -> Any:
        """Take down |g|^2, |w|^2 and g.w of every weight, if wanted; return what is there when that is done.

        `gradients` are sums over all ranks, or where the host has summands, what this rank has given of those. All
        ranks want them in the same steps.
        """

        def take() -> Any:
            if host and host.adds_up:
                positions = range(len(self.weights))
                host.meet_and_look(gradients, positions)
                weights = [tf.convert_to_tensor(w.value) for w in self.weights]
                return tf.cast(host.squares(gradients, weights, positions), tf.float32)
            pairs = [
                (tf.cast(g, tf.float32), tf.cast(w.value, tf.float32))
                for g, w in zip(gradients, self.weights, strict=True)
            ]
            squares = [[2.0 * tf.nn.l2_loss(g) for g, _ in pairs], [2.0 * tf.nn.l2_loss(w) for _, w in pairs]]
            return tf.stack([*map(tf.stack, squares), tf.stack([tf.reduce_sum(g * w) for g, w in pairs])])

        norms = tf.cond(self._wanted, take, lambda: tf.zeros([3, len(self.weights)]))
        self._norms.assign(norms)
        return norms

    def norms(self) -> NDArray[np.float64]:
        """Return float64[3, n]: |g|^2, |w|^2 and g.w of each weight in the last step that was taken down."""
        return self._norms.numpy().astype(np.float64)


def summarize(norms: NDArray[np.float64], weights: Sequence[Any], optimizer: Any) -> dict[str, Any]:
    """Return what a log line says of a step: the gradient's norm over all weights, and of each group of layers.

    `norms` are those of `NormWatch`. The groups are the first words of the weights' paths (`stage2` of
    `stage2_block1_conv1/kernel`). `trust_ratio` is [least, median, greatest] local rate of those of a group's weights
    that have one, before the learning rate; only with LARS whose local rate is that of the gradient.
    """
    gradients, sizes, _ = norms
    rates = local_rates(norms, optimizer)
    groups: dict[str, list[int]] = {}
    for i, weight in enumerate(weights):
        groups.setdefault(weight.path.split("/")[0].split("_")[0], []).append(i)
    layers: dict[str, dict[str, Any]] = {}
    for name, members in groups.items():
        layers[name] = {
            "gradient_norm": float(np.sqrt(gradients[members].sum())),
            "weight_norm": float(np.sqrt(sizes[members].sum())),
        }
        own = [rates[i] for i in members if i in rates]
        if own:
            layers[name]["trust_ratio"] = [min(own), float(np.median(own)), max(own)]
    return {"gradient_norm": float(np.sqrt(gradients.sum())), "layers": layers}


def local_rates(norms: NDArray[np.float64], optimizer: Any) -> dict[int, float]:
    """Return LARS's local rates (`hpctrain.optim.LARS`) by the position of the weights that have one."""
    if not isinstance(optimizer, LARS) or optimizer.adapt != "gradient" or optimizer.clip:
        return {}
    found = {}
    for i, (square, weight_square, product) in enumerate(norms.T.tolist()):
        if not optimizer._trusted[i]:
            continue
        decay, weight = optimizer._decays[i], weight_square**0.5
        if optimizer.norm == "combined":  # |g + wd w|^2
            below = norm = max(0.0, square + 2 * decay * product + decay**2 * weight_square) ** 0.5
        else:
            norm = square**0.5
            below = norm + decay * weight
        found[i] = optimizer.trust_coefficient * weight / (below + optimizer.epsilon) if weight and norm else 1.0
    return found
