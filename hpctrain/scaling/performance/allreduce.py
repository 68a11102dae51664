"""What an allreduce costs: rounds of messages, each alpha + n beta, and gamma for every byte that is added up.

Formulas: R. Thakur, R. Rabenseifner, W. Gropp, "Optimization of Collective Communication Operations in MPICH", IJHPCA
19(1), 2005, section 4 (recursive doubling, recursive halving and doubling, ranks that are no power of two);
P. Patarasuk, X. Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", JPDC 69(2), 2009 (ring).

An algorithm is a list of rounds that follow each other. In a round every rank sends and receives at the same time. All
arithmetic is exact on fractions.Fraction.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache


@dataclass(frozen=True)
class Link:
    """A message of n bytes takes alpha + n beta seconds, adding n bytes to n others gamma n."""

    alpha_seconds: float
    beta_seconds_per_byte: float
    gamma_seconds_per_byte: float = 0.0


@dataclass(frozen=True)
class Network:
    """The links between and within nodes, and how many ranks a node has: ranks of a node are neighbors."""

    between: Link
    within: Link
    ranks_per_node: int = 1


@dataclass(frozen=True)
class Round:
    """What each rank does `count` times: exchange `sent_bytes` with a rank at `distance`, add `reduced_bytes`.

    In a ring one rank of a node has its neighbor on another node; in an exchange over a distance of a node's ranks and
    more all of them do, and share its link. `distance` 0 stands for exchanges with every other rank in turn.
    """

    sent_bytes: float
    reduced_bytes: float
    distance: int
    count: int = 1
    in_ring: bool = False


@lru_cache(maxsize=4096, typed=True)
def ring(ranks: int, num_bytes: float) -> tuple[Round, ...]:
    """P - 1 steps of reduce-scatter and P - 1 of allgather, n / P bytes each.

    2(P-1) alpha + 2(P-1)/P n beta + (P-1)/P n gamma.
    """
    if ranks == 1:
        return ()
    piece = num_bytes / ranks
    return Round(piece, piece, 1, ranks - 1, in_ring=True), Round(piece, 0, 1, ranks - 1, in_ring=True)


@lru_cache(maxsize=4096, typed=True)
def recursive_doubling(ranks: int, num_bytes: float) -> tuple[Round, ...]:
    """Exchange the whole vector over distances 1, 2, 4, ...: log2(P) (alpha + n beta + n gamma).

    With P = 2^k + r ranks, r of them first give their vector to a neighbor and get the result from it in the end.
    """
    power = _power_of_two(ranks)
    rounds = tuple(Round(num_bytes, num_bytes, distance) for distance in _doubling(power))
    if ranks == power:
        return rounds
    return Round(num_bytes, num_bytes, 1), *rounds, Round(num_bytes, 0, 1)


@lru_cache(maxsize=4096, typed=True)
def halving_doubling(ranks: int, num_bytes: float) -> tuple[Round, ...]:
    """Rabenseifner's: reduce-scatter by recursive halving, allgather by recursive doubling.

    2 log2(P) alpha + 2(P-1)/P n beta + (P-1)/P n gamma. With P = 2^k + r ranks the first 2r first pair up: each of a
    pair adds one half, then one of them has all of it and goes on, and in the end gives the other one the result.
    """
    power = _power_of_two(ranks)
    halvings, piece = [], num_bytes
    for distance in _doubling(power):
        piece = piece / 2
        halvings.append(Round(piece, piece, distance))
    rounds = (*halvings, *(replace(r, reduced_bytes=0) for r in reversed(halvings)))
    if ranks == power:
        return rounds
    half = num_bytes / 2
    return Round(half, half, 1), Round(half, 0, 1), *rounds, Round(num_bytes, 0, 1)


@lru_cache(maxsize=4096, typed=True)
def scatter_gather(ranks: int, num_bytes: float) -> tuple[Round, ...]:
    """Two-byte numbers on the wire for four-byte ones: all-to-all, each rank adds up its part, ring allgather.

    What the trainer does with `train.compression`; the parts are added in four bytes.
    """
    if ranks == 1:
        return ()
    piece = num_bytes / ranks
    return Round(piece / 2, piece, 0, ranks - 1), Round(piece / 2, 0, 1, ranks - 1, in_ring=True)


def rounds_seconds(rounds: Iterable[Round], ranks: int, network: Network) -> float:
    """Return the time of rounds one after the other, on nodes that are filled with neighboring ranks."""
    return sum((_round_seconds(each, ranks, network) for each in rounds), 0)


def hierarchical_seconds(ranks: int, num_bytes: float, network: Network) -> float:
    """Reduce-scatter among the L ranks of a node, allreduce of n / L bytes between nodes, allgather in the node.

    The L allreduces between nodes go on at the same time and share each node's link; within a node ring steps. When
    the ranks do not fill their nodes evenly it is that of the fullest node.
    """
    local = min(network.ranks_per_node, ranks)
    nodes = -(-ranks // local)
    within = rounds_seconds(ring(local, num_bytes), local, network)
    if nodes == 1:
        return within
    link = network.between
    shared = Link(link.alpha_seconds, link.beta_seconds_per_byte * local, link.gamma_seconds_per_byte)
    between = Network(shared, shared)
    return within + min(rounds_seconds(f(nodes, num_bytes / local), nodes, between) for f in _FLAT.values())


def allreduce_seconds(algorithm: str, ranks: int, num_bytes: float, network: Network) -> float:
    """Return the time of one allreduce of `num_bytes` a rank; `algorithm` is one of ALGORITHMS, or "best" of them."""
    if algorithm == "best":
        return best_algorithm(ranks, num_bytes, network)[1]
    if algorithm == "hierarchical":
        return hierarchical_seconds(ranks, num_bytes, network)
    return rounds_seconds(_FLAT[algorithm](ranks, num_bytes), ranks, network)


def best_algorithm(ranks: int, num_bytes: float, network: Network) -> tuple[str, float]:
    """Return the name and time of the fastest algorithm, which a tuned MPI takes."""
    times = {name: allreduce_seconds(name, ranks, num_bytes, network) for name in ALGORITHMS}
    name = min(times, key=lambda each: times[each])
    return name, times[name]


_FLAT: dict[str, Callable[[int, float], tuple[Round, ...]]] = {
    "ring": ring,
    "recursive_doubling": recursive_doubling,
    "halving_doubling": halving_doubling,
}
ALGORITHMS = (*_FLAT, "hierarchical")


def _round_seconds(each: Round, ranks: int, network: Network) -> float:
    local = network.ranks_per_node
    # Exact where a node's ranks are a power of two, as the distances are; else some of the short ones leave the node.
    stays = ranks <= local or (0 < each.distance < local and not each.in_ring)
    link = network.within if stays else network.between
    sharing = 1 if stays or each.in_ring else local
    message = link.alpha_seconds + each.sent_bytes * link.beta_seconds_per_byte * sharing
    return each.count * (message + each.reduced_bytes * link.gamma_seconds_per_byte)


def _power_of_two(ranks: int) -> int:
    """The largest power of two that is not larger."""
    return 1 << (ranks.bit_length() - 1)


def _doubling(power: int) -> list[int]:
    return [1 << k for k in range(power.bit_length() - 1)]
