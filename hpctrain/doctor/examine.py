"""The order of an examination: facts, then measurements, then the network, then Horovod, then the judgement."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hpctrain import native
from hpctrain.doctor import findings
from hpctrain.doctor.facts import Facts, gather_facts
from hpctrain.doctor.frameworks import Horovod, try_horovod
from hpctrain.doctor.links import Allreduce, Pair, clock_offsets, exchange_in_pairs, time_allreduce
from hpctrain.doctor.measure import Measured, measure_compute, measure_node
from hpctrain.doctor.meeting import Meeting, ended_after
from hpctrain.errors import UserError
from hpctrain.parallel.launch import launcher_rank
from hpctrain.parallel.world import World, alone, start

_MPI_START_SECONDS = 180.0
_NETWORK_SECONDS = 120.0
_SHARD_SUFFIXES = (".h5", ".hdf5")


@dataclass
class Examination:
    """What was found, by rank where it is a list; on rank 0."""

    world: World
    facts: list[Facts]
    directory: Path
    quick: bool
    measured: list[Measured] = field(default_factory=list)
    clocks: dict[int, float] = field(default_factory=dict)  # rank -> seconds ahead of rank 0
    pairs: list[Pair] = field(default_factory=list)
    allreduce: Allreduce | None = None
    horovod: list[Horovod] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    seconds: float = 0.0


def examine(
    as_json: bool,
    directory: Path | None = None,
    data: Path | None = None,
    quick: bool = False,
    now: Callable[[], float] = time.time,
) -> int:
    """Examine all ranks and print the report on rank 0; return 0 when the installation works, 1 when it does not.

    Files are tried in `directory` (default: the current one), and shards of `data` are read where it is given. With
    `quick` nothing is measured and Horovod is not loaded. What is merely slow is a warning and does not change the
    result. `now` is this rank's clock. Raises UserError, on every rank, for directories that are not there.
    """
    began = time.perf_counter()
    world, unusable = _start()
    shards = world.from_root(lambda: _check_directories(directory, data))
    meeting = Meeting(world)
    facts = gather_facts(world.host, world.mpi_version)
    found = Examination(world, meeting.gather(facts, "looking at its node"), directory or Path.cwd(), quick)
    if not quick:
        _measure(found, meeting, facts, shards, now)
        if not unusable:
            found.horovod = try_horovod(meeting)
    if world.is_root:
        for measured, horovod in zip(found.measured, found.horovod, strict=False):
            if not horovod.error:
                measured.values["import"] = horovod.import_seconds
        found.problems += [unusable] if unusable else []
        _judge(found, directory is not None)
        found.seconds = time.perf_counter() - began

        from hpctrain.doctor.report import print_json, print_text

        (print_json if as_json else print_text)(found)
    return world.broadcast(1 if found.problems else 0)


def _start() -> tuple[World, str]:
    """Start MPI, or go on alone with the reason why that cannot be done."""
    try:
        return start(limit_seconds=_MPI_START_SECONDS), ""
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py finds no MPI library
        if launcher_rank() > 0:
            sys.exit(1)  # rank 0 tells
        return alone(), f"mpi4py does not load ({str(error).splitlines()[0]}); run install.sh again with the job's MPI"


def _check_directories(directory: Path | None, data: Path | None) -> list[Path]:
    """Return the shards to read. What all ranks would find is said once."""
    if directory is not None and not directory.is_dir():
        raise UserError(f"--dir {directory} is no directory; give one that is there, to try its file system")
    if data is None:
        return []
    if not data.is_dir():
        raise UserError(f"--data {data} is no directory; give one with shards, made by `hpctrain data prepare`")
    places = (data, data / "train", data / "val")
    try:
        files = [path for place in places if place.is_dir() for path in sorted(place.iterdir())]
    except OSError as error:
        raise UserError(f"--data {data} cannot be read ({error.strerror}); give a directory that can") from error
    shards = [path for path in files if path.suffix in _SHARD_SUFFIXES]
    if not shards:
        raise UserError(f"--data {data} holds no shards (.h5), nor do train/ and val/ in it")
    return shards


def _measure(found: Examination, meeting: Meeting, facts: Facts, shards: list[Path], now: Callable[[], float]) -> None:
    world = found.world
    tested = _one_a_host(world)
    measured = Measured()
    world.barrier()
    measure_compute(measured, world.plan.cpus)
    if world.rank in tested:
        measure_node(measured, facts, found.directory, shards, tested.index(world.rank))
    found.measured = meeting.gather(measured, "measuring its node")
    if world.size == 1:
        return
    with ended_after(_NETWORK_SECONDS, "the exchange of messages between ranks", world.is_root):
        world.barrier()
        found.clocks = clock_offsets(world.comm, tested, now)
        pairs = exchange_in_pairs(world.comm, tested)
        found.pairs = [pair for rank_pairs in meeting.gather(pairs, "measuring pairs of ranks") for pair in rank_pairs]
        found.allreduce = time_allreduce(world.comm)


def _one_a_host(world: World) -> list[int]:
    """The first rank of each host, or all ranks where there is one host: who tries file systems and the network."""
    first: dict[str, int] = {}
    for rank, place in enumerate(world.places):
        first.setdefault(place.host, rank)
    return list(first.values()) if len(first) > 1 else list(range(world.size))


def _judge(found: Examination, directory_given: bool) -> None:
    facts, measured = found.facts, found.measured
    found.problems += findings.version_problems(facts)
    if found.horovod:
        found.problems += findings.horovod_problems(found.horovod, facts)
    if found.world.comm is not None:
        found.warnings += findings.launch_warnings(found.world.places, found.world.plans, os.environ)
    found.warnings += findings.node_warnings(facts)
    found.warnings += findings.horovod_warnings(facts)
    if uncompiled := native.missing():
        found.warnings.append(f"not compiled: {', '.join(uncompiled)}; run python -m hpctrain.native.build")
    tested = sum("directory" in one.errors or "write" in one.values for one in measured)
    for line, ranks in findings.failures(measured, facts, "directory").items():
        # A current directory that nobody can write may be meant so: runs can be kept elsewhere.
        (found.problems if directory_given or len(ranks) < tested else found.warnings).append(line)
    found.problems += [*findings.failures(measured, facts, "data"), *findings.failures(measured, facts, "compute")]
    found.warnings += findings.failures(measured, facts, "local")
    found.warnings += findings.slow_warnings(measured, facts)
    found.warnings += findings.clock_warnings(found.clocks, facts)
    if not any("oversubscribed" in plan.note for plan in found.world.plans):
        # Ranks that wait for a core of their own look like a slow network.
        found.warnings += findings.link_warnings(found.pairs, facts)
