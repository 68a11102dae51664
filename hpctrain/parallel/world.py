"""The ranks of one job: who they are, where they run, how they agree, and how they end together."""

import faulthandler
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from hpctrain.errors import UserError, not_permitted
from hpctrain.parallel.deadline import ends_within
from hpctrain.parallel.launch import Place, Plan, launcher_rank, launcher_size, plan_rank, set_environment, this_place

T = TypeVar("T")

START_SECONDS = 600.0  # thousands of ranks may load Python from one file system
_ROOT_SPEAKS_FIRST_SECONDS = 3.0
_LAUNCHER_READS_SECONDS = 0.5
_MESSAGE_BYTES = 2**30  # older MPIs count what is in a message by 32 bits
_OUT_OF_MEMORY = ("MemoryError", "ResourceExhaustedError")  # the latter is TensorFlow's
_END_SECONDS = 5  # then the system ends the process
_LATE_SECONDS = 0.2
_SHORTEST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 20e-6, 1e-3


@dataclass(frozen=True)
class World:
    """This rank among all. `comm` is mpi4py's communicator; only this module and `reduce` know what it is."""

    rank: int
    size: int
    host: str
    places: tuple[Place, ...]  # of all ranks, by rank
    plans: tuple[Plan, ...]
    comm: Any
    mpi_version: str

    @property
    def plan(self) -> Plan:
        """This rank's threads and CPUs."""
        return self.plans[self.rank]

    @property
    def is_root(self) -> bool:
        """Whether this is rank 0, the one that prints and writes."""
        return self.rank == 0

    def from_root(self, make: Callable[[], T]) -> T:
        """Call `make` on rank 0 alone and return its result on every rank; a UserError there is raised everywhere."""
        if self.size == 1:
            return make()
        outcome: tuple[bool, Any] = (False, None)
        if self.is_root:
            try:
                outcome = (True, make())
            except UserError as error:
                outcome = (False, str(error))
        good, value = self.broadcast(outcome)
        if not good:
            raise UserError(value)
        return value

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank."""
        self.barrier()
        return value if self.size == 1 else self.comm.bcast(value, root=0)

    def copy_from_root(self, array: Any) -> None:
        """Overwrite a contiguous NumPy array of any dtype with rank 0's, of the same shape and dtype."""
        if self.size == 1:
            return
        self.barrier()
        data = array.reshape(-1).view("uint8")
        for start in range(0, len(data), _MESSAGE_BYTES):
            self.comm.Bcast(data[start : start + _MESSAGE_BYTES], root=0)

    def allgather(self, value: T) -> list[T]:
        """Return every rank's value, by rank, on every rank."""
        self.barrier()
        return [value] if self.size == 1 else self.comm.allgather(value)

    def barrier(self) -> None:
        """Wait for all ranks, asleep. What they do together begins with this, as ranks may come minutes apart."""
        if self.size > 1:
            sleep_until(self.comm.Ibarrier().Test)

    def agree(self) -> "World":
        """Raise UserError on every rank when the launcher started more ranks than MPI knows of; else return self."""
        started = launcher_size()
        if started > 1 and self.size == 1:
            raise UserError(
                f"the launcher started {started} ranks but MPI ({self.mpi_version}) sees each as a world of its own; "
                "use the launcher this MPI was built for (mpirun of the same MPI, or srun --mpi=pmix)"
            )
        return self


def sleep_until(done: Callable[[], bool]) -> None:
    """Return once `done` is true, asked after pauses of a millisecond at most.

    MPI's own waiting takes a core, and where it yields it, some kernels are thrown off by so many yields: on Linux 6.18
    the kernel's own threads, which finish writes to files, did not run for minutes while a rank waited beside busy
    processes, for a rank that waited for such a write.
    """
    pause = _SHORTEST_PAUSE_SECONDS
    while not done():
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def alone(threads: int = 1) -> World:
    """Return the world of this process by itself, without MPI: for programs that train beside each other."""
    place = this_place(socket.gethostname())
    return World(0, 1, place.host, (place,), (Plan(threads, place.cpus, "alone"),), None, "no MPI")


