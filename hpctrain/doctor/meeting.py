"""Bringing what ranks have to say to rank 0, which does not wait for ever and names who did not come."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NoReturn, TypeVar

from hpctrain.doctor.names import fold_hosts, fold_numbers
from hpctrain.parallel.world import World

T = TypeVar("T")

_POLL_SECONDS = 0.0005
_LAUNCHER_READS_SECONDS = 0.5
_FIRST_TAG = 7000


class Meeting:
    """The ranks of a world, who all call the same methods in the same order."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._tag = _FIRST_TAG

    def gather(self, value: T, what: str, limit_seconds: float = 60) -> list[T]:
        """Return every rank's value, by rank, on rank 0, and nothing on the others, who do not wait.

        When a rank does not come within the limit, rank 0 says which, and what it was doing, and ends the job.
        """
        world = self.world
        self._tag += 1  # a fast rank's next value must not be taken for this one
        if world.size == 1:
            return [value]
        if not world.is_root:
            world.comm.send(value, 0, self._tag)
            return []
        from mpi4py import MPI

        found = {0: value}
        status = MPI.Status()
        end = time.monotonic() + limit_seconds
        while len(found) < world.size:
            if world.comm.iprobe(MPI.ANY_SOURCE, self._tag, status):
                source = status.Get_source()
                found[source] = world.comm.recv(source=source, tag=self._tag)
            elif time.monotonic() > end:
                absent = [rank for rank in range(world.size) if rank not in found]
                hosts = fold_hosts([world.places[rank].host for rank in absent])
                give_up(f"rank {fold_numbers(absent)} on {hosts} did not come back from {what} in {limit_seconds:g} s")
            else:
                time.sleep(_POLL_SECONDS)
        return [found[rank] for rank in range(world.size)]


@contextlib.contextmanager
def ended_after(limit_seconds: float, what: str, is_root: bool) -> Iterator[None]:
    """End the job when what is done in here takes longer, as a collective does that a rank stays away from."""
    timer = threading.Timer(limit_seconds, give_up, [f"{what} did not end within {limit_seconds:g} s"])
    timer.daemon = True
    if is_root:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def give_up(problem: str) -> NoReturn:
    """Print a problem and end all ranks with exit code 1."""
    print(f"PROBLEM    {problem}", flush=True)
    sys.stderr.flush()
    mpi: Any = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized() and mpi.COMM_WORLD.Get_size() > 1:
        time.sleep(_LAUNCHER_READS_SECONDS)  # a launcher told to abort may drop what it has not passed on yet
        mpi.COMM_WORLD.Abort(1)
    os._exit(1)
