"""Preparation that is killed, and bad images, full disks and want of memory on its way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hpctrain.data.prepare.sources import ClassFolders, SourceImage
from hpctrain.errors import UserError
from tests.data.source_inputs import contents, run


class _Slow(ClassFolders):
    def read(self, image: SourceImage) -> bytes:
        time.sleep(0.05)
        return super().read(image)


def test_killed_and_run_again_gives_the_same(make_tree, tmp_path: Path) -> None:
    tree = make_tree(classes=2, images=16)
    out = tmp_path / "out"
    run(tree, tmp_path / "whole", "train", shards=8)
    program = (
        "import sys; sys.path.insert(0, sys.argv[3])\n"
        "if __name__ == '__main__':\n"
        "    from pathlib import Path; from hpctrain.data.prepare import prepare\n"
        "    from test_prepare_faults import _Slow\n"
        "    prepare('', sys.argv[2], 'train', shards=8, workers=2, source=_Slow(Path(sys.argv[1])), quiet=True)\n"
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, str(Path(__file__).parent)])}
    process = subprocess.Popen([sys.executable, script, tree, out, Path(__file__).parent], env=environment)
    deadline = time.monotonic() + 60
    while len(list(out.glob("train/*.h5"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("train/*.h5")}
    assert 3 <= len(finished) < 8 and not (out / "train" / "dataset.json").exists()
    (out / "train" / ".train-00007-of-00008.h5.tmp-host-1-0").write_bytes(b"half")
    time.sleep(0.3)  # the workers notice that their parent is gone
    kept = dict(finished)
    torn = out / "train" / sorted(kept)[0]
    torn.write_bytes(torn.read_bytes()[:-100])  # and one shard was damaged since
    del kept[torn.name]
    run(tree, out, "train", shards=8)
    assert contents(out) == contents(tmp_path / "whole")
    assert {name: (out / "train" / name).stat().st_mtime_ns for name in kept} == kept


def test_unfinished_work_of_other_options_is_not_used(make_tree, tmp_path: Path) -> None:
    tree, out = make_tree(), tmp_path / "out"
    run(tree, out, "train", shards=4, seed=1)
    (out / "train" / "dataset.json").unlink()
    run(tree, out, "train", shards=4, seed=2)
    run(tree, tmp_path / "fresh", "train", shards=4, seed=2)
    assert contents(out) == contents(tmp_path / "fresh")


def test_bad_images_are_all_listed_or_left_out(make_tree, tmp_path: Path) -> None:
    tree, out = make_tree(), tmp_path / "out"
    whole = (tree / "class1" / "003.JPEG").read_bytes()
    (tree / "class1" / "003.JPEG").write_bytes(whole[: len(whole) // 2])
    (tree / "class2" / "zz.png").write_bytes(b"not an image")
    (tree / "class2" / "empty.jpg").write_bytes(b"")
    lines: list[str] = []
    with pytest.raises(UserError, match=r"3 of 23 images cannot be decoded.*class1/003.JPEG.*--skip-bad"):
        run(tree, out, "train", quiet=False, echo=lines.append)
    assert sum(line.startswith("bad image") for line in lines) == 3
    assert not (out / "train" / "dataset.json").exists()
    manifest = run(tree, out, "train", skip_bad=True)
    assert manifest.num_records == 20
    assert manifest.prepare["skipped"] == ["class1/003.JPEG", "class2/empty.jpg", "class2/zz.png"]
    run(tree, tmp_path / "again", "train", skip_bad=True, workers=2)
    assert contents(out) == contents(tmp_path / "again")
    run(tree, out, "train", skip_bad=True)  # complete already


def test_skip_bad_with_fewer_images_than_shards(make_tree, tmp_path: Path) -> None:
    tree = make_tree(classes=1, images=3)
    (tree / "class0" / "001.JPEG").write_bytes(b"bad")
    assert len(run(tree, tmp_path / "out", "train", shards=3, skip_bad=True).shards) == 2
    assert len(run(tree, tmp_path / "out", "train", shards=3, skip_bad=True).shards) == 2
    for path in (tree / "class0").iterdir():
        path.write_bytes(b"bad")
    with pytest.raises(UserError, match="none of the images"):
        run(tree, tmp_path / "none", "train", skip_bad=True)


def test_an_interrupted_run_with_overwrite_goes_on(make_tree, tmp_path: Path) -> None:
    tree, out = make_tree(), tmp_path / "out"
    run(tree, out, "train", shards=4, overwrite=True)
    before = {path.name: path.stat().st_mtime_ns for path in (out / "train").glob("*.h5")}
    (out / "train" / "dataset.json").unlink()
    run(tree, out, "train", shards=4, overwrite=True)
    assert {path.name: path.stat().st_mtime_ns for path in (out / "train").glob("*.h5")} == before
    run(tree, out, "train", shards=4, overwrite=True)  # this one is finished, and so is replaced
    assert {path.name: path.stat().st_mtime_ns for path in (out / "train").glob("*.h5")} != before


def test_want_of_memory_is_not_the_images_fault(make_tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    tree = make_tree()
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(UserError, match="needs more memory than there is"):
        run(tree, tmp_path / "out", "train", resize=16, skip_bad=True)


def test_an_image_too_long_for_a_jpeg_is_named(make_tree, tmp_path: Path) -> None:
    tree = make_tree()
    Image.new("RGB", (65501, 1)).save(tree / "class0" / "long.png")
    with pytest.raises(UserError, match=r"class0/long\.png"):
        run(tree, tmp_path / "out", "train")
    assert run(tree, tmp_path / "out", "train", skip_bad=True).num_records == 21


@pytest.mark.parametrize("limit_bytes", [10_000, 70_000, 200_000])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_ends_with_one_sentence(make_tree, tmp_path: Path, limit_bytes: int, workers: str) -> None:
    tree, out = make_tree(classes=1), tmp_path / "out"
    generator = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(generator.integers(0, 255, (200, 200, 3), np.uint8)).save(tree / "class0" / f"{i}.jpg")
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit_bytes}, {limit_bytes})); "
    program = limited + "import sys; from hpctrain.cli import main; sys.exit(main())"
    arguments = ["data", "prepare", str(tree), str(out), "--split", "train", "--shards", "1", "--workers", workers]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert "cannot write" in done.stderr and "File too large" in done.stderr
    assert not list((out / "train").glob("*.h5")) and not list((out / "train").glob(".*tmp-*"))
