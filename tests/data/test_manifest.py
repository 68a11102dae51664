"""dataset.json: what is valid is kept, what is not is refused in words, and nothing points outside its directory."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpctrain.data import ShardReader
from hpctrain.data.manifest import Manifest, ShardEntry, split_directories
from hpctrain.data.shard import ARRAYS, DataError, shard_bounds, shard_file_name
from hpctrain.errors import UserError


def big_manifest(records: int, shards: int) -> Manifest:
    bounds = shard_bounds(records, shards).tolist()
    entries = []
    for i in range(shards):
        n = bounds[i + 1] - bounds[i]
        offsets = dict.fromkeys(ARRAYS, 2048)
        entries.append(ShardEntry(shard_file_name("train", i, shards), bounds[i], n, 100 * n, 10**9, 20, i, i, offsets))
    return Manifest("train", "jpeg", records, 100 * records, tuple(f"c{i}" for i in range(1000)), tuple(entries))


def test_text_round_trip_and_speed(tmp_path: Path) -> None:
    manifest = big_manifest(1_281_167, 1024)
    assert Manifest.from_json(manifest.to_json()) == manifest
    manifest.save(tmp_path)
    start = time.perf_counter()
    reader = ShardReader(tmp_path)
    assert time.perf_counter() - start < 0.2
    assert reader.manifest == manifest


@given(st.integers(1, 10**12), st.integers(1, 5000))
def test_bounds_follow_the_partition_rule(records: int, shards: int) -> None:
    bounds = shard_bounds(records, shards)
    assert all(int(bounds[s]) == s * records // shards for s in range(0, shards + 1, max(1, shards // 7)))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "dataset.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(version="2.0"), "newer"),
        (lambda d: d.update(version=1), "version is 1"),
        (lambda d: d.update(format="other"), "does not describe a data set"),
        (lambda d: d.update(num_records="20"), "num_records is '20'; expected an integer"),
        (lambda d: d.update(num_records=True), "num_records"),
        (lambda d: d.update(num_records=0), "num_records is 0"),
        (lambda d: d.update(num_records=21), r"shards\[0\]|shards\[3\]"),
        (lambda d: d.pop("num_bytes"), "num_bytes is missing"),
        (lambda d: d.update(num_bytes=1), "not the sum"),
        (lambda d: d.update(class_names=[]), "class_names"),
        (lambda d: d.update(class_names=["a", "a", "b"]), "twice"),
        (lambda d: d.update(encoding="png"), "encoding is 'png'"),
        (lambda d: d.update(encoding="raw"), "image_shape"),
        (lambda d: d.update(shards={}), "shards"),
        (lambda d: d.update(shards=[]), "0 shards"),
        (lambda d: d["shards"].reverse(), r"shards\[0\] should hold"),
        (lambda d: d["shards"][1].update(file=d["shards"][0]["file"]), "listed twice"),
        (lambda d: d["shards"][0].update(num_bytes=10**30), "num_bytes"),
        (lambda d: d["shards"][0].update(file_bytes=10), "file_bytes is 10"),
        (lambda d: d["shards"][0]["array_offsets"].update(data=10**12), r"data is 1000000000000"),
        (lambda d: d["shards"][0]["array_offsets"].update(offsets=-8), "offsets is -8"),
        (lambda d: d["shards"][0].update(array_offsets=None), "array_offsets"),
        *[
            (lambda d, file=file: d["shards"][2].update(file=file), r"shards\[2\]: file is")
            for file in ("../secret.h5", "/etc/passwd", "a/b.h5", "..", "", "a\0b", "..\\x.h5")
        ],
    ],
)
def test_wrong_fields_are_named(make_dataset, change: Callable[[dict[str, Any]], object], message: str) -> None:
    folder, _, _ = make_dataset()
    edit(folder, change)
    with pytest.raises(DataError, match=message):
        Manifest.load(folder)


def test_newer_minor_version_is_read(make_dataset) -> None:
    folder, _, _ = make_dataset()
    edit(folder, lambda d: d.update(version="1.7", something_new=1))
    assert Manifest.load(folder).version == "1.7"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_gives_a_manifest_or_a_data_error(make_text: str, data: st.DataObject) -> None:
    document = json.loads(make_text)
    target: Any = document
    while True:
        keys = list(target) if isinstance(target, dict) else list(range(len(target)))
        key = data.draw(st.sampled_from(keys))
        if not (isinstance(target[key], dict | list) and target[key]) or data.draw(st.booleans()):
            break
        target = target[key]
    scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
    target[key] = data.draw(scalars | st.lists(scalars, max_size=3) | st.dictionaries(st.text(), scalars, max_size=3))
    try:
        manifest = Manifest.from_json(json.dumps(document))
    except DataError:
        return
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.fixture
def make_text(make_dataset) -> str:
    return (make_dataset()[0] / "dataset.json").read_text()


@pytest.mark.parametrize("text", [b"", b"{", b"[" * 100_000, b"\xff\xfe", b"7", b"1" * 10_000])
def test_broken_json(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "dataset.json").write_bytes(text)
    with pytest.raises(DataError, match=r"dataset\.json"):
        Manifest.load(tmp_path)


def test_wrong_directories_teach(make_dataset, tmp_path: Path) -> None:
    folder, _, _ = make_dataset()
    with pytest.raises(UserError, match=r"data has no dataset\.json, but .*train do"):
        Manifest.load(folder.parent)
    with pytest.raises(UserError, match="does not exist"):
        Manifest.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is a file"):
        Manifest.load(folder / "train-00000-of-00004.h5")
    assert Manifest.load(folder / "dataset.json").num_records == 20
    make_dataset(split="val")
    assert [path.name for path in split_directories(folder.parent)] == ["train", "val"]
    (folder / "dataset.json").unlink()
    with pytest.raises(UserError, match="not finished"):
        Manifest.load(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="hpctrain data prepare"):
        split_directories(tmp_path / "empty")
