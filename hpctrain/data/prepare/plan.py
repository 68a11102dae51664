"""What a preparation will make: labels, order, number of shards, and the keys by which finished work is recognized."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.hashing import hash64
from hpctrain.data.prepare.sources import ImageList, Listing
from hpctrain.data.shard import MAX_SHARD_RECORDS, MAX_SHARDS, VERSION, shard_bounds, shard_file_name
from hpctrain.errors import UserError, nearest

_MAX_SHARD_BYTES = 128 << 20
_LEAST_SHARDS = 8  # so that small data sets can be cut into partitions as well
_GUESSED_BYTES_PER_PIXEL = 0.4  # of a photograph as JPEG of quality 90
_GUESSED_ASPECT = 1.33


@dataclass(frozen=True)
class Encoding:
    """What is done to every image: kept (nothing set), scaled down to `resize`, or decoded to `raw_size` squared."""

    resize: int | None = None
    quality: int = 90
    raw_size: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("--resize", self.resize), ("--raw", self.raw_size)):
            if value is not None and not 1 <= value <= 16384:
                raise UserError(f"{name} is {value}; expected a number of pixels from 1 to 16384")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality is {self.quality}; expected 1 to 100")
        if self.resize is not None and self.raw_size is not None:
            raise UserError("--resize and --raw exclude each other; --raw scales images itself")

    @property
    def name(self) -> str:
        return "raw" if self.raw_size else "jpeg"

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        return (self.raw_size, self.raw_size, 3) if self.raw_size else None


@dataclass
class Plan:
    """The whole data set to be: images in their final order, cut into shards."""

    folder: Path
    split: str
    encoding: Encoding
    seed: int
    class_names: list[str]
    images: ImageList  # record i is made from images[i], if none is skipped
    labels: NDArray[np.int32]
    num_shards: int
    planned_shards: int  # the same, unless so many images are skipped that fewer are left than shards
    source_kind: str
    source_digest: str
    skipped: list[str] = field(default_factory=list)  # names of images left out because they cannot be decoded

    @property
    def options(self) -> dict[str, Any]:
        """What the content of the shards follows from; kept in the manifest.

        The kind of source is not among it: the same images are the same shards, in whatever they come.
        """
        return {
            "source_digest": self.source_digest,
            "seed": self.seed,
            "num_shards": self.planned_shards,
            **asdict(self.encoding),
        }

    @property
    def key(self) -> str:
        """A hash of the options: two runs with the same key make the same data set."""
        return _digest([json.dumps([VERSION, self.split, self.class_names, self.options])])

    def file(self, shard: int) -> str:
        return shard_file_name(self.split, shard, self.num_shards)

    def bounds(self) -> list[int]:
        bounds: list[int] = shard_bounds(len(self.images), self.num_shards).tolist()
        return bounds

    def without(self, names: Iterable[str]) -> "Plan":
        """Return the plan that leaves the named images out: the order of the others stays the same."""
        out = set(names)
        kept = [i for i, image in enumerate(self.images) if image.name not in out]
        if not kept:
            raise UserError("none of the images can be decoded")
        return replace(
            self,
            images=self.images.select(kept),
            labels=self.labels[kept],
            num_shards=min(self.num_shards, len(kept)),
            skipped=sorted({*self.skipped, *out}),
        )


def make_plan(
    listing: Listing,
    source_kind: str,
    folder: Path,
    split: str,
    encoding: Encoding,
    seed: int,
    shards: int | None,
    shard_mb: float | None,
    class_names: Sequence[str] | None,
    classes_from: str,
) -> Plan:
    """Work out labels, order and shards. `class_names` comes from `classes_from` (for errors), or from the input."""
    images = listing.images.sorted()
    filled = {images.class_names[c] for c in np.unique(images.class_index)}
    if class_names is None:
        empty = [name for name in listing.class_names if name not in filled]
        if empty:
            raise UserError(
                f"{len(empty)} classes hold no images, the first is {empty[0]!r}; remove their folders or tars, or "
                "give the classes with --classes FILE"
            )
        class_names = listing.class_names
    number = {name: i for i, name in enumerate(class_names)}
    unknown = sorted(filled - set(number))
    if unknown:
        raise UserError(f"class {unknown[0]!r} of the input is not in {classes_from}; {nearest(unknown[0], number)}")
    source_digest = _digest(f"{image.name}\0{image.class_name}\0{image.num_bytes}" for image in images)
    images = images.select(shuffled(len(images), seed))
    num_shards = _number_of_shards(images.num_bytes, encoding, shards, shard_mb)
    return Plan(
        folder=folder,
        split=split,
        encoding=encoding,
        seed=seed,
        class_names=list(class_names),
        images=images,
        labels=np.array([number.get(name, -1) for name in images.class_names], np.int32)[images.class_index],
        num_shards=num_shards,
        planned_shards=num_shards,
        source_kind=source_kind,
        source_digest=source_digest,
    )


def shuffled(num_records: int, seed: int) -> NDArray[np.int64]:
    """Return a permutation int64[num_records] that a seed gives on every machine and in every year: a sort by hash."""
    return np.argsort(hash64(seed, np.arange(num_records, dtype=np.int64)), kind="stable").astype(np.int64)


def _number_of_shards(
    num_bytes: NDArray[np.int64], encoding: Encoding, wanted: int | None, shard_mb: float | None
) -> int:
    """A power of two, which any usual number of partitions divides: the least that makes shards of at most `shard_mb`
    (megabytes; 128 MiB where it is not given, and then 8 shards at least), as far as their size can be foreseen."""
    limit = min(len(num_bytes), MAX_SHARDS)
    if wanted is not None and shard_mb is not None:
        raise UserError("--shards and --shard-mb exclude each other; give the number of shards or the size of one")
    if wanted is not None:
        if not 1 <= wanted <= limit:
            raise UserError(f"--shards is {wanted}; expected 1 to {limit}, the number of images")
        if len(num_bytes) > wanted * MAX_SHARD_RECORDS:
            raise UserError(f"--shards is {wanted}; give more, since a shard may have {MAX_SHARD_RECORDS:,} records")
        return wanted
    if shard_mb is not None and not 0 < shard_mb < math.inf:
        raise UserError(f"--shard-mb is {shard_mb:g}; expected a number of megabytes above 0")
    if encoding.raw_size:
        total = len(num_bytes) * encoding.raw_size**2 * 3
    elif encoding.resize:
        most = int(encoding.resize**2 * _GUESSED_ASPECT * _GUESSED_BYTES_PER_PIXEL)
        total = int(np.minimum(num_bytes, most).sum())
    else:
        total = int(num_bytes.sum())
    most_bytes, shards = (_MAX_SHARD_BYTES, _LEAST_SHARDS) if shard_mb is None else (shard_mb * 1e6, 1)
    while total > shards * most_bytes or len(num_bytes) > shards * MAX_SHARD_RECORDS:
        shards *= 2
    while shards > limit:
        shards //= 2
    return shards


def difference(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Say in words which options two preparations differ in."""
    words = []
    for name, value in wanted.items():
        if made.get(name) != value:
            words.append("other input files" if name == "source_digest" else f"{name} {made.get(name)}, now {value}")
    return "; ".join(words) or "other classes"


def _digest(texts: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(text.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()
