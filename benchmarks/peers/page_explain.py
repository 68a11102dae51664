"""The page's tables that explain: the bare convolutions, where a step's time goes, the link between two hosts."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.peers.figures import Run, Spread, of_contender, ratios_of_rounds, verdict
from benchmarks.peers.plan import (
    APART,
    BARE,
    BARE_TENSORFLOW,
    LINK_GOAL,
    OURS,
    RANKS,
    SLICE_SECONDS,
    TWO_RANKS,
    Group,
    peak_gflops,
)
from benchmarks.peers.table import numbers, table

_HEADERS = {"mpi": "MPI", "mpi_in_place": "MPI in place", "horovod": "Horovod as the trainer uses it"}


def bare_convolutions(groups: Sequence[tuple[Group, Sequence[Run]]], machine: Mapping[str, Any]) -> str:
    """Return the rate of the convolutions alone, and of the whole step beside it, for a core."""
    rows = []
    for group, runs in groups:
        flops = next((run["flops_per_image"] for run in runs if "flops_per_image" in run), None)
        ours = next((name for name in (RANKS, OURS) if of_contender(runs, name, "images_per_second")), None)
        step = of_contender(runs, ours, "images_per_second") if ours else None
        for by, contender in (("hpctrain", BARE), ("TensorFlow", BARE_TENSORFLOW)):
            rate = of_contender(runs, contender, "images_per_second")
            if rate is None or step is None or flops is None or ours is None:
                continue
            alone = next(run["convolution_flops_per_image"] for run in runs if "convolution_flops_per_image" in run)
            peak = peak_gflops(group, machine["instructions"])
            bare, whole = (
                spread.median * each / min(2, machine["cores"]) / 1e9 for spread, each in ((rate, alone), (step, flops))
            )
            cells = [f"{bare:.0f}", f"{bare / peak:.0%}", f"{whole:.0f}", f"{whole / peak:.0%}", f"{whole / bare:.0%}"]
            rows.append([group.title, by, *cells, f"{step.median / rate.median:.0%}", ours])
    if not rows:
        return ""
    header = [
        "work",
        "convolutions by",
        "alone",
        "of peak",
        "step",
        "of peak",
        "step to alone",
        "time to step's",
        "step of",
    ]
    text = """GFLOP/s of a core. The convolutions alone are forward, backward for the input and for the weights, each
layer's shape, one after the other: as hpctrain's models do them, and by TensorFlow's kernels. The step is hpctrain's;
it has dense layers as well, so its rate can be higher. The last ratio is the time of the convolutions alone to that of
the step. FLOP are those of the definition: Winograd's algorithm, which hpctrain takes for 3x3 convolutions in float32,
needs fewer.

"""
    return f"## Bare convolutions\n\n{text}" + table(header, rows, range(2, 8))


def two_ranks_spread(result: Run) -> Spread:
    """Return the ratio of two ranks' images/s to that of two independent processes, over rounds."""
    return Spread.of(ratios_of_rounds(result))


def two_ranks_ratios(results: Sequence[Run]) -> list[list[str]]:
    """Return rows for the table of all ratios."""
    rows = []
    for result in results:
        how, spread = TWO_RANKS[result["model"]], two_ranks_spread(result)
        limit = "" if how.limit is None else str(how.limit)
        rows.append([how.title, f"{RANKS} / {APART}", *numbers(spread), limit, verdict(spread, how.limit)])
    return rows


def two_ranks(results: Sequence[Run]) -> str:
    """Return what two ranks do beside two independent processes, and where the difference comes from."""
    if not results:
        return ""
    rows = []
    for result in results:
        how, spread = TWO_RANKS[result["model"]], two_ranks_spread(result)
        ranks, apart = (how.micro_batch * statistics.mean(result[kind]) for kind in ("ranks", "independent"))
        others = [f"{result[kind]:.2f}" for kind in ("ranks / together", "by processor time")]
        batch = f"2 x {how.micro_batch}"
        rounds = str(len(result["ranks"]))
        rows.append([how.title, batch, f"{ranks:.1f}", f"{apart:.1f}", *numbers(spread), *others, rounds])
    header = ["work", "batch", "ranks, images/s", "independent", "ratio", "min", "max"]
    header += ["to waiting ones", "by processor time", "rounds"]
    text = f"""`python -m benchmarks.peers.two_ranks`: two ranks and two processes that know nothing of each other, each
on a CPU of its own, are there at the same time and run in turns of {SLICE_SECONDS} s, while the others are stopped. So
both meet the same machine. Waiting ones would be such processes if both took as long as the slower one in each step, as
ranks have to wait. The ratio of the processor time that a step takes has no waiting in it, but what ranks do besides:
adding the gradients, and wanting the memory for the same at the same time.

"""
    return f"## Two ranks beside two processes\n\n{text}" + table(header, rows, range(2, 10))


