"""Data sets that somebody else has made: what is read is right or refused, and comes from their own files only."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.data import ShardReader, ShardWriter
from hpctrain.data.info import describe, format_description
from hpctrain.data.manifest import Manifest
from hpctrain.data.shard import INDEX_TYPES, MAX_RECORD_BYTES, MAX_SHARD_RECORDS, DataError, index_checksum
from hpctrain.data.verify import verify
from hpctrain.errors import UserError
from hpctrain.staging.check import shard_problem
from tests.conftest import image_bytes
from tests.security.conftest import HOSTILE_NUMBERS, bounded_memory, mutated_bytes, mutated_json, refused_or

RECORDS = 9
SHARD = "train-00000-of-00002.h5"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split of two shards."""
    root = tmp_path_factory.mktemp("good")
    with ShardWriter(root, "train", RECORDS, 2, ["cat", "dog"]) as writer:
        for i in range(RECORDS):
            writer.add(image_bytes(i, 16, 16), i % 2, f"dir/{i}.jpg")
    return root / "train"


@pytest.fixture(scope="module")
def blobs(good: Path) -> list[bytes]:
    return ShardReader(good).read(range(RECORDS))


@pytest.fixture(scope="module")
def copy(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    """Make a fresh copy of the split, always in the same place."""
    place = tmp_path_factory.mktemp("copy") / "train"

    def make() -> Path:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(good, place)
        return place

    return make


def read_all(folder: Path) -> tuple[list[bytes], list[int]]:
    with ShardReader(folder) as reader:
        everything = np.arange(min(reader.num_records, 1000))
        reader.sizes(everything)
        for record in everything.tolist():
            reader.describe(record)
        return reader.read(everything), reader.labels(everything).tolist()


def document(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "dataset.json").read_text())
    return found


@given(data=st.data())
def test_a_mutated_shard_gives_right_records_or_is_refused(
    data: st.DataObject, good: Path, copy: Callable[[], Path], blobs: list[bytes]
) -> None:
    folder = copy()
    (folder / SHARD).write_bytes(data.draw(mutated_bytes((good / SHARD).read_bytes())))
    found = refused_or(lambda: read_all(folder))
    assert found is None or found == (blobs, [i % 2 for i in range(RECORDS)])
    manifest = Manifest.load(folder)
    refused_or(lambda: shard_problem(folder / SHARD, manifest, 0, records=True))


@given(data=st.data())
@settings(max_examples=120)
def test_a_mutated_manifest_gives_records_with_right_checksums_or_is_refused(
    data: st.DataObject, good: Path, copy: Callable[[], Path], blobs: list[bytes]
) -> None:
    folder = copy()
    changed = data.draw(mutated_json(document(good)))
    (folder / "dataset.json").write_text(json.dumps(changed))
    found = refused_or(lambda: read_all(folder))
    assert found is None or set(found[0]) <= set(blobs)
    refused_or(lambda: format_description(describe(folder)))


@given(data=st.data())
def test_bytes_for_a_manifest(data: st.DataObject, good: Path) -> None:
    text = data.draw(st.one_of(mutated_bytes((good / "dataset.json").read_bytes()), st.binary(max_size=200)))
    refused_or(lambda: Manifest.from_json(text))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"a":' * 100_000,
        '{"format": "hpctrain-shards", "version": "1.0", "num_records": ' + "9" * 5000 + "}",
        '{"format": "hpctrain-shards", "version": "' + "1" * 100_000 + '.0"}',
        '{"format": "hpctrain-shards", "version": "1.0", "class_names": [NaN, Infinity]}',
        "null",
        "\ufeff{}",
    ],
)
def test_odd_manifests_are_refused(text: str) -> None:
    with bounded_memory(), pytest.raises(DataError):
        Manifest.from_json(text)


