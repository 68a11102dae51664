"""The demo's data set: the same bytes on any number of workers, honest held-out images, balanced classes."""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hpctrain.errors import UserError

pytest.importorskip("sklearn")
PROGRAMS = Path(__file__).parents[2] / "data_prep"


@pytest.fixture(scope="module", autouse=True)
def programs_on_path() -> Iterator[None]:
    """Worker processes import the program by its name, as they do when it is run."""
    sys.path.insert(0, str(PROGRAMS))
    yield
    sys.path.remove(str(PROGRAMS))


@pytest.fixture(scope="module")
def program(programs_on_path: None) -> ModuleType:
    import make_sample

    return make_sample


@pytest.fixture(scope="module")
def small(program: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sample of 130 training and 60 validation images, made by one worker."""
    out = tmp_path_factory.mktemp("sample") / "out"
    assert program.make_sample(out, program.Options(130, 60, 32, 7), workers=1)
    return out


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_number_of_workers_does_not_change_a_byte(program: ModuleType, small: Path, tmp_path: Path) -> None:
    program.make_sample(tmp_path / "two", program.Options(130, 60, 32, 7), workers=2)
    assert contents(tmp_path / "two") == contents(small)


def test_an_image_does_not_depend_on_how_many_there_are_but_on_the_seed(
    program: ModuleType, small: Path, tmp_path: Path
) -> None:
    program.make_sample(tmp_path / "fewer", program.Options(40, 30, 32, 7))
    program.make_sample(tmp_path / "other", program.Options(40, 30, 32, 8))
    fewer, other, all_of_them = contents(tmp_path / "fewer"), contents(tmp_path / "other"), contents(small)
    images = [name for name in fewer if name.endswith(".jpg")]
    assert len(images) == 70
    assert all(fewer[name] == all_of_them[name] for name in images)
    assert not any(fewer[name] == other[name] for name in images)


def test_the_tree_holds_valid_varied_jpegs_in_balanced_classes(program: ModuleType, small: Path) -> None:
    assert sorted(path.name for path in small.iterdir()) == ["sample.json", "train", "val"]
    for split, expected in (("train", 130), ("val", 60)):
        assert sorted(path.name for path in (small / split).iterdir()) == sorted(program.CLASSES)
        files = sorted((small / split).glob("*/*"))
        counts = Counter(path.parent.name for path in files)
        assert len(files) == expected
        assert max(counts.values()) - min(counts.values()) <= 1
        sizes = set()
        for path in files:
            with Image.open(path) as image:
                image.load()
                assert (image.format, image.mode) == ("JPEG", "RGB")
                assert all(28 <= side <= 40 for side in image.size)
                sizes.add(image.size)
        assert len(sizes) > expected / 3
        assert len({path.read_bytes() for path in files}) == expected


def test_held_out_digits_and_regions_are_never_trained_on(program: ModuleType) -> None:
    sources = program.load_sources()
    seen: dict[str, set[int]] = {split: set() for split in program.SPLITS}
    for digit in range(10):
        for split in program.SPLITS:
            scans = program.digit_scans(sources.labels, digit, split)
            assert (sources.labels[scans] == digit).all()
            seen[split].update(scans.tolist())
    assert not seen["train"] & seen["val"]
    assert len(seen["train"]) + len(seen["val"]) == len(sources.labels) == 1797
    assert len(seen["val"]) > 300

    for photograph in sources.photographs.values():
        height, width = photograph.shape[:2]
        covered = {split: np.zeros((height, width), bool) for split in program.SPLITS}
        for split in program.SPLITS:
            for top, left in program.photograph_cells(height, width, split):
                cell = covered[split][top : top + program.CELL_SIDE, left : left + program.CELL_SIDE]
                assert cell.shape == (program.CELL_SIDE, program.CELL_SIDE)
                cell[:] = True
        assert not (covered["train"] & covered["val"]).any()
        assert covered["val"].sum() * 3 == covered["train"].sum()


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_an_image_shows_comes_from_its_own_split(program: ModuleType, split: str) -> None:
    """Blanking all the other split has, its scans and its parts of the photographs, does not change a pixel."""
    sources = program.load_sources()
    options = program.Options(size=32, seed=3)
    own_scans = np.zeros(len(sources.labels), bool)
    for digit in range(10):
        own_scans[program.digit_scans(sources.labels, digit, split)] = True
    photographs = {}
    for name, photograph in sources.photographs.items():
        kept = np.zeros_like(photograph)
        for top, left in program.photograph_cells(*photograph.shape[:2], split):
            box = np.s_[top : top + program.CELL_SIDE, left : left + program.CELL_SIDE]
            kept[box] = photograph[box]
        photographs[name] = kept
    blanked = program.Sources(photographs, sources.scans * own_scans[:, None, None], sources.labels)
    for index in range(120):
        original = np.asarray(program.draw_image(sources, options, split, index))
        assert (original == np.asarray(program.draw_image(blanked, options, split, index))).all()


def test_a_complete_sample_is_left_alone(
    program: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [str(tmp_path / "out"), "--train", "30", "--val", "30", "--size", "16", "--workers", "1"]
    assert program.main(command) == 0
    assert "made 30 training" in capsys.readouterr().out
    image = next((tmp_path / "out" / "train").glob("*/*.jpg"))
    before = image.stat().st_mtime_ns
    assert program.main(command) == 0
    assert "are there already" in capsys.readouterr().out
    assert image.stat().st_mtime_ns == before

    assert program.main([*command, "--seed", "1"]) == 2
    assert "made with other options" in capsys.readouterr().err

    bytes_before = image.read_bytes()
    image.unlink()  # no longer complete: made again
    assert program.main(command) == 0
    assert image.read_bytes() == bytes_before


def test_an_interrupted_run_is_repeated(program: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "out"
    stale = out / "train" / "digit0-on-china" / "999999.jpg"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"half")
    (out / program.UNFINISHED_MARKER).write_text("{")
    assert program.make_sample(out, program.Options(30, 30, 16, 0))
    assert not stale.exists()
    assert not (out / program.UNFINISHED_MARKER).exists()


@pytest.mark.parametrize(
    ("options", "workers", "message"),
    [
        ({"train": 29}, 1, "--train is 29"),
        ({"val": 0}, 1, "--val is 0"),
        ({"size": 8}, 1, "--size is 8"),
        ({}, 0, "--workers is 0"),
    ],
)
def test_options_out_of_range_are_refused(
    program: ModuleType, tmp_path: Path, options: dict[str, int], workers: int, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        program.make_sample(tmp_path / "out", program.Options(**options), workers)
    assert not (tmp_path / "out").exists()


def test_a_directory_with_other_things_is_not_touched(program: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not empty"):
        program.make_sample(tmp_path, program.Options())
    with pytest.raises(UserError, match="is a file"):
        program.make_sample(tmp_path / "thesis.tex", program.Options())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_missing_scikit_learn_is_one_plain_sentence(
    program: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert program.main([str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "hpctrain[demo]" in error
    assert error.count("\n") == 1


@given(st.lists(st.integers(0, 2**63), min_size=1, max_size=4))
def test_draws_are_a_function_of_their_key_and_stay_in_range(program: ModuleType, key: list[int]) -> None:
    first, second = program.Draws(*key), program.Draws(*key)
    values = [first.uniform(2, 3) for _ in range(20)]
    assert values == [second.uniform(2, 3) for _ in range(20)]
    assert all(2 <= value < 3 for value in values)
    assert len(set(values)) == 20
    assert {first.integer(0, 2) for _ in range(60)} == {0, 1, 2}
    noise = first.noise((40, 50))
    assert abs(noise.mean()) < 0.15
    assert abs(noise.std() - 1) < 0.1
