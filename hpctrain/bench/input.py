"""`hpctrain bench input`: how many images a second a rank's input pipeline gives, with nothing behind it."""

import itertools
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hpctrain.data.manifest import Manifest
from hpctrain.data.order import SampleOrder
from hpctrain.data.reader import ShardReader
from hpctrain.errors import UserError

_WARM_UP_BATCHES = 4


@dataclass(frozen=True)
class InputRates:
    """What was measured, one rate a repeat."""

    data: str
    encoding: str
    augmentation: str
    image_size: int
    threads: int
    images_per_second: list[float] = field(default_factory=list)
    megabytes_per_second: float = 0.0  # of records, in the median repeat

    @property
    def median(self) -> float:
        """Median images a second."""
        return statistics.median(self.images_per_second)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return {**asdict(self), "median_images_per_second": self.median}


def measure_input(
    directory: str | os.PathLike[str],
    *,
    augmentation: str = "heavy",
    image_size: int = 224,
    micro_batch: int = 32,
    threads: int = 1,
    seconds: float = 5.0,
    repeats: int = 3,
    shuffle_block: int = 1,
    partitions: int = 1,
    drop_cache: bool = False,
) -> InputRates:
    """Read the training batches of the split in `directory` for `seconds`, `repeats` times, and return the rates.

    It is the pipeline that training uses, in its order, from the records that training would read next. With
    `drop_cache` the shards are first dropped from this node's page cache, so that they come from the file system.
    """
    from hpctrain.data.pipeline import training_pipeline  # TensorFlow, which wrong arguments need not wait for

    manifest = Manifest.load(directory)
    reader = ShardReader(manifest, directory)
    batch = micro_batch * partitions
    if batch > manifest.num_records:
        raise UserError(f"{directory} has {manifest.num_records} records, less than one batch of {batch}")
    if drop_cache:
        drop_from_page_cache([Path(directory) / shard.file for shard in manifest.shards])
    order = SampleOrder(manifest.num_records, batch, partitions=partitions, shuffle_block=shuffle_block)
    pipeline = training_pipeline(
        reader,
        order,
        micro_batch=micro_batch,
        image_size=image_size,
        augmentation=augmentation,
        threads=threads,
    )
    batches = iter(pipeline)
    for _ in itertools.islice(batches, _WARM_UP_BATCHES):
        pass
    rates = [batches_per_second(batches, seconds) * micro_batch for _ in range(repeats)]
    megabytes = statistics.median(rates) * manifest.num_bytes / manifest.num_records / 1e6
    return InputRates(str(directory), reader.encoding, augmentation, image_size, threads, rates, megabytes)


def batches_per_second(batches: Iterator[Any], seconds: float) -> float:
    """Return how many batches a second come out of an iterator in about `seconds`."""
    count = 0
    started = time.perf_counter()
    while (elapsed := time.perf_counter() - started) < seconds:
        next(batches)
        count += 1
    return count / elapsed


def drop_from_page_cache(paths: list[Path]) -> None:
    """Ask the kernel to forget what it has cached of these files; needs no privilege, and is only advice."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
