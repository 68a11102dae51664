"""Measures hpctrain side by side with what one would run instead, and writes docs/benchmarks-peers.md.

    python -m benchmarks.peers                      everything, under 40 minutes on two cores
    python -m benchmarks.peers --quick --out DIR    one round of the essential, under 8 minutes
    python -m benchmarks.peers --only resnet50-fp32 allreduce     these anew, the rest as it was
    python -m benchmarks.peers --page-only          the page from the measurements that are there

The machine should have nothing else to do. What is measured is saved after each part in measurements.json.
A contender that takes more than $BENCHMARK_TIMEOUT_SECONDS (300) is given up.
"""

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks.peers import parts, plan
from benchmarks.peers.machine import describe_machine, describe_versions, torch_version
from benchmarks.peers.page import ratio_lines, write_page
from benchmarks.peers.plan import Contender, Group
from benchmarks.peers.runner import ROOT, Failed, Run, run_contender, take_turns
from hpctrain.data.atomic import make_folder, write_file

PARTS = ("allreduce", "start_up", "input")
TORCH_PATH = "HPCTRAIN_BENCH_TORCH"


def main() -> int:
    """Measure and write; return 1 if some contender failed."""
    arguments = _parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and not die at once: contenders are to be ended first
    page = arguments.out / "benchmarks-peers.md"
    measurements = arguments.out / "benchmarks-peers" / "measurements.json"
    make_folder(measurements.parent)
    started = time.monotonic()
    found: dict[str, Any] = {}
    if (arguments.only or arguments.page_only) and measurements.exists():
        found = json.loads(measurements.read_text())
    before = found.get("seconds", 0.0)

    def save() -> None:
        found["seconds"] = before + time.monotonic() - started
        write_file(measurements, json.dumps(found, indent=1).encode() + b"\n")
        write_file(page, write_page(found).encode())

    if not arguments.page_only:
        found |= {
            "machine": describe_machine(),
            "versions": describe_versions(arguments.torch),
            "quick": arguments.quick,
        }
        found |= {"date": date.today().isoformat(), "notes": []}
        measure(found, arguments, save)
        save()
    elif found:
        write_file(page, write_page(found).encode())
    else:
        print(f"there are no measurements in {measurements}; measure first", file=sys.stderr)
        return 2
    for row in ratio_lines(found):
        say("  ".join(cell for cell in row if cell).replace("**", ""))
    say(f"{page} is written")
    failed = [run for run in found.get("runs", []) if "error" in run]
    return 1 if failed or any(not note.startswith("PyTorch") for note in found["notes"]) else 0


def measure(found: dict[str, Any], arguments: argparse.Namespace, save: Callable[[], None]) -> None:
    """Measure what is asked for, into `found`; `save` is called after each part."""
    quick = arguments.quick
    rounds = arguments.rounds or (plan.QUICK_ROUNDS if quick else plan.ROUNDS)
    _, no_torch = torch_version(arguments.torch)
    if no_torch:
        found["notes"].append(f"PyTorch was left out: {no_torch}")
        say(found["notes"][-1])

    def run(group: Group, contender: Contender) -> Run:
        if arguments.steps:
            group = replace(group, steps=arguments.steps, quick_steps=arguments.steps)
        return run_contender(group, contender, quick, arguments.torch)

    for group in plan.GROUPS:
        if arguments.only and group.name not in arguments.only:
            continue
        if no_torch:
            group = replace(group, contenders=[one for one in group.contenders if not one.needs_torch])
        fresh = take_turns(group, rounds, quick, run, say)
        found["runs"] = [one for one in found.get("runs", []) if one["group"] != group.name] + fresh
        save()

    def part(name: str, make: Callable[[], Any]) -> None:
        if arguments.only and name not in arguments.only:
            return
        try:
            found[name] = make()
            save()
        except Failed as error:
            found["notes"].append(f"{name}: {error}")
            say(found["notes"][-1])

    sizes = plan.QUICK_ALLREDUCE_SIZES if quick else plan.ALLREDUCE_SIZES
    part("allreduce", lambda: [parts.allreduce(sizes, repeats=10) for _ in range(rounds)])
    cores = found["machine"]["cores"]
    starts = plan.QUICK_START_RANKS if quick else plan.START_RANKS
    repeated = [ranks for ranks in starts for _ in range(rounds if ranks <= cores else 1)]
    part("start_up", lambda: [_start(ranks) for ranks in repeated])
    if not quick or "input" in arguments.only:
        part("input", lambda: parts.input_pipeline(images=600, rounds=3, seconds=2.0))


def _start(ranks: int) -> dict[str, Any]:
    result = parts.start_up(ranks)
    say(f"start with {ranks} ranks: {result['first_step_seconds']:.1f} s to the end of the first step")
    return result


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").split("\n")[0])
    names = [group.name for group in plan.GROUPS]
    parser.add_argument("--quick", action="store_true", help="one round, few steps, the essential contenders")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder for page and measurements (docs)")
    parser.add_argument("--only", nargs="+", choices=[*names, *PARTS], default=[], help="these parts; others are kept")
    parser.add_argument("--page-only", action="store_true", help="write the page from measurements that are there")
    parser.add_argument("--rounds", type=int, help="how often each contender takes its turn")
    parser.add_argument("--steps", type=int, help="timed steps a turn, instead of the plan's")
    parser.add_argument(
        "--torch", metavar="DIR", default=os.environ.get(TORCH_PATH), help=f"where PyTorch is installed (${TORCH_PATH})"
    )
    return parser.parse_args()


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
