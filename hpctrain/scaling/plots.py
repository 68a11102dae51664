"""The pictures of a report: curves of one or several runs, as PNG bytes.

Matplotlib's object-oriented interface only: no global figure, no display needed. Color tells the run, line style tells
the quantity.
"""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, PercentFormatter

from hpctrain.scaling.run_data import RunData, num_warm_up, steady_images_per_second

if TYPE_CHECKING:
    from hpctrain.scaling.study.gather import Results

# Okabe and Ito's colors, which color-blind readers can tell apart; repeated with other dashes it would be unreadable,
# so from nine runs on the colors come from a color map instead.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
_GRAY = "#555555"
_DOTS_PER_INCH = 100
_SMOOTH_FROM_POINTS = 60

LabeledRun = tuple[str, RunData]
Styles = list[tuple[str, dict[str, Any]]]
LegendPlace = Literal["best", "upper right", "lower right"]


def plot_loss(runs: Sequence[LabeledRun]) -> bytes | None:
    """Loss against epoch, training and evaluation; None if no run logged any."""
    figure, axes = _new_figure("Loss", "epoch", "cross-entropy loss")
    used = set()
    for style, run in _styled(runs):
        x, y = run.series("train", "epoch", "loss")
        if x:
            _draw_noisy(axes, x, y, style)
            used.add("train")
        x, y = run.series("eval", "epoch", "loss")
        if x:
            axes.plot(x, y, **style, linestyle="--", marker="o", markersize=3 * style["linewidth"], zorder=3)
            used.add("evaluation")
    styles: Styles = [("train", {"linestyle": "-"}), ("evaluation", {"linestyle": "--", "marker": "o"})]
    return _finish(figure, axes, runs, used, styles, loc="upper right")


def plot_accuracy(runs: Sequence[LabeledRun]) -> bytes | None:
    """Top-1 and top-5 accuracy of the evaluations and top-1 of the training batches, in percent, against epoch."""
    figure, axes = _new_figure("Accuracy", "epoch", "accuracy (%)")
    used = set()
    for style, run in _styled(runs):
        x, y = run.series("train", "epoch", "top1")
        if x:
            axes.plot(x, _smooth(y), color=style["color"], linewidth=1, alpha=0.45)
            used.add("train top-1")
        x, y = run.series("eval", "epoch", "top5")
        if x:
            axes.plot(x, y, **style, linestyle=":", marker="s", markersize=2.5 * style["linewidth"], zorder=3)
            used.add("evaluation top-5")
        x, y = run.series("eval", "epoch", "top1")
        if x:
            axes.plot(x, y, **style, marker="o", markersize=3 * style["linewidth"], zorder=3)
            used.add("evaluation top-1")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))
    axes.set_ylim(0, 1.02)
    styles: Styles = [
        ("evaluation top-5", {"linestyle": ":", "marker": "s"}),
        ("evaluation top-1", {"linestyle": "-", "marker": "o"}),
        ("train top-1", {"linestyle": "-", "linewidth": 1, "alpha": 0.45}),
    ]
    return _finish(figure, axes, runs, used, styles, loc="lower right")


def plot_throughput(runs: Sequence[LabeledRun]) -> bytes | None:
    """Images per second against step, and the median without the warm-up as a dashed line."""
    figure, axes = _new_figure("Throughput", "step", "images/s, all ranks")
    used = set()
    for style, run in _styled(runs):
        x, y = run.series("train", "step", "images_per_second")
        if not x:
            continue
        color = style["color"]
        axes.plot(x, y, color=color, linewidth=1, alpha=0.5, marker="o" if len(x) < 20 else None, markersize=4)
        used.add("logged step")
        median = steady_images_per_second(y)
        if median is not None:
            axes.hlines(median, x[num_warm_up(len(x))], x[-1], color=color, linestyle="--", linewidth=2, zorder=3)
            used.add("median after warm-up")
    axes.set_ylim(bottom=0)
    axes.margins(y=0.1)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    styles: Styles = [
        ("logged step", {"linestyle": "-", "linewidth": 1, "alpha": 0.5}),
        ("median after warm-up", {"linestyle": "--", "linewidth": 2}),
    ]
    return _finish(figure, axes, runs, used, styles, loc="best")


