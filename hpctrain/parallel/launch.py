"""What has to be right before MPI and TensorFlow start: progress mode, algorithms, threads and binding.

All of it is set by the program itself, so that a plain `mpirun -n N hpctrain train ...` is a good one. The
settings are defaults: an environment variable that the user or the job script has set is left as it is.
"""

import math
import os
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# A rank waits for the others in Horovod's background thread, which polls MPI. Without a core of its own that thread
# takes half of the compute thread's: two ranks on two cores then ran at 0.57 of what two lone processes do, and at
# 0.97 once MPI gives the core away while it waits.
YIELD = {
    "OMPI_MCA_mpi_yield_when_idle": "1",
    "I_MPI_THREAD_YIELD": "2",  # Intel MPI: sched_yield
}

# Rabenseifner's algorithm adds a power of two of ranks in a balanced binary tree over neighbors, as the micro-batches
# of a rank are added, at the bandwidth of a ring. Open MPI's other collective components would choose for themselves.
TREE_ORDER = {
    "OMPI_MCA_coll": "^han,acoll",
    "OMPI_MCA_coll_tuned_use_dynamic_rules": "1",
    "OMPI_MCA_coll_tuned_allreduce_algorithm": "6",
    "I_MPI_ADJUST_ALLREDUCE": "2",  # Intel MPI: Rabenseifner's
    "MPIR_CVAR_ALLREDUCE_INTRA_ALGORITHM": "reduce_scatter_allgather",  # MPICH and what is built on it
}

TCP = {
    # Open MPI over TCP. By default a large message goes in one piece, as if by remote memory access; what a rank has to
    # answer before the other one may send waits behind it, and often only one direction was used at a time: 4 MiB over
    # 1 Gbit/s at 0.66 of the link, at 0.96 in fragments, few of which wait in the socket.
    "OMPI_MCA_btl_tcp_flags": "send,inplace",
    "OMPI_MCA_btl_tcp_sndbuf": str(256 * 2**10),
}

EMBEDDED = {
    # For the Open MPI that install.sh puts into the environment; a centre's own is set up by the centre. This component
    # is for one-sided communication over libfabric, which nothing here uses. It sleeps a second when it is closed: in
    # each rank's MPI_Init where it finds no network of its kind, in MPI_Finalize where it finds one.
    "OMPI_MCA_btl": "^ofi",
}

HOROVOD = {
    # The most that goes as one message, and the buffer that small tensors are packed into for MPI. One that stays in
    # the cache made the allreduce of ResNet-50's gradients (102 MB) 1.5 to 4 times as fast as the default of 128 MiB.
    # Within a host there is no such buffer, and a step with 64 MiB was 1 % slower still. Larger tensors go as they are.
    "HOROVOD_FUSION_THRESHOLD": str(2 * 2**20),
    # A rank that does not come to a reduction: named after a minute, and the job ends instead of hanging on.
    "HOROVOD_STALL_CHECK_TIME_SECONDS": "30",
    "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "60",
    "HOROVOD_LOG_LEVEL": "error",
}

QUIET = {
    "TF_CPP_MIN_LOG_LEVEL": "2",  # a thousand ranks need not each tell which instructions their CPU has
    "HDF5_USE_FILE_LOCKING": "FALSE",  # Lustre and NFS without locks; shards are only read
    "KERAS_BACKEND": "tensorflow",
}

_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "PALS_RANKID", "ALPS_APP_PE", "SLURM_PROCID")
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")


def set_environment(deterministic: bool, environ: MutableMapping[str, str] = os.environ) -> None:
    """Set the variables above where they are not set. To be called before MPI, Horovod or TensorFlow is loaded."""
    embedded = Path(sys.prefix, "bin", "prterun").exists()
    for settings in (YIELD, TCP, HOROVOD, QUIET, EMBEDDED if embedded else {}, TREE_ORDER if deterministic else {}):
        for name, value in settings.items():
            environ.setdefault(name, value)


def launcher_rank(environ: Mapping[str, str] = os.environ) -> int:
    """Return this process' rank as the launcher tells it before MPI has started; 0 when nobody does."""
    for name in _RANK_VARIABLES:
        if environ.get(name, "").isdigit():
            # Inside a batch script, outside of srun, SLURM_PROCID is there too, and 0.
            return int(environ[name])
    return 0


def launcher_size(environ: Mapping[str, str] = os.environ) -> int:
    """Return how many ranks the launcher says it started; 1 when it does not say."""
    for name in _SIZE_VARIABLES:
        if environ.get(name, "").isdigit():
            if name.startswith("SLURM") and "SLURM_STEPID" not in environ and "SLURM_STEP_ID" not in environ:
                continue
            return int(environ[name])
    return 1


@dataclass(frozen=True)
class Place:
    """Where a rank runs: what every rank tells the others about itself."""

    host: str
    cpus: tuple[int, ...]  # logical CPUs the launcher lets it run on, sorted
    launcher_cpus: tuple[int, ...]  # those its launcher's daemon has on this host
    cores: Mapping[int, int]  # logical CPU -> physical core, for all CPUs above
    quota_cores: float = math.inf  # what the control group's CPU quota amounts to
    by_mpirun: bool = False  # Open MPI's mpirun started it, which binds to a single core without being asked


@dataclass(frozen=True)
class Plan:
    """What a rank makes of its place: how many compute threads, on which CPUs."""

    threads: int
    cpus: tuple[int, ...]
    note: str  # why, in a few words, for `hpctrain doctor` and manifest.json


