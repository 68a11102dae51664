"""The report of one or several runs: tables and pictures, as Markdown that also reads well in `less`, and as HTML."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from hpctrain.data.atomic import write_file
from hpctrain.errors import UserError
from hpctrain.scaling.batches import compare_batches
from hpctrain.scaling.html import to_html
from hpctrain.scaling.markdown import markdown_table
from hpctrain.scaling.published import labeled_standings
from hpctrain.scaling.run_data import RunData, how_it_ended, read_run, summarize

UNKNOWN = "-"


def write_report(run_dirs: list[Path], out_dir: Path) -> Path:
    """Write report.md and its PNGs for these runs into `out_dir`, overlaid in each picture; return report.md's path.

    report.html beside it holds the same with the pictures in it, a single file. `out_dir` may be a run directory.
    Raises UserError for a run directory that is missing or has no metrics, and for an `out_dir` that cannot be written.
    """
    from hpctrain.scaling import plots  # matplotlib is only loaded for pictures

    if not run_dirs:
        raise UserError("no run directory given: name at least one directory that `hpctrain train` wrote")
    runs = [read_run(run_dir) for run_dir in run_dirs]
    labeled = list(zip(run_labels(runs), runs, strict=True))
    pictures = {
        "loss": plots.plot_loss(labeled),
        "accuracy": plots.plot_accuracy(labeled),
        "throughput": plots.plot_throughput(labeled),
        "learning_rate": plots.plot_learning_rate(labeled),
    }
    report = out_dir / "report.md"
    files = {f"{name}.png": png for name, png in pictures.items() if png is not None}
    text = report_text(labeled, [name.removesuffix(".png") for name in files])
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for name, png in files.items():
            write_file(out_dir / name, png)
        write_file(out_dir / "report.html", to_html(text, files).encode())
        write_file(report, text.encode())
    except OSError as error:
        raise UserError(f"cannot write {out_dir} ({error.strerror}): give an --out that you may write to") from None
    return report


def summary_table(run_dir: Path) -> Table:
    """Return what a run came to, as a table of two columns for the terminal."""
    run = read_run(run_dir)
    table = Table("", run.name, show_edge=False)
    for title, value in summary_rows(summarize(run)):
        table.add_row(title, value)
    for note in run.notes:
        table.add_row("note", note)
    return table


def summary_rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the titles and the formatted values of what `summarize` returned."""
    return [(title, form(summary)) for title, form in _ROWS]


def run_labels(runs: Sequence[RunData]) -> list[str]:
    """Return a name for each run: its directory's, with as much of the path before it as tells equal names apart."""
    parts = [run.path.resolve().parts for run in runs]
    labels = []
    for own in parts:
        length = 1
        others = [other for other in parts if other != own]
        while length < len(own) and any(other[-length:] == own[-length:] for other in others):
            length += 1
        labels.append("/".join(own[-length:]))
    return labels


def report_text(labeled: Sequence[tuple[str, RunData]], pictures: Sequence[str]) -> str:
    """Return the Markdown text of a report with these pictures (names without `.png`)."""
    labels = [label for label, _ in labeled]
    runs = [run for _, run in labeled]
    title = f"Run {labels[0]}" if len(runs) == 1 else f"{len(runs)} runs"
    sections = [f"# {title}"]

    columns = [[value for _, value in summary_rows(summarize(run))] for run in runs]
    rows = [[name, *values] for (name, _), *values in zip(_ROWS, *columns, strict=True)]
    sections.append("## Summary\n\n" + markdown_table(["", *labels], rows))
    sections.append(
        "Loss and accuracies are those of the last evaluation. Images/s is the median over the logged steps, without "
        "the first tenth of them (at least two), which are warm-up."
    )
    notes = [f"- {label}: {note}" for label, run in labeled for note in (*run.notes, *_end_notes(run))]
    if notes:
        sections.append("## Notes\n\n" + "\n".join(notes))

    captions = {"loss": "Loss", "accuracy": "Accuracy", "throughput": "Throughput", "learning_rate": "Learning rate"}
    sections += [f"## {captions[name]}\n\n![{captions[name]}]({name}.png)" for name in pictures]

    sections += _comparisons(labeled)

    if len(runs) > 1:
        rows = differing_settings(runs)
        text = markdown_table(["key", *labels], rows) if rows else "All runs have the same settings."
        sections.append("## Settings that differ\n\n" + text)
    else:
        rows = [[f"`{key}`", _plain(runs[0].config[key])] for key in runs[0].config]
        if rows:
            sections.append("## Settings\n\n" + markdown_table(["key", "value"], rows))
    environment = _environment_rows(runs)
    if environment:
        sections.append("## Environment\n\n" + markdown_table(["", *labels], environment))
    return "\n\n".join(sections) + "\n"