def start(*, deterministic: bool = False, threads: int | None = None, limit_seconds: float = START_SECONDS) -> World:
    """Start MPI and settle threads and binding. To be called before TensorFlow is imported.

    Where not all ranks have come up after `limit_seconds`, this one says so and is killed.
    """
    set_environment(deterministic)
    host = socket.gethostname()
    import mpi4py

    mpi4py.rc.thread_level = "multiple"  # Horovod communicates from a thread of its own
    late = (
        f"hpctrain: MPI has not started within {limit_seconds:g} s ({_where()}): not all ranks have come up, or they "
        "do not hear of each other; start it again, and if it stays so with another launcher (mpirun instead of "
        "srun, another srun --mpi)"
    )
    with ends_within(limit_seconds, late):
        from mpi4py import MPI

        comm = MPI.COMM_WORLD
        if comm.Get_size() > 1:
            _let_others_come(MPI.get_vendor())
        places = tuple(comm.allgather(this_place(host)))
        plan = plan_rank(places, comm.Get_rank(), threads)  # each its own: thousands of them take time
        plans = tuple(comm.allgather(plan))
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, plan.cpus)
    os.environ.setdefault("OMP_NUM_THREADS", str(plan.threads))
    version = MPI.Get_library_version().split(",")[0].split("\n")[0].strip()
    return World(comm.Get_rank(), comm.Get_size(), host, places, plans, comm, version).agree()


def _let_others_come(vendor: tuple[str, tuple[int, int, int]]) -> None:
    """Wait a moment with the first message, where it would kill a rank that is a little late.

    Open MPI 5 reads messages while it waits for the end of MPI_Init, before it has made what they are put into, and
    crashes if one comes then (https://github.com/open-mpi/ompi/issues/12495). The other rank has heard earlier that all
    are there. On busy machines 9 of 430 starts by srun on two hosts ended so, and of 550 with this pause none.
    """
    name, version = vendor
    if name == "Open MPI" and version[0] >= 5:
        time.sleep(_LATE_SECONDS)


def run_rank(main: Callable[[], int]) -> NoReturn:
    """Run a rank's program and end the process so that no other rank is left waiting for it.

    Whatever goes wrong, the last thing on stderr from this program is one line with the reason, and for anything but
    a user's mistake also with rank and host. Then the job is aborted, because the other ranks wait in a collective.
    """
    faulthandler.enable()
    try:
        code = main()
    except UserError as error:
        end_with_mistake(str(error))
    except KeyboardInterrupt:
        end_job(f"hpctrain: interrupted ({_where()})", 130)
    except BaseException as error:
        if isinstance(error, SystemExit) and isinstance(error.code, int):
            code = error.code
        elif type(error).__name__ in _OUT_OF_MEMORY:
            cure = "take a smaller train.micro_batch or fewer ranks a node, and start again"
            end_job(f"hpctrain: out of memory ({_where()}): {_first_line(error)}; {cure}", 1)
        elif isinstance(error, PermissionError) and error.filename is not None:
            end_with_mistake(not_permitted(error))
        else:
            traceback.print_exc()
            end_job(f"hpctrain: {type(error).__name__}: {_first_line(error)} ({_where()})", 1)
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)


def end_with_mistake(message: str) -> NoReturn:
    """End all ranks with exit code 2 and one sentence.

    Most mistakes are found by all ranks alike; then only rank 0 says so. The others give it a moment, and speak for
    themselves if they turn out to be alone with it, as with a shard that one node cannot read.
    """
    if launcher_rank() == 0:
        end_job(f"hpctrain: error: {message}", 2)
    time.sleep(_ROOT_SPEAKS_FIRST_SECONDS)
    end_job(f"hpctrain: error: {message} ({_where()})", 2)


def _where() -> str:
    return f"rank {launcher_rank()} on {socket.gethostname()}"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def end_job(message: str, code: int) -> NoReturn:
    """Print the reason and end this process at once, and all others with it when MPI runs. Works from any thread."""
    if hasattr(signal, "alarm"):
        signal.alarm(_END_SECONDS)  # an abort that hangs, as in a thread of MPI's, does not keep this process
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    if "mpi4py.MPI" in sys.modules:
        from mpi4py import MPI

        if MPI.Is_initialized() and not MPI.Is_finalized() and MPI.COMM_WORLD.Get_size() > 1:
            time.sleep(_LAUNCHER_READS_SECONDS)  # a launcher told to abort may drop what it has not passed on yet
            MPI.COMM_WORLD.Abort(code)
    os._exit(code)  # no exit handlers: Horovod's would wait for the other ranks
