"""Preparation: the same bytes whatever the workers and interruptions; every kind of bad input named in words."""

import io
import itertools
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from hpctrain.data import ShardReader
from hpctrain.data.commands import data as data_commands
from hpctrain.data.images import ImageError, jpeg_header
from hpctrain.data.manifest import Manifest
from hpctrain.data.prepare.plan import shuffled
from hpctrain.data.prepare.sources import ClassFolders, SourceImage
from hpctrain.errors import UserError
from tests.data.source_inputs import contents, run


def test_jpegs_are_kept_and_all_are_there_once(make_tree, tmp_path: Path) -> None:
    tree = make_tree(classes=3, images=7)
    manifest = run(tree, tmp_path / "out", "train", seed=5)
    reader = ShardReader(tmp_path / "out" / "train")
    assert reader.num_records == 21 and len(manifest.shards) == 8
    assert reader.class_names == ("class0", "class1", "class2")
    names = [reader.name(i) for i in range(21)]
    assert sorted(names) == sorted(str(path.relative_to(tree)) for path in tree.rglob("*.JPEG"))
    assert names != sorted(names)
    assert reader.read(np.arange(21)) == [(tree / name).read_bytes() for name in names]
    assert reader.labels(np.arange(21)).tolist() == [int(name[5]) for name in names]
    assert reader.sizes([0])[1][0] == 20 + 2 * int(names[0][7:10])


def test_same_bytes_with_any_workers_any_place_and_other_bytes_with_another_seed(make_tree, tmp_path: Path) -> None:
    tree = make_tree(classes=2, images=12)
    shutil.copytree(tree, tmp_path / "elsewhere")
    run(tree, tmp_path / "one", "train", resize=16, workers=1)
    run(tmp_path / "elsewhere", tmp_path / "three", "train", resize=16, workers=3)
    run(tree, tmp_path / "seed", "train", resize=16, seed=1)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert contents(tmp_path / "one") != contents(tmp_path / "seed")


def test_shuffle_is_a_permutation_that_never_changes() -> None:
    for seed in (0, 1, -3, 2**40):
        assert sorted(shuffled(1000, seed).tolist()) == list(range(1000))
    assert shuffled(8, 0).tolist() == FROZEN_ORDER  # files made years apart must agree


FROZEN_ORDER = [7, 3, 5, 1, 0, 6, 4, 2]


def test_complete_data_set_is_left_alone_and_other_options_are_refused(make_tree, tmp_path: Path) -> None:
    tree, out = make_tree(), tmp_path / "out"
    run(tree, out, "train", shards=4)
    before = {path: path.stat().st_mtime_ns for path in (out / "train").iterdir()}
    lines: list[str] = []
    run(tree, out, "train", shards=4, quiet=False, echo=lines.append)
    assert "complete already" in lines[-1]
    run(tree, out, "train", shards=4, quiet=False, echo=lines.append, decode=True)
    assert "complete already" in lines[-2] and f"data verify --decode {out / 'train'}" in lines[-1]
    assert {path: path.stat().st_mtime_ns for path in (out / "train").iterdir()} == before
    with pytest.raises(UserError, match=r"num_shards 4, now 2.*--overwrite"):
        run(tree, out, "train", shards=2)
    (tree / "class0" / "new.jpg").write_bytes((tree / "class0" / "000.JPEG").read_bytes())
    with pytest.raises(UserError, match="other input files"):
        run(tree, out, "train", shards=4)
    run(tree, out, "train", shards=2, overwrite=True)
    assert sorted(path.name for path in (out / "train").iterdir()) == [
        "dataset.json",
        "train-00000-of-00002.h5",
        "train-00001-of-00002.h5",
    ]
    (out / "train" / "train-00001-of-00002.h5").unlink()  # a lost shard alone is made again
    first = (out / "train" / "train-00000-of-00002.h5").stat().st_mtime_ns
    run(tree, out, "train", shards=2)
    assert (out / "train" / "train-00000-of-00002.h5").stat().st_mtime_ns == first
    Manifest.load(out / "train", check_files=True)


