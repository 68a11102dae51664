"""Which shards a node needs follows from the sample order, and how they come there from who lacks them."""

from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.data.manifest import Manifest, ShardEntry
from hpctrain.data.order import SampleOrder
from hpctrain.data.shard import shard_bounds
from hpctrain.errors import UserError
from hpctrain.staging import shards_of_node
from hpctrain.staging.plan import Node, evaluation_shards_of_node, nodes_of, partitions_of_rank, transfers


def manifest_of(num_records: int, num_shards: int) -> Manifest:
    bounds = shard_bounds(num_records, num_shards)
    entries = tuple(
        ShardEntry(f"{s}.h5", int(bounds[s]), int(bounds[s + 1] - bounds[s]), 1, 1, 1, 0, 0, {})
        for s in range(num_shards)
    )
    return Manifest("train", "jpeg", num_records, num_shards, ("a",), entries)


def shards_holding(manifest: Manifest, records: set[int]) -> tuple[int, ...]:
    bounds = shard_bounds(manifest.num_records, len(manifest.shards))
    return tuple(sorted(set((np.searchsorted(bounds, sorted(records), side="right") - 1).tolist())))


@pytest.mark.parametrize("num_shards", [8, 13])
@pytest.mark.parametrize("partitions", [1, 4, 8])
@pytest.mark.parametrize("ranks", range(1, 9))
def test_a_node_needs_exactly_what_its_ranks_read(ranks: int, partitions: int, num_shards: int) -> None:
    manifest = manifest_of(130, num_shards)
    order = SampleOrder(130, 8 * ranks, seed=3, partitions=partitions)
    steps = order.total_steps(12)  # a rank that has a part of a partition's share needs some epochs to see all of it
    read = [
        {int(r) for step in range(1, steps + 1) for r in order.batch(step, rank, ranks)[0]} for rank in range(ranks)
    ]
    for own in [*combinations(range(ranks), 1), *combinations(range(ranks), 2), tuple(range(ranks))]:
        wanted = shards_of_node(manifest, partitions, own, ranks)
        assert wanted == shards_holding(manifest, set().union(*(read[rank] for rank in own)))


def test_a_node_reads_the_same_with_any_number_of_ranks_on_it() -> None:
    """So one rank a node may stage for four that train."""
    manifest = manifest_of(1000, 32)
    for partitions in (1, 4, 6, 8):
        for node in range(4):
            alone = shards_of_node(manifest, partitions, [node], 4)
            for each in (2, 3, 4):
                own = range(node * each, (node + 1) * each)
                assert shards_of_node(manifest, partitions, own, 4 * each) == alone


@given(st.integers(1, 40), st.integers(1, 40))
def test_ranks_share_the_partitions_in_order(partitions: int, ranks: int) -> None:
    parts = [partitions_of_rank(partitions, rank, ranks) for rank in range(ranks)]
    assert {p for part in parts for p in part} == set(range(partitions))
    assert all(len(part) >= 1 for part in parts)
    assert all(b.start - a.stop in (-1, 0) for a, b in pairwise(parts))
    if ranks % partitions == 0 or partitions % ranks == 0:
        assert {len(part) for part in parts} == {max(1, partitions // ranks)}


def test_a_number_of_partitions_that_cannot_be() -> None:
    for partitions in (0, 101):
        with pytest.raises(UserError, match=r"--partitions is .*expected .* 1 to 100"):
            shards_of_node(manifest_of(100, 4), partitions, [0], 1)


@given(st.integers(1, 200), st.integers(1, 50), st.integers(1, 9), st.integers(1, 12))
def test_evaluation(num_records: int, micro_batch: int, ranks: int, num_shards: int) -> None:
    manifest = manifest_of(num_records, min(num_records, num_shards))
    total = -(-num_records // micro_batch)
    for rank in range(ranks):
        batches = range(rank * total // ranks, (rank + 1) * total // ranks)
        records = {r for b in batches for r in range(b * micro_batch, min(num_records, (b + 1) * micro_batch))}
        assert evaluation_shards_of_node(manifest, micro_batch, [rank], ranks) == shards_holding(manifest, records)


def test_nodes() -> None:
    assert nodes_of(["b", "b", "a", "b"]) == (Node("b", (0, 1, 3)), Node("a", (2,)))


@given(st.lists(st.tuples(st.integers(1, 4), st.frozensets(st.integers(0, 15))), min_size=1, max_size=6))
def test_every_lack_is_mended_by_one_reader_a_shard(layout: list[tuple[int, frozenset[int]]]) -> None:
    hosts = [f"n{number}" for number, (ranks, _) in enumerate(layout) for _ in range(ranks)]
    nodes, missing = nodes_of(hosts), [shards for _, shards in layout]
    plan = transfers(missing, nodes)
    assert [t.shard for t in plan] == sorted(set().union(*missing)), "each once, in an order that all ranks share"
    for transfer in plan:
        assert transfer.reader in transfer.ranks and list(transfer.ranks) == sorted(set(transfer.ranks))
        receivers = [hosts[rank] for rank in transfer.ranks]
        assert receivers == [node.host for node, lacks in zip(nodes, missing, strict=True) if transfer.shard in lacks]


def test_ranks_and_nodes_take_turns() -> None:
    plan = transfers([range(24)] * 3, nodes_of(["a"] * 4 + ["b"] * 4 + ["c"] * 4))
    reads = [sum(t.reader == rank for t in plan) for rank in range(12)]
    writes = [sum(rank in t.ranks for t in plan) for rank in range(12)]
    assert reads == [2] * 12 and writes == [6] * 12
