"""A look at one node in about two seconds, without MPI or TensorFlow: `python -m hpctrain.doctor.node --json`."""

import argparse
import dataclasses
import json
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from hpctrain.doctor.compute import copy_bytes_per_second, gemm_seconds
from hpctrain.doctor.files import probe_directory, within

_FILES_SECONDS = 1.0


@dataclass(frozen=True)
class NodeFacts:
    """What a node is able to do now. A measurement that failed is None, and `errors` says why."""

    host: str
    gemm_seconds: float | None  # one product of two float32[1024, 1024] matrices, with all threads NumPy takes
    memory_bytes_per_second: float | None  # read and written by a copy, one thread
    write_bytes_per_second: float | None  # 4 MiB in the directory, with fsync
    read_bytes_per_second: float | None
    operations_per_second: float | None  # create, stat, unlink in the directory
    free_memory_bytes: int | None
    clock_seconds: float  # since the epoch, when the measurements were done
    seconds: float  # that they took
    errors: dict[str, str]  # measurement ("compute", "files") -> why it failed


def probe_node(directory: str | os.PathLike[str]) -> NodeFacts:
    """Measure this node in about two seconds, three at most; files are written in `directory`. Raises nothing."""
    start = time.perf_counter()
    errors: dict[str, str] = {}
    gemm = memory = files = None
    try:
        gemm, memory = gemm_seconds(0.4), copy_bytes_per_second(0.2)
    except Exception as error:  # too little memory, a NumPy that does not load: the finding itself
        errors["compute"] = describe(error)
    try:
        files = within(_FILES_SECONDS, lambda: probe_directory(Path(directory), _FILES_SECONDS / 4))
    except Exception as error:
        errors["files"] = f"{directory}: {describe(error)}"
    return NodeFacts(
        socket.gethostname(),
        gemm,
        memory,
        files.write_bytes_per_second if files else None,
        files.read_bytes_per_second if files else None,
        files.operations_per_second if files else None,
        free_memory_bytes(),
        time.time(),
        time.perf_counter() - start,
        errors,
    )


def free_memory_bytes() -> int | None:
    """Return the memory that programs can still get, after /proc/meminfo; None where that does not tell."""
    return meminfo_bytes("MemAvailable")


def meminfo_bytes(key: str) -> int | None:
    """Return one line of /proc/meminfo in bytes; None where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)
    except (OSError, ValueError, IndexError):
        return None


def describe(error: BaseException) -> str:
    """Return an error as part of a sentence; the one who calls names the file or directory."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = (str(error).strip() or "no message").splitlines()[0]
    return text if isinstance(error, OSError) else f"{type(error).__name__}: {text}"


def main() -> None:
    """Print this node's facts: one line of JSON, or a line a fact."""
    parser = argparse.ArgumentParser(prog="python -m hpctrain.doctor.node", description=__doc__)
    parser.add_argument("--dir", default=".", help="directory to try the file system in (default: the current one)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args()
    facts = dataclasses.asdict(probe_node(options.dir))
    if options.json:
        print(json.dumps(facts), flush=True)
    else:
        for name, value in facts.items():
            print(f"{name:<26}{value}")
    sys.stdout.flush()
    os._exit(0)  # without waiting for a thread that a dead file server holds


if __name__ == "__main__":
    main()
