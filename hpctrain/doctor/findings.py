"""From what all ranks reported to sentences: what does not work, what is slow, who is odd. Pure functions."""

import statistics
from collections.abc import Hashable, Mapping, Sequence

from hpctrain.doctor.facts import Facts
from hpctrain.doctor.frameworks import Horovod
from hpctrain.doctor.judge import odd_ones, slow_in_pairs, unlike
from hpctrain.doctor.links import Pair
from hpctrain.doctor.measure import MEASURES, Measure, Measured
from hpctrain.doctor.names import fold_hosts, fold_numbers
from hpctrain.parallel.launch import Place, Plan, warnings_for

_SHOWN = 8
_CLOCK_SECONDS = 1.0
_LATENCY = Measure("latency", "us", 1e-6, "", floor=2.0, larger_is_better=False)
_LINK = Measure("1 MiB one way", "ms", 1e-3, "", floor=1.5, larger_is_better=False)
_SMALL_LOCKED_BYTES = 64 << 20
_FEW_FILES = 1024
_SMALL_SHARED_BYTES = 64 << 20
_SMALL_FREE_BYTES = 1 << 30


def version_problems(facts: Sequence[Facts]) -> list[str]:
    """Return a sentence for every version that is not the same on all ranks; the majority is right."""
    names = sorted({name for one in facts for name in one.versions})
    columns: dict[str, list[Hashable]] = {
        name: [one.versions.get(name, "not installed") for one in facts] for name in names
    }
    columns["MPI"] = [one.mpi for one in facts]
    return [line for name, column in columns.items() for line in _different(name, column, facts)]


def node_warnings(facts: Sequence[Facts]) -> list[str]:
    """Return sentences about nodes and settings that are unlike the others', and limits that are too low."""
    columns: dict[str, list[Hashable]] = {
        "CPU": [one.cpu for one in facts],
        "logical CPUs": [one.cpus for one in facts],
        "kernel": [one.kernel for one in facts],
        "frequency governor": [one.governor for one in facts],
        "Python": [one.python for one in facts],
        "memory limit in bytes": [one.memory_limit_bytes for one in facts],
        "limit of open files": [one.open_files for one in facts],
        "limit of locked memory": [one.locked_memory_bytes for one in facts],
    }
    for name in sorted({name for one in facts for name in one.settings}):
        columns[name] = [one.settings.get(name, "unset") for one in facts]
    found = [line for name, column in columns.items() for line in _different(name, column, facts)]

    def low(values: Sequence[int | None], least: int) -> list[int]:
        return [i for i, value in enumerate(values) if value is not None and value < least]

    if ranks := low([one.locked_memory_bytes if one.fabric else None for one in facts], _SMALL_LOCKED_BYTES):
        found.append(
            f"{where(ranks, facts)}: less than 64 MiB may be locked, which the fabric needs; ulimit -l unlimited"
        )
    if ranks := low([one.open_files for one in facts], _FEW_FILES):
        found.append(f"{where(ranks, facts)}: fewer than {_FEW_FILES:,} files may be open; ulimit -n 4096")
    if len(facts) > 1 and (ranks := low([one.shared_memory_free_bytes for one in facts], _SMALL_SHARED_BYTES)):
        found.append(f"{where(ranks, facts)}: less than 64 MiB are free in /dev/shm, where ranks of a node meet")
    if ranks := low([one.free_memory_bytes for one in facts], _SMALL_FREE_BYTES):
        found.append(f"{where(ranks, facts)}: less than 1 GiB of memory is free; look for other programs there")
    return found


def launch_warnings(places: Sequence[Place], plans: Sequence[Plan], environ: Mapping[str, str]) -> list[str]:
    """Return the sentences of `launch.warnings_for`, once for all hosts that share one."""
    ranks_of: dict[str, list[int]] = {}
    for rank, place in enumerate(places):
        ranks_of.setdefault(place.host, []).append(rank)
    hosts_of: dict[str, list[str]] = {}
    for host, ranks in ranks_of.items():
        for line in warnings_for([places[i] for i in ranks], [plans[i] for i in ranks], environ):
            own = line.startswith(f"{host} ")
            hosts_of.setdefault(line.removeprefix(host) if own else line, []).extend([host] if own else [])
    return [fold_hosts(hosts) + line for line, hosts in hosts_of.items()]


def horovod_problems(horovod: Sequence[Horovod], facts: Sequence[Facts]) -> list[str]:
    """Return sentences about a Horovod that does not load, or not with the job's MPI."""
    broken: dict[str, list[int]] = {}
    for rank, one in enumerate(horovod):
        if one.error:
            text = f"Horovod does not load ({one.error}); run install.sh again"
        elif one.size < 0:
            continue  # it loads, and was not started because another rank's does not
        elif (one.rank, one.size) != (rank, len(facts)):
            text = (
                f"Horovod sees {one.size} ranks, MPI {len(facts)}, or in another order; Horovod was built against "
                "another MPI: run install.sh again with the job's MPI"
            )
        elif not one.mpi_threads:
            text = "this MPI has no MPI_THREAD_MULTIPLE, which Horovod beside mpi4py needs"
        else:
            continue
        broken.setdefault(text, []).append(rank)
    return [f"{where(ranks, facts)}: {text}" for text, ranks in broken.items()]


def horovod_warnings(facts: Sequence[Facts]) -> list[str]:
    """Return a sentence if Horovod is not the one that install.sh builds."""
    version = facts[0].versions.get("horovod")
    if version is None or "+hpctrain" in version:
        return []
    return [
        f"Horovod {version} is without hpctrain's changes, so that sums within a host take two to six times as long; "
        "run install.sh again"
    ]