def plot_learning_rate(runs: Sequence[LabeledRun]) -> bytes | None:
    """Learning rate against epoch; None if no run logged any."""
    figure, axes = _new_figure("Learning rate", "epoch", "learning rate")
    used = set()
    for style, run in _styled(runs):
        x, y = run.series("train", "epoch", "learning_rate")
        if x:
            axes.plot(x, y, **style)
            used.add("learning rate")
    axes.set_ylim(bottom=0)
    return _finish(figure, axes, runs, used, [], loc="upper right")


def plot_speedup(results: "Results") -> bytes:
    """Speed-up of a study's node counts over the smallest, with quartiles, beside the ideal line."""
    figure, axes = _new_figure("Speed-up", "nodes", f"times the images/s of {_nodes(results.measured[0].nodes)}")
    counts = results.measured
    nodes = [count.nodes for count in counts]
    ideal = [n / nodes[0] for n in nodes]
    axes.plot(nodes, ideal, color=_GRAY, linestyle="--", linewidth=1.4, label="ideal")
    _draw_spreads(axes, nodes, [count.speedup for count in counts], 1.0)
    if len(nodes) > 1:
        axes.set_yscale("log", base=2)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_ylim(bottom=0)
    return _finish_study(figure, axes, nodes, results.title)


def plot_efficiency(results: "Results") -> bytes:
    """Parallel efficiency of a study's node counts in percent, with quartiles."""
    counts = results.measured
    figure, axes = _new_figure("Parallel efficiency", "nodes", "speed-up over the ideal (%)")
    nodes = [count.nodes for count in counts]
    axes.axhline(100, color=_GRAY, linestyle="--", linewidth=1.4, label="ideal")
    _draw_spreads(axes, nodes, [count.efficiency for count in counts], 100.0)
    top = max(100 * count.efficiency.high for count in counts if count.efficiency)
    axes.set_ylim(0, max(108, 1.05 * top))
    return _finish_study(figure, axes, nodes, results.title)


def plot_breakdown(results: "Results") -> bytes | None:
    """The mean step of each node count cut into its parts, stacked; None if no run logged them."""
    from hpctrain.scaling.study.report import PART_TITLES

    counts = [count for count in results.measured if count.parts is not None]
    if not counts:
        return None
    figure, axes = _new_figure("Where the time of a step goes", "nodes", "ms a step, mean over ranks")
    # Compute at the bottom, where its height can be compared between counts.
    colors = {"compute": _COLORS[0], "exposed": _COLORS[1], "straggler": _COLORS[4], "input": _COLORS[2]}
    bottom = np.zeros(len(counts))
    for part, color in colors.items():
        height = np.array([1e3 * count.parts[part] for count in counts if count.parts is not None])
        axes.bar(range(len(counts)), height, bottom=bottom, color=color, width=0.6, label=PART_TITLES[part])
        bottom += height
    for x, total in enumerate(bottom):
        axes.annotate(f"{total:,.4g}", (x, total), (0, 3), textcoords="offset points", ha="center", fontsize=10)
    axes.set_xticks(range(len(counts)), [f"{count.nodes:,}" for count in counts])
    axes.set_ylim(0, 1.12 * max(bottom))
    axes.set_title(results.title, fontsize=10, color=_GRAY, loc="right")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    return _png(figure)


def _draw_spreads(axes: Axes, nodes: list[int], spreads: list[Any], factor: float) -> None:
    middle = np.array([factor * spread.median for spread in spreads])
    errors = np.abs([[factor * s.low for s in spreads] - middle, [factor * s.high for s in spreads] - middle])
    style: dict[str, Any] = {"color": _COLORS[0], "marker": "o", "linewidth": 1.8, "capsize": 4, "zorder": 3}
    axes.errorbar(nodes, middle, yerr=errors, label="measured (median, quartiles)", **style)


