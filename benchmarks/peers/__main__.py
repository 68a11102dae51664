"""Measures hpctrain side by side with what one would run instead, and writes docs/benchmarks-peers.md.

    python -m benchmarks.peers                      everything, under 40 minutes on two cores
    python -m benchmarks.peers --quick --out DIR    one round of the essential, under 8 minutes
    python -m benchmarks.peers --only resnet50-fp32 allreduce     these anew, the rest as it was
    python -m benchmarks.peers --page-only          the page from the measurements that are there

The machine should have nothing else to do. What is measured is saved after each part in measurements.json.
A contender that takes more than $BENCHMARK_TIMEOUT_SECONDS (300) is given up. --minutes is the time for everything:
all groups get one round and the parts their turn, then rounds go on while the next one fits, by what the last one took.
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
from benchmarks.peers.budget import Budget
from benchmarks.peers.link import measure_link
from benchmarks.peers.machine import describe_machine, describe_versions, torch_version
from benchmarks.peers.page import ratio_lines, write_page
from benchmarks.peers.page_explain import two_ranks_spread
from benchmarks.peers.plan import Contender, Group
from benchmarks.peers.runner import ROOT, Failed, LeftOut, Run, run_contender
from benchmarks.peers.turns import Turns, more_rounds
from benchmarks.peers.two_ranks import measure as measure_two_ranks
from hpctrain.data.atomic import make_folder, write_file

PARTS = ("two_ranks", "allreduce", "link", "start_up", "profile", "input")
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
        found |= {"date": date.today().isoformat(), "notes": [], "failed": []}
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
    return 1 if found.get("failed") or any("error" in run for run in found.get("runs", [])) else 0


def measure(found: dict[str, Any], arguments: argparse.Namespace, save: Callable[[], None]) -> None:
    """Measure what is asked for, into `found`; `save` is called after each part."""
    quick = arguments.quick
    rounds = arguments.rounds or (plan.QUICK_ROUNDS if quick else plan.ROUNDS)
    budget = Budget(60 * (arguments.minutes or (plan.QUICK_MINUTES if quick else plan.MINUTES)))
    _, no_torch = torch_version(arguments.torch)
    if no_torch:
        found["notes"].append(f"PyTorch was left out: {no_torch}")
        say(found["notes"][-1])

    def run(group: Group, contender: Contender) -> Run:
        if arguments.steps:
            group = replace(group, steps=arguments.steps, quick_steps=arguments.steps)
        return run_contender(group, contender, quick, arguments.torch, budget.until)

    def take_round(turns: Turns) -> None:
        turns.take_round()
        keep(turns)

    def keep(turns: Turns) -> None:
        others = [one for one in found.get("runs", []) if one["group"] != turns.group.name]
        found["runs"] = others + turns.results
        save()

    instructions = found["machine"]["instructions"]
    groups = plan.groups_for(instructions)
    if no_torch:
        groups = [replace(g, contenders=[one for one in g.contenders if not one.needs_torch]) for g in groups]
    asked = [group for group in groups if not arguments.only or group.name in arguments.only]
    all_turns = [Turns(group, quick, run, say, budget) for group in asked]
    emulated = [turns for turns in all_turns if plan.is_emulated(turns.group, instructions)]
    for turns in all_turns:
        if turns not in emulated:
            take_round(turns)
    measure_parts(found, arguments, budget, save)
    for turns in emulated:
        take_round(turns)
    more_rounds(all_turns, rounds, budget, keep)
    found["notes"] += [note for turns in all_turns for note in turns.left_out]


def measure_parts(
    found: dict[str, Any], arguments: argparse.Namespace, budget: Budget, save: Callable[[], None]
) -> None:
    """Measure what is not a contender's train step."""
    quick, until = arguments.quick, budget.until

    def part(name: str, make: Callable[[], Any], in_quick: bool = True) -> None:
        if (arguments.only and name not in arguments.only) or (quick and not in_quick and not arguments.only):
            return
        try:
            if not budget.fits(0):
                raise LeftOut("the time was up")
            found[name] = make()
            save()
        except LeftOut as reason:
            found["notes"].append(f"{name}: {reason}")
            say(found["notes"][-1])
        except Failed as error:
            found["failed"].append(f"{name}: {error}")
            say(f"{name} failed: {error}")

    part("two_ranks", lambda: _two_ranks(found, quick, budget))
    sizes = plan.QUICK_ALLREDUCE_SIZES if quick else plan.ALLREDUCE_SIZES
    times = 1 if quick else 2
    part("allreduce", lambda: [parts.allreduce(sizes, 10, until) for _ in range(times)])
    link_sizes = plan.QUICK_LINK_SIZES if quick else plan.LINK_SIZES
    part("link", lambda: measure_link(link_sizes, plan.LINK_REPEATS, plan.LINK_MBIT, until))
    part("start_up", lambda: _starts(found, quick, budget))
    profiled = [group for group in plan.GROUPS if group.model in plan.PROFILE and group.precision == "float32"]
    part("profile", lambda: parts.profile(profiled, until), in_quick=False)
    part("input", lambda: parts.input_pipeline(600, rounds=8, seconds=0.6, until=until), in_quick=False)


