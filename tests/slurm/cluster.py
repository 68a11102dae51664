"""A private Slurm cluster of several nodes on this one machine, for tests.

A node is a slurmd in namespaces of its own: a host name, a /dev/shm, an /etc/hosts and process numbers. All of a node
therefore ends with the first process in it, as in a power cut, and Slurm and MPI take the nodes for different hosts.
Jobs get more CPUs than the machine has. Nothing is shared with a Slurm of the machine itself or with another cluster of
this kind: keys, sockets, ports and folders are the cluster's own.
"""

import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.slurm.processes import environments, is_alive, poll, send, tree

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare", "setpriv")
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
FINAL_STATES = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL")
# Variables by which jobs learn from their surroundings; those of the tests' own surroundings are not for them.
FOREIGN = re.compile(r"(SLURM|SBATCH|SRUN|SQUEUE|SINFO|SCANCEL|PMI|OMPI_COMM|OMP_|TF_NUM|PRTE|PYTEST)")

# A requeued job waits for cred_expire, by default two minutes; started by hand before that, it may be refused.
# TmpFS: a folder a node, or PMIx's sockets of several nodes get in each other's way. SlurmdSpoolDir without %n: the
# PMIx plugin sends messages between nodes to a socket there and leaves %n as it is. Each node mounts its own folder.
SLURM_CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
TmpFS={folder}/tmp/%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
JobRequeue=1
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobs.txt
JobAcctGatherType=jobacct_gather/none
KillWait=5
MinJobAge=3600
SlurmctldTimeout=30
SlurmdTimeout=10
ReturnToService=2
MailProg=/bin/true
SlurmdParameters=config_overrides
"""


@dataclass(frozen=True)
class JobState:
    """What Slurm says about a job."""

    name: str  # JobState: PENDING, RUNNING, COMPLETED, ...
    exit_code: int  # of the script, or 0
    restarts: int  # how often it was requeued and started again
    fields: dict[str, str]  # all that `scontrol show job -o` shows

    @property
    def ended(self) -> bool:
        return self.name in FINAL_STATES


def why_impossible() -> str | None:
    """Return why this machine cannot run a VirtualCluster, or None when it can."""
    missing = [tool for tool in TOOLS if shutil.which(tool, path=SEARCH_PATH) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: slurm-wlm, slurm-client, munge, libpmix2)"
    if os.geteuid() != 0:
        return "only root can give the nodes host names of their own"
    probe = ["unshare", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "hostname", "node1"]
    done = subprocess.run(probe, capture_output=True, text=True)
    return f"no namespaces here: {done.stderr.strip()}" if done.returncode else None


class VirtualCluster:
    """`with VirtualCluster(folder) as cluster:` runs a Slurm of `nodes` nodes, node1, node2, ..."""

    def __init__(self, folder: Path, nodes: int = 4, cpus_a_node: int = 4) -> None:
        self.folder, self.cpus_a_node = folder, cpus_a_node
        self.nodes = [f"node{i + 1}" for i in range(nodes)]
        self.env = {name: value for name, value in os.environ.items() if not FOREIGN.match(name)}
        self.env.update(SLURM_CONF=str(folder / "slurm.conf"), PYTHONUNBUFFERED="1")
        self.env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), SEARCH_PATH])
        self.env["TMPDIR"] = str(folder / "tmp" / "jobs")  # what killed jobs leave behind goes with the cluster
        if os.geteuid() == 0:
            self.env.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._frozen: set[str] = set()
        self._reserved: socket.socket | None = None

    def __enter__(self) -> "VirtualCluster":
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    # Jobs

    def command(self, *arguments: str | Path, check: bool = True, timeout_seconds: float = 120) -> str:
        """Run one of Slurm's commands, or any other, as a user of the cluster would, and return what it prints."""
        done = subprocess.run(
            [str(a) for a in arguments], env=self.env, capture_output=True, text=True, timeout=timeout_seconds
        )
        if check and done.returncode:
            raise AssertionError(
                f"{shlex.join(map(str, arguments))}: exit {done.returncode}: {done.stdout}{done.stderr}"
            )
        return done.stdout

    def submit(self, *arguments: str | Path, **variables: str | Path) -> str:
        """`sbatch` options and a script, with `variables` in the job's environment; return the job's number."""
        export = ["--export=" + ",".join(["ALL", *(f"{k}={v}" for k, v in variables.items())])]
        return self.command("sbatch", "--parsable", *export, *arguments).strip().split(";")[0]

    def state(self, job: str) -> JobState:
        """Ask Slurm about a job."""
        line = self.command("scontrol", "show", "job", "-o", job).splitlines()[0]
        fields = dict(field.split("=", 1) for field in line.split() if "=" in field)
        exit_code = int(fields["ExitCode"].split(":")[0])
        return JobState(fields["JobState"], exit_code, int(fields["Restarts"]), fields)

    def wait(self, job: str, timeout_seconds: float = 240) -> JobState:
        """Wait until a job has ended for good and return how."""
        deadline = time.monotonic() + timeout_seconds
        while not (state := self.state(job)).ended:
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {job} is {state.name} after {timeout_seconds:.0f} s\n{self.output(job)}")
            time.sleep(0.2)
        return state

    def output(self, job: str) -> str:
        """What a job has written so far to its output (and error) files."""
        fields = self.state(job).fields
        paths = {Path(fields[name]) for name in ("StdOut", "StdErr") if name in fields}
        return "".join(path.read_text(errors="replace") for path in sorted(paths) if path.is_file())

    def processes(self, job: str, variable: str = "PMIX_RANK") -> dict[int, int]:
        """Process numbers (as this machine counts them) of a job's ranks: {rank: pid}."""
        return {
            int(environ[variable]): pid for pid, environ in self._members(job) if environ.get(variable, "").isdigit()
        }

    def everything_of(self, job: str) -> list[int]:
        """Process numbers of all that carries a job's number, on any node."""
        return [pid for pid, _ in self._members(job)]

    def _members(self, job: str) -> Iterator[tuple[int, dict[str, str]]]:
        ours = {"SLURM_JOB_ID": job, "SLURM_CONF": self.env["SLURM_CONF"]}  # another cluster counts from 1 too
        return ((pid, environ) for pid, environ in environments() if ours.items() <= environ.items())

    # Nodes

    def node_state(self, node: str) -> str:
        """What `sinfo` says about a node: idle, alloc, mix, down, ...; a trailing * means that it does not respond."""
        return self.command("sinfo", "-h", "-n", node, "-o", "%T").strip()

    def power_off(self, node: str) -> None:
        """End everything on a node at once, and say nothing to Slurm."""
        daemon = self._daemons.pop(node)
        self._frozen.discard(node)
        all_of_it = tree(daemon.pid)
        daemon.kill()  # unshare --kill-child; the kernel ends the rest of the namespace
        daemon.wait()
        poll(lambda: not any(map(is_alive, all_of_it)), f"{node} to end", 20)

    def freeze(self, node: str) -> None:
        """Stop everything on a node without ending it: its connections stay open and nothing answers."""
        self._frozen.add(node)
        send(tree(self._daemons[node].pid), signal.SIGSTOP)

    def power_on(self, node: str) -> None:
        """Start a node that was off, and wait until Slurm has it."""
        self._start_node(node)
        self.wait_for_nodes()

    def wait_for_nodes(self, timeout_seconds: float = 60) -> None:
        """Wait until all nodes are idle."""
        states: list[str] = []

        def ready() -> bool:
            states[:] = self.command("sinfo", "-h", "-N", "-o", "%T", check=False).split()
            return states == ["idle"] * len(self.nodes)

        poll(ready, f"idle nodes; Slurm's log: {self.folder}/log", timeout_seconds)

    def tidy(self, timeout_seconds: float = 60) -> None:
        """Cancel all jobs and start the nodes that are off, frozen or dead."""
        for node in list(self._frozen):
            self.power_off(node)
        self.command("scancel", "-Q", "--me")
        poll(lambda: not self.command("squeue", "-h").strip(), "an empty queue", timeout_seconds)
        for node in self.nodes:
            daemon = self._daemons.get(node)
            if daemon is None or daemon.poll() is not None:
                self._start_node(node)
        self.wait_for_nodes()

    def pids(self) -> list[int]:
        """Process numbers of all that the cluster consists of."""
        return [pid for daemon in self._daemons.values() for pid in tree(daemon.pid)]

    # Starting and stopping

    def _start(self) -> None:
        of_nodes = [f"{kind}/{node}" for kind in ("tmp", "spools") for node in self.nodes]
        for name in ("run", "log", "state", "spool", "tmp/jobs", *of_nodes):
            (self.folder / name).mkdir(parents=True)
        port = self._reserve_ports(len(self.nodes) + 1)
        user = self.command("id", "-un").strip()
        host = socket.gethostname().split(".")[0]
        lines = [SLURM_CONF.format(host=host, port=port, user=user, folder=self.folder)]
        for i, node in enumerate(self.nodes):
            place = f"NodeName={node} NodeHostname={node} NodeAddr=127.0.0.1 Port={port + 1 + i}"
            lines.append(f"{place} CPUs={self.cpus_a_node} RealMemory=4000 State=UNKNOWN\n")
        lines.append("PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP\n")
        (self.folder / "slurm.conf").write_text("".join(lines))
        hosts = "".join(f"127.0.1.{i + 1} {node}\n" for i, node in enumerate(self.nodes))
        (self.folder / "hosts").write_text(Path("/etc/hosts").read_text() + "\n" + hosts)
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))

        at = self.folder
        files = [f"--key-file={key}", f"--socket={at}/munge.socket", f"--pid-file={at}/run/munged.pid"]
        files += [f"--log-file={at}/log/munged.log", f"--seed-file={at}/munge.seed"]
        self._spawn("munged", "munged", "--foreground", "--force", *files)
        poll((at / "munge.socket").exists, f"munged; its log: {at}/log", 20)
        self._spawn("slurmctld", "slurmctld", "-D", "-f", self.env["SLURM_CONF"])
        for node in self.nodes:
            self._start_node(node)
        self.wait_for_nodes()

    def _start_node(self, node: str) -> None:
        # The shell is the first process there: it takes note of orphans that have ended, which slurmd would not.
        script = 'hostname "$1"; mount -t tmpfs -o mode=1777 tmpfs /dev/shm; mount --bind "$2/hosts" /etc/hosts\n'
        script += 'mount --bind "$2/spools/$1" "$2/spool"\n'
        script += 'slurmd -D -N "$1" -f "$2/slurm.conf" & wait "$!"'
        own = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._spawn(node, *own, "sh", "-euc", script, "sh", node, str(self.folder))

    def _spawn(self, name: str, *command: str) -> None:
        """Start a daemon in the foreground; the kernel ends it when the tests' process ends, however that comes."""
        with open(self.folder / "log" / f"{name}.out", "ab") as log:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.env,
                start_new_session=True,  # Ctrl-C is for the tests, which then stop the cluster in order
            )

    def _stop(self) -> None:
        for node in [name for name in self._daemons if name in self.nodes]:
            self.power_off(node)
        for daemon in self._daemons.values():
            daemon.kill()  # its state goes with the folder
            daemon.wait()
        self._daemons.clear()
        if self._reserved is not None:
            self._reserved.close()

    def _reserve_ports(self, count: int) -> int:
        """Return the first of `count` free ports in a row; the last of their block stays bound, as our claim to it."""
        block = 32
        for first in range(20_000, 30_000, block):  # below those that the kernel gives to outgoing connections
            claim = socket.socket()
            try:
                claim.bind(("127.0.0.1", first + block - 1))
                for port in range(first, first + count):
                    with socket.socket() as probe:
                        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                        probe.bind(("127.0.0.1", port))
            except OSError:
                claim.close()
                continue
            self._reserved = claim
            return first
        raise OSError("no free ports between 20000 and 30000")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt), VirtualCluster(Path(sys.argv[1]).absolute()) as by_hand:
        print(f"export SLURM_CONF={shlex.quote(by_hand.env['SLURM_CONF'])}", flush=True)
        signal.pause()
