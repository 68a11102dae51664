"""Which record is read when: a pure function of the data set's size and the configuration, never of the rank count.

The records 0..N-1 are cut into `partitions` contiguous ranges. Each partition is an endless stream of its own records,
shuffled anew for every pass over them, and every global batch takes an equal share of each stream, laid out partition
by partition. Rank r of R works on the r-th contiguous R-th of each global batch. So with partitions = 1 the order is a
full global shuffle, and with partitions = nodes a node only ever reads its own partition's shards.

Streams do not stop at the end of an epoch: when the global batch does not divide the data set, a batch takes the last
records of one pass and the first of the next. No record is dropped or padded, and a pass reads each record once.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.hashing import hash64
from hpctrain.errors import UserError

_BLOCKS, _RECORDS = 1, 2  # what a hash is for, so that the two shuffles are independent


def partition_bounds(num_records: int, partitions: int) -> NDArray[np.int64]:
    """Return int64[partitions + 1]: partition p holds the records from bounds[p] up to, not including, bounds[p + 1].

    Shards are cut by the same rule, so partitions begin at shard boundaries when their number divides the shards'.
    """
    return np.arange(partitions + 1, dtype=np.int64) * num_records // partitions


def shuffled(first: int, last: int, seed: int, epoch: int, shuffle_block: int = 1) -> NDArray[np.int64]:
    """Return the records first..last-1 in the order in which one pass reads them, as int64[last - first].

    Blocks of `shuffle_block` neighboring records are put in random order and the records of a block are shuffled
    among themselves: a block is still one contiguous piece of a file. Block 1 is a full shuffle.
    """
    records = np.arange(first, last, dtype=np.int64)
    if shuffle_block == 1:
        return records[np.argsort(hash64(seed, _RECORDS, epoch, records), kind="stable")]
    block = (records - first) // shuffle_block
    block_keys = hash64(seed, _BLOCKS, epoch, first, np.arange(block[-1] + 1))
    rank_of_block = np.argsort(np.argsort(block_keys, kind="stable"), kind="stable")
    return records[np.lexsort((hash64(seed, _RECORDS, epoch, records), rank_of_block[block]))]


@dataclass
class SampleOrder:
    """The order of one run. Raises UserError when the global batch does not divide over the partitions."""

    num_records: int
    global_batch: int
    seed: int = 0
    partitions: int = 1
    shuffle_block: int = 1
    # The last pass that was computed for each partition: the steps of a run come in order, so one is enough.
    _passes: dict[int, tuple[int, NDArray[np.int64]]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for name in ("num_records", "global_batch", "partitions", "shuffle_block"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, expected at least 1")
        if self.partitions > self.num_records:
            raise UserError(
                f"data.partitions is {self.partitions} but the data set has only {self.num_records} records; "
                "choose at most one partition a record"
            )
        if self.global_batch % self.partitions:
            raise UserError(
                f"train.global_batch {self.global_batch} does not divide over data.partitions {self.partitions}; "
                "every global batch takes an equal share of each partition, so choose a divisor of the batch"
            )

    @property
    def share(self) -> int:
        """Records of one partition in one global batch."""
        return self.global_batch // self.partitions

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return (records, epochs) of one rank's slice of global batch `step`, each int64[global_batch / ranks].

        Steps are numbered from 1, epochs (passes over the record's partition) from 0. Raises UserError when the
        global batch does not divide over the ranks.
        """
        if self.global_batch % ranks:
            raise UserError(
                f"train.global_batch {self.global_batch} does not divide over {ranks} ranks; "
                "choose a number of ranks that divides it"
            )
        size = self.global_batch // ranks
        first, last = rank * size, (rank + 1) * size
        records = np.empty(size, np.int64)
        epochs = np.empty(size, np.int64)
        bounds = partition_bounds(self.num_records, self.partitions)
        for partition in range(first // self.share, (last - 1) // self.share + 1):
            low = max(first, partition * self.share)
            high = min(last, (partition + 1) * self.share)
            stream = (step - 1) * self.share + np.arange(low, high) - partition * self.share
            num_records = bounds[partition + 1] - bounds[partition]
            epoch, position = np.divmod(stream, num_records)
            epochs[low - first : high - first] = epoch
            out = records[low - first : high - first]
            for e in range(int(epoch[0]), int(epoch[-1]) + 1):
                here = epoch == e
                out[here] = self._pass(partition, e, bounds)[position[here]]
        return records, epochs

    def _pass(self, partition: int, epoch: int, bounds: NDArray[np.int64]) -> NDArray[np.int64]:
        known = self._passes.get(partition)
        if known is None or known[0] != epoch:
            order = shuffled(int(bounds[partition]), int(bounds[partition + 1]), self.seed, epoch, self.shuffle_block)
            known = self._passes[partition] = (epoch, order)
        return known[1]

    def total_steps(self, epochs: float) -> int:
        """Steps that `epochs` passes take: the smallest number of global batches that covers them."""
        return steps_in(epochs, self.num_records, self.global_batch)


def steps_in(epochs: float, num_records: int, global_batch: int) -> int:
    """Global batches that cover `epochs` passes over `num_records` records, at least 1."""
    samples = round(epochs * num_records, 6)
    return max(1, -int(-samples // global_batch))


def batch_indices(
    num_records: int,
    seed: int,
    epoch: int,
    partitions: int,
    global_batch: int,
    shuffle_block: int = 1,
) -> list[NDArray[np.int64]]:
    """Return the record numbers of one epoch, one int64 array for each global batch that holds any of them.

    Their concatenation is a permutation of 0..num_records-1. Each array has `global_batch` elements, laid out
    partition by partition, except at the ends when the batch does not divide the data set: the batch that straddles
    two epochs then appears in both, each time with the records of that epoch. Rank r of R reads the r-th contiguous
    R-th of a whole batch. This is a view by epoch of what `SampleOrder.batch` gives by step.
    """
    return list(_epoch_batches(SampleOrder(num_records, global_batch, seed, partitions, shuffle_block), epoch))


def _epoch_batches(order: SampleOrder, epoch: int) -> Iterator[NDArray[np.int64]]:
    sizes = np.diff(partition_bounds(order.num_records, order.partitions))
    first_step = int((epoch * sizes // order.share).min()) + 1
    last_step = int((((epoch + 1) * sizes - 1) // order.share).max()) + 1
    for step in range(first_step, last_step + 1):
        records, epochs = order.batch(step)
        if (epochs == epoch).any():
            yield records[epochs == epoch]
