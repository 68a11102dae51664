"""Real ranks, one of them odd for real."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.mpi

DOCTOR = [sys.executable, "-m", "hpctrain", "doctor"]
# The last rank of the job gets the environment that follows: ODD NAME=VALUE... -- COMMAND
ODD = """
last=$((OMPI_COMM_WORLD_SIZE - 1))
while [ "$1" != -- ]; do
  if [ "$OMPI_COMM_WORLD_RANK" = "$last" ]; then export "$1"; fi
  shift
done
shift
exec "$@"
"""


def mpirun(ranks: int, command: list[str], **odd: str) -> subprocess.CompletedProcess[str]:
    """Run a command on several ranks, the last of them with other environment variables."""
    environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    if os.geteuid() == 0:
        environ.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    wrapper = ["bash", "-c", ODD, "odd", *(f"{name}={value}" for name, value in odd.items()), "--"]
    words = ["mpirun", "--oversubscribe", "-n", str(ranks), *wrapper, *command]
    return subprocess.run(words, capture_output=True, text=True, timeout=400, env=environ, check=False)


@pytest.fixture
def older_keras(tmp_path: Path) -> Path:
    """A folder that makes a rank with it on its path see another Keras."""
    folder = tmp_path / "packages"
    (folder / "keras-3.1.0.dist-info").mkdir(parents=True)
    (folder / "keras-3.1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: keras\nVersion: 3.1.0\n")
    return folder


def test_the_rank_with_another_version_and_another_setting_is_named(older_keras: Path) -> None:
    done = mpirun(3, [*DOCTOR, "--quick"], PYTHONPATH=str(older_keras), HOROVOD_FUSION_THRESHOLD="1")
    assert done.returncode == 1
    (problem,) = [line for line in done.stdout.splitlines() if line.startswith("PROBLEM")]
    assert "rank 2 on " in problem and "keras 3.1.0, most have" in problem
    assert any("rank 2 on" in line and "HOROVOD_FUSION_THRESHOLD 1" in line for line in done.stdout.splitlines())
    assert "measured" not in done.stdout, "--quick measures nothing"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the slow kernels are of OpenBLAS on x86-64")
def test_a_rank_that_computes_slowly_is_named_and_everything_is_measured(tmp_path: Path) -> None:
    done = mpirun(2, [*DOCTOR, "--json", "--dir", str(tmp_path)], OPENBLAS_CORETYPE="Prescott")
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    report = json.loads(done.stdout)
    assert report["problems"] == []
    assert any(line.startswith("rank 1 on ") and "compute, float32 GEMM" in line for line in report["warnings"])
    for rank in report["ranks"]:
        assert rank["measured"]["errors"] == {}
        assert {"compute", "memory", "write", "read", "operations", "import"} <= set(rank["measured"]["values"])
    (pair,) = report["pairs"]
    assert pair["ranks"] == [0, 1] and pair["latency_seconds"] > 0 and pair["seconds"] > 0
    assert report["allreduce"]["bus_bytes_per_second"] > 0
    assert abs(report["clock_offsets_seconds"]["1"]) < 0.5
    assert all(horovod["size"] == 2 for horovod in report["horovod"])
    assert list(tmp_path.iterdir()) == []


def test_a_horovod_that_does_not_load_on_one_rank_keeps_nobody_waiting(tmp_path: Path) -> None:
    (tmp_path / "horovod").mkdir()
    (tmp_path / "horovod" / "__init__.py").write_text("raise ImportError('libmpi.so.40: cannot open shared object')\n")
    done = mpirun(2, DOCTOR, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    (problem,) = [line for line in done.stdout.splitlines() if line.startswith("PROBLEM")]
    assert "rank 1 on " in problem and "libmpi.so.40" in problem


def test_a_directory_that_is_not_there_is_said_once() -> None:
    done = mpirun(2, [*DOCTOR, "--dir", "/no/such/directory"])
    assert done.returncode == 2
    assert done.stderr.count("/no/such/directory") == 1 and "Traceback" not in done.stderr


def test_a_clock_that_is_off_is_found() -> None:
    code = (
        "import time; from hpctrain.doctor.links import clock_offsets; from mpi4py import MPI; comm = MPI.COMM_WORLD;"
        "off = [0, 0, 30.0][comm.rank]; print(clock_offsets(comm, [0, 1, 2], lambda: time.time() + off))"
    )
    done = mpirun(3, [sys.executable, "-c", code])
    offsets = next(eval(line) for line in done.stdout.splitlines() if ":" in line)
    assert offsets[0] == 0 and abs(offsets[1]) < 1 and abs(offsets[2] - 30) < 1


def test_a_rank_that_does_not_come_is_named() -> None:
    code = (
        "import time; from hpctrain.doctor.meeting import Meeting; from hpctrain.parallel.world import start;"
        "world = start(); meeting = Meeting(world); meeting.gather(1, 'the first');"
        "time.sleep(300) if world.rank == 1 else meeting.gather(2, 'thinking', 2)"
    )
    done = mpirun(3, [sys.executable, "-c", f"{code}; world.barrier()"])
    assert done.returncode != 0
    assert "PROBLEM    rank 1 on " in done.stdout and "did not come back from thinking in 2 s" in done.stdout


def test_a_collective_that_does_not_end_ends_the_job() -> None:
    code = (
        "import time; from hpctrain.doctor.meeting import ended_after; from hpctrain.parallel.world import start\n"
        "world = start()\n"
        "with ended_after(2, 'the barrier', world.is_root): time.sleep(300) if world.rank == 1 else world.barrier()"
    )
    done = mpirun(2, [sys.executable, "-c", code])
    assert done.returncode != 0 and "PROBLEM    the barrier did not end within 2 s" in done.stdout


def test_an_interrupt_ends_it_and_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*DOCTOR, "--dir", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    deadline = time.monotonic() + 60
    while "numpy" not in Path(f"/proc/{process.pid}/maps").read_text():  # it is at work
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130 and "interrupted" in stderr and "Traceback" not in stderr
    assert list(tmp_path.iterdir()) == []
