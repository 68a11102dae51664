"""What every contender does alike: take its orders from the command line, time its steps, print one line of JSON."""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LAUNCHED = "BENCHMARK_LAUNCHED"  # environment variable: seconds since the epoch when the runner started the contender
_MEETING_SECONDS = 300.0

# model -> (image size, classes)
IMAGES = {"resnet50": (224, 1000), "alexnet_bn": (227, 1000), "resnet20": (32, 10)}


@dataclass(frozen=True)
class Work:
    """What one process of a contender is to do."""

    model: str
    precision: str  # float32 or mixed_bfloat16
    micro_batch: int  # images a step of one process
    threads: int
    steps: int  # timed
    warm_up: int  # steps before them
    process: int  # of those that the runner starts; under mpirun each is number 0 of 1
    processes: int
    meet: Path | None  # folder in which processes that know nothing of each other wait for each other
    ports: tuple[int, ...]  # free on this host, one for each process

    @property
    def image_size(self) -> int:
        """Side of an image in pixels."""
        return IMAGES[self.model][0]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return IMAGES[self.model][1]

    @property
    def bfloat16(self) -> bool:
        """Whether activations and convolutions are bfloat16."""
        return self.precision == "mixed_bfloat16"


def parse_work(arguments: list[str] | None = None) -> Work:
    """Read the command line, and bind this process to its CPUs. To be called before anything heavy is imported."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=list(IMAGES), required=True)
    parser.add_argument("--precision", choices=["float32", "mixed_bfloat16"], required=True)
    parser.add_argument("--micro-batch", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warm-up", type=int, default=2)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--meet", type=Path)
    parser.add_argument("--ports", default="")
    parser.add_argument("--cpus", default="", help="such as 0,1; those it was started with if empty")
    given = vars(parser.parse_args(arguments))
    if cpus := given.pop("cpus"):
        os.sched_setaffinity(0, [int(cpu) for cpu in cpus.split(",")])
    given["ports"] = tuple(int(port) for port in given["ports"].split(",") if port)
    return Work(**given)


def time_steps(work: Work, step: Callable[[], object], **facts: object) -> None:
    """Take the steps and print the line. `step` returns when the step is done; `facts` go into the line as well."""
    step()
    start_seconds = time.time() - float(os.environ.get(LAUNCHED) or "nan")
    for _ in range(work.warm_up - 1):
        step()
    if work.meet is not None:
        _wait_for_all(work.meet, work.process, work.processes)
    seconds = []
    for _ in range(work.steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    print_line(
        images_per_second=work.micro_batch / statistics.median(seconds),
        step_seconds=seconds,
        peak_rss_mb=peak_rss_mb(),
        start_seconds=start_seconds,
        **facts,
    )


def print_line(**values: object) -> None:
    """Print the values as one line of JSON, in one write, so that ranks that print at the same time do not mix."""
    sys.stdout.flush()
    os.write(1, json.dumps(values).encode() + b"\n")


def peak_rss_mb() -> float:
    """Return the most memory that this process has had, in MB of 10^6 bytes; its parent's, as in ru_maxrss, not."""
    status = Path("/proc/self/status").read_text()
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(kilobytes) * 1024 / 1e6


def shared_out_mb() -> float:
    """Return this process's memory in MB of 10^6 bytes, pages that several processes have shared out among them."""
    rollup = Path("/proc/self/smaps_rollup").read_text()
    kilobytes = next(line.split()[1] for line in rollup.splitlines() if line.startswith("Pss:"))
    return int(kilobytes) * 1024 / 1e6


def _wait_for_all(folder: Path, process: int, processes: int) -> None:
    (folder / f"ready-{process}").touch()
    until = time.monotonic() + _MEETING_SECONDS
    while len(list(folder.glob("ready-*"))) < processes:
        if time.monotonic() > until:
            raise TimeoutError(f"not all of {processes} processes came to {folder}")
        time.sleep(0.01)
