"""Staging jobs of several ranks that take themselves for several nodes."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@dataclass
class Outcome:
    """How a staging job ended, and which files its ranks opened on the shared file system."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    opened: list[str]

    @property
    def traffic(self) -> dict[str, Any]:
        return dict(json.loads(self.stdout.splitlines()[-1]))


@pytest.fixture
def run_job(tmp_path: Path) -> Callable[..., Outcome]:
    """Run job.py: `run_job(["a", "a", "b"], data, **options)` is three ranks on two nodes with LOCAL/a and LOCAL/b."""
    count = 0

    def run(hosts: list[str], data: Path | None = None, **options: Any) -> Outcome:
        nonlocal count
        count += 1
        log = tmp_path / f"log{count}"
        log.mkdir()
        options = {"hosts": hosts, "local": str(tmp_path / "local"), "log": str(log), "data": str(data), **options}
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        if os.geteuid() == 0:
            environ.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
        command = ["mpirun", "--oversubscribe", "-n", str(len(hosts)), sys.executable, "-m", "tests.staging.job"]
        started = time.monotonic()
        done = subprocess.run(
            [*command, json.dumps(options)], capture_output=True, text=True, env=environ, cwd=ROOT, timeout=120
        )
        opened = [line for path in sorted(log.iterdir()) for line in path.read_text().splitlines()]
        return Outcome(done.returncode, done.stdout, done.stderr, time.monotonic() - started, opened)

    return run