def _two_ranks(found: dict[str, Any], quick: bool, budget: Budget) -> list[dict[str, Any]]:
    """Measure two ranks of each model beside two independent processes, as long as time is enough."""
    results: list[dict[str, Any]] = []
    for model, how in plan.TWO_RANKS.items():
        seconds = how.quick_seconds if quick else how.seconds
        if not seconds:
            continue
        try:
            if not budget.fits(seconds + plan.TWO_RANKS_START_SECONDS):
                raise LeftOut("the time was up")
            results.append(measure_two_ranks(model, "float32", seconds, budget.until))
        except LeftOut as reason:
            found["notes"].append(f"two_ranks of {model}: {reason}")
            say(found["notes"][-1])
            continue
        except Failed as error:
            found["failed"].append(f"two_ranks of {model}: {error}")
            say(found["failed"][-1])
            continue
        say(f"{how.title}: two ranks to two processes {two_ranks_spread(results[-1]).median:.3f}")
    return results


def _starts(found: dict[str, Any], quick: bool, budget: Budget) -> list[dict[str, Any]]:
    """Start jobs with more and more ranks, as long as memory and time are enough; a rank a core or fewer twice."""
    results: list[dict[str, Any]] = []
    last_seconds, last_ranks = 0.0, 1
    for ranks in plan.QUICK_START_RANKS if quick else plan.START_RANKS:
        again = not quick and ranks <= found["machine"]["cores"]
        for _ in range(2 if again else 1):
            started = budget.spent
            try:
                if not budget.fits(last_seconds * ranks / last_ranks):
                    raise LeftOut("the time was up")
                parts.check_memory(ranks, results)
                results.append(parts.start_up(ranks, budget.until))
            except LeftOut as reason:
                found["notes"].append(f"start_up with {ranks} ranks: {reason}")
                say(found["notes"][-1])
                return results
            last_seconds, last_ranks = budget.spent - started, ranks
            say(f"start with {ranks} ranks: {results[-1]['first_step_seconds']:.1f} s to the end of the first step")
    return results


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").split("\n")[0])
    names = [group.name for group in plan.GROUPS]
    parser.add_argument("--quick", action="store_true", help="one round, few steps, the essential contenders")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder for page and measurements (docs)")
    parser.add_argument("--only", nargs="+", choices=[*names, *PARTS], default=[], help="these parts; others are kept")
    parser.add_argument("--page-only", action="store_true", help="write the page from measurements that are there")
    parser.add_argument("--rounds", type=int, help="how often each contender takes its turn at most")
    parser.add_argument("--minutes", type=float, help=f"time for everything ({plan.MINUTES:g}, {plan.QUICK_MINUTES:g})")
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
