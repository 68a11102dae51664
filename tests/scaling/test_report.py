"""Reports and summaries of run directories: their numbers are those one computes by hand, and broken runs are read."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from hpctrain.cli import cli
from hpctrain.errors import UserError
from hpctrain.scaling import read_metrics, read_run, summarize, summary_table, write_report
from hpctrain.scaling.report import format_seconds, run_labels
from hpctrain.scaling.run_data import num_warm_up, parse_metrics, run_dirs_in, steady_images_per_second

# The first two rates are warm-up; the median of the other four is 110.
RATES = [5.0, 20.0, 100.0, 130.0, 120.0, 90.0]


def train(step: int, rate: float, loss: float = 1.0) -> dict[str, Any]:
    return {
        "kind": "train",
        "step": step,
        "epoch": step / 4,
        "loss": loss,
        "top1": 0.5,
        "learning_rate": 0.1 * step,
        "images_per_second": rate,
        "step_seconds": 64 / rate,
    }


def evaluation(step: int, loss: float, top1: float, top5: float) -> dict[str, Any]:
    record = {"kind": "eval", "step": step, "epoch": step / 4, "loss": loss, "top1": top1, "top5": top5}
    return {**record, "num_images": 100, "seconds": 1.5}


def records() -> list[dict[str, Any]]:
    steps = [train(step, rate, 3 - step / 4) for step, rate in enumerate(RATES, 1)]
    end = {"kind": "end", "step": 6, "epoch": 1.5, "reason": "finished", "train_seconds": 83.2}
    return [*steps[:4], evaluation(4, 1.2, 0.75, 0.97), *steps[4:], evaluation(6, 1.25, 0.725, 0.98125), end]


def lines(items: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


def make_run(path: Path, text: str | None = None, **overrides: Any) -> Path:
    path.mkdir(parents=True)
    (path / "metrics.jsonl").write_text(lines(records()) if text is None else text)
    config = {
        "name": "demo",
        "model": {"name": "resnet20", "num_classes": 30, "image_size": 32},
        "train": {"global_batch": 64, "micro_batch": 16, "epochs": 2, **overrides},
        "data": {"path": "demo/shards"},
        "optimizer": {"name": "lars", "learning_rate": 4.0},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    manifest = {
        "ranks": 4,
        "threads_per_rank": 2,
        "hosts": [{"host": "node01", "ranks": [0, 1]}, {"host": "node02", "ranks": [2, 3]}],
        "versions": {"tensorflow": "2.21.0", "python": "3.11.9"},
        "started": "2025-03-01T12:00:00Z",
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def cells(report: str, title: str) -> list[str]:
    """Return the cells of the report's table row with this title."""
    for line in report.splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if len(row) > 1 and row[0] == title:
            return row[1:]
    raise AssertionError(f"no row {title!r} in\n{report}")


def test_summary_has_the_numbers_computed_by_hand(tmp_path: Path) -> None:
    assert summarize(make_run(tmp_path / "demo-1")) == {
        "run": "demo-1",
        "recipe": "demo",
        "model": "resnet20",
        "data": "demo/shards",
        "ranks": 4,
        "threads_per_rank": 2,
        "num_hosts": 2,
        "global_batch": 64,
        "steps": 6,
        "epochs": 1.5,
        "train_loss": 1.5,
        "eval_loss": 1.25,
        "top1": 0.725,
        "top5": 0.98125,
        "best_top1": 0.75,
        "images_per_second": 110.0,
        "wall_seconds": 83.2,
        "num_sessions": 1,
        "end": "finished",
    }


