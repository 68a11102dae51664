"""A run beside published results, runs of several batches beside each other, and the page that holds it all."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from hpctrain.scaling import read_run, write_report
from hpctrain.scaling.batches import compare_batches
from hpctrain.scaling.html import to_html
from hpctrain.scaling.published import labeled_standings, published_results, results_of, standing


def make_run(path: Path, *, model: str = "resnet50", rate: float = 1e5, end: bool = True, **settings: Any) -> Path:
    """A run of 90 epochs of ImageNet at a batch of 32K that took an hour, unless told otherwise."""
    path.mkdir(parents=True)
    batch = settings.pop("global_batch", 32768)
    tops: list[float] = settings.pop("top1s", [0.3, 0.6, 0.755])
    images = settings.pop("num_records", 1_281_167)
    records: list[dict[str, Any]] = [
        {"kind": "train", "step": n, "epoch": n / 10, "loss": 1.0, "top1": 0.1, "images_per_second": rate}
        for n in range(1, 9)
    ]
    records += [
        {"kind": "eval", "step": 10 * n, "epoch": float(n), "loss": 1.0, "top1": top1, "top5": 0.9}
        for n, top1 in enumerate(tops, start=1)
    ]
    if end:
        records.append({"kind": "end", "step": 100, "epoch": 90.0, "reason": "finished", "train_seconds": 3600.0})
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = {
        "name": "mine",
        "model": {"name": model},
        "data": {"path": "/data"},
        "train": {"global_batch": batch, "epochs": 90, **settings},
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    manifest = {
        "ranks": 512,
        "hosts": [{"host": "a"}, {"host": "b"}],
        "started": "2026-01-02T00:00:00",
        "data": {"num_records": images, "num_classes": 1000},
    }
    (path / "manifest.json").write_text(json.dumps(manifest))
    return path


def test_the_table_is_whole() -> None:
    results = published_results()
    assert len(results) == 15
    paper = [r for r in results if r.source == "arXiv 1709.05011"]
    assert {(r.model, r.minutes, r.processors) for r in paper} == {
        ("alexnet_bn", 11, 1024),
        ("resnet50", 20, 2048),
        ("resnet50", 14, 2048),
    }
    assert results[0].epochs is None and all(r.source and r.top1_percent > 50 for r in results)


def test_relatives_share_their_results() -> None:
    assert {r.model for r in results_of("alexnet")} == {"alexnet", "alexnet_bn"}
    assert results_of("resnet50_v15") == results_of("resnet50") and len(results_of("resnet50")) == 13
    assert results_of("resnet20") == [] and results_of(None) == []


def test_a_finished_run_has_its_place(tmp_path: Path) -> None:
    found = standing("mine", read_run(make_run(tmp_path / "run")))
    assert found is not None and (found.minutes, found.projected) == (60, False)
    rows = found.rows()
    assert len(rows) == 14
    faster = [r for r in found.results if r.minutes < 60]
    assert rows[len(faster)][0] in ("**mine**", "Goyal et al. (Facebook)") and [
        row[0] for row in rows if "mine" in row[0]
    ] == ["**mine**"]
    assert f"took 60 minutes: place {len(faster) + 1} of 14 by time" in found.sentences()
    better = [r for r in found.results if r.top1_percent > 75.5]
    assert f"75.50 % is place {len(better) + 1} by accuracy" in found.sentences()


@pytest.mark.parametrize("settings", [{"end": False}, {"steps": 100}])
def test_what_was_left_out_is_projected(tmp_path: Path, settings: dict[str, Any]) -> None:
    found = standing("mine", read_run(make_run(tmp_path / "run", **settings)))
    assert found is not None and found.projected
    assert found.minutes == pytest.approx(90 * 1_281_167 / 1e5 / 60)
    assert "At its rate the whole training takes" in found.sentences()


def test_other_data_does_not_compare_and_says_so(tmp_path: Path) -> None:
    found = standing("mine", read_run(make_run(tmp_path / "run", num_records=5000)))
    assert found is not None and "5,000 images of 1,000 classes and not on ImageNet" in found.sentences()
    assert labeled_standings([("small", read_run(make_run(tmp_path / "small", model="resnet20")))]) == []


def test_a_run_without_manifest_still_has_a_row(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", end=False)
    (run / "manifest.json").unlink()
    found = standing("mine", read_run(run))
    assert found is not None and found.minutes is None
    assert found.rows()[-1][0] == "**mine**" and "place" in found.sentences()


def test_batches_are_compared_at_the_accuracy_that_all_reach(tmp_path: Path) -> None:
    small = make_run(tmp_path / "small", global_batch=1024, top1s=[0.2, 0.5, 0.7], rate=1000.0)
    large = make_run(tmp_path / "large", global_batch=4096, top1s=[0.1, 0.2, 0.3, 0.5], rate=3000.0)
    other = make_run(tmp_path / "other", model="alexnet", global_batch=8192)
    runs = [(path.name, read_run(path)) for path in (large, small, other)]
    (comparison,) = compare_batches(runs)
    assert (comparison.model, comparison.top1) == ("resnet50", 0.5)
    first, second = comparison.rows
    assert (first.label, first.epochs, first.steps, first.efficiency) == ("small", 2, 20, 1)
    assert (second.label, second.epochs, second.efficiency) == ("large", 4, 0.5)
    assert second.seconds == pytest.approx(40 * 4096 / 3000)
    assert compare_batches(runs[:1]) == []


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def parsed(text: str) -> _Page:
    page = _Page()
    page.feed(text)
    assert page.open == []
    return page


def test_the_page_is_one_file_with_everything_in_it(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, global_batch=batch) for name, batch in (("a", 1024), ("b", 32768))]
    report = write_report(runs, tmp_path / "out").read_text()
    text = (tmp_path / "out" / "report.html").read_text()
    page = parsed(text)
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == len(re.findall(r"!\[", report)) > 0
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    for heading in re.findall(r"^## (.+)$", report, re.MULTILINE):
        assert f"<h2>{heading}</h2>" in text
    assert "## Beside published results" in report and "## Batch-size efficiency of resnet50" in report
    assert "<strong>a</strong>" in text and "Mikami et al. (Sony)" in text


def test_markdown_that_reports_use() -> None:
    text = to_html(
        "# A & B\n\nplain `a<b` and **bold**\nnext [x](https://a.org/?q=1)\n\n- one\n- two\n  more\n\n"
        "| a | b |\n|---|---|\n| `c` | d\\|e |\n\n![p](p.png)\n\n![q](q.png)\n\n    mpirun <x>\n",
        {"p.png": b"\x00"},
    )
    parsed(text)
    for part in (
        "<title>A &amp; B</title>",
        "<h1>A &amp; B</h1>",
        "<code>a&lt;b</code> and <strong>bold</strong>",
        '<a href="https://a.org/?q=1">x</a>',
        "<ul><li>one</li><li>two\n  more</li></ul>",
        "<th>a</th><th>b</th>",
        "<td><code>c</code></td><td>d|e</td>",
        'src="data:image/png;base64,AA=="',
        "<p>(q.png)</p>",
        "<pre><code>mpirun &lt;x&gt;</code></pre>",
    ):
        assert part in text


def test_text_from_runs_cannot_become_markup() -> None:
    text = to_html('# <script>alert(1)</script>\n\n| a |\n|---|\n| <img src="x" onerror="y"> |\n', {})
    assert "<script>" not in text and "<img" not in text
