"""What was written is what is read, whatever the order, the thread and the sizes; what is damaged is named."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpctrain.data import ShardReader, ShardWriter
from hpctrain.data.manifest import Manifest
from hpctrain.data.reader import pack
from hpctrain.data.shard import DataError, shard_bounds
from hpctrain.errors import UserError


@settings(max_examples=30, deadline=None)
@given(blobs=st.lists(st.binary(min_size=1, max_size=300), min_size=1, max_size=30), data=st.data())
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, blobs: list[bytes], data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("round")
    n = len(blobs)
    shards = data.draw(st.integers(1, n))
    labels = data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n))
    names = data.draw(
        st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=9), min_size=n, max_size=n)
    )
    with ShardWriter(folder, "train", n, shards, list("abcde")) as writer:
        for i in range(n):
            assert writer.add(blobs[i], labels[i], names[i], height=i + 1, width=2 * i + 1) == i
    wanted = data.draw(st.lists(st.integers(0, n - 1), max_size=60))
    with ShardReader(folder / "train", max_open_files=2) as reader:
        assert (reader.num_records, reader.num_classes, len(reader)) == (n, 5, n)
        assert reader.read(np.array(wanted, np.int64)) == [blobs[i] for i in wanted]
        assert reader.labels(np.array(wanted, np.int64)).tolist() == [labels[i] for i in wanted]
        heights, widths = reader.sizes(np.array(wanted, np.int64))
        assert heights.tolist() == [i + 1 for i in wanted] and heights.dtype == np.int32
        assert widths.tolist() == [2 * i + 1 for i in wanted]
        assert [reader.name(i) for i in range(n)] == names


def test_hdf5_library_sees_the_same(make_dataset) -> None:
    folder, blobs, labels = make_dataset(records=10, shards=3)
    manifest = Manifest.load(folder, check_files=True)
    bounds = shard_bounds(10, 3)
    for number, shard in enumerate(manifest.shards):
        with h5py.File(folder / shard.file, locking=False) as file:
            offsets = file["offsets"][:]
            stored = file["data"][:].tobytes()
            found = [stored[a:b] for a, b in pairwise(offsets)]
            assert found == blobs[bounds[number] : bounds[number + 1]]
            assert file["ids"][:].tolist() == list(range(bounds[number], bounds[number + 1]))
            assert file["labels"][:].tolist() == labels[bounds[number] : bounds[number + 1]]
            assert file["data"].id.get_offset() == shard.data_offset


def test_large_data_starts_at_a_page_and_files_are_reproducible(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with ShardWriter(tmp_path / name, "train", 2, 1, ["x"]) as writer:
            writer.add(b"\1" * 70000, 0, "one", 5, 5)
            writer.add(b"\2" * 70000, 0, "two", 5, 5)
    manifest = Manifest.load(tmp_path / "a" / "train")
    assert manifest.shards[0].data_offset % 4096 == 0
    file = Path("train") / manifest.shards[0].file
    assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_shard_larger_than_memory_goes_through_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hpctrain.data.writer._MEMORY_BYTES", 1000)
    with ShardWriter(tmp_path, "train", 30, 1, ["x"]) as writer:
        for i in range(30):
            writer.add(bytes([i]) * 500, 0, height=1, width=1)
    assert ShardReader(tmp_path / "train").read(np.arange(30)) == [bytes([i]) * 500 for i in range(30)]
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == ["dataset.json", "train-00000-of-00001.h5"]


def test_raw_images(tmp_path: Path) -> None:
    images = np.arange(3 * 4 * 5 * 3, dtype=np.uint8).reshape(3, 4, 5, 3)
    with ShardWriter(tmp_path, "val", 3, 2, ["x"], "raw", image_shape=(4, 5, 3)) as writer:
        for image in images:
            writer.add(image, 0)
        with pytest.raises(UserError, match="one more"):
            writer.add(images[0], 0)
    reader = ShardReader(tmp_path / "val")
    assert reader.encoding == "raw" and reader.image_shape == (4, 5, 3)
    found = [np.frombuffer(blob, np.uint8).reshape(reader.image_shape) for blob in reader.read([2, 0, 1])]
    assert np.array_equal(found, images[[2, 0, 1]])


def test_from_a_manifest_in_the_first_directory_that_has_the_shard(make_dataset, tmp_path: Path) -> None:
    folder, blobs, _ = make_dataset(records=8, shards=2)
    manifest = Manifest.from_json(Manifest.load(folder).to_json())
    staged = tmp_path / "staged"
    staged.mkdir()
    (folder / manifest.shards[1].file).rename(staged / manifest.shards[1].file)
    reader = ShardReader(manifest, [staged, folder])
    assert reader.read(np.arange(8)) == blobs
    assert str(staged) in reader.describe(7) and "dir/image7.jpg" in reader.describe(7)


def test_packed_records_lie_one_after_the_other(make_dataset) -> None:
    folder, blobs, _ = make_dataset(records=20, shards=3)
    wanted = [4, 19, 5, 5, 0, 6]
    packed, offsets = ShardReader(folder).read_packed(wanted)
    assert packed.dtype == np.uint8 and offsets.dtype == np.int64
    assert packed.tobytes() == b"".join(blobs[i] for i in wanted)
    assert offsets.tolist() == np.cumsum([0, *(len(blobs[i]) for i in wanted)]).tolist()
    again, same = pack([blobs[i] for i in wanted])
    assert np.array_equal(again, packed) and np.array_equal(same, offsets)


def test_consecutive_records_take_one_read(make_dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, blobs, _ = make_dataset(records=40, shards=2)
    reader = ShardReader(folder)
    reader.labels(np.arange(40))
    sizes = []
    real = os.preadv

    def noted(fd: int, buffers: list[memoryview], offset: int) -> int:
        sizes.append(sum(map(len, buffers)))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", noted)
    mixed = np.array([7, 5, 6, 8, 30, 31])
    assert reader.read(mixed) == [blobs[i] for i in mixed]
    assert sizes == [sum(map(len, blobs[5:9])), sum(map(len, blobs[30:32]))]


def test_opening_touches_no_shard(make_dataset) -> None:
    folder, _, _ = make_dataset(records=8, shards=2)
    for path in folder.glob("*.h5"):
        path.unlink()
    reader = ShardReader(folder)
    with pytest.raises(DataError, match=r"train-00000-of-00002.h5 is missing"):
        reader.read([0])
    with pytest.raises(DataError, match=r"train-00000-of-00002.h5"):
        Manifest.load(folder, check_files=True)


def test_many_threads_few_open_files(make_dataset) -> None:
    folder, blobs, labels = make_dataset(records=60, shards=12)
    reader = ShardReader(folder, max_open_files=2)

    def task(seed: int) -> bool:
        records = np.random.default_rng(seed).integers(0, 60, 40)
        good = reader.read(records) == [blobs[i] for i in records]
        return good and reader.labels(records).tolist() == [labels[i] for i in records]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(task, range(60)))
    assert len(reader._files) <= 2


def test_short_reads_and_passing_errors(make_dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, blobs, _ = make_dataset()
    monkeypatch.setattr("hpctrain.data.reader._FIRST_WAIT_SECONDS", 0.0)
    real, calls = os.preadv, [0]

    def unreliable(fd: int, buffers: list[memoryview], offset: int) -> int:
        calls[0] += 1
        if calls[0] % 8 == 3:
            raise OSError(errno.EIO, "Input/output error")
        return real(fd, [buffers[0][:1000]], offset)

    monkeypatch.setattr(os, "preadv", unreliable)
    assert ShardReader(folder).read([3, 4, 17]) == [blobs[3], blobs[4], blobs[17]]

    def broken(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(
        DataError, match=r"cannot read shard .*00003.*at byte \d+: Input/output error \(errno 5, 3 tries"
    ):
        ShardReader(folder).read([17])


def test_flipped_byte_is_named(make_dataset) -> None:
    folder, blobs, _ = make_dataset()
    shard = Manifest.load(folder).shards[1]
    with (folder / shard.file).open("r+b") as file:
        file.seek(shard.data_offset + len(blobs[5]) + len(blobs[6]) + 40)  # inside record 7
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    reader = ShardReader(folder)
    with pytest.raises(
        DataError, match=r"record 7 of .*train-00001-of-00004.h5 \(made from dir/image7.jpg\)"
    ) as caught:
        reader.read(np.arange(20))
    assert caught.value.record == 7
    unchecked = reader.read(np.arange(20), verify=False)
    assert np.flatnonzero(~reader.checksums_ok(np.arange(20), unchecked)).tolist() == [7]


def test_truncated_and_exchanged_shards(make_dataset) -> None:
    folder, _, _ = make_dataset()
    first, second = (folder / f"train-{i:05d}-of-00004.h5" for i in (0, 1))
    content = first.read_bytes()
    first.write_bytes(content[:-10])
    with pytest.raises(DataError, match=f"has {len(content) - 10} bytes.*cut off"):
        ShardReader(folder).read([0])
    first.write_bytes(second.read_bytes()[: len(content)].ljust(len(content), b"\0"))
    with pytest.raises(DataError, match=r"does not match dataset.json"):
        ShardReader(folder).read([0])


def test_labels_out_of_range_are_refused(make_dataset) -> None:
    folder, _, _ = make_dataset()
    manifest = replace(Manifest.load(folder), class_names=("cat", "cow"))
    with pytest.raises(DataError, match=r"labels are outside 0\.\.1, the first is 2"):
        ShardReader(manifest, folder).labels([0])
    with pytest.raises(IndexError):
        ShardReader(manifest, folder).read([20])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1), value=st.integers(0, 255), length=st.integers(1, 9))
def test_damaged_bytes_give_other_records_or_an_error_never_wrong_bytes(
    damaged_set: tuple[Path, list[bytes]], place: float, value: int, length: int
) -> None:
    folder, blobs = damaged_set
    path = folder / "train-00000-of-00001.h5"
    content = path.read_bytes()
    start = int(place * (len(content) - length))
    try:
        path.write_bytes(content[:start] + bytes([value]) * length + content[start + length :])
        try:
            assert ShardReader(folder).read(np.arange(len(blobs))) == blobs
        except DataError as error:
            assert path.name in str(error)
    finally:
        path.write_bytes(content)


@pytest.fixture
def damaged_set(make_dataset, tmp_path: Path) -> tuple[Path, list[bytes]]:
    folder, blobs, _ = make_dataset(records=6, shards=1)
    return folder, blobs


def test_incomplete_and_wrong_use_of_the_writer(tmp_path: Path, make_image) -> None:
    with (
        pytest.raises(UserError, match="only 1 were added"),
        ShardWriter(tmp_path, "train", 2, 1, ["x"]) as writer,
    ):
        writer.add(make_image(0), 0)
    with pytest.raises(UserError, match=r"no dataset.json"):
        ShardReader(tmp_path / "train")
    with ShardWriter(tmp_path, "train", 2, 2, ["x"]) as writer:
        writer.add(make_image(0), 0)
        for wrong, label, message in [
            (b"text", 0, "not a JPEG"),
            (make_image(0), 1, "label 1"),
            (b"", 0, "not a JPEG"),
        ]:
            with pytest.raises(UserError, match=message):
                writer.add(wrong, label)
        writer.add(make_image(1), 0)
    with pytest.raises(UserError, match="already holds"):
        ShardWriter(tmp_path, "train", 2, 2, ["x"])
    with ShardWriter(tmp_path, "train", 1, 1, ["x"], overwrite=True) as writer:
        writer.add(make_image(0), 0)
    assert sorted(path.name for path in (tmp_path / "train").iterdir()) == ["dataset.json", "train-00000-of-00001.h5"]
    with pytest.raises(UserError, match="num_shards is 3"):
        ShardWriter(tmp_path, "val", 2, 3, ["x"])