def test_report_of_one_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo-1")
    path = write_report([run], run)
    assert path == run / "report.md"
    report = path.read_text()
    expected = {
        "ranks x threads": "4 x 2 on 2 hosts",
        "global batch": "64",
        "steps": "6",
        "epochs": "1.5",
        "loss": "1.2500",
        "top-1": "72.50 %",
        "top-5": "98.12 %",
        "images/s": "110",
        "wall time": "1:23 min",
        "ended": "finished",
        "hosts": "node01, node02",
        "tensorflow": "2.21.0",
        "`train.micro_batch`": "16",
    }
    assert {title: cells(report, title) for title in expected} == {key: [value] for key, value in expected.items()}
    assert "## Notes" not in report
    pictures = re.findall(r"\]\((.+\.png)\)", report)
    assert pictures == ["loss.png", "accuracy.png", "throughput.png", "learning_rate.png"]
    for name in pictures:
        with Image.open(run / name) as image:
            image.load()
            assert image.format == "PNG"
            assert image.size == (800, 480)
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_report_of_several_runs_overlays_them_and_shows_what_differs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / f"demo-{batch}", global_batch=batch) for batch in (64, 128, 256)]
    report = write_report(runs, tmp_path / "out").read_text()
    assert cells(report, "global batch") == ["64", "128", "256"]
    assert cells(report, "`train.global_batch`") == ["64", "128", "256"]
    assert "`train.micro_batch`" not in report
    assert cells(report, "") == ["demo-64", "demo-128", "demo-256"]


def test_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    for out in ("first", "second"):
        write_report([run], tmp_path / out)
    files = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert len(files) == 6
    for name in files:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@given(cut=st.integers(1, 60))
def test_a_last_line_cut_by_a_kill_is_tolerated(cut: int) -> None:
    whole = lines(records())
    parsed, num_broken = parse_metrics(whole[:-cut])
    assert num_broken == 0
    assert parsed == (records() if cut == 1 else records()[:-1])


def test_a_broken_line_elsewhere_is_counted(tmp_path: Path) -> None:
    good = lines(records()).splitlines()
    run = make_run(tmp_path / "demo", "\n".join([good[0], '{"kind": "tra', *good[1:3], "[1]", *good[3:], '{"ki']))
    assert read_run(run).notes == ("metrics.jsonl: 2 broken lines left out",)
    assert read_metrics(run / "metrics.jsonl") == records()
    assert "demo: metrics.jsonl: 2 broken lines left out" in write_report([run], run).read_text()


def test_steps_repeated_after_a_resume_count_once_and_sessions_add_up(tmp_path: Path) -> None:
    first = [train(step, 1.0, loss=9.0) for step in range(1, 5)]
    preempted = {"kind": "end", "step": 4, "epoch": 1.0, "reason": "preempted", "train_seconds": 16.8}
    again = [record for record in records() if record["step"] >= 3]
    run = make_run(tmp_path / "demo", lines([*first, preempted, *again]))
    summary = summarize(run)
    assert (summary["steps"], summary["num_sessions"], summary["end"]) == (6, 2, "finished")
    assert summary["wall_seconds"] == pytest.approx(100)
    assert read_run(run).series("train", "step", "loss") == ([1, 2, 3, 4, 5, 6], [9, 9, 2.25, 2, 1.75, 1.5])


def test_a_session_that_was_killed_is_counted_and_is_not_the_end_of_the_one_before(tmp_path: Path) -> None:
    def resume(step: int) -> dict[str, object]:
        return {"kind": "resume", "step": step}

    first = [train(1, 1.0), train(2, 1.0)]
    first.append({"kind": "end", "step": 2, "epoch": 1.0, "reason": "preempted", "train_seconds": 16.8})
    run = make_run(tmp_path / "killed", lines([*first, resume(2)]))
    assert (summarize(run)["num_sessions"], summarize(run)["end"]) == (2, None)
    assert "still running or was killed" in write_report([run], tmp_path / "out").read_text()
    last = {"kind": "end", "step": 4, "epoch": 1.0, "reason": "finished", "train_seconds": 3.2}
    run = make_run(tmp_path / "done", lines([*first, resume(2), resume(2), train(3, 1.0), train(4, 1.0), last]))
    summary = summarize(run)
    assert (summary["num_sessions"], summary["end"], summary["wall_seconds"]) == (3, "finished", 20.0)


def test_a_run_with_pieces_missing_is_reported_with_notes(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", lines([train(1, 50.0), {"kind": "eval", "step": 1, "loss": None}]))
    (run / "config.yaml").unlink()
    (run / "manifest.json").write_text('{"ranks":')
    summary = summarize(run)
    assert {key for key, value in summary.items() if value is not None} == {
        "run",
        "steps",
        "epochs",
        "train_loss",
        "num_sessions",
    }
    report = write_report([run], tmp_path / "out").read_text()
    for note in ("config.yaml is missing", "manifest.json cannot be read", "logged no end"):
        assert note in report
    assert cells(report, "images/s") == ["-"]
    assert cells(report, "wall time") == ["-"]
    assert cells(report, "ranks x threads") == ["- x -"]


def test_a_picture_without_data_is_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo", lines([evaluation(4, float("nan"), 0.1, 0.2)]))
    report = write_report([run], tmp_path / "out").read_text()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "accuracy.png",
        "loss.png",
        "report.html",
        "report.md",
    ]
    assert "throughput.png" not in report
    assert cells(report, "loss") == ["nan"]


