"""A pretend cluster: a launcher that starts ranks here and calls them other hosts', which can be killed or frozen."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

PATIENCE_SECONDS = 60

# What Open MPI's mpirun does, as far as it matters: --host a:1,b:1, a rank a slot; if a rank fails, all end, and its
# code is the launcher's. A host in $CLUSTER/dead starts nothing and is waited for; one in $CLUSTER/broken refuses.
LAUNCHER = """#!{python}
import os, signal, subprocess, sys, time
if sys.argv[1:] == ["--version"]:
    print("mpirun (Open MPI) 5.0.0")
    sys.exit()
words, cluster = sys.argv[1:], os.environ["CLUSTER"]
hosts = [h.split(":")[0] for h in words[words.index("--host") + 1].split(",") for _ in range(int(h.split(":")[1]))]
program = words[words.index("program-begins") + 1 :]
state = lambda kind, host: os.path.exists(f"{{cluster}}/{{kind}}/{{host}}")
if any(state("broken", host) for host in hosts):
    print("no daemon on that host", file=sys.stderr)
    sys.exit(1)
if any(state("dead", host) for host in hosts):
    time.sleep(1000)
if "hpctrain.doctor.node" in program:
    slow = 9.0 if state("slow", hosts[0]) else 1.0
    print("a login message")
    print('{{"gemm_seconds": %s, "memory_bytes_per_second": 1e9, "errors": {{}}}}' % (0.01 * slow), flush=True)
    sys.exit()
ranks = []
for i, host in enumerate(hosts):
    env = dict(os.environ, PRETEND_HOST=host, RANK=str(i), SIZE=str(len(hosts)))
    ranks.append(subprocess.Popen(program, env=env, process_group=0) if sys.version_info >= (3, 11)
                 else subprocess.Popen(program, env=env, preexec_fn=os.setpgrp))
def on(number, frame):
    for rank in ranks:
        rank.send_signal(signal.SIGKILL if number == signal.SIGTERM else number)
signal.signal(signal.SIGUSR1, on)
signal.signal(signal.SIGTERM, on)
while None in [rank.poll() for rank in ranks]:
    time.sleep(0.02)
    failed = [rank.returncode for rank in ranks if rank.returncode not in (None, 0, 85)]
    if failed and not os.path.exists(f"{{cluster}}/hang"):
        on(signal.SIGTERM, None)
        [rank.wait() for rank in ranks]
        sys.exit(128 - failed[0] if failed[0] < 0 else failed[0])
    while failed:  # as an srun that waits for a node that is gone
        time.sleep(1)
sys.exit(max(rank.returncode for rank in ranks))
"""

# A training program of one step each 0.05 s that starts from its newest "checkpoint", as $ACT says.
PROGRAM = """
import json, os, pathlib, signal, sys, time
run, cluster = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1]), pathlib.Path(os.environ["CLUSTER"])
act, steps = os.environ["ACT"].split(":"), 20
rank, host = int(os.environ["RANK"]), os.environ["PRETEND_HOST"]
stop = []
signal.signal(signal.SIGUSR1, lambda *_: stop.append(1))
(cluster / "pids").mkdir(exist_ok=True)
(cluster / "pids" / f"{host}-{rank}").write_text(str(os.getpid()))
with open(cluster / "starts", "a") as file:
    file.write(f"{host} {rank} {os.environ['SIZE']} {' '.join(sys.argv[1:])}\\n")
done = max([int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")], default=0)
if act[0] == "exit":
    sys.exit(int(act[1]))
for step in range(done + 1, steps + 1):
    if stop:
        sys.exit(85)
    if rank == 0:
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"kind": "train", "step": step}) + "\\n")
        if step % 5 == 0:
            (run / "checkpoints" / f"step-{step:08d}").mkdir(parents=True, exist_ok=True)
    if act[0] == "crash" and rank == 0 and step == int(act[1]) + done * (act[2] == "later"):
        sys.exit(9)
    while step == 12 and act[0] == "wait" and not stop and not (cluster / "go").exists():
        time.sleep(0.02)
    time.sleep(0.02)
