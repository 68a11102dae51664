"""The emulated hosts themselves: what the tests and measurements on them rely on."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.emulated_hosts import EmulatedHosts
from tests.emulated.conftest import MakeHosts
from tests.slurm.processes import is_alive, poll

pytestmark = pytest.mark.emulated

ALLREDUCE = """
import socket, sys, time
import numpy as np
from mpi4py import MPI
world = MPI.COMM_WORLD
mine, total = np.full(int(sys.argv[1]) // 4, world.rank + 1, np.float32), np.empty(int(sys.argv[1]) // 4, np.float32)
seconds = []
for _ in range(2):
    world.Barrier()
    started = time.perf_counter()
    world.Allreduce(mine, total)
    seconds.append(world.allreduce(time.perf_counter() - started, MPI.MAX))
assert (total == world.size * (world.size + 1) / 2).all()
hosts = world.gather(socket.gethostname())
if world.rank == 0:
    print(min(seconds), *hosts)
"""
COUNT = "import itertools, time\nfor i in itertools.count(): print(i, flush=True); sum(range(100_000))"


def allreduce(hosts: EmulatedHosts, size_bytes: int, *where: int, ranks_per_host: int = 1) -> tuple[float, list[str]]:
    """Check an allreduce's sums; return its seconds and the ranks' host names."""
    command = [sys.executable, "-c", ALLREDUCE, str(size_bytes)]
    environ = {"OMPI_MCA_mpi_yield_when_idle": "1"}  # more ranks than cores
    seconds, *names = hosts.run(command, ranks_per_host, where, env=environ, timeout_seconds=120).split()
    return float(seconds), names


def links() -> str:
    return subprocess.run(["ip", "-brief", "link"], capture_output=True, text=True, check=True).stdout


def test_ranks_on_hosts_of_their_own_add_up(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(4)
    assert allreduce(hosts, 400_000, 0, 1)[1] == ["node0", "node1"]
    assert allreduce(hosts, 400_000, 0, 1, 2, 3)[1] == ["node0", "node1", "node2", "node3"]
    assert allreduce(hosts, 400_000, 1, 3, ranks_per_host=2)[1] == ["node1", "node1", "node3", "node3"]


def test_the_link_limits_the_rate(make_hosts: MakeHosts) -> None:
    hosts = make_hosts(2, rate_mbit=200)
    size = 16_000_000
    wire_seconds = size * 8 / 200e6  # each of two ranks sends and receives as much as it has
    assert 0.95 * wire_seconds < allreduce(hosts, size, 0, 1)[0] < 20 * wire_seconds
    hosts.set_rate(1, 50)
    assert 0.95 * 4 * wire_seconds < allreduce(hosts, size, 0, 1)[0]
    hosts.set_rate(1, None)
    hosts.set_rate(0, 20)
    assert 0.95 * wire_seconds < allreduce(hosts, size // 10, 0, 1)[0]


def test_two_networks_at_once_do_not_meet(make_hosts: MakeHosts) -> None:
    one, other = make_hosts(2), make_hosts(3, rate_mbit=500)
    before = links()
    names: dict[str, list[str]] = {}
    thread = threading.Thread(target=lambda: names.update(one=allreduce(one, 400_000, 0, 1)[1]))
    thread.start()
    names["other"] = allreduce(other, 400_000, 2, 1)[1]
    thread.join()
    assert names == {"one": ["node0", "node1"], "other": ["node2", "node1"]}
    assert links() == before and "switch" not in before


@pytest.mark.parametrize("cut_link", [True, False])
def test_a_killed_host_is_gone_at_once_and_the_others_are_not(
    cut_link: bool, make_hosts: MakeHosts, tmp_path: Path
) -> None:
    """mpirun finds out when connections close, and hears nothing of a host that is off the network."""
    hosts = make_hosts(3)
    job = hosts.start([sys.executable, "-c", COUNT], log=tmp_path / "job")
    poll(lambda: (tmp_path / "job.out").read_text().count("10\n") >= 3, "all ranks to count", 60)
    doomed, other = hosts.pids(1), hosts.pids(2)
    hosts.kill_host(1, cut_link=cut_link)
    assert not any(map(is_alive, doomed))
    if cut_link:
        time.sleep(1)
        assert job.poll() is None and all(map(is_alive, other))
    else:
        job.wait(60)  # with 0 at times: Open MPI 5 forgets that it has lost a host
    hosts.close()
    job.wait(20)
    assert not any(map(is_alive, other))


def test_a_host_can_be_frozen_and_slow(make_hosts: MakeHosts, tmp_path: Path) -> None:
    hosts = make_hosts(1)
    log = tmp_path / "job"
    job = hosts.start([sys.executable, "-c", COUNT], log=log)

    def count() -> int:
        return len(log.with_suffix(".out").read_bytes().splitlines())

    def advance(seconds: float) -> int:
        before = count()
        time.sleep(seconds)
        return count() - before

    poll(lambda: count() > 10, "the job to count", 60)
    full = advance(1)
    hosts.freeze_host(0)
    time.sleep(0.3)  # what is on its way to the log arrives
    assert advance(1) == 0
    hosts.slow_host(0, share=0.1)
    poll(lambda: advance(0.5) > 0, "the slow job to count", 60)
    assert advance(2) / 2 < full / 2
    hosts.thaw_host(0)
    poll(lambda: advance(0.5) > 0, "the job to count again", 60)
    hosts.close()
    job.wait(20)


HELD = """
import signal, sys
from pathlib import Path
from benchmarks.emulated_hosts import EmulatedHosts
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
with EmulatedHosts(2, 100, directory=Path(sys.argv[1])) as hosts:
    job = hosts.start([sys.executable, "-c", "import time; time.sleep(1000)"], log=Path(sys.argv[1]) / "job")
    while min(len(hosts.pids(0)), len(hosts.pids(1))) < 3:
        pass
    print(job.pid, *hosts.pids(0), *hosts.pids(1), flush=True)
    signal.pause()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_program(number: signal.Signals, possible: None, tmp_path: Path) -> None:
    before = links()
    command = [sys.executable, "-c", HELD, str(tmp_path / "held")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as program:
        assert program.stdout is not None
        pids = [int(word) for word in program.stdout.readline().split()]
        assert len(pids) >= 7 and all(map(is_alive, pids))
        namespace = os.readlink(f"/proc/{pids[0]}/ns/net")
        program.send_signal(number)
        program.wait(30)
    poll(lambda: not any(map(is_alive, pids)), "everything on the hosts to end", 20)
    assert namespace not in {_namespace(entry) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    assert links() == before
    assert not subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


def _namespace(process: Path) -> str:
    try:
        return os.readlink(process / "ns/net")
    except OSError:
        return ""
