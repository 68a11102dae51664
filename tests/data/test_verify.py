"""verify names every damaged record and shard; info describes what is there."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest

from hpctrain.data import ShardReader, ShardWriter
from hpctrain.data.info import describe, format_description
from hpctrain.data.manifest import Manifest
from hpctrain.data.verify import verify
from hpctrain.errors import UserError


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x10
    path.write_bytes(content)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_damage_is_found_and_named(make_dataset, workers: int) -> None:
    folder, blobs, _ = make_dataset(records=20, shards=5)
    make_dataset(records=6, shards=2, split="val")
    assert verify(folder.parent, workers).ok and verify(folder.parent, workers).num_records == 26
    shards = Manifest.load(folder).shards
    for record in (1, 3, 9):
        shard = shards[record // 4]
        place = shard.data_offset + sum(map(len, blobs[shard.first_record : record])) + 100
        flip(folder / shard.file, place)
    (folder / shards[3].file).write_bytes((folder / shards[3].file).read_bytes()[:-1])
    flip(folder / shards[4].file, shards[4].array_offsets["labels"])
    report = verify(folder.parent, workers)
    assert [(bad.split, bad.shard, bad.record, bad.name) for bad in report.bad_records] == [
        ("train", shards[record // 4].file, record, f"dir/image{record}.jpg") for record in (1, 3, 9)
    ]
    assert len(report.bad_shards) == 2
    assert shards[3].file in report.bad_shards[0] and "cut off" in report.bad_shards[0]
    assert shards[4].file in report.bad_shards[1] and "index" in report.bad_shards[1]
    assert not report.ok and report.num_shards == 7


def test_every_single_byte_that_matters(make_dataset) -> None:
    """A flipped byte is found wherever something is stored: in records, index, names, ids."""
    folder, _, _ = make_dataset(records=3, shards=1)
    shard = Manifest.load(folder).shards[0]
    path = folder / shard.file
    content = path.read_bytes()
    for name, place in shard.array_offsets.items():
        flip(path, place)
        assert not verify(folder, 1).ok, name
        path.write_bytes(content)
    with h5py.File(path, locking=False) as file:
        assert set(file) == set(shard.array_offsets)
    assert verify(folder, 1).ok


def test_records_that_are_no_images(tmp_path: Path, make_image) -> None:
    whole = make_image(1)
    with ShardWriter(tmp_path, "train", 4, 1, ["x"]) as writer:
        writer.add(whole, 0, "fine")
        writer.add(b"text", 0, "text", 1, 1)
        writer.add(whole, 0, "size", 5, 5)
        writer.add(whole[: len(whole) * 3 // 4], 0, "cut")
    assert [bad.name for bad in verify(tmp_path, 1).bad_records] == ["text", "size"]
    assert [bad.name for bad in verify(tmp_path, 1, decode=True).bad_records] == ["text", "size", "cut"]


def test_info(make_dataset) -> None:
    folder, blobs, _ = make_dataset(records=20, shards=4)
    make_dataset(records=5, shards=1, split="val")
    description = describe(folder.parent)
    json.dumps(description)
    train, val = description["splits"]
    assert (train["split"], val["split"]) == ("train", "val")
    assert (train["num_records"], train["num_shards"], train["num_classes"]) == (20, 4, 3)
    assert train["mean_record_bytes"] == sum(map(len, blobs)) / 20
    assert train["heights"] == {"min": 16, "median": 18.0, "max": 20}
    heights, _ = ShardReader(folder).sizes(np.arange(20))
    assert heights.min() == 16
    assert "cat, cow, dog" in format_description(description)
    with pytest.raises(UserError, match="does not exist"):
        describe(folder.parent / "nothing")
