"""A study's results for people and programs: a table for the terminal, report.md with pictures, report.csv."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from hpctrain.data.atomic import write_file
from hpctrain.errors import UserError
from hpctrain.scaling.html import to_html
from hpctrain.scaling.markdown import markdown_table
from hpctrain.scaling.plan import duration
from hpctrain.scaling.study.calibration import Calibration, calibrate
from hpctrain.scaling.study.gather import PARTS, Count, Results, Spread, gather

UNKNOWN = "-"
_JOULES_A_KWH = 3.6e6
PART_TITLES = {
    "input": "waiting for input",
    "compute": "compute",
    "straggler": "waiting for the slowest rank",
    "exposed": "exposed communication",
}


def write_study_report(out: Path) -> tuple[Results, list[Path]]:
    """Gather a study and write report.md, .html and .csv, its pictures and calibration.json into its directory.

    Returns the results and the files, report.md first. Raises UserError if there is no study or it cannot be written.
    """
    from hpctrain.scaling import plots  # matplotlib is only loaded for pictures

    results = gather(out)
    calibration, note = calibrate(results)
    if note:
        results = replace(results, notes=(*results.notes, note))
    files: dict[str, bytes] = {"report.csv": csv_text(results).encode()}
    if results.measured:
        pictures = {
            "speedup": plots.plot_speedup(results),
            "efficiency": plots.plot_efficiency(results),
            "breakdown": plots.plot_breakdown(results),
        }
        files |= {f"{name}.png": png for name, png in pictures.items() if png is not None}
    if calibration is not None:
        files["calibration.json"] = calibration.to_json().encode()
    names = [name.removesuffix(".png") for name in files if name.endswith(".png")]
    text = report_text(results, names, calibration)
    files = {"report.md": text.encode(), "report.html": to_html(text, files).encode(), **files}
    try:
        for name, content in files.items():
            write_file(out / name, content)
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}; copy the study to where you may write") from None
    return results, [out / name for name in files]


def tables(results: Results) -> list[Table]:
    """Return the results as tables for the terminal: the counts, the parts of a step, the slowest hosts."""
    main = Table(*[column.title for column in COLUMNS], show_edge=False, title_justify="left")
    for column in main.columns[:3] + main.columns[4:]:
        column.justify = "right"
    for count in results.counts:
        main.add_row(*(column.text(count) for column in COLUMNS))
    found = [main]
    for head, rows in (_parts_rows(results), _host_rows(results)):
        if rows:
            table = Table(*head, show_edge=False)
            for column in table.columns[1:]:
                column.justify = "right"
            for row in rows:
                table.add_row(*row)
            found.append(table)
    return found


def open_runs(results: Results) -> list[str]:
    """Return a line for each count with runs that are not done: how many, and why."""
    lines = []
    for count in results.counts:
        for word in ("missing", "waiting", "running", "failed", "unknown"):
            own = [state for state in count.states if state.word == word]
            if own:
                notes = "; ".join(dict.fromkeys(state.note for state in own if state.note))
                number = f"{len(own)} of {len(count.states)} runs " if len(count.states) > 1 else ""
                lines.append(f"{_nodes(count.nodes)}: {number}{word}" + (f" ({notes})" if notes else ""))
    return lines


def csv_text(results: Results) -> str:
    """Return a line for each node count; times in seconds, an empty field for what is not known."""
    head = ["nodes", "ranks", "global_batch", "runs", "runs_done", "steps_measured"]
    spreads = ("step", "images_per_second", "speedup", "efficiency", "train_seconds", "node_hours")
    names = {"step": "step_seconds"}
    head += [names.get(name, name) + end for name in spreads for end in ("", "_quartile1", "_quartile3")]
    head += ["step_seconds_fastest_run", "step_seconds_slowest_run", "job_energy_joules"]
    head += [f"{part}_seconds" for part in PARTS]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    for count in results.counts:
        done = sum(state.word == "done" for state in count.states)
        row: list[Any] = [count.nodes, count.ranks, count.global_batch, len(count.states), done, count.num_steps]
        for name in spreads:
            spread: Spread | None = getattr(count, name)
            row += [spread.median, spread.low, spread.high] if spread else [None] * 3
        row += [min(count.repeats), max(count.repeats)] if count.repeats else [None] * 2
        row.append(count.energy_joules)
        row += [count.parts[part] if count.parts else None for part in PARTS]
        writer.writerow([f"{value:.7g}" if isinstance(value, float) else value for value in row])
    return buffer.getvalue()


def report_text(results: Results, pictures: Sequence[str], calibration: Calibration | None) -> str:
    """Return the Markdown report with these pictures (names without `.png`)."""
    sections = [f"# Scaling study: {results.title}"]
    where = f" on {results.site}" if results.site else ""
    held = "the images of a rank are fixed and the global batch grows with the nodes"
    if results.mode == "strong":
        held = "the global batch is fixed"
    sections.append(
        f"{results.mode.capitalize()} scaling{where}: {held}. A study measures speed and says nothing about accuracy."
    )
    sections += [f"**{note}**" for note in results.notes]
    rows = [[column.text(count) for column in COLUMNS] for count in results.counts]
    sections.append("## Results\n\n" + markdown_table([column.title for column in COLUMNS], rows))
    sections.append(
        "Medians over the measured steps of all repeats, with their quartiles in brackets; the warm-up is left out. "
        "Speed-up and efficiency are against the median of the smallest count. Time to train and node-hours are those "
        "of the recipe's epochs at this rate, without start-up, evaluations and checkpoints. "
        "Energy is that of a whole job of the study, where Slurm counts it."
    )
    repeated = [count for count in results.measured if len(count.repeats) > 1]
    if repeated:
        rows = [[str(c.nodes), *(f"{1e3 * t:,.4g}" for t in sorted(c.repeats))] for c in repeated]
        most = max(map(len, rows))
        rows = [[*row, *([UNKNOWN] * (most - len(row)))] for row in rows]
        head = ["nodes", *(["fastest"] + [""] * (most - 3) + ["slowest"])]
        sections.append("## Repeats\n\nMedian step of each repeat, in ms.\n\n" + markdown_table(head, rows))
    unfinished = open_runs(results)
    if unfinished:
        lines = "\n".join(f"- {line}" for line in unfinished)
        sections.append(f"## Not measured\n\n{lines}\n\n`hpctrain study` with the same arguments goes on with them.")
    captions = {"speedup": "Speed-up", "efficiency": "Efficiency", "breakdown": "Where the time of a step goes"}
    for name in pictures:
        section = f"## {captions[name]}\n\n![{captions[name]}]({name}.png)"
        if name == "breakdown":
            section += "\n\n" + markdown_table(*_parts_rows(results)) + "\n\n" + _PARTS_TEXT
        sections.append(section)
    head, rows = _host_rows(results)
    if rows:
        sections.append("## Slowest hosts\n\n" + markdown_table(head, rows) + "\n\n" + _HOSTS_TEXT)
    if calibration is not None:
        sections.append(calibration.markdown())
    return "\n\n".join(sections) + "\n"


_PARTS_TEXT = (
    "Means over ranks and measured steps, in ms; they add up to the mean step. Compute has in it what is reduced "
    "behind the backward pass. A rank waits for the slowest from its own last gradient to that of the rank that comes "
    "last; from there on until all sums are there, communication is exposed."
)
_HOSTS_TEXT = (
    "In how many of the measured steps it took part in a rank of the host came last to the reduction, and in how many "
    "it would if all hosts were alike. "
    "Own time: input and compute of its slowest rank against the mean of all ranks, where it was among the slowest."
)


class _Column:
    def __init__(self, title: str, text: Callable[[Count], str]) -> None:
        self.title, self.text = title, text


def _state(count: Count) -> str:
    words = [state.word for state in count.states]
    if set(words) == {"done"}:
        return "done"
    return ", ".join(f"{words.count(word)} {word}" if len(words) > 1 else word for word in dict.fromkeys(sorted(words)))


def _spread(name: str, form: Callable[[float], str]) -> Callable[[Count], str]:
    def text(count: Count) -> str:
        spread: Spread | None = getattr(count, name)
        if spread is None:
            return UNKNOWN
        return f"{form(spread.median)} [{form(spread.low)}, {form(spread.high)}]"

    return text


def _median(name: str, form: Callable[[float], str]) -> Callable[[Count], str]:
    def text(count: Count) -> str:
        spread: Spread | None = getattr(count, name)
        return UNKNOWN if spread is None else form(spread.median)

    return text


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _energy(count: Count) -> str:
    return UNKNOWN if count.energy_joules is None else f"{count.energy_joules / _JOULES_A_KWH:.3g} kWh"


COLUMNS = (
    _Column("nodes", lambda count: f"{count.nodes:,}"),
    _Column("ranks", lambda count: UNKNOWN if count.ranks is None else f"{count.ranks:,}"),
    _Column("batch", lambda count: f"{count.global_batch:,}"),
    _Column("runs", _state),
    _Column("images/s", _spread("images_per_second", _rate)),
    _Column("ms a step", _spread("step", lambda value: f"{1e3 * value:,.4g}")),
    _Column("speed-up", _spread("speedup", lambda value: f"{value:.2f}")),
    _Column("efficiency", _median("efficiency", lambda value: f"{value:.1%}")),
    _Column("to train", _median("train_seconds", duration)),
    _Column("node-hours", _median("node_hours", lambda value: f"{value:,.3g}")),
    _Column("energy", _energy),
)


def _parts_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    counts = [count for count in results.measured if count.parts]
    rows = [[f"{c.nodes:,}", *(_milliseconds(c.parts[part]) for part in PARTS)] for c in counts if c.parts]
    return ["nodes", *(PART_TITLES[part] for part in PARTS)], rows


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.4g}" if seconds >= 1e-3 else f"{1e3 * seconds:.2f}"


def _host_rows(results: Results) -> tuple[list[str], list[list[str]]]:
    rows = [[h.host, f"{h.last:,} of {h.steps:,}", f"{h.expected:,.3g}", f"{h.excess:+.1%}"] for h in results.hosts]
    return ["slowest hosts", "steps it came last", "if all were alike", "own time"], rows


def _nodes(count: int) -> str:
    return f"{count:,} node{'s' if count > 1 else ''}"