def _comparisons(labeled: Sequence[tuple[str, RunData]]) -> list[str]:
    """Return the sections that set runs beside each other by batch, and beside what is published."""
    sections = []
    for comparison in compare_batches(labeled):
        rows = [
            [
                row.label,
                f"{row.batch:,}",
                f"{row.epochs:.4g}",
                f"{row.steps:,.0f}",
                UNKNOWN if row.seconds is None else format_seconds(row.seconds),
                f"{row.efficiency:.2f}",
            ]
            for row in comparison.rows
        ]
        head = ["run", "batch", "epochs", "steps", "training time", "efficiency"]
        sections.append(
            f"## Batch-size efficiency of {comparison.model}\n\nTo the first evaluation with a top-1 of "
            f"{100 * comparison.top1:.2f} % or more, which all of these runs reach. Efficiency is the epochs of the "
            "smallest batch over a run's own: 1 is a larger batch that costs nothing.\n\n" + markdown_table(head, rows)
        )
    standings = labeled_standings(labeled)
    if standings:
        sections.append("## Beside published results")
    for found in standings:
        sections.append(f"{found.label}: {found.sentences()}\n\n" + markdown_table(found.head, found.rows()))
    return sections


def differing_settings(runs: Sequence[RunData]) -> list[list[str]]:
    """Return [key, value of each run] for every configuration key that is not the same in all runs."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = [[f"`{key}`", *(_plain(run.config.get(key)) for run in runs)] for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1]


def _end_notes(run: RunData) -> list[str]:
    end = how_it_ended(run)
    if end is None:
        return ["the run logged no end: it is still running or was killed"]
    if end == "preempted":
        return ["the run was preempted and not yet resumed to its end"]
    return []


def _environment_rows(runs: Sequence[RunData]) -> list[list[str]]:
    """Return [title, value of each run]: start, hosts and the versions of the software."""
    versions = [run.manifest.get("versions") for run in runs]
    known = [version if isinstance(version, dict) else {} for version in versions]
    rows = [
        ["started", *(_plain(run.manifest.get("started")) for run in runs)],
        ["hosts", *(_host_names(run.manifest.get("hosts")) for run in runs)],
    ]
    rows += [
        [str(name), *(_plain(version.get(name)) for version in known)]
        for name in sorted({name for version in known for name in version}, key=str)
    ]
    return [row for row in rows if any(value != UNKNOWN for value in row[1:])]


def _host_names(hosts: Any, at_most: int = 4) -> str:
    """Return the first host names and how many there are: a report of 2,048 nodes should stay readable."""
    if not isinstance(hosts, list) or not hosts:
        return UNKNOWN
    names = [str(host.get("host", "?")) if isinstance(host, dict) else str(host) for host in hosts]
    more = f", ... ({len(names):,} in all)" if len(names) > at_most else ""
    return ", ".join(names[:at_most]) + more


def _plain(value: Any) -> str:
    return UNKNOWN if value is None else str(value)


def _count(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda summary: UNKNOWN if summary[key] is None else f"{summary[key]:,}"


def _percent(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda summary: UNKNOWN if summary[key] is None else f"{100 * summary[key]:.2f} %"


def _loss(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda summary: UNKNOWN if summary[key] is None else f"{summary[key]:.4f}"


def _name(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda summary: _plain(summary[key])


def _ranks_by_threads(summary: dict[str, Any]) -> str:
    text = f"{_count('ranks')(summary)} x {_count('threads_per_rank')(summary)}"
    hosts = summary["num_hosts"]
    return text + (f" on {hosts:,} host{'s' if hosts > 1 else ''}" if hosts else "")


def _epochs(summary: dict[str, Any]) -> str:
    return UNKNOWN if summary["epochs"] is None else f"{summary['epochs']:.2f}".rstrip("0").rstrip(".")


def _images_per_second(summary: dict[str, Any]) -> str:
    rate = summary["images_per_second"]
    if rate is None:
        return UNKNOWN
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:.4g}"


def _wall_time(summary: dict[str, Any]) -> str:
    return UNKNOWN if summary["wall_seconds"] is None else format_seconds(summary["wall_seconds"])


def format_seconds(seconds: float) -> str:
    """Return a duration as `12.3 s` below a minute, else as `H:MM:SS` or `M:SS`."""
    if not math.isfinite(seconds) or seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d} h" if hours else f"{minutes}:{rest:02d} min"


_ROWS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("recipe", _name("recipe")),
    ("model", _name("model")),
    ("data", _name("data")),
    ("ranks x threads", _ranks_by_threads),
    ("global batch", _count("global_batch")),
    ("steps", _count("steps")),
    ("epochs", _epochs),
    ("train loss", _loss("train_loss")),
    ("loss", _loss("eval_loss")),
    ("top-1", _percent("top1")),
    ("top-5", _percent("top5")),
    ("best top-1", _percent("best_top1")),
    ("images/s", _images_per_second),
    ("wall time", _wall_time),
    ("ended", _name("end")),
)