def with_index(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Change the index arrays of the first shard, and make all checksums right again."""
    manifest = document(folder)
    shard = manifest["shards"][0]
    arrays = {}
    for name, code in INDEX_TYPES.items():
        length = shard["num_records"] + (name == "offsets")
        arrays[name] = np.fromfile(folder / SHARD, code, length, offset=shard["array_offsets"][name])
    change(arrays)
    with open(folder / SHARD, "r+b") as file:
        for name, array in arrays.items():
            file.seek(shard["array_offsets"][name])
            file.write(array.tobytes())
    shard["checksum"] = index_checksum(arrays)
    (folder / "dataset.json").write_text(json.dumps(manifest))


@given(
    name=st.sampled_from(["offsets", "labels", "heights", "widths", "checksums"]),
    place=st.integers(0, 4),
    value=HOSTILE_NUMBERS,
)
def test_an_index_that_lies_with_right_checksums(
    name: str, place: int, value: int, copy: Callable[[], Path], blobs: list[bytes]
) -> None:
    folder = copy()

    def change(arrays: dict[str, np.ndarray]) -> None:
        array = arrays[name]
        array[place % len(array)] = np.array(value & (2 ** (8 * array.itemsize) - 1), np.uint64).astype(array.dtype)

    with_index(folder, change)
    found = refused_or(lambda: read_all(folder))
    assert found is None or (set(found[0]) <= set(blobs) and set(found[1]) <= {0, 1})


def test_images_and_records_beyond_memory_are_refused(copy: Callable[[], Path]) -> None:
    folder = copy()

    def too_many_pixels(arrays: dict[str, np.ndarray]) -> None:
        arrays["heights"][:] = arrays["widths"][:] = 65535

    with_index(folder, too_many_pixels)
    with pytest.raises(DataError, match="more than 134,217,728 pixels"):
        ShardReader(folder).labels([0])


def test_a_sparse_file_does_not_fill_memory(copy: Callable[[], Path]) -> None:
    """A terabyte that takes no room on the disk."""
    folder = copy()
    size = 1 << 40
    os.truncate(folder / SHARD, size)
    good = document(folder)

    def refused(match: str, **fields: int) -> None:
        changed = json.loads(json.dumps(good))
        changed["shards"][0] |= {"file_bytes": size, **fields}
        changed["num_bytes"] = sum(shard["num_bytes"] for shard in changed["shards"])
        (folder / "dataset.json").write_text(json.dumps(changed))
        with bounded_memory(), pytest.raises(DataError, match=match):
            read_all(folder)

    refused("expected 1 to 16777216", num_records=MAX_SHARD_RECORDS + 1, num_bytes=1 << 39)
    last = good["shards"][0]["num_records"]

    def one_large_record(arrays: dict[str, np.ndarray]) -> None:
        arrays["offsets"][last] = MAX_RECORD_BYTES * 3

    good["shards"][0]["num_bytes"] = MAX_RECORD_BYTES * 3
    (folder / "dataset.json").write_text(json.dumps(good))
    with_index(folder, one_large_record)
    good["shards"][0]["checksum"] = document(folder)["shards"][0]["checksum"]
    refused("a record has more than 402,653,184 bytes")


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../train/x.h5", "..", ".", "", "a/b", "a\\b", "a\0b", "x\n", "\x1b[2Jx", "\ud800", "x" * 256],
)
def test_file_names_that_lead_elsewhere_are_refused(name: str, copy: Callable[[], Path]) -> None:
    folder = copy()
    changed = document(folder)
    changed["shards"][0]["file"] = name
    (folder / "dataset.json").write_text(json.dumps(changed))
    with pytest.raises(DataError, match="expected the name of a file in the same directory"):
        ShardReader(folder)


def test_a_link_out_of_the_data_set_is_refused(copy: Callable[[], Path], tmp_path: Path) -> None:
    folder = copy()
    elsewhere = tmp_path / "elsewhere.h5"
    shutil.move(folder / SHARD, elsewhere)
    (folder / SHARD).symlink_to(elsewhere)
    with pytest.raises(DataError, match="a link that leads out of its folder"):
        read_all(folder)
    with pytest.raises(DataError, match="a link that leads out of its folder"):
        shard_problem(folder / SHARD, Manifest.load(folder), 0, records=False)
    report = verify(folder, workers=1)
    assert len(report.bad_shards) == 1 and "leads out of its folder" in report.bad_shards[0]


def test_a_link_inside_the_data_set_is_followed(copy: Callable[[], Path], blobs: list[bytes]) -> None:
    folder = copy()
    (folder / SHARD).rename(folder / "real.h5")
    (folder / SHARD).symlink_to("real.h5")
    assert read_all(folder)[0] == blobs
    linked = folder.parent / "linked"
    linked.unlink(missing_ok=True)
    linked.symlink_to(folder)  # and a link to all of it is the user's own
    assert read_all(linked)[0] == blobs


def test_a_pipe_in_the_place_of_a_shard_does_not_hang(copy: Callable[[], Path]) -> None:
    folder = copy()
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)
    with pytest.raises(UserError, match="is no file"):
        read_all(folder)


def test_names_do_not_reach_the_terminal_as_they_are(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, "train", 1, 1, ["\x1b[2Jcat"]) as writer:
        writer.add(image_bytes(1), 0, "\x1b]0;title\x07.jpg")
    reader = ShardReader(tmp_path / "train")
    assert reader.name(0) == "\x1b]0;title\x07.jpg"  # as it was given
    assert "\x1b" not in reader.describe(0) and "\\x1b]0;title" in reader.describe(0)
    assert "\x1b" not in format_description(describe(tmp_path))
