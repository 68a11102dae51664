"""Weights once a host, by real MPI: the numbers of weights that each rank has for itself, bad steps and all."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.training.host_weights_program import NOT_IN_COMMON, OPTIMIZERS

ROOT = Path(__file__).parents[2]


def run(out: Path, hosts: str, *options: str) -> dict[str, list[np.ndarray]]:
    """Run the program with a rank on the host of each letter; return what each rank has for each optimizer."""
    out.mkdir()
    environ = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = ["mpirun", "--oversubscribe", "-n", str(len(hosts)), sys.executable, "-m"]
    command += ["tests.training.host_weights_program", "--hosts", hosts, "--out", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "all steps are right"
    return {path.stem: list(np.load(path).values()) for path in sorted(out.iterdir())}


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("hosts", "options"),
    [
        ("aa", ["--bucket-bytes", "1e3"]),
        ("aaa", ["--bucket-bytes", "1e9", "--with-sums"]),
        ("aaba", ["--with-sums"]),  # with buckets of another size these summands would be added in another order
    ],
)
def test_weights_in_common_have_the_bits_of_those_that_are_not(hosts: str, options: list[str], tmp_path: Path) -> None:
    common = run(tmp_path / "common", hosts)
    assert len(common) == len(hosts) * len({**NOT_IN_COMMON, **OPTIMIZERS})
    different = {b"".join(array.tobytes() for array in arrays) for arrays in common.values()}
    assert len(different) == 2 * len({**NOT_IN_COMMON, **OPTIMIZERS})  # the rank that assigned has others than the rest
    apart = run(tmp_path / "apart", hosts, "--without-memory", *options)
    for name, arrays in common.items():
        *arrays, first_norms, last_norms = arrays
        *others, other_first_norms, other_last_norms = apart[name]
        # On one host each rank adds a part of the squares of norms that LARS needs, which are rounded in another way.
        exact = "b" in hosts or not name.startswith("lars") or name.startswith("lars-update")
        for array, other in zip(arrays, others, strict=True):
            np.testing.assert_allclose(array, other, rtol=0 if exact else 1e-4, atol=0 if exact else 1e-7, err_msg=name)
        np.testing.assert_allclose(first_norms, other_first_norms, rtol=1e-4, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(last_norms, other_last_norms, rtol=1e-4, atol=1e-6, err_msg=name)
