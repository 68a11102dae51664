"""Makes one shard in a worker process."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.hdf5 import inspect_shard
from hpctrain.data.images import ImageError, PreparedImage, prepare_jpeg, prepare_raw
from hpctrain.data.manifest import ShardEntry
from hpctrain.data.prepare.plan import Encoding
from hpctrain.data.prepare.sources import ImageList, ImageSource, SourceImage
from hpctrain.data.processes import Count
from hpctrain.data.shard import MAX_RECORD_BYTES, DataError
from hpctrain.data.writer import Record, ShardBuilder
from hpctrain.errors import UserError

SHOWN = 20  # images that are named before the rest is only counted
_ASKED_FOR = ("resized", "decoded")  # conversions that the options ask for; the others are an image's own oddity
_WINDOW_BYTES = 64 << 20


@dataclass(frozen=True)
class ShardTask:
    """One shard to be made. `key` names its content: a finished shard that carries it need not be made again."""

    path: Path
    first_record: int
    images: ImageList
    labels: NDArray[np.int32]
    key: str


@dataclass
class ShardOutcome:
    """A finished shard (None where an image is bad), what was done to its images, and the bad ones with reasons."""

    entry: ShardEntry | None
    conversions: dict[str, int] = field(default_factory=dict)
    converted: list[tuple[str, str]] = field(default_factory=list)  # (what, name) of the first that were odd
    bad: list[tuple[str, str]] = field(default_factory=list)


def make_shard(context: tuple[ImageSource, Encoding, bool], task: ShardTask, count: Count) -> ShardOutcome:
    """Make a shard, or recognize one that an earlier run finished. After a bad image the others are only checked.

    The context is the input, what is done to each image, and whether those that are kept are decoded as a check.
    """
    source, encoding, decode = context
    finished = _finished(task)
    if finished is not None:
        count(len(task.images), already_done=True)
        return finished
    builder = ShardBuilder(task.path, task.first_record, {"encoding": encoding.name, "key": task.key})
    conversions: dict[str, int] = {}
    odd: dict[str, list[int]] = {}  # places in the shard
    bad: list[tuple[str, str]] = []
    try:
        for i, (image, blob) in enumerate(_read_all(source, task.images)):
            try:
                if isinstance(blob, ImageError):
                    raise blob
                prepared = _prepare(blob, encoding, decode)
            except MemoryError:
                raise UserError(
                    f"{image.name} needs more memory than there is; use fewer workers, or give the job more memory"
                ) from None
            except ImageError as error:
                bad.append((image.name, str(error)))
            else:
                if prepared.conversion:
                    conversions[prepared.conversion] = conversions.get(prepared.conversion, 0) + 1
                    if prepared.conversion not in _ASKED_FOR and conversions[prepared.conversion] <= SHOWN:
                        odd.setdefault(prepared.conversion, []).append(i)
                if not bad:
                    label = int(task.labels[i])
                    builder.add(Record(prepared.blob, label, image.name, prepared.height, prepared.width))
            count(1, image.num_bytes)
        if bad:
            return ShardOutcome(None, bad=bad)
        attributes = {
            "conversions": json.dumps(conversions, sort_keys=True),
            "converted": json.dumps(odd, sort_keys=True),
        }
        return ShardOutcome(builder.finish(attributes), conversions, _converted(task, odd))
    finally:
        builder.abort()


def _read_all(source: ImageSource, images: ImageList) -> Iterator[tuple[SourceImage, bytes | ImageError]]:
    """Read images in their order, a window of them at a time by their place in the input: shuffled reads of a disk or
    a parallel file system become a sweep, and no more than a window is held."""
    bytes_before = np.concatenate([[0], np.cumsum(images.num_bytes)])
    start = 0
    while start < len(images):
        end = int(np.searchsorted(bytes_before, bytes_before[start] + _WINDOW_BYTES, side="right")) - 1
        end = max(start + 1, end)
        window = list(images[start:end])
        blobs: list[bytes | ImageError] = [b""] * len(window)
        for i in sorted(range(len(window)), key=lambda i: (window[i].file, window[i].offset, window[i].name)):
            try:
                if window[i].num_bytes > MAX_RECORD_BYTES:
                    raise ImageError(f"it has {window[i].num_bytes:,} bytes; an image may have {MAX_RECORD_BYTES:,}")
                blobs[i] = source.read(window[i])
            except ImageError as error:
                blobs[i] = error
        for i, image in enumerate(window):
            yield image, blobs[i]
            blobs[i] = b""
        start = end


def _prepare(blob: bytes, encoding: Encoding, decode: bool) -> PreparedImage:
    if encoding.raw_size:
        return prepare_raw(blob, encoding.raw_size)
    return prepare_jpeg(blob, encoding.resize, encoding.quality, decode)


def _finished(task: ShardTask) -> ShardOutcome | None:
    if not task.path.exists():
        return None
    with contextlib.suppress(DataError, ValueError):
        entry, attributes = inspect_shard(task.path)
        same = attributes.get("key") == task.key and entry.first_record == task.first_record
        if same and entry.num_records == len(task.images):
            conversions, odd = (json.loads(str(attributes[name])) for name in ("conversions", "converted"))
            return ShardOutcome(entry, conversions, _converted(task, odd))
    return None


def _converted(task: ShardTask, odd: dict[str, list[int]]) -> list[tuple[str, str]]:
    return [(what, task.images[i].name) for what, places in sorted(odd.items()) for i in places]
