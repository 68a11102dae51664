"""The virtual cluster itself: what the other tests rely on."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import VirtualCluster
from tests.slurm.processes import is_alive, poll

pytestmark = pytest.mark.slurm

SHOW_WORLD = "from mpi4py import MPI; w = MPI.COMM_WORLD; print(*w.allgather(MPI.Get_processor_name()), w.size)"


def test_nodes_have_names_and_processes_of_their_own(cluster: VirtualCluster) -> None:
    assert sorted(cluster.command("srun", "-N4", "hostname").split()) == cluster.nodes
    # ps on one node shows nothing of the others
    seen = cluster.command("srun", "-N4", "sh", "-c", "ps -e -o args | grep -c '^slurmd -D'").split()
    assert seen == ["1"] * 4


@pytest.mark.parametrize("launch", ["srun --mpi=pmix", "mpirun --map-by ppr:1:node", "mpirun"])
def test_ranks_of_both_launchers_are_one_world(launch: str, cluster: VirtualCluster, tmp_path: Path) -> None:
    script = tmp_path / "job.sh"
    script.write_text(f"#!/bin/bash\n{launch} {sys.executable} -c '{SHOW_WORLD}'\n")
    job = cluster.submit("-N2", "--ntasks-per-node=1", f"--output={tmp_path}/%j.out", script)
    assert cluster.wait(job).name == "COMPLETED", cluster.output(job)
    assert cluster.output(job).splitlines() == ["node1 node2 2"] * 2


def test_a_second_cluster_at_the_same_time(cluster: VirtualCluster, tmp_path: Path) -> None:
    with VirtualCluster(tmp_path / "other", nodes=2) as other:
        job = other.submit("--wrap=hostname", f"--output={tmp_path}/%j.out")
        assert other.wait(job).name == "COMPLETED"
        assert other.command("sinfo", "-h", "-o", "%D").split() == ["2"]
        assert cluster.command("sinfo", "-h", "-o", "%D").split() == ["4"]
    assert cluster.command("srun", "-N4", "echo", "here").split() == ["here"] * 4


HELD = """
import signal, sys, time
from pathlib import Path
from tests.slurm.cluster import VirtualCluster
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
with VirtualCluster(Path(sys.argv[1]), nodes=2) as cluster:
    job = cluster.submit("-N2", "--wrap=srun sleep 1000", "--output=/dev/null")
    while len(cluster.everything_of(job)) < 4:
        time.sleep(0.1)
    print(*cluster.pids(), *cluster.everything_of(job), flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_tests(number: signal.Signals, cluster: VirtualCluster, tmp_path: Path) -> None:
    """However they end: Ctrl-C lets the cluster stop in order, SIGKILL leaves it to the kernel."""
    command = [sys.executable, "-c", HELD, str(tmp_path / "held")]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=root) as tests:
        assert tests.stdout is not None
        try:
            pids = [int(pid) for pid in tests.stdout.readline().split()]
            tests.send_signal(number)
            tests.wait(60)
        finally:
            tests.kill()
    assert len(pids) >= 2 + 2 * 2 + 4
    poll(lambda: not any(map(is_alive, pids)), "the cluster's processes to end", 30)


def test_a_node_that_loses_power_comes_back(cluster: VirtualCluster) -> None:
    cluster.power_off("node4")
    cluster.command("scontrol", "update", "node=node4", "state=down", "reason=power")
    assert cluster.node_state("node4").startswith("down")
    cluster.power_on("node4")
    assert cluster.command("srun", "-w", "node4", "hostname").strip() == "node4"
