"""Weights once a host, by real MPI: the bits of weights that each rank has for itself, bad steps and all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.host_weights_program import NOT_IN_COMMON, OPTIMIZERS

ROOT = Path(__file__).parents[2]


def run(hosts: str, *options: str) -> dict[str, str]:
    """Run the program with a rank on the host of each letter; return a digest of what it has for each optimizer."""
    environ = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = ["mpirun", "--oversubscribe", "-n", str(len(hosts)), sys.executable, "-m"]
    command += ["tests.training.host_weights_program", "--hosts", hosts, *options]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    *lines, last = done.stdout.splitlines()
    assert last == "all steps are right"
    return dict(line.split() for line in lines)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("hosts", "options"),
    [
        ("aa", ["--bucket-bytes", "1e3"]),
        ("aaba", ["--with-sums"]),  # with buckets of another size these summands would be added in another order
    ],
)
def test_weights_in_common_have_the_bits_of_those_that_are_not(hosts: str, options: list[str]) -> None:
    common = run(hosts)
    assert list(common) == [*NOT_IN_COMMON, *OPTIMIZERS, "assigned"] and len(set(common.values())) == len(common)
    assert run(hosts, "--without-memory", *options) == common
