"""The sample order: every record once a pass, whatever the sizes, and the same on any number of ranks."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hpctrain.data import batch_indices
from hpctrain.data.order import SampleOrder, partition_bounds, shuffled, steps_in
from hpctrain.errors import UserError


@st.composite
def orders(draw: st.DrawFn, batch_multiple: int = 1) -> SampleOrder:
    """Orders of small data sets: batches that divide them or not, and some larger than they are."""
    num_records = draw(st.integers(1, 120))
    partitions = draw(st.integers(1, min(num_records, 6)))
    batch = partitions * draw(st.integers(1, 30 if batch_multiple == 1 else 3)) * batch_multiple
    block = draw(st.sampled_from([1, 2, 3, 7, 200]))
    return SampleOrder(num_records, batch, draw(st.integers(0, 5)), partitions, block)


def stream_of(order: SampleOrder, partition: int, steps: int) -> list[tuple[int, int]]:
    """What a run reads of one partition in its first steps: (record, pass), as the layout of a batch promises."""
    part = slice(partition * order.share, (partition + 1) * order.share)
    stream = []
    for step in range(1, steps + 1):
        records, epochs = order.batch(step)
        stream += list(zip(records[part].tolist(), epochs[part].tolist(), strict=True))
    return stream


@given(orders(), st.integers(0, 3))
def test_every_epoch_is_a_permutation(order: SampleOrder, epoch: int) -> None:
    batches = batch_indices(
        order.num_records, order.seed, epoch, order.partitions, order.global_batch, order.shuffle_block
    )
    assert np.array_equal(np.sort(np.concatenate(batches)), np.arange(order.num_records))
    assert all(0 < len(batch) <= order.global_batch for batch in batches)


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 5), st.integers(0, 3), st.sampled_from([1, 3]))
def test_batches_of_an_epoch_are_the_steps_of_a_run(
    partitions: int, share: int, batches: int, epoch: int, block: int
) -> None:
    """Where the batch divides the data set, an epoch's batches are whole and are those of SampleOrder."""
    batch = partitions * share
    listed = batch_indices(batch * batches, 1, epoch, partitions, batch, block)
    order = SampleOrder(batch * batches, batch, 1, partitions, block)
    assert len(listed) == batches
    for i, records in enumerate(listed):
        assert np.array_equal(records, order.batch(epoch * batches + i + 1)[0])


@given(orders())
def test_a_partition_keeps_to_its_range_and_to_its_place_in_the_batch(order: SampleOrder) -> None:
    bounds = partition_bounds(order.num_records, order.partitions)
    for step in (1, 2, 9):
        records, _ = order.batch(step)
        assert records.dtype == np.int64 and len(records) == order.global_batch
        for p, part in enumerate(np.split(records, order.partitions)):
            assert ((part >= bounds[p]) & (part < bounds[p + 1])).all()