def this_place(host: str) -> Place:
    """Look at this process' affinity, its launcher's, the cores behind them and the control group's quota."""
    cpus = _affinity(0)
    launcher = _affinity(os.getppid()) or cpus
    cores = {cpu: _physical_core(cpu) for cpu in {*cpus, *launcher}}
    by_mpirun = "OMPI_COMM_WORLD_SIZE" in os.environ
    return Place(host, cpus, tuple(sorted({*cpus, *launcher})), cores, _cgroup_quota(), by_mpirun)


def plan_rank(places: Sequence[Place], rank: int, threads: int | None = None) -> Plan:
    """Return the threads and CPUs of one rank, given where all of them are: a pure function.

    Ranks that the launcher has bound to CPUs of their own keep them. Ranks that share CPUs (all of a host, or those
    of a socket) get an equal part of them each, whole cores, in the order of ranks; and so do ranks that Open MPI's
    mpirun has each bound to a single core of a larger host (its default for two ranks), of the host's. There is one
    compute thread for each physical core.
    """
    me = places[rank]
    local = [i for i, place in enumerate(places) if place.host == me.host]
    position = local.index(rank)
    masks = [set(places[i].cpus) for i in local]
    sharing = _overlapping(masks, position)
    shared = sorted(set().union(*(masks[i] for i in sharing)))
    unasked = all(places[i].by_mpirun and _count_cores(places[i], places[i].cpus) == 1 for i in local)
    offered = sorted(set().union(*(places[i].launcher_cpus for i in local)))
    wide_cores = {cpu: core for i in local for cpu, core in places[i].cores.items()}
    if unasked and len({wide_cores[c] for c in offered}) >= 2 * len(local):
        cpus, note = _share(offered, wide_cores, position, len(local)), "an equal part of the launcher's CPUs"
    elif len(sharing) == 1:
        cpus, note = me.cpus, "bound by the launcher" if len(local) > 1 else "all CPUs allowed"
    elif len({wide_cores[c] for c in shared}) >= len(sharing):
        cpus = _share(shared, wide_cores, sharing.index(position), len(sharing))
        note = f"an equal part of the CPUs of {len(sharing)} ranks"
    else:
        cpus, note = me.cpus, f"{len(sharing)} ranks share {len({wide_cores[c] for c in shared})} cores: oversubscribed"
    cores = len({wide_cores[cpu] for cpu in cpus})
    limit = max(1, int(me.quota_cores / len(local) + 1e-9)) if math.isfinite(me.quota_cores) else cores
    if "oversubscribed" in note:
        cores = 1
    return Plan(threads or min(cores, limit), cpus, note)


def warnings_for(places: Sequence[Place], plans: Sequence[Plan], environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return sentences about a launch that will be slow, each with its cure; empty when all is well."""
    found = []
    for host in sorted({place.host for place in places}):
        local = [i for i, place in enumerate(places) if place.host == host]
        cores = {places[i].cores[cpu] for i in local for cpu in places[i].launcher_cpus}
        threads = sum(plans[i].threads for i in local)
        if threads > len(cores):
            found.append(
                f"{host} has {len(cores)} cores for {len(local)} ranks with {threads} compute threads; start fewer "
                "ranks there or lower train.threads"
            )
        elif threads <= len(cores) // 2:
            found.append(
                f"{host} uses {threads} of {len(cores)} cores; start more ranks or let the launcher bind wider "
                "(mpirun --map-by ppr:R:node:pe=C, srun --cpus-per-task=C)"
            )
    if environ.get("OMPI_MCA_mpi_yield_when_idle") == "0":
        found.append("OMPI_MCA_mpi_yield_when_idle is 0: MPI takes compute time while it waits; unset it or set 1")
    omp = environ.get("OMP_NUM_THREADS", "")
    if omp.isdigit() and plans and int(omp) > max(plan.threads for plan in plans):
        found.append(f"OMP_NUM_THREADS is {omp} but a rank has {plans[0].threads} cores; unset it or set it to that")
    return found


def _overlapping(masks: Sequence[set[int]], position: int) -> list[int]:
    """The positions of the masks that overlap with the given one, directly or through others, and its own."""
    found, reach = {position}, set(masks[position])
    while more := {i for i, mask in enumerate(masks) if i not in found and mask & reach}:
        found |= more
        reach = reach.union(*(masks[i] for i in more))
    return sorted(found)


def _share(cpus: Sequence[int], cores: Mapping[int, int], position: int, parts: int) -> tuple[int, ...]:
    """The position-th of `parts` equal runs of whole cores, as their logical CPUs; a remainder stays unused."""
    ordered = sorted({cores[cpu] for cpu in cpus})
    size = len(ordered) // parts
    mine = set(ordered[position * size : (position + 1) * size])
    return tuple(cpu for cpu in cpus if cores[cpu] in mine)


def _count_cores(place: Place, cpus: Sequence[int]) -> int:
    return len({place.cores[cpu] for cpu in cpus})


def _affinity(pid: int) -> tuple[int, ...]:
    try:
        return tuple(sorted(os.sched_getaffinity(pid)))
    except (OSError, AttributeError):
        return tuple(range(os.cpu_count() or 1)) if pid == 0 else ()


def _physical_core(cpu: int) -> int:
    """The lowest logical CPU of the same physical core."""
    try:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        return int(siblings.replace("-", ",").split(",")[0])
    except (OSError, ValueError):
        return cpu


def _cgroup_quota() -> float:
    """Cores that the control group's CPU quota (version 2) allows; infinite when there is none."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return math.inf
