"""From record numbers to batches: reads in Python by the block, decoding and resizing in TensorFlow's threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from hpctrain.data.augment import Boxes, central_boxes, training_boxes
from hpctrain.data.native import crop_resize
from hpctrain.data.order import SampleOrder
from hpctrain.data.reader import ShardReader
from hpctrain.data.shard import DataError

MEAN_RGB = (123.675, 116.28, 103.53)  # of ImageNet, in 0..255, as most published ResNet results use
STDDEV_RGB = (58.395, 57.12, 57.375)
PADDING = -1  # record number and label of what fills up a batch and counts for nothing
_CHUNK_RECORDS = 64  # read and handed to TensorFlow at a time

Samples = tuple[NDArray[np.int64], NDArray[np.int64]]  # record numbers (or PADDING) and their epochs
BoxRule = Callable[
    [NDArray[np.int32], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]], tuple[Boxes, NDArray[np.bool_]]
]


@dataclass
class InputPipeline:
    """Batches of (images float32[micro_batch, S, S, 3] normalized, labels int32[micro_batch]).

    `dataset_from(n)` is the tf.data.Dataset from the n-th batch on. Iterating over the pipeline gives its batches, and
    raises a DataError in plain words where the dataset would raise TensorFlow's error. `bad_records` are the numbers
    of the records that were skipped so far.
    """

    dataset_from: Callable[[int], Any]
    source: "_RecordSource"

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
    source = _RecordSource(reader, samples, boxes, on_bad_record)
    signature = (
        tf.TensorSpec([None], tf.string),
        tf.TensorSpec([None], tf.int32),
        tf.TensorSpec([None, 4], tf.int32),
        tf.TensorSpec([None], tf.bool),
    )
    decode = _raw_decoder(reader.image_shape) if reader.encoding == "raw" else _decode_jpeg
    finish = _finisher(image_size)

    def to_image(blob: Any, label: Any, box: Any, flip: Any) -> tuple[Any, Any]:
        return finish(*decode(blob, box), flip), label

    options = tf.data.Options()
    options.deterministic = True
    # A pool of its own: the decoders then share the cores with the training step through the operating system,
    # and do not wait in the queue of its operations.
    options.threading.private_threadpool_size = threads
    options.autotune.enabled = False

    chunks_ahead = max(2, -(-read_ahead_batches * micro_batch // _CHUNK_RECORDS))

    def dataset_from(first_batch: int) -> Any:
        dataset = tf.data.Dataset.from_generator(lambda: source.chunks(first_batch), output_signature=signature)
        dataset = dataset.prefetch(chunks_ahead).unbatch()
        dataset = dataset.map(to_image, num_parallel_calls=threads, deterministic=True)
        return dataset.batch(micro_batch, drop_remainder=True).prefetch(read_ahead_batches).with_options(options)

    return InputPipeline(dataset_from, source)


def _decode_jpeg(blob: Any, box: Any) -> tuple[Any, Any]:
    """Return the pixels of a box, cut out before the inverse transform, and the box in them: all of them."""
    pixels = tf.image.decode_and_crop_jpeg(blob, box, channels=3, dct_method="INTEGER_FAST")
    return pixels, tf.concat([[0, 0], box[2:]], 0)


def _raw_decoder(image_shape: tuple[int, int, int]) -> Callable[[Any, Any], tuple[Any, Any]]:
    def decode(blob: Any, box: Any) -> tuple[Any, Any]:
        return tf.reshape(tf.io.decode_raw(blob, tf.uint8), image_shape), box

    return decode


def _finisher(image_size: int) -> Callable[[Any, Any, Any], Any]:
    """Return (pixels uint8[h, w, 3], box, flip) -> the box resized, mirrored and normalized, float32[S, S, 3]."""
    scale = 1 / np.array(STDDEV_RGB)
    shift = -np.array(MEAN_RGB) * scale
    shape = (image_size, image_size, 3)
    operation = crop_resize()
    if operation is not None:
        attributes = {"size": image_size, "scale": scale.tolist(), "shift": shift.tolist()}
        return lambda pixels, box, flip: tf.ensure_shape(operation(pixels, box, flip, **attributes), shape)
    # As large as an image: multiplying and adding three numbers along the last axis takes four times as long.
    scales = tf.constant(np.broadcast_to(scale, shape), tf.float32)
    shifts = tf.constant(np.broadcast_to(shift, shape), tf.float32)

    def finish(pixels: Any, box: Any, flip: Any) -> Any:
        part = tf.slice(pixels, [box[0], box[1], 0], [box[2], box[3], 3])[tf.newaxis]
        image = tf.raw_ops.ResizeBilinear(images=part, size=[image_size, image_size], half_pixel_centers=True)[0]
        return tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image) * scales + shifts

    return finish


@dataclass
class _RecordSource:
    """The Python side of the pipeline: reads chunks of records and works out their boxes."""

    reader: ShardReader
    samples: Callable[[int], Iterable[Samples]]
    boxes: BoxRule
    on_bad_record: str
    bad_records: set[int] = field(default_factory=set)
    _error: Exception | None = None
    _undecodable: set[int] = field(default_factory=set)
    _recent: deque[NDArray[np.int64]] = field(default_factory=lambda: deque(maxlen=64))

    def chunks(self, first_batch: int) -> Iterator[tuple[Any, ...]]:
        try:
            for records, epochs in self.samples(first_batch):
                for first in range(0, len(records), _CHUNK_RECORDS):
                    part = slice(first, first + _CHUNK_RECORDS)
                    yield self._load(records[part], epochs[part])
        except Exception as error:  # TensorFlow would bury it in a traceback of its own
            self._error = error
            raise

    def _load(self, records: NDArray[np.int64], epochs: NDArray[np.int64]) -> tuple[Any, ...]:
        self._recent.append(records)
        real = np.flatnonzero(records != PADDING)
        wanted = records[real]
        blobs = self.reader.read(wanted, verify=self.on_bad_record == "error")
        if self.on_bad_record == "skip":
            good = self.reader.checksums_ok(wanted, blobs)
            if self._undecodable:
                good &= ~np.isin(wanted, list(self._undecodable))
            self.bad_records.update(wanted[~good].tolist())
            real, wanted = real[good], wanted[good]
            blobs = [blob for blob, ok in zip(blobs, good, strict=True) if ok]
        filler, filler_shape = _padding_image(self.reader)
        out_blobs = np.empty(len(records), object)
        out_blobs.fill(filler)  # np.full would cut off zeros at the end of bytes
        labels = np.full(len(records), PADDING, np.int32)
        heights = np.full(len(records), filler_shape[0], np.int32)
        widths = np.full(len(records), filler_shape[1], np.int32)
        out_blobs[real] = blobs
        labels[real] = self.reader.labels(wanted)
        heights[real], widths[real] = self.reader.sizes(wanted)
        boxes, flips = self.boxes(heights, widths, records, epochs)
        return out_blobs, labels, boxes, flips

    def skip_or_raise(self, error: Exception) -> None:
        """Raise for an error that came out of the dataset, in our words, or note which record to skip from now on."""
        if self._error is not None:
            raise self._error
        if self.reader.encoding == "jpeg":
            for record in np.concatenate(list(self._recent) or [np.zeros(0, np.int64)]).tolist():
                problem = "" if record == PADDING or record in self.bad_records else self._problem_of(record)
                if not problem:
                    continue
                if self.on_bad_record == "skip":
                    self._undecodable.add(record)
                    return
                raise DataError(
                    f"{self.reader.describe(record)} {problem}; run `hpctrain data verify` on the data set and prepare "
                    "it again, or set data.on_bad_record=skip",
                    record,
                ) from error
        raise error

    def _problem_of(self, record: int) -> str:
        """Say what is wrong with a JPEG whose checksum is right, or nothing."""
        (blob,) = self.reader.read([record], verify=False)
        height, width = (int(side[0]) for side in self.reader.sizes([record]))
        try:
            found = tf.image.decode_jpeg(blob, channels=3).shape
        except tf.errors.InvalidArgumentError:
            return "is not a JPEG image that can be decoded"
        if tuple(found[:2]) != (height, width):
            return f"is an image of {found[0]} x {found[1]} pixels, but its index says {height} x {width}"
        return ""


def _padding_image(reader: ShardReader) -> tuple[bytes, tuple[int, int]]:
    """A small gray image in the data set's encoding, and its height and width."""
    if reader.encoding == "raw":
        height, width, channels = reader.image_shape
        return bytes(height * width * channels), (height, width)
    return _padding_jpeg(), (8, 8)


def _padding_jpeg() -> bytes:
    global _PADDING_JPEG
    if _PADDING_JPEG is None:
        _PADDING_JPEG = bytes(tf.io.encode_jpeg(tf.fill([8, 8, 3], tf.constant(128, tf.uint8))).numpy())
    return _PADDING_JPEG


_PADDING_JPEG: bytes | None = None
