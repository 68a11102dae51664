"""The ranks of a host take turns on its CPUs, so that all of them get on equally fast.

In each step ranks wait for the slowest, and CPUs that ought to be alike often are not: other tenants of a virtual
machine, another hardware thread of the core, daemons. A rank that stays on the slower one makes all others wait for it.
"""

import contextlib
import ctypes
import itertools
import os
import platform
import struct
import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpctrain.parallel.launch import Place, Plan
from hpctrain.parallel.world import World

_PERIOD_SECONDS = 0.1  # shorter than the steps of large networks, and much longer than filling a cache takes
_SHARE = 0.01  # of the time goes into it at most
_TURNS_A_LOOK = 10  # whether all ranks are there, which takes longer than a turn
_SLICE_NANOSECONDS = 100_000


@dataclass(frozen=True)
class _Member:
    """A rank that takes part, as another process of the host finds it."""

    process: int
    namespace: str  # in which the process has that number
    started: int | None  # in ticks since the host's start; another process with that number started at another time
    cpus: tuple[int, ...]
    may_move: bool


def take_turns(world: World) -> None:
    """Let ranks of a host whose CPUs share a cache exchange those with each other from now on.

    Each keeps as many CPUs, and has them to itself. Nothing changes for a rank that has no such neighbor, for ranks
    that share their CPUs already, and where the system does not let one of them run on the others' CPUs. All ranks
    call it together, once; a thread of one rank of a group moves all of them, so that no two are in one place.
    """
    if world.size == 1:
        return
    cpus = world.plan.cpus
    ranks = neighbors(world.places, world.plans, world.rank, _cpus_of_last_cache(cpus[0]))
    everywhere = {cpu for rank in ranks for cpu in world.plans[rank].cpus}
    may_move = len(ranks) > 1 and _may_run_on(everywhere, cpus)
    me = _Member(os.getpid(), _namespace(), _start_ticks(os.getpid()), cpus, may_move)
    members = world.allgather(me)
    group = [members[rank] for rank in ranks]
    good = [member.may_move and member.namespace == me.namespace and _is_there(member) for member in group]
    if ranks[0] == world.rank and all(good):
        threading.Thread(target=_exchange, args=(group,), name="rotation", daemon=True).start()


def neighbors(places: Sequence[Place], plans: Sequence[Plan], rank: int, cache: Collection[int]) -> tuple[int, ...]:
    """Return the ranks that can exchange CPUs with `rank`, itself among them: a pure function.

    These are ranks of its host that have as many CPUs as it has, to themselves, and all of them in `cache`, the CPUs
    that share the last cache with the rank's first one.
    """
    local = [i for i, place in enumerate(places) if place.host == places[rank].host]
    users = Counter(cpu for i in local for cpu in plans[i].cpus)
    fit = [
        i
        for i in local
        if len(plans[i].cpus) == len(plans[rank].cpus) and all(users[c] == 1 and c in cache for c in plans[i].cpus)
    ]
    return tuple(fit) if rank in fit else (rank,)


def _exchange(group: Sequence[_Member]) -> None:
    """Move the group around for as long as all of them are there, and the system lets it.

    Threads are looked up before the pause: Linux lets a thread that has just used its CPU wait for others, up to some
    milliseconds, and two ranks would be in one place meanwhile. For the same reason this thread stays where the first
    rank was, and begins with whoever is there now: that CPU is free while the others are moved. A thread that is
    put elsewhere, even in the pause, stays there.
    """
    home, cpus, used = group[0].cpus, [member.cpus for member in group], 0.0
    os.sched_setaffinity(0, home)
    _ask_for_short_slices()
    for turn in itertools.count():
        if turn % _TURNS_A_LOOK == 0 and not all(map(_is_there, group)):
            return
        began = time.thread_time()
        threads = [_threads(member.process, own) for member, own in zip(group, cpus, strict=True)]
        time.sleep(max(_PERIOD_SECONDS, used / _SHARE))
        first, before = cpus.index(home), cpus
        cpus = [*cpus[1:], cpus[0]]
        try:
            for i in (*range(first, len(group)), *range(first)):
                _move([thread for thread in threads[i] if _runs_on(thread, before[i])], cpus[i])
        except OSError:  # such as a set of CPUs that somebody has made smaller
            for one, member in zip(threads, group, strict=True):
                with contextlib.suppress(OSError):
                    _move(one, member.cpus)
            return
        used = time.thread_time() - began


def _threads(process: int, cpus: Collection[int]) -> list[int]:
    """The threads of a process that may run on just these CPUs, but this one."""
    found, this = [], threading.get_native_id()
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
        for thread in map(int, os.listdir(f"/proc/{process}/task")):
            if thread != this and _runs_on(thread, cpus):
                found.append(thread)
    return found


def _runs_on(thread: int, cpus: Collection[int]) -> bool:
    """Whether a thread is there and may run on just these CPUs."""
    with contextlib.suppress(ProcessLookupError):
        return os.sched_getaffinity(thread) == set(cpus)
    return False


def _move(threads: Collection[int], cpus: Collection[int]) -> None:
    for thread in threads:
        with contextlib.suppress(ProcessLookupError):  # it has ended since
            os.sched_setaffinity(thread, cpus)


def _ask_for_short_slices() -> None:
    """Have this thread come to its turn soon when it wakes up beside a busy one, for which it will not be long.

    Linux since 6.6 lets it wait for the end of the other's slice otherwise, some milliseconds, with two ranks on
    the same CPUs. Others ignore it.
    """
    call = {"x86_64": 314, "aarch64": 274, "ppc64le": 355}.get(platform.machine())
    if call is not None:
        attributes = struct.pack("=IIQiIQQQ", 48, 0, 0, 0, 0, _SLICE_NANOSECONDS, 0, 0)  # struct sched_attr
        ctypes.CDLL(None).syscall(call, 0, attributes, 0)


def _is_there(member: _Member) -> bool:
    return member.started is not None and _start_ticks(member.process) == member.started


def _start_ticks(process: int) -> int | None:
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return int(fields[19])
    except (OSError, ValueError, IndexError):
        return None


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _may_run_on(cpus: Collection[int], home: Collection[int]) -> bool:
    """Whether this thread is let run on all of `cpus`; it stays on `home`."""
    try:
        os.sched_setaffinity(0, cpus)
        there = os.sched_getaffinity(0)
        os.sched_setaffinity(0, home)
    except (OSError, AttributeError):
        return False
    return there == set(cpus)


def _cpus_of_last_cache(cpu: int) -> set[int]:
    """The CPUs that share the last level of cache with a CPU; only itself where the system does not tell."""
    try:
        caches = list(Path(f"/sys/devices/system/cpu/cpu{cpu}/cache").glob("index*"))
        last = max(caches, key=lambda cache: int((cache / "level").read_text()))
        found = set()
        for part in (last / "shared_cpu_list").read_text().split(","):
            low, _, high = part.partition("-")
            found |= set(range(int(low), int(high or low) + 1))
        return found
    except (OSError, ValueError):
        return {cpu}
