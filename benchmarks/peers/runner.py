"""Starts contenders, and keeps what they print."""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.plan import Contender, Group
from benchmarks.peers.work import LAUNCHED

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_SECONDS = float(os.environ.get("BENCHMARK_TIMEOUT_SECONDS", "300"))
Run = dict[str, Any]


class Failed(Exception):
    """A contender did not do its work; says why in one line."""


class LeftOut(Failed):
    """What cannot be measured here, or not now; says why."""


class OutOfTime(LeftOut):
    """The time for the whole benchmark was up before it was done."""


def run_contender(
    group: Group, contender: Contender, quick: bool = False, torch_path: str | None = None, until: float = math.inf
) -> Run:
    """Run it once; return images/s of all its processes together, and of the slowest or largest one the rest."""
    return together(start(contender, work_words(group, contender, quick), torch_path, until))


def work_words(group: Group, contender: Contender, quick: bool) -> list[str]:
    """Return the arguments that tell a contender what to do."""
    steps = min(contender.steps, group.quick_steps if quick else group.steps)
    return [
        *("--model", group.model, "--precision", group.precision, "--micro-batch", str(contender.micro_batch)),
        *("--threads", str(contender.threads), "--steps", str(steps), "--warm-up", str(group.warm_up)),
    ]


def start(
    contender: Contender, arguments: Sequence[str], torch_path: str | None = None, until: float = math.inf
) -> list[Run]:
    """Start a contender's processes and wait for them; return the line of JSON of each."""
    python = [sys.executable, *contender.program, *arguments]
    extra = dict(contender.environment)
    if contender.needs_torch and torch_path:
        extra["PYTHONPATH"] = os.pathsep.join([torch_path, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    meeting = Path(tempfile.mkdtemp(prefix="benchmark-"))
    try:
        if contender.launch == "mpirun":
            commands = [mpirun(contender.processes, python)]
        elif contender.launch == "processes":
            commands = _processes(contender, python, meeting)
        else:
            commands = [python]
        lines = run_commands(commands, extra, until)
    finally:
        shutil.rmtree(meeting)
    if len(lines) != contender.processes:
        raise Failed(f"{len(lines)} of {contender.processes} processes printed their figures")
    return lines


def mpirun(ranks: int, command: Sequence[str]) -> list[str]:
    """Return the command under mpirun, as plain as it can be."""
    more = ["--map-by", ":OVERSUBSCRIBE"] if ranks > len(os.sched_getaffinity(0)) else []
    return ["mpirun", "-n", str(ranks), *more, *command]


def together(lines: Sequence[Run]) -> Run:
    """Return the sum of the images/s of all processes, the largest memory, the latest start, the slowest steps."""
    slowest = min(lines, key=lambda line: line["images_per_second"])
    return {
        **slowest,
        "images_per_second": sum(line["images_per_second"] for line in lines),
        "peak_rss_mb": max(line["peak_rss_mb"] for line in lines),
        "start_seconds": max(line["start_seconds"] for line in lines),
    }


def run_commands(
    commands: Sequence[Sequence[str]], extra: Mapping[str, str] | None = None, until: float = math.inf
) -> list[Run]:
    """Run commands at the same time; return the JSON objects they print, one a line. Raises Failed.

    All get `extra` beside this program's environment. `until` is an end on time.monotonic's clock: OutOfTime. Whatever
    is still running when one fails, when time is up or when this program is interrupted is ended with all that it has
    started.
    """
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", **as_root(), **(extra or {}), LAUNCHED: str(time.time())}
    files = [tempfile.TemporaryFile("w+") for _ in range(2 * len(commands))]  # noqa: SIM115
    started: list[subprocess.Popen[str]] = []
    try:
        for i, command in enumerate(commands):
            started.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=files[2 * i],
                    stderr=files[2 * i + 1],
                    text=True,
                    start_new_session=True,
                )
            )
        own_until = time.monotonic() + TIMEOUT_SECONDS
        while None in (codes := [process.poll() for process in started]):
            if any(codes):
                break
            if time.monotonic() > until:
                raise OutOfTime("the time was up")
            if time.monotonic() > own_until:
                raise Failed(f"not done after {TIMEOUT_SECONDS:.0f} s")
            time.sleep(0.05)
        for i, process in enumerate(started):
            if process.returncode:
                raise Failed(f"exit code {process.returncode}: {_last_line(files[2 * i + 1])}")
        lines = []
        for file in files[::2]:
            file.seek(0)
            lines += [json.loads(line) for line in file if line.startswith("{")]
        return lines
    finally:
        for process in started:
            _end(process)
        for file in files:
            file.close()


def _processes(contender: Contender, python: Sequence[str], meeting: Path) -> list[list[str]]:
    """The commands of processes without a launcher: each has its part of the CPUs and knows everyone's port."""
    cpus = sorted(os.sched_getaffinity(0))
    ports = ",".join(map(str, free_ports(contender.processes)))
    commands = []
    for i in range(contender.processes):
        share = cpus[i * len(cpus) // contender.processes : (i + 1) * len(cpus) // contender.processes]
        mine = ["--cpus", ",".join(map(str, share))] if share else []
        place = ["--process", str(i), "--processes", str(contender.processes), "--meet", str(meeting)]
        commands.append([*python, *place, "--ports", ports, *mine])
    return commands


def free_ports(count: int) -> list[int]:
    """Return TCP ports that nobody listens on at this moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def as_root() -> dict[str, str]:
    """Return what Open MPI asks of root, and of nobody else."""
    if os.geteuid() != 0:
        return {}
    return {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}


def _end(process: subprocess.Popen[str]) -> None:
    """End a process and its session; mpirun gets a moment to end its ranks, which have sessions of their own."""
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _last_line(file: Any) -> str:
    file.seek(0)
    lines = [line.strip() for line in file if any(map(str.isalnum, line))]  # and not the frame of Open MPI's messages
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["nothing on stderr"])[-1][:300]
