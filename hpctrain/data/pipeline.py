"""From record numbers to batches: reads in Python by the block, decoding and resizing in TensorFlow's threads."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from hpctrain.data.augment import Boxes, central_boxes, training_boxes
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

    `dataset` is the tf.data.Dataset itself; iterating over the pipeline gives the same batches, and raises a
    DataError in plain words where the dataset would raise TensorFlow's error.
    """

    dataset: Any
    source: "_RecordSource"

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        try:
            yield from self.dataset
        except tf.errors.OpError as error:
            raise self.source.explain(error) from error


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
) -> InputPipeline:
    """Return the micro-batches of one rank for the steps first_step..last_step (endless when None), in order."""

    def samples() -> Iterator[Samples]:
        step = first_step
        while last_step is None or step <= last_step:
            yield order.batch(step, rank, ranks)
            step += 1

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
) -> InputPipeline:
    """Return the given micro-batches of the data set in its stored order, centrally cropped.

    Micro-batch b holds the records from b * micro_batch on; the last one is filled up with label -1.
    """
    numbers = list(batches)

    def samples() -> Iterator[Samples]:
        for number in numbers:
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
    )


def input_pipeline(
    reader: ShardReader,
    samples: Callable[[], Iterable[Samples]],
    boxes: BoxRule,
    *,
    micro_batch: int,
    image_size: int,
    threads: int = 1,
    on_bad_record: str = "error",
) -> InputPipeline:
    """Return batches of the records that `samples()` lists, cut out by `boxes`, decoded, resized and normalized.

    `samples()` gives pairs (records int64[n], epochs int64[n]); record -1 is padding and gets label -1. `boxes` maps
    (heights, widths, records, epochs) to (boxes int32[n, 4] as top, left, height, width; flips bool[n]). The order is
    kept whatever the number of threads. With `on_bad_record="skip"` a record whose checksum does not match becomes
    padding, so that ranks stay in step, and is listed in `source.bad_records`.
    """
    source = _RecordSource(reader, samples, boxes, on_bad_record)
    signature = (
        tf.TensorSpec([None], tf.string),
        tf.TensorSpec([None], tf.int32),
        tf.TensorSpec([None, 4], tf.int32),
        tf.TensorSpec([None], tf.bool),
    )
    decode = _raw_decoder(reader.image_shape) if reader.encoding == "raw" else _decode_jpeg
    mean = tf.constant(MEAN_RGB, tf.float32)
    scale = 1.0 / tf.constant(STDDEV_RGB, tf.float32)

    def to_image(blob: Any, label: Any, box: Any, flip: Any) -> tuple[Any, Any]:
        pixels = decode(blob, box)[tf.newaxis]
        image = tf.raw_ops.ResizeBilinear(images=pixels, size=[image_size, image_size], half_pixel_centers=True)[0]
        image = tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)
        return (image - mean) * scale, label

    dataset = tf.data.Dataset.from_generator(source.chunks, output_signature=signature)
    dataset = dataset.prefetch(2).unbatch()
    dataset = dataset.map(to_image, num_parallel_calls=threads, deterministic=True)
    dataset = dataset.batch(micro_batch, drop_remainder=True).prefetch(2)
    options = tf.data.Options()
    options.deterministic = True
    # A pool of its own: the decoders then share the cores with the training step through the operating system,
    # and do not wait in the queue of its operations.
    options.threading.private_threadpool_size = threads
    options.autotune.enabled = False
    return InputPipeline(dataset.with_options(options), source)


def _decode_jpeg(blob: Any, box: Any) -> Any:
    return tf.image.decode_and_crop_jpeg(blob, box, channels=3, dct_method="INTEGER_FAST")


def _raw_decoder(image_shape: tuple[int, int, int]) -> Callable[[Any, Any], Any]:
    def decode(blob: Any, box: Any) -> Any:
        image = tf.reshape(tf.io.decode_raw(blob, tf.uint8), image_shape)
        return tf.slice(image, [box[0], box[1], 0], [box[2], box[3], 3])

    return decode


@dataclass
class _RecordSource:
    """The Python side of the pipeline: reads chunks of records and works out their boxes."""

    reader: ShardReader
    samples: Callable[[], Iterable[Samples]]
    boxes: BoxRule
    on_bad_record: str
    bad_records: list[int] = field(default_factory=list)
    _error: Exception | None = None
    _recent: deque[NDArray[np.int64]] = field(default_factory=lambda: deque(maxlen=64))

    def chunks(self) -> Iterator[tuple[Any, ...]]:
        try:
            for records, epochs in self.samples():
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
            self.bad_records.extend(int(record) for record in wanted[~good])
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

    def explain(self, error: Exception) -> Exception:
        """Return what to raise for an error that came out of the dataset: ours as it was, or the record at fault."""
        if self._error is not None:
            return self._error
        if self.reader.encoding == "jpeg":
            for record in np.concatenate(list(self._recent) or [np.zeros(0, np.int64)]):
                problem = "" if record == PADDING or record in self.bad_records else self._problem_of(int(record))
                if problem:
                    return DataError(
                        f"{self.reader.describe(int(record))} {problem}; "
                        "run `hpctrain data verify` on the data set and prepare it again",
                        int(record),
                    )
        return error

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
