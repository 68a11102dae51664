"""Clocks and network between ranks: pairs in rounds, then all together. Collective over the ranks that are named."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hpctrain.doctor.judge import rounds_of_pairs

MESSAGE_BYTES = 1 << 20
ALLREDUCE_BYTES = 32 << 20
_ROUNDS = 8
_SMALL_BYTES = 8
_CLOCK_EXCHANGES = 8
_GO_ON, _LAST, _CLOCK = 6001, 6002, 6003


@dataclass(frozen=True)
class Pair:
    """What two ranks measured between them."""

    ranks: tuple[int, int]
    latency_seconds: float  # one way, 8 bytes
    seconds: float  # one way, 1 MiB


@dataclass(frozen=True)
class Allreduce:
    """The sum of a buffer over all ranks."""

    bytes: int
    seconds: float  # the slowest rank's; the median of a few
    bus_bytes_per_second: float  # bytes / seconds * 2 (P - 1) / P, what a link carries in a ring


def clock_offsets(comm: Any, ranks: Sequence[int], now: Callable[[], float] = time.time) -> dict[int, float]:
    """Return, on rank 0, the seconds that each of `ranks` is ahead of rank 0's clock; nothing elsewhere.

    As in NTP: of several round trips the quickest counts, and the other's reading belongs to its middle. The error
    is at most half of that round trip.
    """
    if comm.Get_rank() != 0:
        if comm.Get_rank() in ranks:
            for _ in range(_CLOCK_EXCHANGES):
                comm.recv(source=0, tag=_CLOCK)
                comm.send(now(), 0, _CLOCK)
        return {}
    offsets = {0: 0.0}
    for rank in ranks:
        if rank == 0:
            continue
        trips = []
        for _ in range(_CLOCK_EXCHANGES):
            # The clock read here is a steady one's, so that a step of the time of day does not count as a trip.
            start, sent = time.perf_counter(), now()
            comm.send(None, rank, _CLOCK)
            theirs = comm.recv(source=rank, tag=_CLOCK)
            trip = time.perf_counter() - start
            trips.append((trip, theirs - (sent + trip / 2)))
        offsets[rank] = min(trips)[1]
    return offsets


def exchange_in_pairs(comm: Any, ranks: Sequence[int]) -> list[Pair]:
    """Let `ranks` measure each other, two by two in at most eight rounds; return the pairs that this rank began."""
    mine = []
    me = comm.Get_rank()
    for pairs in rounds_of_pairs(len(ranks), _ROUNDS):
        for low, high in pairs:
            if me == ranks[low]:
                mine.append(_measure(comm, ranks[high]))
            elif me == ranks[high]:
                _answer(comm, ranks[low])
    return mine


def time_allreduce(comm: Any, limit_seconds: float = 1.0) -> Allreduce:
    """Sum 32 MiB of float32 in place over all ranks; return the same on every rank."""
    import numpy as np
    from mpi4py import MPI

    buffer = np.zeros(ALLREDUCE_BYTES // 4, np.float32)
    taken: list[float] = []
    repeats = 2
    while len(taken) < repeats:
        comm.Barrier()
        start = time.perf_counter()
        comm.Allreduce(MPI.IN_PLACE, buffer, MPI.SUM)
        taken.append(comm.allreduce(time.perf_counter() - start, MPI.MAX))
        if len(taken) == 1:  # the maximum over ranks, so all of them choose the same
            repeats = min(6, 2 + int(limit_seconds / taken[0]))
    seconds = statistics.median(taken[1:])  # the first one also sets up buffers and connections
    size = comm.Get_size()
    return Allreduce(buffer.nbytes, seconds, buffer.nbytes / seconds * 2 * (size - 1) / size)


def _measure(comm: Any, partner: int) -> Pair:
    latency = _ping(comm, partner, _SMALL_BYTES, 50, 0.05)
    seconds = _ping(comm, partner, MESSAGE_BYTES, 20, 0.15)
    return Pair((comm.Get_rank(), partner), latency, seconds)


def _answer(comm: Any, partner: int) -> None:
    _pong(comm, partner, _SMALL_BYTES)
    _pong(comm, partner, MESSAGE_BYTES)


def _ping(comm: Any, partner: int, size: int, most: int, limit_seconds: float) -> float:
    """Send messages back and forth until the limit; return the median seconds of one way."""
    buffer = bytearray(size)
    taken: list[float] = []
    end = time.perf_counter() + limit_seconds
    last = False
    while not last:
        last = len(taken) >= most or (len(taken) >= 2 and time.perf_counter() > end)
        start = time.perf_counter()
        comm.Send(buffer, partner, _LAST if last else _GO_ON)
        comm.Recv(buffer, partner, _GO_ON)
        taken.append((time.perf_counter() - start) / 2)
    return statistics.median_low(taken[1:])  # the first one waited for the partner to come


def _pong(comm: Any, partner: int, size: int) -> None:
    from mpi4py import MPI

    buffer = bytearray(size)
    status = MPI.Status()
    while status.Get_tag() != _LAST:
        comm.Recv(buffer, partner, MPI.ANY_TAG, status)
        comm.Send(buffer, partner, _GO_ON)