def failures(measured: Sequence[Measured], facts: Sequence[Facts], what: str) -> dict[str, list[int]]:
    """Return sentences about a measurement that failed, each with the ranks it failed on."""
    found: dict[str, list[int]] = {}
    for rank, one in enumerate(measured):
        if what in one.errors:
            found.setdefault(one.errors[what], []).append(rank)
    return {f"{where(ranks, facts)}: {text}": ranks for text, ranks in found.items()}


def slow_warnings(measured: Sequence[Measured], facts: Sequence[Facts]) -> list[str]:
    """Return one sentence for each measure by which ranks or nodes are much slower than the rest.

    What belongs to a node is compared where there are several: ranks of one node share it, and disturb each other.
    """
    found = []
    several_hosts = len({one.host for one in facts}) > 1
    for name, measure in MEASURES.items():
        if measure.of_node and not several_hosts:
            continue
        values = [one.values.get(name) for one in measured]
        odd = odd_ones([measure.cost(value) for value in values], measure.floor)
        if not odd:
            continue
        known = sorted(value for value in values if value is not None)
        # Of two the better one is what the other is compared with.
        usual = known[len(known) // 2] if measure.larger_is_better else known[(len(known) - 1) // 2]
        measured_on = [rank for rank, value in enumerate(values) if value is not None]
        texts = [f"{who} ({measure.text(values[rank] or 0.0)})" for who, rank in _grouped(odd, measured_on, facts)]
        found.append(
            f"{_first(texts)}: {measure.label} is unlike the rest, whose median is "
            f"{measure.text(usual)}; {measure.cure}"
        )
    return found


def link_warnings(pairs: Sequence[Pair], facts: Sequence[Facts]) -> list[str]:
    """Return sentences about ranks or nodes that are slow in most of their pairs, and about single slow links."""
    found = []
    hosts = {facts[rank].host for pair in pairs for rank in pair.ranks}

    def name(rank: int) -> str:
        return facts[rank].host if len(hosts) > 1 else f"rank {rank} on {facts[rank].host}"

    for measure, seconds in (
        (_LATENCY, {pair.ranks: pair.latency_seconds for pair in pairs}),
        (_LINK, {pair.ranks: pair.seconds for pair in pairs}),
    ):
        slow, links = slow_in_pairs(seconds, measure.floor)
        others = [s for pair, s in seconds.items() if pair not in links and not set(pair) & set(slow)]
        usual = f"MPI {measure.label}, {measure.text(statistics.median(others))} between others" if others else ""
        if slow:
            own = {rank: statistics.median(s for pair, s in seconds.items() if rank in pair) for rank in slow}
            texts = [f"{name(rank)} ({measure.text(own[rank])})" for rank in slow]
            found.append(
                f"{_first(texts)}: slow with most partners, {usual}; look at its network adapter and for programs that "
                "share its cores"
            )
        if links:
            texts = [f"{name(a)} - {name(b)} ({measure.text(seconds[a, b])})" for a, b in links]
            found.append(f"{_first(texts)}: slow with each other only, {usual}; look at the network between them")
    return found


def clock_warnings(offsets: Mapping[int, float], facts: Sequence[Facts]) -> list[str]:
    """Return a sentence for every node whose clock is more than a second off what most have."""
    ordered = sorted(offsets.values())
    if not ordered:
        return []
    usual = ordered[len(ordered) // 2] if len(ordered) > 2 else 0.0
    found = []
    for rank, offset in offsets.items():
        away = offset - usual
        if abs(away) > _CLOCK_SECONDS:
            found.append(
                f"{where([rank], facts)}: its clock is {abs(away):,.1f} s {'ahead' if away > 0 else 'behind'}; log "
                "times and TensorBoard will mislead, and files look older or newer than they are"
            )
    if len(found) > _SHOWN:
        found[_SHOWN:] = [f"{len(found) - _SHOWN:,} more clocks are off by more than {_CLOCK_SECONDS:g} s"]
    return found


def where(ranks: Sequence[int], facts: Sequence[Facts]) -> str:
    """Return ranks and their hosts in a few words."""
    plural = "s" if len(ranks) > 1 else ""
    return f"rank{plural} {fold_numbers(ranks)} on {fold_hosts([facts[rank].host for rank in ranks])}"


def _first(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _SHOWN:,} more" if len(texts) > _SHOWN else ""
    return ", ".join(texts[:_SHOWN]) + more


def _different(name: str, column: Sequence[Hashable], facts: Sequence[Facts]) -> list[str]:
    usual, others = unlike(column)
    reference = "rank 0 has" if len(column) == 2 else "most have"
    return [f"{where(ranks, facts)}: {name} {value}, {reference} {usual}" for value, ranks in others.items()]


def _grouped(odd: Sequence[int], measured_on: Sequence[int], facts: Sequence[Facts]) -> list[tuple[str, int]]:
    """Words for the odd ranks, and the worst rank of each: a host of many whose ranks are all odd is one."""
    several = len({one.host for one in facts}) > 1
    counts: dict[str, int] = {}
    for rank in measured_on:
        counts[facts[rank].host] = counts.get(facts[rank].host, 0) + 1
    by_host: dict[str, list[int]] = {}
    for rank in odd:
        by_host.setdefault(facts[rank].host, []).append(rank)
    found = []
    for host, ranks in by_host.items():
        whole = several and len(ranks) == counts[host]
        found.append((host if whole else where(ranks, facts), ranks[0]))
    return found
