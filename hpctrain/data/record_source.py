"""The Python side of the input pipeline: which records a batch has, their bytes, and the boxes to cut out of them."""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import compress, islice
from typing import Any

import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from hpctrain.data.augment import Boxes
from hpctrain.data.decode import PADDING_GRAY, PADDING_SIZE, padding_jpeg
from hpctrain.data.heap import keep_freed_memory
from hpctrain.data.reader import Buffer, ShardReader, pack, parts
from hpctrain.data.shard import DataError

# TensorFlow takes several batches from Python at once, as each time costs 1 to 2 ms: as many as have this many records
# or bytes, whichever is less.
_GROUP_RECORDS, _GROUP_BYTES = 128, 12 << 20
_GROUPS_BETWEEN = 4  # that are neither read ahead nor decoded: those that wait in TensorFlow and are taken apart

PADDING = -1  # record number and label of what fills up a batch and counts for nothing

Samples = tuple[NDArray[np.int64], NDArray[np.int64]]  # record numbers (or PADDING) and their epochs
BoxRule = Callable[
    [NDArray[np.int32], NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]], tuple[Boxes, NDArray[np.bool_]]
]


@dataclass
class RecordSource:
    """Reads the records of some batches at a time and works out their boxes.

    `threads` are those that decode: what an error of theirs is about is looked for among all batches on their way.
    """

    reader: ShardReader
    samples: Callable[[int], Iterable[Samples]]
    boxes: BoxRule
    on_bad_record: str
    read_ahead_batches: int
    threads: int
    bad_records: set[int] = field(default_factory=set)
    _error: Exception | None = None
    _undecodable: set[int] = field(default_factory=set)
    _recent: deque[NDArray[np.int64]] = field(default_factory=deque)

    def groups(self, first_batch: int, micro_batch: int) -> Iterator[tuple[Any, ...]]:
        """Yield (images, labels int32[k], boxes int32[k, 4], flips bool[k]) of several batches, from `first_batch` on.

        k is a multiple of `micro_batch`. `images` are k JPEG files as a ShardReader packs them, or uint8[k, height,
        width, 3] where they are raw.
        """
        keep_freed_memory()
        readers = ThreadPoolExecutor(self.read_ahead_batches, "read")
        loading: deque[Future[tuple[Any, ...]]] = deque()
        try:
            # Several groups are read at once: a parallel file system answers slowly, but many requests at a time.
            for records, epochs in self._samples_of_groups(first_batch, micro_batch):
                self._recent.append(records)
                while len(self._recent) > 2 * self.read_ahead_batches + self.threads + _GROUPS_BETWEEN:
                    self._recent.popleft()
                loading.append(readers.submit(self._load, records, epochs))
                if len(loading) > self.read_ahead_batches:
                    yield loading.popleft().result()
            while loading:
                yield loading.popleft().result()
        except Exception as error:  # TensorFlow would bury it in a traceback of its own
            self._error = error
            raise
        finally:
            readers.shutdown(wait=False, cancel_futures=True)

    def _samples_of_groups(self, first_batch: int, micro_batch: int) -> Iterator[Samples]:
        manifest = self.reader.manifest
        most = min(_GROUP_RECORDS, _GROUP_BYTES * manifest.num_records // manifest.num_bytes)
        batches = self._samples_of_batches(first_batch, micro_batch)
        while group := list(islice(batches, max(1, most // micro_batch))):
            records, epochs = zip(*group, strict=True)
            yield np.concatenate(records), np.concatenate(epochs)

    def _samples_of_batches(self, first_batch: int, micro_batch: int) -> Iterator[Samples]:
        for records, epochs in self.samples(first_batch):
            for first in range(0, len(records), micro_batch):
                yield records[first : first + micro_batch], epochs[first : first + micro_batch]

    def _load(self, records: NDArray[np.int64], epochs: NDArray[np.int64]) -> tuple[Any, ...]:
        real = np.flatnonzero(records != PADDING)
        images, good = self._read(records, real)
        real = real[good]
        labels = np.full(len(records), PADDING, np.int32)
        heights, widths = np.full((2, len(records)), PADDING_SIZE, np.int32)
        labels[real] = self.reader.labels(records[real])
        heights[real], widths[real] = self.reader.sizes(records[real])
        boxes, flips = self.boxes(heights, widths, records, epochs)
        return images, labels, boxes, flips

    def _read(self, records: NDArray[np.int64], real: NDArray[np.int64]) -> tuple[Any, NDArray[np.bool_]]:
        """Return the images of a group, with padding where a record is not real or not good, and which are good."""
        wanted, verify = records[real], self.on_bad_record == "error"
        packed, offsets = self.reader.read_packed(wanted, verify)
        good = np.ones(len(wanted), np.bool_)
        if not verify:
            good = self.reader.checksums_ok(wanted, parts(packed, offsets))
            if self._undecodable:
                good &= ~np.isin(wanted, list(self._undecodable))
            self.bad_records.update(wanted[~good].tolist())
        if len(wanted) < len(records) or not good.all():
            images: list[Buffer] = [self._padding()] * len(records)
            for place, image in zip(real[good].tolist(), compress(parts(packed, offsets), good), strict=True):
                images[place] = image
            packed, offsets = pack(images)
        if self.reader.encoding == "raw":
            return packed.reshape(len(records), *self.reader.image_shape), good
        return (packed, offsets), good

    def _padding(self) -> bytes:
        if self.reader.encoding == "raw":
            return bytes([PADDING_GRAY]) * math.prod(self.reader.image_shape)
        return padding_jpeg()

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
