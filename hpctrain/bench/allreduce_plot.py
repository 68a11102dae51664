"""The picture of `hpctrain bench allreduce`: time and bus bandwidth over message size, and the fit, as PNG bytes."""

import io
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hpctrain.bench.fit import bus_bandwidth, ring_seconds

_PATHS = (
    ("horovod", "Horovod, as the trainer", "#0072B2", "o"),
    ("mpi", "MPI_Allreduce", "#D55E00", "s"),
    ("mpi_in_place", "MPI_Allreduce in place", "#009E73", "^"),
)
_FIT_POINTS = 200


def plot_allreduce(result: dict[str, Any]) -> bytes:
    """Draw the result of `measure_allreduce`: medians as points with the range of repeats, the fit as dashed lines."""
    figure = Figure(figsize=(11, 4.8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    ranks, fit = result["ranks"], result["fit"]
    sizes = np.array([row["bytes"] for row in result["sizes"]], float)
    line = np.geomspace(sizes[0], sizes[-1], _FIT_POINTS)
    for path, label, color, marker in _PATHS:
        if result["sizes"][0][f"{path}_seconds"] is None:
            continue
        seconds = np.array([row[f"{path}_seconds"] for row in result["sizes"]])
        low, high = np.array([row[f"{path}_range_seconds"] for row in result["sizes"]]).T
        style: dict[str, Any] = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1.5, "label": label}
        left.errorbar(sizes, seconds, yerr=[seconds - low, high - seconds], capsize=2, **style)
        right.plot(sizes, [bus_bandwidth(n, t, ranks) / 1e9 for n, t in zip(sizes, seconds, strict=True)], **style)
        if path == "mpi":
            continue
        beta, constant = fit["beta_seconds_per_byte"], fit["horovod_overhead_seconds"]
        if path == "mpi_in_place":
            beta, constant = fit["mpi_beta_seconds_per_byte"], 0.0
        times = [
            constant + ring_seconds(n, ranks, fit["alpha_seconds"], beta, fit["gamma_seconds_per_byte"]) for n in line
        ]
        fitted: dict[str, Any] = {"color": color, "linestyle": "--", "linewidth": 1, "label": f"fit to {label}"}
        left.plot(line, times, **fitted)
        right.plot(line, [bus_bandwidth(n, t, ranks) / 1e9 for n, t in zip(line, times, strict=True)], **fitted)
    left.set_yscale("log")
    left.set_ylabel("seconds, slowest rank")
    right.set_ylabel("bus bandwidth, GB/s")
    right.set_ylim(bottom=0)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("message, bytes")
        axes.grid(color="#DDDDDD", linewidth=0.8)
        axes.set_axisbelow(True)
    left.legend(fontsize=9, framealpha=0.9)
    hosts = result["hosts"]
    figure.suptitle(
        f"allreduce on {ranks} ranks, {hosts} host{'' if hosts == 1 else 's'}, {result['mpi']}", fontsize=11
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
