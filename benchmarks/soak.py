#!/usr/bin/env python3
"""A long run on small shards with many epochs, evaluations and checkpoints: do memory, files and threads stay flat?

Two ranks train the demo's recipe for so many minutes while this program looks into /proc every few seconds. Printed
are, for each rank, the values in the first and in the last quarter of the time after the warm-up.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

LOOK_SECONDS = 5.0
WARM_UP_SHARE = 0.1
KINDS = {"memory, MB": "rss_mb", "open files": "files", "threads": "threads"}


def look(pid: int) -> dict[str, float]:
    """Return what a process holds now: resident memory in 10**6 bytes, open files, threads."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return {
        "rss_mb": int(status["VmRSS"].split()[0]) * 1024 / 1e6,
        "files": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(status["Threads"]),
    }


def ranks_of(run_dir: Path) -> dict[int, int]:
    """Return {rank: process number} of the job that trains in this directory."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(run_dir).encode() in (entry / "cmdline").read_bytes():
                environ = dict(x.split(b"=", 1) for x in (entry / "environ").read_bytes().split(b"\0") if b"=" in x)
                if b"PMIX_RANK" in environ:
                    found[int(environ[b"PMIX_RANK"])] = int(entry.name)
        except OSError:
            continue
    return found


def quarters(samples: list[Mapping[str, float]], kind: str) -> tuple[float, float, float, float]:
    """Return median and greatest value of the first and of the last quarter of the samples after the warm-up."""
    values = [sample[kind] for sample in samples[int(len(samples) * WARM_UP_SHARE) :]]
    count = max(1, len(values) // 4)
    first, last = values[:count], values[-count:]
    return statistics.median(first), max(first), statistics.median(last), max(last)


def main() -> None:
    """Train, look, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", type=Path, help="a data set, such as demo/shards of `make demo`")
    parser.add_argument("--run-dir", type=Path, required=True, help="a new directory for the run")
    parser.add_argument("--minutes", type=float, default=30.0)
    options = parser.parse_args()
    run_dir = options.run_dir.absolute()
    settings = [f"data.path={options.shards.absolute()}", "train.epochs=100000", "evaluate.every_epochs=1"]
    settings += ["checkpoint.every_steps=20", "log.every_steps=50", "schedule.warmup_epochs=2"]
    command = ["mpirun", "--oversubscribe", "-n", "2", sys.executable, "-m", "hpctrain", "train", "demo", *settings]
    job = subprocess.Popen([*command, "--run-dir", str(run_dir)], stdout=subprocess.DEVNULL)
    samples: dict[int, list[Mapping[str, float]]] = {0: [], 1: []}
    end = time.monotonic() + options.minutes * 60
    while time.monotonic() < end and job.poll() is None:
        time.sleep(LOOK_SECONDS)
        if (run_dir / "metrics.jsonl").exists():
            for rank, pid in ranks_of(run_dir).items():
                try:
                    samples[rank].append(look(pid))
                except (FileNotFoundError, KeyError):
                    continue
    job.send_signal(signal.SIGUSR1)
    code = job.wait()
    (run_dir / "soak.json").write_text(json.dumps(samples))
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = sum(line["kind"] == "train" for line in lines)
    evaluations = sum(line["kind"] == "eval" for line in lines)
    print(f"{options.minutes:g} minutes, exit code {code}: {steps:,} steps, {evaluations} evaluations\n")
    print("| | rank | first quarter: median, most | last quarter: median, most |\n|---|---|---:|---:|")
    for words, kind in KINDS.items():
        for rank, of_rank in samples.items():
            a, b, c, d = quarters(of_rank, kind)
            print(f"| {words} | {rank} | {a:.0f}, {b:.0f} | {c:.0f}, {d:.0f} |")


if __name__ == "__main__":
    main()