def _finish_study(figure: Figure, axes: Axes, nodes: list[int], title: str) -> bytes:
    if len(nodes) > 1:
        axes.set_xscale("log", base=2)
    axes.set_xticks(nodes, [f"{count:,}" for count in nodes])
    axes.minorticks_off()
    axes.set_title(title, fontsize=10, color=_GRAY, loc="right")
    axes.legend(loc="best", framealpha=0.9, edgecolor="none", fontsize=10)
    return _png(figure)


def _nodes(count: int) -> str:
    return f"{count:,} node{'s' if count > 1 else ''}"


def _new_figure(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4.8), dpi=_DOTS_PER_INCH, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=13, fontweight="bold", loc="left")
    axes.set_xlabel(x_label, fontsize=11)
    axes.set_ylabel(y_label, fontsize=11)
    axes.grid(color="#DDDDDD", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _colored(runs: Sequence[LabeledRun]) -> list[tuple[str, LabeledRun]]:
    """Return each run with its color."""
    if len(runs) <= len(_COLORS):
        return list(zip(_COLORS, runs, strict=False))
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    colors = [to_hex(colormaps["viridis"](share)) for share in np.linspace(0, 0.92, len(runs))]
    return list(zip(colors, runs, strict=True))


def _styled(runs: Sequence[LabeledRun]) -> list[tuple[dict[str, Any], RunData]]:
    """Return each run with its color and line width.

    Earlier runs are wider, so that runs which coincide (on other node counts they do, bit for bit) all stay visible.
    """
    colored = _colored(runs)
    extra = [min(1.8, 0.9 * (len(colored) - 1)) * (1 - i / max(1, len(colored) - 1)) for i in range(len(colored))]
    return [({"color": color, "linewidth": 1.6 + w}, run) for w, (color, (_, run)) in zip(extra, colored, strict=True)]


def _smooth(values: list[float]) -> list[float]:
    """Return the centered running mean over about a fortieth of the points; as given when there are few.

    At the ends the window is cut off, so the curve is neither shifted nor bent. A NaN stays within its window.
    """
    if len(values) < _SMOOTH_FROM_POINTS:
        return values
    half = len(values) // 80 + 1
    return [float(np.mean(values[max(0, i - half) : i + half + 1])) for i in range(len(values))]


def _draw_noisy(axes: Axes, x: list[float], y: list[float], style: dict[str, Any]) -> None:
    """Draw the values faintly and their running mean over them; only a line when there are few values."""
    if len(y) >= _SMOOTH_FROM_POINTS:
        axes.plot(x, y, color=style["color"], linewidth=0.7, alpha=0.3)
    axes.plot(x, _smooth(y), **style)


def _finish(
    figure: Figure,
    axes: Axes,
    runs: Sequence[LabeledRun],
    used: set[str],
    styles: Styles,
    loc: LegendPlace,
) -> bytes | None:
    """Add the legends and return the PNG; None if nothing was drawn.

    One legend names the quantities by their line style, a second one under the axes names the runs by their color.
    """
    if not used:
        return None
    colored = _colored(runs)
    alone = len(runs) == 1
    shown = [(name, style) for name, style in styles if name in used]
    if shown:
        style_color = colored[0][0] if alone else _GRAY
        lines = [Line2D([], [], label=name, color=style_color, markersize=5, **style) for name, style in shown]
        axes.legend(handles=lines, loc=loc, framealpha=0.9, edgecolor="none", fontsize=10)
    if alone:
        axes.set_title(runs[0][0], fontsize=10, color=_GRAY, loc="right")
    else:
        handles = [Line2D([], [], label=label, color=color, linewidth=3) for color, (label, _) in colored]
        longest = max(len(label) for label, _ in runs)
        columns = max(1, min(len(runs), 96 // (longest + 6)))
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=10)
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the version of the software, the same data give the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
