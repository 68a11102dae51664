"""What `hpctrain bench step` and `bench allreduce` print for people."""

from typing import Any

from rich.console import Console
from rich.table import Table

from hpctrain.bench.fit import ring_seconds

_LAYERS_SHOWN = 10
_WIDTH = 160


def print_step(result: dict[str, Any], data_note: str) -> None:
    """Print the result of `measure_step`."""
    console = _console()
    ranks, step = result["ranks"], result["step_seconds"]
    console.print(
        f"{result['model']} at {result['image_size']} pixels, {result['precision']}, micro-batch "
        f"{result['micro_batch']}; {ranks} rank{'' if ranks == 1 else 's'} with {result['threads']} "
        f"thread{'' if result['threads'] == 1 else 's'} each; {result['host']}, {result['cpu']}"
    )
    console.print(f"{result['images_per_second']:,.1f} images/s a rank, without communication")
    table = _table("what", "milliseconds", "share of step")
    rows = [
        ("train step", step),
        ("  forward and backward alone", result["forward_backward_seconds"]),
        ("  update alone", result["update_seconds"]),
        ("step with allreduce", result.get("allreduce_step_seconds")),
        ("bare Keras loop's step", result["bare_keras_step_seconds"]),
        ("input of a micro-batch alone", result["input_seconds"]),
    ]
    for name, seconds in rows:
        if seconds is not None:
            table.add_row(name, f"{1e3 * seconds:,.2f}", f"{seconds / step:.1%}")
    console.print(table)
    low, high = min(result["step_seconds_all"]), max(result["step_seconds_all"])
    console.print(f"steps took {1e3 * low:,.2f} to {1e3 * high:,.2f} ms in {len(result['step_seconds_all'])} rounds")
    console.print(f"framework overhead: {result['framework_overhead']:.3f} times the bare Keras loop")
    if result["peak_share"] is not None:
        console.print(
            f"{result['flops_per_image'] / 1e9:,.3f} GFLOP an image, {result['peak_share']:.1%} of the "
            f"{result['peak_flops'] / 1e9:,.0f} GFLOP/s of a matrix product"
        )
    if "parallel_efficiency" in result:
        console.print(f"parallel efficiency of a step: {result['parallel_efficiency']:.3f}")
    if ranks > 1:
        slowest = result["slowest_rank"]
        console.print(
            f"slowest: rank {slowest['rank']} on {slowest['host']}, {1e3 * slowest['step_seconds']:,.2f} ms a step"
        )
    if data_note:
        console.print(data_note)
    if result["layers"]:
        _print_layers(console, result)


def _print_layers(console: Console, result: dict[str, Any]) -> None:
    layers, whole = result["layers"], result["forward_backward_seconds"]
    table = _table("layer", "parameters", "forward ms", "backward ms", "share of both passes")
    costly = sorted(layers, key=lambda row: row["forward_seconds"] + row["backward_seconds"], reverse=True)
    for row in costly[:_LAYERS_SHOWN]:
        forward, backward = row["forward_seconds"], row["backward_seconds"]
        table.add_row(
            row["name"],
            f"{row['parameters']:,}",
            f"{1e3 * forward:,.3f}",
            f"{1e3 * backward:,.3f}",
            f"{(forward + backward) / whole:.1%}",
        )
    shown = min(_LAYERS_SHOWN, len(layers))
    console.print(f"the {shown} most expensive of {len(layers)} layers:")
    console.print(table)
    console.print(
        f"layers were timed one by one; times are scaled by {result['layer_scale']:.2f} to add up to the passes"
    )


def print_allreduce(result: dict[str, Any]) -> None:
    """Print the result of `measure_allreduce`."""
    console = _console()
    fit, ranks, hosts = result["fit"], result["ranks"], result["hosts"]
    with_horovod = result["sizes"][0]["horovod_seconds"] is not None
    console.print(
        f"allreduce of float32 on {ranks} ranks, {hosts} host{'' if hosts == 1 else 's'}; {result['mpi']}; medians of "
        f"{result['repeats']} repeats, slowest rank"
    )
    table = _table("bytes", "Horovod ms", "MPI ms", "in place ms", "Horovod GB/s", "in place GB/s", "fit")
    beta, constant = fit["beta_seconds_per_byte"], fit["horovod_overhead_seconds"]
    for row in result["sizes"]:
        measured = row["horovod_seconds"] if with_horovod else row["mpi_in_place_seconds"]
        formula = ring_seconds(row["bytes"], ranks, fit["alpha_seconds"], beta, fit["gamma_seconds_per_byte"])
        table.add_row(
            f"{row['bytes']:,}",
            *(_milliseconds(row, path) for path in ("horovod", "mpi", "mpi_in_place")),
            *(_gigabytes(row, path) for path in ("horovod", "mpi_in_place")),
            f"{(formula + constant) / measured - 1:+.0%}",
        )
    console.print(table)
    console.print("GB/s: bus bandwidth, 2 (P-1)/P bytes/second; fit: the formula's time against the measured")
    console.print(
        f"ring fitted to {'Horovod' if with_horovod else 'MPI in place'}: alpha {1e6 * fit['alpha_seconds']:.2f} us, "
        f"beta {1e9 * beta:.4f} ns a byte, gamma {1e9 * fit['gamma_seconds_per_byte']:.4f} ns a byte (measured), "
        f"Horovod's overhead {1e3 * constant:.3f} ms; median error {fit['relative_error']:.1%}"
    )


def _milliseconds(row: dict[str, Any], path: str) -> str:
    if row[f"{path}_seconds"] is None:
        return "-"
    low, high = (1e3 * seconds for seconds in row[f"{path}_range_seconds"])
    return f"{1e3 * row[f'{path}_seconds']:,.3f} ({low:,.3f}-{high:,.3f})"


def _gigabytes(row: dict[str, Any], path: str) -> str:
    rate = row[f"{path}_busbw_bytes_per_second"]
    return "-" if rate is None else f"{rate / 1e9:,.2f}"


def _table(first: str, *numbers: str) -> Table:
    table = Table()
    table.add_column(first, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _console() -> Console:
    # mpirun gives each rank a terminal of its own of no size, whatever its output goes to.
    return Console(width=_WIDTH, force_terminal=False, highlight=False, soft_wrap=True, markup=False)
