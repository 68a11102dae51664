"""Sums over ranks by real MPI: right for every size, and nothing that is still needed is overwritten."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("ranks", "bucket_bytes", "options"),
    [
        (2, 4e6, []),
        (3, 1e3, []),
        (4, 1e9, []),
        (5, 4e6, []),
        (2, 4e6, ["--compression", "bf16"]),
        (2, 4e6, ["--compression", "fp16"]),
        (2, 4e6, ["--without-memory"]),
        (2, 4e6, ["--without-wish"]),
    ],
    ids=lambda value: "".join(value).strip("-") if isinstance(value, list) else None,
)
def test_sums_over_ranks(ranks: int, bucket_bytes: float, options: list[str]) -> None:
    environ = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = ["mpirun", "--oversubscribe", "-n", str(ranks), sys.executable, "-m", "tests.parallel.reduce_program"]
    command += [str(bucket_bytes), *options]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "all sums are right" in done.stdout
