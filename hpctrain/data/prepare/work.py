"""Makes one shard in a worker process."""

import contextlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from hpctrain.data.hdf5 import inspect_shard
from hpctrain.data.images import ImageError, PreparedImage, prepare_jpeg, prepare_raw
from hpctrain.data.manifest import ShardEntry
from hpctrain.data.prepare.plan import Encoding
from hpctrain.data.prepare.sources import ImageSource, SourceImage
from hpctrain.data.processes import Count
from hpctrain.data.shard import DataError
from hpctrain.data.writer import Record, ShardBuilder


@dataclass(frozen=True)
class ShardTask:
    """One shard to be made. `key` names its content: a finished shard that carries it need not be made again."""

    path: Path
    first_record: int
    images: list[SourceImage]
    labels: list[int]
    key: str


@dataclass
class ShardOutcome:
    """A finished shard (None where an image is bad), what was done to its images, and the bad ones with reasons."""

    entry: ShardEntry | None
    conversions: dict[str, int] = field(default_factory=dict)
    bad: list[tuple[str, str]] = field(default_factory=list)


def make_shard(context: tuple[ImageSource, Encoding], task: ShardTask, count: Count) -> ShardOutcome:
    """Make a shard, or recognize one that an earlier run finished. After a bad image the others are only checked."""
    source, encoding = context
    finished = _finished(task)
    if finished is not None:
        count(len(task.images), already_done=True)
        return finished
    builder = ShardBuilder(task.path, task.first_record, {"encoding": encoding.name, "key": task.key})
    conversions: dict[str, int] = {}
    bad: list[tuple[str, str]] = []
    try:
        for image, label in zip(task.images, task.labels, strict=True):
            blob = source.read(image)
            try:
                prepared = _prepare(blob, encoding)
            except ImageError as error:
                bad.append((image.name, str(error)))
            else:
                if prepared.conversion:
                    conversions[prepared.conversion] = conversions.get(prepared.conversion, 0) + 1
                if not bad:
                    builder.add(Record(prepared.blob, label, image.name, prepared.height, prepared.width))
            count(1, len(blob))
        if bad:
            return ShardOutcome(None, {}, bad)
        conversions = dict(sorted(conversions.items()))
        return ShardOutcome(builder.finish({"conversions": json.dumps(conversions)}), conversions)
    finally:
        builder.abort()


def _prepare(blob: bytes, encoding: Encoding) -> PreparedImage:
    if encoding.raw_size:
        return prepare_raw(blob, encoding.raw_size)
    return prepare_jpeg(blob, encoding.resize, encoding.quality)


def _finished(task: ShardTask) -> ShardOutcome | None:
    if not task.path.exists():
        return None
    with contextlib.suppress(DataError, ValueError):
        entry, attributes = inspect_shard(task.path)
        same = attributes.get("key") == task.key and entry.first_record == task.first_record
        if same and entry.num_records == len(task.images):
            return ShardOutcome(entry, json.loads(str(attributes["conversions"])))
    return None