@given(orders(), st.integers(1, 8))
def test_streams_go_on_over_batches_and_passes(order: SampleOrder, steps: int) -> None:
    """A partition's stream is one pass after the other, and each pass has each of its records once."""
    bounds = partition_bounds(order.num_records, order.partitions)
    for p in range(order.partitions):
        size = int(bounds[p + 1] - bounds[p])
        stream = stream_of(order, p, steps)
        assert [epoch for _, epoch in stream] == [i // size for i in range(len(stream))]
        for first in range(0, len(stream) - size + 1, size):
            assert sorted(r for r, _ in stream[first : first + size]) == list(range(bounds[p], bounds[p + 1]))
        assert max(Counter(stream).values()) == 1


@given(orders(batch_multiple=24), st.integers(1, 20))
def test_slices_of_the_ranks_make_up_the_global_batch(order: SampleOrder, step: int) -> None:
    whole = order.batch(step)
    for ranks in (1, 2, 3, 4, 8):
        parts = [order.batch(step, rank, ranks) for rank in range(ranks)]
        assert {len(records) for records, _ in parts} == {order.global_batch // ranks}
        assert np.array_equal(np.concatenate([records for records, _ in parts]), whole[0])
        assert np.array_equal(np.concatenate([epochs for _, epochs in parts]), whole[1])


@given(orders(), st.lists(st.integers(1, 40), min_size=2, max_size=6))
def test_a_batch_does_not_depend_on_what_was_asked_before(order: SampleOrder, steps: list[int]) -> None:
    """So a run that resumes at any step goes on with the exact next sample."""
    for step in steps:
        fresh = SampleOrder(order.num_records, order.global_batch, order.seed, order.partitions, order.shuffle_block)
        assert np.array_equal(order.batch(step), fresh.batch(step))


def test_with_one_partition_a_node_a_rank_reads_its_own_partition_only() -> None:
    order = SampleOrder(1000, 64, partitions=8)
    bounds = partition_bounds(1000, 8)
    for rank in range(8):
        read = np.concatenate([order.batch(step, rank, 8)[0] for step in range(1, 40)])
        assert read.min() == bounds[rank] and read.max() == bounds[rank + 1] - 1


@given(st.integers(0, 50), st.integers(1, 150), st.integers(1, 40), st.integers(0, 3))
def test_blocks_stay_together(first: int, size: int, block: int, epoch: int) -> None:
    """Each block of neighbors, counted from the start of the range, is read as one piece, in some order."""
    records = shuffled(first, first + size, 4, epoch, block)
    assert np.array_equal(np.sort(records), np.arange(first, first + size))
    blocks = (records - first) // block
    assert np.count_nonzero(np.diff(blocks)) == -(-size // block) - 1


@pytest.mark.parametrize("block", [1, 10])
def test_seeds_and_epochs_give_other_orders(block: int) -> None:
    """Both the order of the blocks and the order within a block are drawn anew."""
    orders = [shuffled(0, 1000, seed, epoch, block) for seed in range(4) for epoch in range(4)]
    for i, left in enumerate(orders):
        for right in orders[:i]:
            assert (left == right).mean() < 0.05
    firsts = [tuple(order[::block] // block) for order in orders]
    assert len(set(firsts)) == len(orders)
    if block > 1:
        within = {tuple(order[np.flatnonzero(order // block == 0)]) for order in orders}
        assert len(within) > 10


def test_the_order_is_uniform() -> None:
    """Each record comes to each place equally often over the epochs."""
    places = np.array([np.argsort(shuffled(0, 8, 0, epoch)) for epoch in range(4000)])
    for record in range(8):
        counts = np.bincount(places[:, record], minlength=8)
        assert abs(counts - 500).max() < 6 * np.sqrt(500)


def test_the_order_is_pinned() -> None:
    """Runs are to be repeated for years: a change here changes all of them, and needs a very good reason."""
    assert shuffled(0, 10, 1, 0).tolist() == [1, 7, 9, 4, 5, 2, 6, 0, 3, 8]
    assert shuffled(5, 15, 1, 2, 3).tolist() == [11, 13, 12, 9, 10, 8, 5, 7, 6, 14]
    order = SampleOrder(10, 4, seed=3, partitions=2, shuffle_block=2)
    assert [order.batch(step)[0].tolist() for step in (1, 2, 3)] == [[0, 1, 7, 8], [4, 2, 5, 6], [3, 0, 9, 9]]
    assert [order.batch(step)[1].tolist() for step in (1, 2, 3)] == [[0] * 4, [0] * 4, [0, 1, 0, 1]]


def test_a_batch_that_does_not_divide_over_the_ranks() -> None:
    with pytest.raises(UserError, match=r"global_batch 12 .* 5 ranks"):
        SampleOrder(100, 12).batch(1, 0, 5)


def test_sizes_that_do_not_fit() -> None:
    with pytest.raises(UserError, match=r"global_batch 12 .*partitions 5"):
        SampleOrder(100, 12, partitions=5)
    with pytest.raises(UserError, match=r"partitions is 8 .* only 7 records"):
        SampleOrder(7, 8, partitions=8)
    with pytest.raises(UserError, match="partitions"):
        batch_indices(100, 0, 0, 3, 10)
    for field in ("num_records", "global_batch", "partitions", "shuffle_block"):
        with pytest.raises(UserError, match=f"{field} is 0"):
            SampleOrder(**{"num_records": 10, "global_batch": 2, field: 0})


@given(st.integers(1, 500), st.integers(1, 100), st.integers(1, 20))
def test_the_steps_of_some_epochs_are_the_fewest_that_cover_them(num_records: int, batch: int, tenths: int) -> None:
    epochs = tenths / 10
    steps = steps_in(epochs, num_records, batch)
    assert steps * batch * 10 >= tenths * num_records
    assume(steps > 1)
    assert (steps - 1) * batch * 10 < tenths * num_records
    assert steps == SampleOrder(num_records, batch).total_steps(epochs)


def test_steps_of_imagenet() -> None:
    """90 epochs of 1,281,167 images in batches of 8,192: 14,075.1 batches, so 14,076 steps."""
    assert steps_in(90, 1_281_167, 8192) == 14_076
    assert steps_in(90, 1_281_024, 8192) == 90 * 1_281_024 // 8192 + 1
    assert steps_in(1e-9, 10, 4) == 1


@pytest.mark.parametrize("block", [1, 64])
def test_an_epoch_of_imagenet_is_ordered_in_no_time(block: int) -> None:
    started = time.perf_counter()
    order = SampleOrder(1_281_167, 8192, partitions=1, shuffle_block=block)
    seen = np.zeros(order.num_records, np.int64)
    for step in range(1, 157):
        records, _ = order.batch(step, 3, 8)
        np.add.at(seen, records, 1)
    assert time.perf_counter() - started < 5
    assert seen.max() == 1 and seen.sum() == 156 * 1024
