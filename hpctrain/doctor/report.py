"""How an examination is printed: a page for people, however many ranks there are, or everything as JSON."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hpctrain.doctor.facts import SHOWN_SETTINGS, Facts
from hpctrain.doctor.findings import where
from hpctrain.doctor.links import Allreduce
from hpctrain.doctor.measure import MEASURES
from hpctrain.doctor.names import fold_hosts, fold_numbers
from hpctrain.parallel.launch import TREE_ORDER, Plan

if TYPE_CHECKING:
    from hpctrain.doctor.examine import Examination

_LINES_A_RANK = 16
_LABEL_WIDTH, _VALUE_WIDTH = 28, 16


def print_text(found: "Examination") -> None:
    """Print the report: what all have in common once, a line for each kind of node, and who is unlike the rest."""
    world, facts = found.world, found.facts
    hosts = {one.host for one in facts}
    print(f"ranks      {world.size:,} on {len(hosts):,} host{'s' if len(hosts) > 1 else ''}; {world.mpi_version}")
    for text, names in _kinds(facts, _node_text):
        print(f"nodes      {fold_hosts(names)}: {text}")
    for text, names in _kinds(facts, _limits_text):
        print(f"limits     {fold_hosts(names)}: {text}")
    print(f"versions   {', '.join(f'{name} {version}' for name, version in facts[0].versions.items())}")
    print(f"Horovod    {_horovod_text(found)}")
    _print_ranks(found)
    for name in SHOWN_SETTINGS:
        print(f"setting    {name}={facts[0].settings.get(name, '(unset)')}")
    if not found.quick:
        _print_measures(found)
    for problem in found.problems:
        print(f"PROBLEM    {problem}")
    for warning in found.warnings:
        print(f"warning    {warning}")
    if not found.problems and not found.warnings:
        print("all is well" + (" with what --quick looks at" if found.quick else ""))


def print_json(found: "Examination") -> None:
    """Print everything that was found, by rank."""
    world, facts = found.world, found.facts
    report: dict[str, Any] = {
        "versions": facts[0].versions,
        "mpi": world.mpi_version,
        "quick": found.quick,
        "horovod": [dataclasses.asdict(one) for one in found.horovod],
        "directory": str(found.directory),
        "ranks": [
            {
                "rank": rank,
                "host": place.host,
                "cpus": list(plan.cpus),
                "threads": plan.threads,
                "placement": plan.note,
                "facts": dataclasses.asdict(facts[rank]),
                **({"measured": dataclasses.asdict(found.measured[rank])} if found.measured else {}),
            }
            for rank, (place, plan) in enumerate(zip(world.places, world.plans, strict=True))
        ],
        "settings": {name: facts[0].settings.get(name) for name in SHOWN_SETTINGS},
        "deterministic_settings": TREE_ORDER,
        "clock_offsets_seconds": found.clocks,
        "pairs": [dataclasses.asdict(pair) for pair in found.pairs],
        "allreduce": dataclasses.asdict(found.allreduce) if found.allreduce else None,
        "problems": found.problems,
        "warnings": found.warnings,
        "seconds": found.seconds,
    }
    print(json.dumps(report, indent=1))


def _kinds(facts: Sequence[Facts], describe: Callable[[Facts], str]) -> list[tuple[str, list[str]]]:
    """Hosts by what is said of them, the most frequent first."""
    kinds: dict[Hashable, list[str]] = {}
    for host, one in {one.host: one for one in facts}.items():
        kinds.setdefault(describe(one), []).append(host)
    return sorted(((str(text), names) for text, names in kinds.items()), key=lambda kind: -len(kind[1]))


def _node_text(one: Facts) -> str:
    # Two digits: nodes of a kind differ by what their kernels keep.
    memory = f"{float(f'{one.memory_bytes / 1e9:.2g}'):g} GB" if one.memory_bytes else "memory unknown"
    fabric = f", {' '.join(one.fabric)}" if one.fabric else ""
    return f"{one.cpu}, {one.cpus} CPUs, {memory}, Linux {one.kernel}{fabric}"


def _limits_text(one: Facts) -> str:
    files = "any number of" if one.open_files is None else f"{one.open_files:,}"
    locked = "any" if one.locked_memory_bytes is None else f"{one.locked_memory_bytes / 2**20:,.0f} MiB"
    memory = "the node's" if one.memory_limit_bytes is None else f"{one.memory_limit_bytes / 1e9:,.1f} GB"
    return f"{files} open files, {locked} locked memory, memory: {memory}, $TMPDIR: {one.local_directory}"


def _horovod_text(found: "Examination") -> str:
    if found.quick:
        return "not loaded (--quick)"
    if not found.horovod:
        return "not tried, without MPI"
    broken = sum(bool(one.error) for one in found.horovod)
    if not broken:
        return "works"
    first = next(one.error for one in found.horovod if one.error)
    return f"does not load: {first}" if broken == len(found.horovod) else f"does not load on {broken:,} ranks"


def _print_ranks(found: "Examination") -> None:
    """A line a rank when these are few; otherwise one for each way in which ranks are placed on their hosts."""
    world = found.world
    if world.size <= _LINES_A_RANK:
        for rank, plan in enumerate(world.plans):
            cpus = fold_numbers(plan.cpus)
            print(f"rank {rank:<5} {world.places[rank].host}: {_threads(plan)} on CPUs {cpus} ({plan.note})")
        return
    counts: dict[str, int] = {}
    for place in world.places:
        counts[place.host] = counts.get(place.host, 0) + 1
    kinds: dict[str, list[int]] = {}
    for rank, (place, plan) in enumerate(zip(world.places, world.plans, strict=True)):
        text = f"{counts[place.host]} a host, {_threads(plan)} on {len(plan.cpus)} CPUs each ({plan.note})"
        kinds.setdefault(text, []).append(rank)
    for text, ranks in kinds.items():
        print(f"placement  {where(ranks, found.facts)}: {text}")


def _threads(plan: Plan) -> str:
    return f"{plan.threads} thread{'s' if plan.threads > 1 else ''}"


def _print_measures(found: "Examination") -> None:
    print(f"\n{'measured':<{_LABEL_WIDTH}} {'median':>{_VALUE_WIDTH}} {'worst':>{_VALUE_WIDTH}}   where")
    for name, measure in MEASURES.items():
        values = {(r,): one.values[name] for r, one in enumerate(found.measured) if name in one.values}
        _print_row(found, measure.label, values, measure.text, measure.larger_is_better, measure.of_node)
    by_pair = {pair.ranks: pair for pair in found.pairs}
    if by_pair:
        latencies = {ranks: pair.latency_seconds for ranks, pair in by_pair.items()}
        rates = {ranks: 2**20 / pair.seconds for ranks, pair in by_pair.items()}
        _print_row(found, "MPI latency in pairs", latencies, lambda v: f"{v * 1e6:,.1f} us", False)
        _print_row(found, "MPI 1 MiB in pairs", rates, lambda v: f"{v / 1e9:,.2f} GB/s", True)
    if found.clocks:
        away = {(rank,): abs(offset) for rank, offset in found.clocks.items()}
        _print_row(found, "clock away from rank 0's", away, lambda v: f"{v * 1e3:,.3f} ms", False)
    if found.allreduce:
        print(f"{'allreduce of 32 MiB':<{_LABEL_WIDTH}} {_allreduce_text(found.allreduce)}")
    print(f"tried in {found.directory}; took {found.seconds:.1f} s\n")


def _print_row(
    found: "Examination",
    label: str,
    values: Mapping[Any, float],
    text: Callable[[float], str],
    larger_is_better: bool,
    of_node: bool = False,
) -> None:
    """Print one row; `values` are by the ranks (a tuple of one or two) that measured each."""
    if not values:
        return
    row = f"{label:<{_LABEL_WIDTH}} {text(statistics.median(values.values())):>{_VALUE_WIDTH}}"
    if len(values) > 1:
        worst = (min if larger_is_better else max)(values.items(), key=lambda item: item[1])
        ranks = worst[0]
        hosts = {one.host for one in found.facts}
        place = found.facts[ranks[0]].host if of_node and len(hosts) > 1 else where(ranks, found.facts)
        row += f" {text(worst[1]):>{_VALUE_WIDTH}}   {place}"
    print(row)


def _allreduce_text(allreduce: Allreduce) -> str:
    rate = f"{allreduce.bus_bytes_per_second / 1e9:,.2f} GB/s"
    return f"{rate:>{_VALUE_WIDTH}}   bus bandwidth; {allreduce.seconds * 1e3:,.1f} ms, the slowest rank's"