def test_images_that_are_not_ordinary_jpegs_are_reencoded(make_image, tmp_path: Path) -> None:
    folder = tmp_path / "in" / "a"
    folder.mkdir(parents=True)
    (folder / "gray.jpg").write_bytes(make_image(1, mode="L"))
    (folder / "plain.JPG").write_bytes(make_image(2))
    (folder / "cmyk.jpeg").write_bytes(make_image(3, mode="CMYK"))
    (folder / "really_png.jpg").write_bytes(make_image(4, format="PNG"))
    (folder / "palette.png").write_bytes(make_image(5, mode="P", format="PNG"))
    (folder / "alpha.PNG").write_bytes(make_image(6, mode="RGBA", format="PNG"))
    (folder / "x.bmp").write_bytes(make_image(7, format="BMP"))
    (folder / "x.webp").write_bytes(make_image(8, format="WEBP"))
    (folder / "._plain.JPG").write_bytes(b"hidden")
    (folder / "notes.txt").write_text("ignored")
    lines: list[str] = []
    manifest = run(tmp_path / "in", tmp_path / "out", "train", quiet=False, echo=lines.append)
    assert manifest.prepare["conversions"] == {"BMP": 1, "CMYK JPEG": 1, "PNG": 3, "WEBP": 1}
    assert any("1 other files ignored, for instance a/notes.txt" in line for line in lines)
    reader = ShardReader(tmp_path / "out" / "train")
    blobs = {reader.name(i): reader.read([i])[0] for i in range(8)}
    assert blobs["a/gray.jpg"] == make_image(1, mode="L") and blobs["a/plain.JPG"] == make_image(2)
    for name, number in [("a/really_png.jpg", 4), ("a/x.bmp", 7), ("a/alpha.PNG", 6)]:
        header = jpeg_header(blobs[name])
        assert header.is_ordinary and header.components == 3
        found = np.asarray(Image.open(io.BytesIO(blobs[name])), np.int32)
        expected = np.asarray(Image.open(io.BytesIO(make_image(number, format="PNG"))), np.int32)
        assert np.abs(found - expected).mean() < 4


def test_resize_only_makes_smaller(make_image, tmp_path: Path) -> None:
    folder = tmp_path / "in" / "a"
    folder.mkdir(parents=True)
    (folder / "large.jpg").write_bytes(make_image(1, 301, 200))
    (folder / "small.jpg").write_bytes(make_image(2, 20, 64))
    manifest = run(tmp_path / "in", tmp_path / "out", "train", resize=64)
    assert manifest.prepare["conversions"] == {"resized": 1}
    reader = ShardReader(tmp_path / "out" / "train")
    sizes = {reader.name(i): (int(reader.sizes([i])[0][0]), int(reader.sizes([i])[1][0])) for i in (0, 1)}
    assert sizes == {"a/large.jpg": (96, 64), "a/small.jpg": (20, 64)}
    for i in (0, 1):
        header = jpeg_header(reader.read([i])[0])
        assert (header.height, header.width) == sizes[reader.name(i)]


def test_raw(make_tree, tmp_path: Path) -> None:
    run(make_tree(), tmp_path / "out", "train", raw=16)
    reader = ShardReader(tmp_path / "out" / "train")
    assert reader.image_shape == (16, 16, 3) and {len(blob) for blob in reader.read(np.arange(21))} == {768}