@pytest.mark.parametrize("manifest", [{}, {"hosts": None, "versions": []}, {"hosts": ["a", {}], "ranks": "many"}])
def test_an_odd_manifest_is_tolerated(tmp_path: Path, manifest: dict[str, Any]) -> None:
    run = make_run(tmp_path / "demo")
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert "110" in write_report([run], run).read_text()


def test_what_is_no_run_directory_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    blank = make_run(tmp_path / "blank", "")
    good = make_run(tmp_path / "good")
    for bad, message in (
        (tmp_path / "absent", "no run directory .*absent"),
        (tmp_path / "empty", "empty holds no metrics.jsonl"),
        (blank, "blank.* holds no record"),
        (good / "config.yaml", "no run directory"),
    ):
        with pytest.raises(UserError, match=message):
            write_report([good, bad], tmp_path / "out")
        assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="no run directory given"):
        write_report([], tmp_path / "out")
    with pytest.raises(UserError, match="cannot write"):
        write_report([good], good / "config.yaml")


def test_a_study_stands_for_its_runs_by_node_count(tmp_path: Path) -> None:
    names = ["nodes-1", "nodes-2", "nodes-2-repeat-2", "nodes-16"]
    runs = [make_run(tmp_path / "study" / name) for name in names]
    (tmp_path / "study" / "nodes-32").mkdir()  # has not begun
    assert run_dirs_in(tmp_path / "study") == runs
    assert run_dirs_in(runs[0]) == [runs[0]]
    assert run_dirs_in(tmp_path / "none") == [tmp_path / "none"]
    outcome = CliRunner().invoke(cli, ["report", str(tmp_path / "study"), "--out", str(tmp_path / "out")])
    assert outcome.exit_code == 0 and "nodes-16" in (tmp_path / "out" / "report.md").read_text()


def test_terminal_table(tmp_path: Path) -> None:
    console = Console(width=100, record=True, quiet=False, file=(tmp_path / "log").open("w"))
    console.print(summary_table(make_run(tmp_path / "demo")))
    text = console.export_text()
    for part in ("resnet20", "4 x 2 on 2 hosts", "72.50 %", "98.12 %", "1:23 min"):
        assert part in text


def test_runs_of_equal_name_get_labels_that_differ(tmp_path: Path) -> None:
    paths = [tmp_path / "a" / "demo", tmp_path / "b" / "demo", tmp_path / "other"]
    assert run_labels([read_run(make_run(path)) for path in paths]) == ["a/demo", "b/demo", "other"]


@given(st.lists(st.floats(1, 1e6), max_size=60))
def test_the_steady_rate_ignores_the_warm_up(rates: list[float]) -> None:
    skipped = num_warm_up(len(rates))
    assert skipped >= max(2, len(rates) / 10)
    slowed = [rate / 1000 for rate in rates[:skipped]] + rates[skipped:]
    steady = steady_images_per_second(slowed)
    assert steady == steady_images_per_second(rates)
    if len(rates) > skipped:
        assert steady is not None
        assert min(rates[skipped:]) <= steady <= max(rates[skipped:])
    else:
        assert steady is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (59.94, "59.9 s"), (60, "1:00 min"), (3599.6, "1:00:00 h"), (86461, "24:01:01 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_no_tensorflow_and_no_pyplot_is_loaded(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    code = (
        "import sys; from pathlib import Path; from hpctrain import scaling\n"
        "assert 'matplotlib' not in sys.modules and 'yaml' not in sys.modules\n"
        "path = Path(sys.argv[1]); scaling.summarize(path); assert 'matplotlib' not in sys.modules\n"
        "scaling.write_report([path], path)\n"
        "assert not {'tensorflow', 'keras', 'matplotlib.pyplot', 'h5py'} & set(sys.modules)\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, str(run)], check=True, cwd=root)