def profile(results: Sequence[Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    """Return where the time of a step goes; `titles` are those of groups."""
    if not results:
        return ""
    names = [f"{titles[result['group']]}, {result['contender']}" for result in results]
    header = ["ms of a step", *(f"{name} {unit}" for name in names for unit in ("", "%"))]
    rows = []
    for kind in results[0]["milliseconds"]:
        cells = []
        for result in results:
            milliseconds, whole = result["milliseconds"][kind], result["milliseconds"]["whole step"]
            cells += [f"{milliseconds:,.1f}", f"{100 * milliseconds / whole:.1f}"]
        rows.append([kind, *cells])
    text = """TensorFlow's profiler around some steps of two processes, each with one thread. What Horovod does beside
the operations does not count as one.

"""
    return f"## Where the time of a step goes\n\n{text}" + table(header, rows, range(1, 1 + 2 * len(results)))


def link_ratios(result: Mapping[str, Any] | None) -> list[list[str]]:
    """Return rows of the page's ratios: the trainer's allreduce to the link, and to what TCP makes of it."""
    rows = []
    for size in (result or {}).get("allreduce", {}).get("sizes", []):
        assert result is not None
        for words, limit in (
            (f"a link of {result['rate_mbit'] / 1000:g} Gbit/s", result["rate_mbit"] * 1e6 / 8),
            ("TCP both ways", Spread.of(result["tcp"]["both_ways_bytes_per_second"]).median),
        ):
            spread = _of_limit(size, "horovod", result["allreduce"]["ranks"], limit)
            ratio = f"Horovod as the trainer uses it / {words}, {size['bytes'] // 2**20} MiB"
            rows.append(["allreduce, 2 hosts", ratio, *numbers(spread), str(LINK_GOAL), verdict(spread, LINK_GOAL)])
    return rows


def link(result: Mapping[str, Any] | None) -> str:
    """Return the allreduce between two hosts beside TCP."""
    if not result:
        return ""
    limit = result["rate_mbit"] * 1e6 / 8
    ranks = result["allreduce"]["ranks"]
    rows = []
    for size in result["allreduce"]["sizes"]:
        cells = []
        for path in _HEADERS:
            cells += [f"{1e3 * size[f'{path}_seconds']:,.1f}", f"{_of_limit(size, path, ranks, limit).median:.2f}"]
        rows.append([f"{size['bytes'] // 2**20} MiB", *cells])
    header = ["message", *(text for name in _HEADERS.values() for text in (f"{name} ms", "of the link"))]
    one_way, both = (
        Spread.of(result["tcp"][f"{way}_bytes_per_second"]).median / limit for way in ("one_way", "both_ways")
    )
    rate, repeats = result["rate_mbit"], result["allreduce"]["repeats"]
    text = f"""`hpctrain bench allreduce` between two emulated hosts on this machine, {rate} Mbit/s each way, which is
{limit / 1e6:.0f} MB/s with the headers of Ethernet and TCP; {repeats} repeats, medians. Bus bandwidth, 2(n-1)/n times
the bytes a second, to that. TCP by itself, a socket and nothing else, carries {one_way:.3f} of the link one way and
{both:.3f} each way when both send.

"""
    return f"## Allreduce between two hosts\n\n{text}" + table(header, rows, range(1, 1 + 2 * len(_HEADERS)))


def _of_limit(size: Mapping[str, Any], path: str, ranks: int, limit: float) -> Spread:
    """Bus bandwidth to a rate in bytes a second: of the median time, the longest and the shortest."""
    sent = 2 * (ranks - 1) / ranks * size["bytes"]
    fastest, slowest = size[f"{path}_range_seconds"]
    return Spread(sent / size[f"{path}_seconds"] / limit, sent / slowest / limit, sent / fastest / limit)
