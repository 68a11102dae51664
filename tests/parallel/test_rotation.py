"""Ranks take turns on CPUs: which of them can, and real ranks that are watched at it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hpctrain.parallel.launch import Place, Plan
from hpctrain.parallel.rotation import neighbors

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, os, sys, threading, time
from hpctrain.parallel.rotation import take_turns
from hpctrain.parallel.world import start

world = start(threads=1)
take_turns(world)
later, elsewhere = (threading.Thread(target=time.sleep, args=(5,), daemon=True) for _ in range(2))
later.start()
elsewhere.start()
everything = sorted({cpu for plan in world.plans for cpu in plan.cpus})
for _ in range(3):  # when it has been moved for a while; it may be about to be moved
    time.sleep(0.2)
    os.sched_setaffinity(elsewhere.native_id, everything)
found = {thread: [] for thread in (0, later.native_id, elsewhere.native_id)}
until = time.monotonic() + 2
while time.monotonic() < until:
    for thread, cpus in found.items():
        cpus.append(sorted(os.sched_getaffinity(thread)))
    time.sleep(0.003)
*found, elsewhere = found.values()
stays = all(cpus == everything for cpus in elsewhere)
print(json.dumps([world.rank, world.plan.cpus, *found, stays]), flush=True)
world.barrier()
"""


def watch(ranks: int) -> list[tuple[list[int], list[list[int]], list[list[int]]]]:
    """Return each rank's CPUs, and those that its main thread and another one were let run on, every 3 ms.

    A third thread has been put elsewhere, and is to stay there.
    """
    environ = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = ["mpirun", "--oversubscribe", "-n", str(ranks), sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = sorted(json.loads(line) for line in done.stdout.splitlines())
    assert [line[0] for line in lines] == list(range(ranks))
    assert all(stays for *_, stays in lines)
    return [(cpus, main, later) for _, cpus, main, later, _ in lines]


@pytest.mark.mpi
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is only one CPU to take turns on")
def test_two_ranks_are_on_either_half_of_the_cpus_half_of_the_time() -> None:
    halves = None
    for cpus, main, later in watch(2):
        halves = halves or (cpus, [c for c in sorted(os.sched_getaffinity(0)) if c not in cpus][: len(cpus)])
        for seen in (main, later):
            assert all(one in halves for one in seen)
            assert 0.25 < sum(one == cpus for one in seen) / len(seen) < 0.75


@pytest.mark.mpi
def test_ranks_that_share_their_cpus_stay() -> None:
    for cpus, main, later in watch(len(os.sched_getaffinity(0)) + 1):
        assert all(one == cpus for one in [*main, *later])


def group(*ranks: tuple[str, tuple[int, ...]], rank: int, cache: set[int]) -> tuple[int, ...]:
    """The neighbors of a rank among ranks that are each on a host, with CPUs."""
    places = [Place(host, cpus, cpus, {cpu: cpu for cpu in cpus}) for host, cpus in ranks]
    return neighbors(places, [Plan(1, cpus, "") for _, cpus in ranks], rank, cache)


def test_neighbors_have_as_many_cpus_of_the_same_cache() -> None:
    ranks = (("a", (0, 1)), ("b", (0, 1)), ("b", (2, 3)), ("b", (4, 5)), ("b", (6,)), ("b", (7,)))
    first = {0, 1, 2, 3}
    assert group(*ranks, rank=0, cache=first) == (0,)
    assert group(*ranks, rank=1, cache=first) == group(*ranks, rank=2, cache=first) == (1, 2)
    assert group(*ranks, rank=3, cache={4, 5, 6, 7}) == (3,)
    assert group(*ranks, rank=4, cache={4, 5, 6, 7}) == group(*ranks, rank=5, cache={4, 5, 6, 7}) == (4, 5)


def test_no_turns_for_ranks_that_span_caches_or_share_cpus() -> None:
    wide = (("a", (0, 1)), ("a", (2, 3)))
    assert group(*wide, rank=0, cache={0}) == (0,)
    shared = (("a", (0, 1)), ("a", (1, 2)), ("a", (3, 4)), ("a", (5, 6)))
    everything = set(range(7))
    assert [group(*shared, rank=rank, cache=everything) for rank in range(4)] == [(0,), (1,), (2, 3), (2, 3)]
