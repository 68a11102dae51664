"""Small real images and data sets made of them."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from hpctrain.data.hashing import hash64
from hpctrain.parallel.launch import Place, Plan
from hpctrain.parallel.world import World

# The same examples in every run, however slow the machine is and whatever failed on it before.
settings.register_profile("hpctrain", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("hpctrain")


def image_bytes(number: int, height: int = 24, width: int = 32, mode: str = "RGB", format: str = "JPEG") -> bytes:
    """An image file whose content follows from its number alone."""
    coarse = (hash64(number, np.arange(48)) % np.uint64(256)).astype(np.uint8).reshape(4, 4, 3)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format)
    return buffer.getvalue()


@pytest.fixture
def make_image() -> Callable[..., bytes]:
    return image_bytes


@pytest.fixture
def lone_world() -> World:
    """The world of a single rank, without MPI."""
    place = Place("node7", (0,), (0,), {0: 0})
    return World(0, 1, "node7", (place,), (Plan(1, (0,), "all CPUs allowed"),), None, "No MPI 1.0")


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[..., tuple[Path, list[bytes], list[int]]]:
    """Write a split with ShardWriter; returns its directory, the records and the labels."""

    def make(records: int = 20, shards: int = 4, split: str = "train") -> tuple[Path, list[bytes], list[int]]:
        from hpctrain.data import ShardWriter

        blobs = [image_bytes(i, 16 + i % 5, 16 + i % 3) for i in range(records)]
        labels = [i % 3 for i in range(records)]
        with ShardWriter(tmp_path / "data", split, records, shards, ["cat", "cow", "dog"]) as writer:
            for i, (blob, label) in enumerate(zip(blobs, labels, strict=True)):
                writer.add(blob, label, f"dir/image{i}.jpg")
        return tmp_path / "data" / split, blobs, labels

    return make
