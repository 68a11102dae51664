"""`hpctrain doctor`: what is installed, how the ranks are placed, and what of it will be slow or fail."""

import importlib.metadata
import json
import os
import platform
from typing import Any

from hpctrain.data.native import LIBRARY
from hpctrain.parallel.launch import HOROVOD, TREE_ORDER, YIELD, warnings_for
from hpctrain.parallel.world import World, start

_PACKAGES = ("hpctrain", "tensorflow-cpu", "tensorflow", "keras", "horovod", "mpi4py", "h5py", "numpy")


def examine(as_json: bool) -> int:
    """Print what was found, on rank 0; return 0 when the installation works, 1 when it does not.

    Settings that are merely slow are warnings and do not change the exit code.
    """
    world = start()
    facts = _facts()
    everyone = world.allgather(facts)
    problems = _problems(world, everyone)
    warnings = warnings_for(world.places, world.plans)
    if not LIBRARY.is_file():
        warnings.append("the input pipeline's operation is not compiled: python -m hpctrain.data.native.build")
    if not world.is_root:
        return 1 if problems else 0
    ranks = [
        {"rank": i, "host": place.host, "cpus": list(plan.cpus), "threads": plan.threads, "placement": plan.note}
        for i, (place, plan) in enumerate(zip(world.places, world.plans, strict=True))
    ]
    settings = {name: os.environ.get(name) for name in (*YIELD, *HOROVOD, "OMP_NUM_THREADS")}
    report = {
        "versions": facts["versions"],
        "mpi": world.mpi_version,
        "horovod": facts["horovod"],
        "ranks": ranks,
        "settings": settings,
        "deterministic_settings": TREE_ORDER,
        "problems": problems,
        "warnings": warnings,
    }
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        _print(report)
    return 1 if problems else 0


def _facts() -> dict[str, Any]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    versions["image operation"] = "compiled" if LIBRARY.is_file() else "TensorFlow's"
    return {"versions": versions, "horovod": _horovod()}


def _horovod() -> dict[str, Any]:
    """Load Horovod and ask it what it was built with."""
    from hpctrain.parallel.quiet import import_tensorflow

    try:
        import_tensorflow()
        import horovod.tensorflow as hvd

        hvd.init()
        return {
            "works": True,
            "rank": hvd.rank(),
            "size": hvd.size(),
            "mpi_built": bool(hvd.mpi_built()),
            "mpi_threads": bool(hvd.mpi_threads_supported()),
        }
    except Exception as error:  # whatever keeps it from loading is the finding
        return {"works": False, "error": f"{type(error).__name__}: {error}".splitlines()[0]}


def _problems(world: World, everyone: list[dict[str, Any]]) -> list[str]:
    """Sentences about what will not work, each with its cure."""
    found = []
    for rank, facts in enumerate(everyone):
        where = f"rank {rank} on {world.places[rank].host}"
        horovod = facts["horovod"]
        if not horovod["works"]:
            found.append(f"{where}: Horovod does not load ({horovod['error']}); run install.sh again")
        elif (horovod["rank"], horovod["size"]) != (rank, world.size):
            found.append(
                f"{where}: Horovod sees rank {horovod['rank']} of {horovod['size']}, MPI rank {rank} of {world.size}; "
                "Horovod was built against another MPI: run install.sh again with the job's MPI"
            )
        elif not horovod["mpi_threads"]:
            found.append(f"{where}: this MPI has no MPI_THREAD_MULTIPLE, which Horovod beside mpi4py needs")
        for package, version in facts["versions"].items():
            if everyone[0]["versions"].get(package) != version:
                found.append(f"{where}: {package} {version}, but rank 0 has {everyone[0]['versions'].get(package)}")
    return found


def _print(report: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    print(f"versions   {versions}")
    print(f"MPI        {report['mpi']}")
    horovod = report["horovod"]
    print(f"Horovod    {'works' if horovod['works'] else 'does not load: ' + horovod['error']}")
    for rank in report["ranks"]:
        print(
            f"rank {rank['rank']:<5} {rank['host']}: {rank['threads']} threads on CPUs "
            f"{','.join(map(str, rank['cpus']))} ({rank['placement']})"
        )
    for name, value in report["settings"].items():
        print(f"setting    {name}={value if value is not None else '(unset)'}")
    for problem in report["problems"]:
        print(f"PROBLEM    {problem}")
    for warning in report["warnings"]:
        print(f"warning    {warning}")
    if not report["problems"] and not report["warnings"]:
        print("all is well")