def test_jpegs_that_are_kept_are_decoded_on_request(make_tree, tmp_path: Path) -> None:
    """What header and end do not show: a progressive JPEG with a Huffman table that no decoder accepts."""
    tree = make_tree(classes=2, images=4)
    victim = sorted(tree.rglob("*.JPEG"))[3]
    blob = bytearray(victim.read_bytes())
    table = blob.index(b"\xff\xc4") + 5
    blob[table : table + 16] = bytes([255] * 16)  # more codes than there can be
    victim.write_bytes(blob)
    assert run(tree, tmp_path / "quick", "train").num_records == 8
    with pytest.raises(UserError, match=victim.name):
        run(tree, tmp_path / "careful", "train", decode=True)
    assert run(tree, tmp_path / "careful", "train", decode=True, skip_bad=True).num_records == 7


def test_a_preview_does_not_stand_for_the_end_of_a_cut_off_image(make_tree, tmp_path: Path) -> None:
    tree = make_tree(classes=2, images=4)
    victim = sorted(tree.rglob("*.JPEG"))[5]
    blob = victim.read_bytes()
    preview = b"\xff\xd8\xff\xd9"
    with_preview = blob[:2] + b"\xff\xe1" + (len(preview) + 2).to_bytes(2, "big") + preview + blob[2:]
    victim.write_bytes(with_preview)
    assert run(tree, tmp_path / "whole", "train").num_records == 8
    victim.write_bytes(with_preview[: len(with_preview) * 2 // 3])
    with pytest.raises(UserError, match=victim.name):
        run(tree, tmp_path / "cut", "train")


def test_processes_of_the_caller_are_left_alone(make_tree, tmp_path: Path) -> None:
    own = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
    own.start()
    try:
        run(make_tree(classes=2, images=8), tmp_path / "out", "train", workers=2)
        assert own.is_alive()
    finally:
        own.kill()
        own.join()


def test_val_has_the_classes_of_train(make_tree, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(make_tree("train", classes=4, images=2), out, "train")
    val = make_tree("val", classes=2, images=2)
    (val / "class0").rename(val / "class3")
    run(val, out, "val")
    reader = ShardReader(out / "val")
    assert reader.num_classes == 4 and sorted(set(reader.labels(np.arange(4)).tolist())) == [1, 3]
    (val / "class1").rename(val / "klass1")
    with pytest.raises(UserError, match=r"'klass1' of the input is not in .*train; did you mean class"):
        run(val, out, "val", overwrite=True)


def test_class_list_file(make_tree, tmp_path: Path) -> None:
    tree, listed = make_tree(classes=2), tmp_path / "classes.txt"
    (tree / "empty").mkdir()
    with pytest.raises(UserError, match=r"'empty'.*--classes"):
        run(tree, tmp_path / "out", "train")
    listed.write_text("class1\n\nclass0\nclass9\n")
    run(tree, tmp_path / "out", "train", classes=listed)
    reader = ShardReader(tmp_path / "out" / "train")
    assert reader.class_names == ("class1", "class0", "class9")
    assert all(reader.labels([i])[0] == 1 - int(reader.name(i)[5]) for i in range(reader.num_records))
    listed.write_text("class1\n")
    with pytest.raises(UserError, match=r"'class0' of the input is not in .*classes.txt"):
        run(tree, tmp_path / "out2", "train", classes=listed)


def test_wrong_inputs_teach(make_tree, tmp_path: Path) -> None:
    tree, empty = make_tree("set/train"), tmp_path / "empty"
    empty.mkdir()
    cases: list[tuple[Callable[[], object], str]] = [
        (
            lambda: run(tmp_path / "nowhere", tmp_path / "o", "train"),
            "not a directory and not a file; expected a folder",
        ),
        (lambda: run(tmp_path, tmp_path / "o", "train", labels=tmp_path), "holds no images, whose classes"),
        (lambda: run(tree.parent, tmp_path / "o", "train"), "give one of them"),
        (lambda: run(tree / "class0", tmp_path / "o", "train"), "images in no folders .*--labels"),
        (lambda: run(empty, tmp_path / "o", "train"), "has no folders, no images .* no tars and no TFRecords"),
        (lambda: run(tree, tmp_path / "o", "train", shards=22), "--shards is 22; expected 1 to 21"),
        (lambda: run(tree, tmp_path / "o", "train", shards=0), "--shards is 0"),
        (lambda: run(tree, tmp_path / "o", "train", quality=101), "--quality"),
        (lambda: run(tree, tmp_path / "o", "train", resize=0), "--resize"),
        (lambda: run(tree, tmp_path / "o", "train", resize=4, raw=4), "exclude"),
        (lambda: run(tree, tmp_path / "o", "train", workers=0), "--workers"),
        (lambda: run(tree, tree / "class0" / "000.JPEG", "train"), "cannot create"),
        (lambda: run(tree, tmp_path / "o", "train", classes=tmp_path / "none.txt"), "class list"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message):
            call()


def test_size_of_shards(make_tree, tmp_path: Path) -> None:
    tree = make_tree()
    total = sum(path.stat().st_size for path in tree.rglob("*.JPEG"))
    for shard_bytes, shards in ((total, 1), (total - 1, 2), (total / 4, 4), (total / 5, 8), (1, 16)):
        manifest = run(tree, tmp_path / f"out{shards}", "train", shard_mb=shard_bytes / 1e6)
        assert len(manifest.shards) == shards  # a power of two, of at most 21 images
    assert manifest.num_bytes == total
    for wrong in (0, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match=r"--shard-mb is .*; expected a number of megabytes above 0"):
            run(tree, tmp_path / "out", "train", shard_mb=wrong)
    with pytest.raises(UserError, match="--shards and --shard-mb exclude each other"):
        run(tree, tmp_path / "out", "train", shard_mb=1, shards=2)


class _Noted(ClassFolders):
    """Keeps the names of what is read, in this order."""

    read_names: ClassVar[list[str]] = []

    def read(self, image: SourceImage) -> bytes:
        self.read_names.append(image.name)
        return super().read(image)


def test_images_are_read_by_place_in_windows(make_tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the window: the same shards, each image read once, and within a window by place."""
    tree = make_tree()
    run(tree, tmp_path / "expected", "train", shards=2)
    for window_bytes in (1, 3000, 10**9):
        monkeypatch.setattr("hpctrain.data.prepare.work._WINDOW_BYTES", window_bytes)
        _Noted.read_names.clear()
        run("", tmp_path / str(window_bytes), "train", shards=2, source=_Noted(tree))
        names = _Noted.read_names
        assert contents(tmp_path / "expected") == contents(tmp_path / str(window_bytes))
        assert len(set(names)) == len(names) == 21
        falls = 1 + sum(later < earlier for earlier, later in itertools.pairwise(names))
        if window_bytes == 1:
            reader = ShardReader(tmp_path / "expected" / "train")
            assert names == [reader.name(i) for i in range(21)]
        else:
            assert falls == 2 if window_bytes == 10**9 else 2 < falls < 15


def test_link_to_a_folder_above_ends(make_tree, tmp_path: Path) -> None:
    tree = make_tree(classes=1, images=2)
    (tree / "class0" / "loop").symlink_to(tree / "class0")
    (tree / "class0" / "deep" / "er").mkdir(parents=True)
    shutil.copy(tree / "class0" / "000.JPEG", tree / "class0" / "deep" / "er" / "c.jpg")
    assert run(tree, tmp_path / "out", "train").num_records == 3


class _Threads:
    """Ranks as threads, joined by a barrier."""

    def __init__(self, rank: int, size: int, shared: dict[str, Any]) -> None:
        self.rank, self.size, self._shared = rank, size, shared

    def allgather(self, value: Any) -> list[Any]:
        self._shared[str(self.rank)] = value
        self._shared["barrier"].wait(60)
        result = [self._shared[str(rank)] for rank in range(self.size)]
        self._shared["barrier"].wait(60)
        return result

    def broadcast(self, value: Any) -> Any:
        return self.allgather(value)[0]


def on_ranks(size: int, call: Callable[[_Threads], Any]) -> list[Any]:
    shared: dict[str, Any] = {"barrier": threading.Barrier(size)}
    results: list[Any] = [None] * size

    def work(rank: int) -> None:
        try:
            results[rank] = call(_Threads(rank, size, shared))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return results


def test_several_ranks_make_the_same_and_fail_together(make_tree, tmp_path: Path) -> None:
    tree = make_tree()
    run(tree, tmp_path / "alone", "train", shards=5)
    results = on_ranks(3, lambda group: run(tree, tmp_path / "ranks", "train", shards=5, group=group))
    assert contents(tmp_path / "alone") == contents(tmp_path / "ranks")
    assert results[0] == results[2] == Manifest.load(tmp_path / "ranks" / "train")
    (tree / "class0" / "000.JPEG").write_bytes(b"bad")
    results = on_ranks(3, lambda group: run(tree, tmp_path / "bad", "train", group=group))
    assert all(isinstance(result, UserError) and "1 of 21 images" in str(result) for result in results)
    results = on_ranks(2, lambda group: run(tmp_path / "none", tmp_path / "x", "train", group=group))
    assert all(isinstance(result, UserError) and "not a directory" in str(result) for result in results)


def test_commands(make_tree, tmp_path: Path) -> None:
    tree, out = make_tree(), tmp_path / "out"
    runner = CliRunner()
    arguments = ["prepare", str(tree), str(out), "--split", "train", "--workers", "1", "--shards", "3"]
    result = runner.invoke(data_commands, arguments)
    assert result.exit_code == 0 and "wrote" in result.output
    result = runner.invoke(data_commands, ["info", str(out)])
    assert result.exit_code == 0 and "records     21" in result.output
    result = runner.invoke(data_commands, ["verify", str(out), "--workers", "1", "--decode"])
    assert result.exit_code == 0 and "as it was written: 21 records" in result.output
    result = runner.invoke(data_commands, ["extract", str(out / "train"), "4", str(tmp_path / "x.jpg")])
    name = ShardReader(out / "train").name(4)
    assert result.exit_code == 0 and name in result.output
    assert (tmp_path / "x.jpg").read_bytes() == (tree / name).read_bytes()
    result = runner.invoke(data_commands, ["extract", str(out / "train"), "4", str(tmp_path)])
    assert isinstance(result.exception, UserError) and "is a folder" in str(result.exception)
    result = runner.invoke(data_commands, ["extract", str(out / "train"), "21", str(tmp_path / "x.jpg")])
    assert isinstance(result.exception, UserError) and "expected 0 to 20" in str(result.exception)


def test_program_prints_one_sentence_and_exits_with_2(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    program = [
        sys.executable,
        root / "data_prep" / "prepare_imagenet.py",
        tmp_path / "none",
        tmp_path,
        "--split",
        "val",
    ]
    result = subprocess.run(program, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)})
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "not a directory" in result.stderr


def test_jpeg_header_of_cut_files(make_image) -> None:
    blob = make_image(1, 33, 65)
    assert (jpeg_header(blob).height, jpeg_header(blob).width) == (33, 65)
    for length in range(150):
        with pytest.raises(ImageError):
            jpeg_header(blob[:length])


def test_workers_leave_without_a_word(make_tree: Callable[..., Path], tmp_path: Path) -> None:
    """Workers that have only just started when the work is done used to end with tracebacks."""
    tree = make_tree(classes=2, images=4)
    for attempt in range(3):
        command = [sys.executable, "-m", "hpctrain", "data", "prepare", str(tree), str(tmp_path / f"out{attempt}")]
        done = subprocess.run(
            [*command, "--split", "train", "--shards", "3", "--workers", "3"],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0
        assert "Traceback" not in done.stderr and "leaked" not in done.stderr