"""


@dataclass
class Supervision:
    """A supervisor under way."""

    process: subprocess.Popen[str]
    cluster: Path
    run_dir: Path

    def end(self) -> tuple[int, str]:
        """Exit code and output."""
        try:
            output, _ = self.process.communicate(timeout=PATIENCE_SECONDS)
        finally:
            self.process.kill()
        return self.process.returncode, output

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while not condition():
            if time.monotonic() > end or self.process.poll() is not None:
                raise AssertionError(f"{what}: {self.end() if self.process.poll() is not None else 'still waiting'}")
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        metrics = self.run_dir / "metrics.jsonl"
        self.wait_for(lambda: metrics.exists() and f'"step": {step}}}' in metrics.read_text(), f"step {step}")

    def mark(self, kind: str, host: str) -> None:
        (self.cluster / kind).mkdir(exist_ok=True)
        (self.cluster / kind / host).touch()

    def kill_host(self, host: str) -> None:
        """End all ranks there; from now on nothing starts there."""
        self.mark("dead", host)
        for file in (self.cluster / "pids").glob(f"{host}-*"):
            os.kill(int(file.read_text()), signal.SIGKILL)

    def events(self, *names: str) -> list[dict[str, Any]]:
        records = [json.loads(line) for line in (self.run_dir / "supervise.jsonl").read_text().splitlines()]
        return [record for record in records if not names or record["event"] in names]

    @property
    def launches(self) -> list[list[str]]:
        return [event["hosts"] for event in self.events("launch")]

    def starts(self) -> list[str]:
        return (self.cluster / "starts").read_text().splitlines()


@dataclass
class Cluster:
    """Starts supervisors and ends what a failing test has left of them."""

    folder: Path
    started: list[Supervision] = field(default_factory=list)

    def __call__(
        self, act: str, *options: str, hosts: str = "a,b,c", marks: tuple[str, ...] = (), **env: str
    ) -> Supervision:
        run_dir = self.folder / "a run"
        command = [sys.executable, "-m", "hpctrain", "supervise", "--hosts", hosts, "--probe-seconds", "5"]
        launch = f"'{self.folder / 'my tools' / 'mpirun'}' program-begins"
        command += ["--launch", launch, "--pause-seconds", "0.1", "--grace-seconds", "0.5", *options, "--"]
        command += [sys.executable, str(self.folder / "program.py"), "--resume", "none", "--run-dir", str(run_dir)]
        supervision = Supervision(None, self.folder, run_dir)  # type: ignore[arg-type]
        for mark in marks:
            supervision.mark(*mark.split("/"))
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "PBS_", "HPCTRAIN_"))}
        supervision.process = subprocess.Popen(
            command,
            env={**clean, "CLUSTER": str(self.folder), "ACT": act, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(supervision)
        return supervision

    def leftovers(self) -> list[int]:
        """Processes that carry this cluster's name."""
        found = []
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                environ = Path(f"/proc/{entry}/environ").read_bytes()
                state = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if f"CLUSTER={self.folder}\0".encode() in environ and state != "Z":
                found.append(int(entry))
        return found


@pytest.fixture
def supervise(tmp_path: Path) -> Iterator[Cluster]:
    tools = tmp_path / "my tools"
    tools.mkdir()
    (tools / "mpirun").write_text(LAUNCHER.format(python=sys.executable))
    (tools / "mpirun").chmod(0o755)
    (tmp_path / "program.py").write_text(PROGRAM)
    cluster = Cluster(tmp_path)
    yield cluster
    for supervision in cluster.started:
        supervision.process.kill()
    for pid in cluster.leftovers():
        os.kill(pid, signal.SIGKILL)
