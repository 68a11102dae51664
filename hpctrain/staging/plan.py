"""Which shards a node needs, and which ranks bring them there: pure functions of sizes, hosts and what is missing."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from hpctrain.data.manifest import Manifest
from hpctrain.data.order import partition_bounds
from hpctrain.errors import UserError


@dataclass(frozen=True)
class Node:
    """A host and the ranks that run there, in rising order. The first of them speaks for the node."""

    host: str
    ranks: tuple[int, ...]

    @property
    def leader(self) -> int:
        return self.ranks[0]


@dataclass(frozen=True)
class Transfer:
    """One shard's way to the nodes that lack it: `reader` reads it, and it and all other `ranks` write it."""

    shard: int
    reader: int
    ranks: tuple[int, ...]  # in rising order, one on each node that lacks the shard


def nodes_of(hosts: Sequence[str]) -> tuple[Node, ...]:
    """Group ranks by their hosts, given by rank; nodes come in the order of their first ranks."""
    ranks: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        ranks.setdefault(host, []).append(rank)
    return tuple(Node(host, tuple(own)) for host, own in ranks.items())


def partitions_of_rank(partitions: int, rank: int, ranks: int) -> range:
    """Return the partitions that rank `rank` of `ranks` reads from.

    A rank takes the rank-th contiguous part of a global batch that is laid out partition by partition (data/order.py):
    from the share rank/ranks of it to (rank + 1)/ranks, so from partition floor(rank P / R) to partition
    ceil((rank + 1) P / R) - 1, whatever the batch.
    """
    return range(rank * partitions // ranks, -(-(rank + 1) * partitions // ranks))


def shards_of_node(manifest: Manifest, partitions: int, ranks_of_node: Collection[int], ranks: int) -> tuple[int, ...]:
    """Return the numbers of the shards that the `ranks_of_node`, of all `ranks`, read in training; sorted.

    With one partition that is every shard. Raises UserError for a number of partitions the data set cannot have.
    """
    if not 1 <= partitions <= manifest.num_records:
        raise UserError(
            f"--partitions is {partitions}; expected the data.partitions of the training, 1 to {manifest.num_records}"
        )
    bounds = partition_bounds(manifest.num_records, partitions)
    wanted = {p for rank in ranks_of_node for p in partitions_of_rank(partitions, rank, ranks)}
    return _shards_with(manifest, [(int(bounds[p]), int(bounds[p + 1])) for p in wanted])


def evaluation_shards_of_node(
    manifest: Manifest, micro_batch: int, ranks_of_node: Collection[int], ranks: int
) -> tuple[int, ...]:
    """Return the numbers of the shards that the `ranks_of_node` read in an evaluation, sorted.

    The split is cut into micro-batches, of which rank r takes those from floor(r T / R) up to floor((r + 1) T / R).
    """
    total = -(-manifest.num_records // micro_batch)
    runs = [(rank * total // ranks * micro_batch, (rank + 1) * total // ranks * micro_batch) for rank in ranks_of_node]
    return _shards_with(manifest, [(first, min(last, manifest.num_records)) for first, last in runs])


def transfers(missing: Sequence[Collection[int]], nodes: Sequence[Node]) -> tuple[Transfer, ...]:
    """Plan how `missing[n]`, the shards that node n needs and has not, get there; sorted by shard.

    Each shard has one reader in the whole job. A node's ranks take turns, and so do the nodes at reading. Every rank
    goes through its transfers in this order, which is why none waits for another in a circle: of the transfers that
    are not finished, all that take part in the first one have finished those before it.
    """
    nodes_by_shard: dict[int, list[int]] = {}
    for number, shards in enumerate(missing):
        for shard in shards:
            nodes_by_shard.setdefault(shard, []).append(number)
    turns: dict[tuple[int, ...], int] = {}
    plan = []
    for shard, wanting in sorted(nodes_by_shard.items()):
        turn = turns.get(tuple(wanting), 0)
        turns[tuple(wanting)] = turn + 1
        ranks = [nodes[number].ranks[turn % len(nodes[number].ranks)] for number in wanting]
        plan.append(Transfer(shard, ranks[turn % len(ranks)], tuple(sorted(ranks))))
    return tuple(plan)


def _shards_with(manifest: Manifest, runs: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The shards that hold any record of the runs first..last-1."""
    starts = np.array([shard.first_record for shard in manifest.shards], np.int64)
    found: set[int] = set()
    for first, last in runs:
        if last > first:
            low, high = np.searchsorted(starts, [first, last - 1], side="right") - 1
            found.update(range(int(low), int(high) + 1))
    return tuple(sorted(found))
