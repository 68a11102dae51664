"""From record numbers to batches: reads in Python by the batch, all that is done once an image in TensorFlow."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from hpctrain.data.augment import Boxes, central_boxes, training_boxes
from hpctrain.data.decode import make_decoder
from hpctrain.data.order import SampleOrder
from hpctrain.data.reader import ShardReader
from hpctrain.data.record_source import PADDING, BoxRule, RecordSource, Samples


@dataclass
class InputPipeline:
    """Batches of (images float32[micro_batch, S, S, 3] normalized, labels int32[micro_batch]).

    `dataset_from(n)` is the tf.data.Dataset from the n-th batch on. Iterating over the pipeline gives its batches, and
    raises a DataError in plain words where the dataset would raise TensorFlow's error. `bad_records` are the numbers
    of the records that were skipped so far.
    """

    dataset_from: Callable[[int], Any]
    source: RecordSource

    @property
    def bad_records(self) -> set[int]:
        return self.source.bad_records

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        delivered = 0
        while True:
            try:
                for batch in self.dataset_from(delivered):
                    yield batch
                    delivered += 1
                return
            except tf.errors.OpError as error:
                # Only TensorFlow notices an image that cannot be decoded, and a dataset ends with its first error. So
                # where such records are skipped, a new one starts after the last batch that was delivered.
                self.source.skip_or_raise(error)


def training_pipeline(
    reader: ShardReader,
    order: SampleOrder,
    *,
    micro_batch: int,
    image_size: int,
    augmentation: str = "weak",
    crop_fraction: float = 0.875,
    flip: bool = True,
    rank: int = 0,
    ranks: int = 1,
    first_step: int = 1,
    last_step: int | None = None,
    threads: int = 1,
    on_bad_record: str = "error",
    read_ahead_batches: int = 2,
) -> InputPipeline:
    """Return the micro-batches of one rank for the steps first_step..last_step (endless when None), in order."""

    def samples(first_batch: int) -> Iterator[Samples]:
        step, done = divmod(first_batch, max(1, order.global_batch // (ranks * micro_batch)))
        step += first_step
        skipped = done * micro_batch
        while last_step is None or step <= last_step:
            records, epochs = order.batch(step, rank, ranks)
            yield records[skipped:], epochs[skipped:]
            step, skipped = step + 1, 0

    def boxes(
        heights: NDArray[np.int32],
        widths: NDArray[np.int32],
        records: NDArray[np.int64],
        epochs: NDArray[np.int64],
    ) -> tuple[Boxes, NDArray[np.bool_]]:
        return training_boxes(
            augmentation,
            heights,
            widths,
            records,
            epochs,
            order.seed,
            crop_fraction=crop_fraction,
            flip=flip,
        )

    return input_pipeline(
        reader,
        samples,
        boxes,
        micro_batch=micro_batch,
        image_size=image_size,
        threads=threads,
        on_bad_record=on_bad_record,
        read_ahead_batches=read_ahead_batches,
    )


def evaluation_pipeline(
    reader: ShardReader,
    batches: Iterable[int],
    *,
    micro_batch: int,
    image_size: int,
    crop_fraction: float = 0.875,
    threads: int = 1,
    on_bad_record: str = "error",
    read_ahead_batches: int = 2,
) -> InputPipeline:
    """Return the given micro-batches of the data set in its stored order, centrally cropped.

    Micro-batch b holds the records from b * micro_batch on; the last one is filled up with label -1.
    """
    numbers = list(batches)

    def samples(first_batch: int) -> Iterator[Samples]:
        for number in numbers[first_batch:]:
            records = number * micro_batch + np.arange(micro_batch, dtype=np.int64)
            yield np.where(records < reader.num_records, records, PADDING), np.zeros(micro_batch, np.int64)

    def boxes(
        heights: NDArray[np.int32],
        widths: NDArray[np.int32],
        records: NDArray[np.int64],
        epochs: NDArray[np.int64],
    ) -> tuple[Boxes, NDArray[np.bool_]]:
        return central_boxes(heights, widths, crop_fraction), np.zeros(len(records), np.bool_)

    return input_pipeline(
        reader,
        samples,
        boxes,
        micro_batch=micro_batch,
        image_size=image_size,
        threads=threads,
        on_bad_record=on_bad_record,
        read_ahead_batches=read_ahead_batches,
    )


def input_pipeline(
    reader: ShardReader,
    samples: Callable[[int], Iterable[Samples]],
    boxes: BoxRule,
    *,
    micro_batch: int,
    image_size: int,
    threads: int = 1,
    on_bad_record: str = "error",
    read_ahead_batches: int = 2,
) -> InputPipeline:
    """Return batches of the records that `samples` lists, cut out by `boxes`, decoded, resized and normalized.

    `samples(n)` gives pairs (records int64[k], epochs int64[k]) from batch n on; record -1 is padding and gets label
    -1. `boxes` maps (heights, widths, records, epochs) to (boxes int32[n, 4] as top, left, height, width; flips
    bool[n]). The order is kept whatever the number of threads. With `on_bad_record="skip"` a record whose checksum does
    not match, or which cannot be decoded, becomes padding, so that ranks stay in step, and is listed in `bad_records`.
    `read_ahead_batches` batches are made before they are asked for, and the records of as many again are read.
    """
    source = RecordSource(reader, samples, boxes, on_bad_record, read_ahead_batches, threads)
    images: Any = (tf.TensorSpec([None], tf.uint8), tf.TensorSpec([None], tf.int64))
    if reader.encoding == "raw":
        images = tf.TensorSpec([None, *reader.image_shape], tf.uint8)
    rest = (tf.TensorSpec([None], tf.int32), tf.TensorSpec([None, 4], tf.int32), tf.TensorSpec([None], tf.bool))
    decode = make_decoder(reader.encoding, micro_batch, image_size)

    def numbered(*group: Any) -> Any:
        """The group once for each of its batches, with the number of the batch: nothing is copied."""
        labels = group[1]
        batches = tf.data.Dataset.range(tf.size(labels, tf.int64) // micro_batch)
        return tf.data.Dataset.zip((tf.data.Dataset.from_tensors(group).repeat(), batches))

    def to_batch(group: Any, number: Any) -> tuple[Any, Any]:
        images, labels, boxes, flips = group
        first, last = number * micro_batch, (number + 1) * micro_batch
        if reader.encoding == "raw":
            images = images[first:last]
        else:
            packed, offsets = images
            images = packed, offsets[first : last + 1]
        return decode(images, boxes[first:last], flips[first:last]), tf.ensure_shape(labels[first:last], [micro_batch])

    options = tf.data.Options()
    options.deterministic = True
    # A pool of its own: the decoders then share the cores with the training step through the operating system,
    # and do not wait in the queue of its operations.
    options.threading.private_threadpool_size = threads
    options.autotune.enabled = False

    def dataset_from(first_batch: int) -> Any:
        dataset = tf.data.Dataset.from_generator(
            lambda: source.groups(first_batch, micro_batch), output_signature=(images, *rest)
        )
        dataset = dataset.prefetch(1).flat_map(numbered).map(to_batch, num_parallel_calls=threads, deterministic=True)
        return dataset.prefetch(read_ahead_batches).with_options(options)

    return InputPipeline(dataset_from, source)
