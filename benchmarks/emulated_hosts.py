"""Several hosts on this one machine, with a network between them whose rate can be set. Linux, root.

A host is a set of Linux namespaces: its own network, host name, process numbers, /dev/shm and /etc/hosts. MPI takes the
hosts for different machines and talks TCP between them. They hang on a bridge in one more network namespace, the
`head`, in which mpirun runs, like a login node. Nothing is created in the machine's own network, so several of these at
once do not meet; and everything is held by processes that the kernel ends with the one that started them, so nothing
is left over however that ends. All hosts share the machine's cores and files.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

TOOLS = ("ip", "tc", "unshare", "nsenter", "setpriv", "mpirun")
SEARCH_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/sbin:/sbin"])
SUBNET = "10.77.0"  # the same in every instance: none can be reached from outside
# A filled bucket goes out at once. 128 KiB is 1 ms at 1 Gbit/s, and holds the largest packet the kernel hands on.
BURST, QUEUE = "128kb", "8mb"
SLOW_PERIOD_SECONDS = 0.05

# The first process of a host; it takes note of orphans that have ended. Before /proc is the host's own, it still shows
# the number by which the rest of the machine knows this process.
HOST_SCRIPT = """
read -r pid rest </proc/self/stat
hostname "$1"
mount -t proc proc /proc
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount --bind "$2/hosts" /etc/hosts
ip link set lo up
echo "$pid"
sleep infinity & wait "$!"
"""
HEAD_SCRIPT = f"""
hostname head
ip link set lo up
ip link add switch type bridge
ip address add {SUBNET}.254/24 dev switch
ip link set switch up
echo "$$"
exec sleep infinity
"""
AGENT = """#!/bin/sh
# In the place of ssh: agent HOST COMMAND...
at=$(dirname "$0") host=$1; shift
read -r pid <"$at/pid.$host" || { echo "there is no host $host" >&2; exit 255; }
TMPDIR="$at/tmp/$host" nsenter --target "$pid" --net --uts --mount --pid -- sh -c "$*"
code=$?
# As ssh does until the daemon it has started is on its own: a host that is off the network is not heard of any more,
# and one that ends closes the connection.
while [ -e "$at/cut.$host" ] && kill -0 "$PPID" 2>/dev/null; do sleep 1; done
[ -e "$at/pid.$host" ] || exit 255
exit "$code"
"""


def why_impossible() -> str | None:
    """Return why this machine cannot have EmulatedHosts, or None when it can."""
    missing = [tool for tool in TOOLS if shutil.which(tool, path=SEARCH_PATH) is None]
    if missing:
        return f"{', '.join(missing)} not installed (Debian: iproute2, util-linux)"
    if os.geteuid() != 0:
        return "only root can give the hosts networks of their own"
    script = "ip link add probe0 type veth peer name probe1 && tc qdisc replace dev probe0 root tbf rate 1gbit "
    script += f"burst {BURST} limit {QUEUE} && ip link add probe2 type bridge && mount -t tmpfs tmpfs /dev/shm"
    probe = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "sh", "-c", script]
    done = subprocess.run(probe, capture_output=True, text=True, env={**os.environ, "PATH": SEARCH_PATH})
    return f"no emulated network here: {done.stderr.strip()}" if done.returncode else None


class EmulatedHosts:
    """`with EmulatedHosts(4, rate_mbit=1000, directory=DIR) as hosts:` has four hosts, node0 to node3.

    `rate_mbit` limits what a host sends and, apart, what it receives, in Mbit/s (10^6 bits, with TCP's and Ethernet's
    headers); None is no limit. `burst` is what goes out at once after a pause, in tc's words. `directory` is for a few
    small files and the hosts' TMPDIRs. To be used from the thread that goes on longest: the kernel ends the hosts with
    it.
    """

    def __init__(self, count: int, rate_mbit: float | None = None, *, directory: Path, burst: str = BURST) -> None:
        self.names = [f"node{i}" for i in range(count)]
        self.rate_mbit = rate_mbit
        self.burst = burst
        self.folder = directory.absolute()
        self._head: subprocess.Popen[str] | None = None
        self._hosts: dict[int, subprocess.Popen[str]] = {}
        self._inits: dict[int, int] = {}  # host -> process number of its first process
        self._own_names: set[str] = set()  # the namespaces' names as /proc shows them
        self._slowed: dict[int, tuple[threading.Thread, threading.Event]] = {}

    def __enter__(self) -> "EmulatedHosts":
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Jobs

    def mpirun_words(self, ranks_per_host: int = 1, hosts: Sequence[int] | None = None) -> list[str]:
        """Return the words before a program that make it an MPI job on these hosts (all when None), in their order.

        The first process that runs them becomes mpirun itself: signals to it and its exit code are mpirun's. It ends
        with the process that started it. Ranks are not bound to cores.
        """
        names = [self.names[i] for i in (range(len(self.names)) if hosts is None else hosts)]
        assert self._head is not None
        words = ["setpriv", "--pdeathsig", "KILL", "nsenter", f"--target={self._head.pid}", "--net", "--uts", "env"]
        words += [f"PATH={SEARCH_PATH}", f"TMPDIR={self.folder}/tmp/head", "OMPI_ALLOW_RUN_AS_ROOT=1"]
        words += ["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1", "mpirun", "--prtemca", "plm_ssh_agent", f"{self.folder}/agent"]
        words += ["--mca", "pml", "ob1", "--mca", "btl", "self,sm,tcp", "--mca", "btl_tcp_if_include", "eth0"]
        words += ["--bind-to", "none", "--host", ",".join(f"{name}:{ranks_per_host}" for name in names)]
        return [*words, "-n", str(ranks_per_host * len(names))]

    def start(
        self,
        command: Sequence[str | Path],
        ranks_per_host: int = 1,
        hosts: Sequence[int] | None = None,
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start an MPI job and return its mpirun at once; output goes to `log`.out and `log`.err."""
        words = [*self.mpirun_words(ranks_per_host, hosts), *map(str, command)]
        with open(log.with_suffix(".out"), "wb") as out, open(log.with_suffix(".err"), "wb") as err:
            return subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )

    def run(
        self,
        command: Sequence[str | Path],
        ranks_per_host: int = 1,
        hosts: Sequence[int] | None = None,
        *,
        env: Mapping[str, str] | None = None,
        timeout_seconds: float = 240,
    ) -> str:
        """Run an MPI job to its end and return what it prints; RuntimeError when it fails or takes longer."""
        log = self.folder / "run"
        process = self.start(command, ranks_per_host, hosts, log=log, env=env)
        try:
            code: int | str = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            code = f"none after {timeout_seconds:g} s"
        finally:
            process.kill()
            process.wait()
        out, err = (log.with_suffix(suffix).read_text(errors="replace") for suffix in (".out", ".err"))
        if code != 0:
            raise RuntimeError(f"{shlex.join(map(str, command))}: exit code {code}\n{out[-3000:]}{err[-3000:]}")
        return out

    def pids(self, host: int) -> list[int]:
        """Process numbers, as the machine counts them, of everything on a host but its first process."""
        return [pid for pid in _members({self._namespace(host)}) if pid != self._inits[host]]

    # What happens to hosts

    def set_rate(self, host: int, rate_mbit: float | None) -> None:
        """Limit what a host sends and what it receives to this many Mbit/s each; None is no limit."""
        assert self._head is not None
        for pid, device in ((self._inits[host], "eth0"), (self._head.pid, f"port{host}")):
            tc = ["nsenter", f"--target={pid}", "--net", "tc", "qdisc"]
            if rate_mbit is None:
                # Without one of its own, the device gets the kernel's default, which is no limit.
                _command(*tc, "replace", "dev", device, "root", "pfifo", "limit", "1000")
            else:
                limit = ["tbf", "rate", f"{rate_mbit * 1e6:.0f}bit", "burst", self.burst, "limit", QUEUE]
                _command(*tc, "replace", "dev", device, "root", *limit)

    def cut_link(self, host: int) -> None:
        """Take a host off the network: packets to and from it are lost, and nobody is told."""
        assert self._head is not None
        (self.folder / f"cut.{self.names[host]}").touch()
        _command("nsenter", f"--target={self._head.pid}", "--net", "ip", "link", "set", f"port{host}", "down")

    def kill_host(self, host: int, cut_link: bool = True) -> None:
        """End everything on a host at once, as in a power cut: its peers hear nothing.

        Without `cut_link` the kernel closes its connections, as when only the programs are killed.
        """
        self._end_slowness(host)
        if cut_link:
            self.cut_link(host)
        (self.folder / f"pid.{self.names[host]}").unlink()
        everything = _members({self._namespace(host)})
        self._hosts[host].kill()  # unshare --kill-child; the kernel ends the rest of the namespace
        self._hosts.pop(host).wait()
        _poll(lambda: not any(map(_is_alive, everything)), f"{self.names[host]} to end")

    def freeze_host(self, host: int) -> None:
        """Stop everything on a host without ending it: its connections stay open and nothing answers."""
        self._end_slowness(host)
        _send(self.pids(host), signal.SIGSTOP)

    def thaw_host(self, host: int) -> None:
        """Let a frozen or slow host go on at full speed."""
        self._end_slowness(host)
        _send(self.pids(host), signal.SIGCONT)

    def slow_host(self, host: int, share: float = 0.1) -> None:
        """Let what runs on a host run for only this share of the time, in turns of 50 ms, until `thaw_host`."""
        self._end_slowness(host)
        end = threading.Event()

        def slow() -> None:
            while not end.is_set():
                _send(self.pids(host), signal.SIGSTOP)
                end.wait((1 - share) * SLOW_PERIOD_SECONDS)
                _send(self.pids(host), signal.SIGCONT)
                end.wait(share * SLOW_PERIOD_SECONDS)

        self._slowed[host] = (threading.Thread(target=slow, daemon=True), end)
        self._slowed[host][0].start()

    def _end_slowness(self, host: int) -> None:
        if host in self._slowed:
            thread, end = self._slowed.pop(host)
            end.set()
            thread.join()

    # Starting and ending

    def close(self) -> None:
        """End everything: all that runs on the hosts, the hosts and their network. Can be called again."""
        for host in list(self._slowed):
            self._end_slowness(host)
        left = _members(self._own_names)
        for process in [*self._hosts.values(), *([self._head] if self._head else [])]:
            process.kill()
        _send(left, signal.SIGKILL)  # mpirun and its agents are in the head's network, in no process namespace
        for process in [*self._hosts.values(), *([self._head] if self._head else [])]:
            process.wait()
        self._hosts.clear()
        self._head = None
        _poll(lambda: not any(map(_is_alive, left)), "the emulated hosts to end")

    def _start(self) -> None:
        for name in ("head", *self.names):
            (self.folder / "tmp" / name).mkdir(parents=True, exist_ok=True)
        addresses = [f"{SUBNET}.{i + 1} {name}\n" for i, name in enumerate(self.names)]
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(addresses) + f"{SUBNET}.254 head\n")
        for stale in self.folder.glob("cut.*"):
            stale.unlink()
        (self.folder / "agent").write_text(AGENT)
        (self.folder / "agent").chmod(0o755)
        self._head = _spawn(["unshare", "--net", "--uts"], HEAD_SCRIPT)
        self._own_names.add(_namespace(_first_line(self._head), "net"))
        for host in range(len(self.names)):
            self._start_host(host)

    def _start_host(self, host: int) -> None:
        assert self._head is not None
        own = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child"]
        self._hosts[host] = _spawn(own, HOST_SCRIPT, self.names[host], str(self.folder))
        pid = self._inits[host] = _first_line(self._hosts[host])
        self._own_names |= {self._namespace(host), _namespace(pid, "net")}
        (self.folder / f"pid.{self.names[host]}").write_text(f"{pid}\n")
        in_head = ["nsenter", f"--target={self._head.pid}", "--net", "ip", "link"]
        in_host = ["nsenter", f"--target={pid}", "--net", "ip"]
        port = f"port{host}"
        _command(*in_head, "add", port, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        _command(*in_head, "set", port, "master", "switch", "up")
        _command(*in_host, "address", "add", f"{SUBNET}.{host + 1}/24", "dev", "eth0")
        _command(*in_host, "link", "set", "eth0", "up")
        if self.rate_mbit is not None:
            self.set_rate(host, self.rate_mbit)

    def _namespace(self, host: int) -> str:
        return _namespace(self._inits[host], "pid")


def _spawn(unshare: list[str], script: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a holder of namespaces; the kernel ends it with the thread that started it."""
    return subprocess.Popen(
        ["setpriv", "--pdeathsig", "KILL", *unshare, "sh", "-euc", script, "sh", *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PATH": SEARCH_PATH},
        start_new_session=True,  # Ctrl-C is for the program, which then closes the hosts in order
    )


def _first_line(process: subprocess.Popen[str]) -> int:
    """Wait for the process number that a holder prints when it is ready."""
    assert process.stdout is not None
    line = process.stdout.readline()
    if not line:
        raise OSError("an emulated host did not start; its reason is on stderr")
    return int(line)


def _command(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "PATH": SEARCH_PATH})
    if done.returncode:
        raise OSError(f"{shlex.join(words)}: {done.stderr.strip()}")


def _namespace(pid: int, kind: str) -> str:
    return os.readlink(f"/proc/{pid}/ns/{kind}")


def _members(names: set[str]) -> list[int]:
    """Process numbers of all that is in one of these process or network namespaces."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # gone meanwhile, or ended and not yet noted
            if {_namespace(int(entry), "pid"), _namespace(int(entry), "net")} & names:
                found.append(int(entry))
    return found


def _is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may wait a while for its parent to take note."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _send(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _poll(condition: Callable[[], bool], what: str, timeout_seconds: float = 20) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {timeout_seconds:.0f} s still waiting for {what}")
        time.sleep(0.02)


if __name__ == "__main__":
    number, mbit, place = int(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3])
    with contextlib.suppress(KeyboardInterrupt), EmulatedHosts(number, mbit, directory=place) as by_hand:
        print(shlex.join(by_hand.mpirun_words()), flush=True)
        signal.pause()
