"""What a rank tells about its process and its node without measuring anything."""

import importlib.metadata
import os
import platform
import resource
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hpctrain import native, processor
from hpctrain.doctor.node import free_memory_bytes, meminfo_bytes
from hpctrain.environment import without_secrets
from hpctrain.parallel.launch import HOROVOD, TREE_ORDER, YIELD

_PACKAGES = (
    *("hpctrain", "tensorflow-cpu", "tensorflow", "keras", "horovod", "mpi4py", "h5py", "numpy"),
    *("pydantic", "PyYAML", "click", "rich", "Pillow", "matplotlib"),
)
SHOWN_SETTINGS = (*YIELD, *HOROVOD, "OMP_NUM_THREADS")
_COMPARED_SETTINGS = (
    *SHOWN_SETTINGS,
    *TREE_ORDER,
    *("OMP_PLACES", "OMP_PROC_BIND", "MKL_NUM_THREADS", "KMP_AFFINITY", "KMP_BLOCKTIME", "HDF5_USE_FILE_LOCKING"),
    *("TF_ENABLE_ONEDNN_OPTS", "HOROVOD_THREAD_AFFINITY", "HOROVOD_CPU_OPERATIONS", "LD_PRELOAD"),
)


@dataclass(frozen=True)
class Facts:
    """One rank's process and node. Bytes are None where the system does not tell or sets no limit."""

    host: str
    versions: Mapping[str, str]
    mpi: str
    python: str  # the interpreter's path
    kernel: str
    cpu: str
    cpus: int  # logical, of the node
    governor: str  # of the CPU's frequency; "" where the system does not tell
    memory_bytes: int | None
    memory_limit_bytes: int | None  # of the control group
    free_memory_bytes: int | None
    shared_memory_free_bytes: int | None  # /dev/shm
    local_directory: str  # $TMPDIR, or what stands for it
    local_free_bytes: int | None
    open_files: int | None
    locked_memory_bytes: int | None
    fabric: tuple[str, ...]  # network devices that need locked memory
    settings: Mapping[str, str]  # environment variables that are set


def gather_facts(host: str, mpi: str) -> Facts:
    """Look at this process and its node; takes some milliseconds and raises nothing."""
    local = tempfile.gettempdir() if not os.environ.get("TMPDIR") else os.environ["TMPDIR"]
    return Facts(
        host=host,
        versions=_versions(),
        mpi=mpi,
        python=sys.executable,
        kernel=platform.release(),
        cpu=processor.name(),
        cpus=os.cpu_count() or 1,
        governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        memory_bytes=meminfo_bytes("MemTotal"),
        memory_limit_bytes=_memory_limit(),
        free_memory_bytes=free_memory_bytes(),
        shared_memory_free_bytes=_free_bytes("/dev/shm"),
        local_directory=local,
        local_free_bytes=_free_bytes(local),
        open_files=_limit(resource.RLIMIT_NOFILE),
        locked_memory_bytes=_limit(resource.RLIMIT_MEMLOCK),
        fabric=_fabric(),
        settings={name: without_secrets(os.environ[name]) for name in _COMPARED_SETTINGS if name in os.environ},
    )


def cpu_megahertz(cpus: tuple[int, ...]) -> float | None:
    """Return the mean clock rate of some CPUs right now, in MHz; None where the system does not tell."""
    rates = [_read(f"/sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq") for cpu in cpus]
    known = [int(rate) / 1000 for rate in rates if rate.isdigit()]
    return sum(known) / len(known) if known else None


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    for operation in native.OPERATIONS:
        compiled = native.compiled_file(operation).is_file()
        versions[f"{operation} operation"] = "compiled" if compiled else "TensorFlow's"
    return versions


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text().strip()
    except (OSError, ValueError):
        return ""


def _memory_limit() -> int | None:
    """The smallest memory limit of this process' control group and those above it, of either version."""
    limits = []
    for line in _read("/proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = Path("/sys/fs/cgroup/memory" if controllers else "/sys/fs/cgroup")
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            limits.append(_read(folder / ("memory.limit_in_bytes" if controllers else "memory.max")))
            if folder == root:
                break
    # Version 1 says "none" with a number near 2**63.
    return min((int(limit) for limit in limits if limit.isdigit() and int(limit) < 2**60), default=None)


def _free_bytes(folder: str) -> int | None:
    try:
        status = os.statvfs(folder)
    except OSError:
        return None
    return status.f_bavail * status.f_frsize


def _limit(which: int) -> int | None:
    soft, _ = resource.getrlimit(which)
    return None if soft == resource.RLIM_INFINITY else soft


def _fabric() -> tuple[str, ...]:
    try:
        return tuple(sorted(os.listdir("/sys/class/infiniband")))
    except OSError:
        return ()
