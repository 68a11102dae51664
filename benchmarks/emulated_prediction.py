#!/usr/bin/env python3
"""Predicted against measured time of a step, on emulated hosts with links of several rates.

    python -m benchmarks.emulated_prediction              measures what is missing (root, Linux), writes the page
    python -m benchmarks.emulated_prediction --page-only  the page from the measurements that are there
    python -m benchmarks.emulated_prediction --only small/2/100

Three things are measured apart from each other: compute (`hpctrain bench step` on all hosts at once, nothing sent), the
network (`hpctrain bench allreduce`), and training. The first two go into the performance model, the third is compared
with what it says. Every measurement is saved when it is done; one that is there already is not repeated.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.emulated_hosts import EmulatedHosts, why_impossible
from hpctrain.config import load_config
from hpctrain.data.atomic import write_file
from hpctrain.scaling.performance.calibration import parse_calibration
from hpctrain.scaling.performance.predict import prepare
from hpctrain.scaling.performance.step import StepTime, step_time

DOCS = Path(__file__).resolve().parents[1] / "docs"
HOST_COUNTS = (2, 4, 8)
WARM_UP_STEPS = 3
HPCTRAIN = [sys.executable, "-m", "hpctrain"]
TIMEOUT_SECONDS = 900
Measurements = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Model:
    """What is trained, on links of which rates (Mbit/s), and for how many steps."""

    overrides: tuple[str, ...]
    micro_batch: int
    rates_mbit: tuple[int, ...]
    steps: int


# Much compute for 1.1 MB of gradients, and little compute for 86 MB of them.
MODELS = {
    "small": Model(("model.name=resnet20", "model.image_size=32"), 32, (100, 300, 1000), 15),
    "large": Model(("model.name=alexnet_bn", "model.image_size=67"), 16, (300, 1000), 8),
}
# From Horovod's small vectors up to the model's largest tensor, as far as a link of that rate lets one wait for it.
SIZES = {100: "4K,64K,1M,4M", 300: "4K,64K,1M,4M,16M", 1000: "4K,64K,1M,4M,16M,64M"}


@dataclass(frozen=True)
class Comparison:
    """A training's step and what the model says of it, in seconds; network parameters from two hosts or from all."""

    model: str
    hosts: int
    rate_mbit: int
    measured: tuple[float, ...]  # of each step
    from_two: StepTime
    from_all: StepTime

    @property
    def seconds(self) -> float:
        """The median step."""
        return statistics.median(self.measured)

    def error(self, predicted: StepTime) -> float:
        """Predicted against measured, relative."""
        return predicted.total / self.seconds - 1


def settings(model: str, hosts: int) -> list[str]:
    """Return the overrides of the demo recipe that make it the training of a model on so many hosts, a rank each."""
    case = MODELS[model]
    return [
        *case.overrides,
        "model.num_classes=10",
        "data.synthetic=true",
        "data.path=null",
        f"train.micro_batch={case.micro_batch}",
        f"train.global_batch={hosts * case.micro_batch}",
        "train.threads=1",
        "optimizer.learning_rate=0.01",
        f"train.steps={case.steps}",
        "log.tensorboard=false",
    ]


def cases() -> list[tuple[str, str]]:
    """Return (kind, name) of every measurement, in order; names are MODEL/HOSTS, HOSTS/RATE, MODEL/HOSTS/RATE."""
    rates = sorted({rate for model in MODELS.values() for rate in model.rates_mbit})
    steps = [("steps", f"{model}/{hosts}") for model in MODELS for hosts in HOST_COUNTS]
    networks = [("allreduces", f"{hosts}/{rate}") for rate in rates for hosts in HOST_COUNTS]
    return [*steps, *networks, *(("trainings", f"{m}/{hosts}/{rate}") for m, hosts, rate in _trainings())]


def _trainings() -> Iterator[tuple[str, int, int]]:
    for name, model in MODELS.items():
        for rate in model.rates_mbit:
            for hosts in HOST_COUNTS:
                yield name, hosts, rate


# Measuring


def measure(path: Path, only: str = "") -> None:
    """Make the measurements that `path` does not have, all or those whose name is `only`, and save each in it."""
    found: Measurements = json.loads(path.read_text()) if path.exists() else {}
    found.setdefault("machine", {"cores": os.cpu_count()})
    todo = [(kind, name) for kind, name in cases() if name not in found.get(kind, {}) and only in ("", name)]
    started = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="emulated-"))
    try:
        with EmulatedHosts(max(HOST_COUNTS), directory=scratch / "hosts") as hosts:
            for number, (kind, name) in enumerate(todo, start=1):
                case_started = time.monotonic()
                found.setdefault(kind, {})[name] = _MEASURE[kind](hosts, scratch, *name.split("/"))
                path.parent.mkdir(parents=True, exist_ok=True)
                write_file(path, json.dumps(found, indent=1).encode() + b"\n")
                now = time.monotonic()
                print(
                    f"{number}/{len(todo)}  {kind} {name}: {now - case_started:.0f} s, {now - started:.0f} s in all",
                    flush=True,
                )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _measure_compute(hosts: EmulatedHosts, scratch: Path, model: str, count: str) -> dict[str, Any]:
    """All ranks at once, as in training, because they share the cores. The layers' shares are measured on two."""
    _set_rates(hosts, None)
    layers = ["--profile-seconds", "8"] if int(count) == 2 else ["--no-layers"]
    command = ["bench", "step", "demo", *settings(model, int(count)), *layers, "--steps", "8"]
    return _run_to_json(hosts, scratch, int(count), command)


def _measure_network(hosts: EmulatedHosts, scratch: Path, count: str, rate: str) -> dict[str, Any]:
    """Horovod's own share is measured on two hosts; starting TensorFlow on all would take longer than everything."""
    _set_rates(hosts, float(rate))
    command = ["bench", "allreduce", "--sizes", SIZES[int(rate)], "--repeats", "3"]
    return _run_to_json(hosts, scratch, int(count), command if int(count) == 2 else [*command, "--no-horovod"])


def _measure_training(hosts: EmulatedHosts, scratch: Path, model: str, count: str, rate: str) -> dict[str, Any]:
    _set_rates(hosts, float(rate))
    run_dir = scratch / "run"
    command = [*HPCTRAIN, "train", "demo", *settings(model, int(count)), "--run-dir", str(run_dir)]
    hosts.run(command, hosts=range(int(count)), timeout_seconds=TIMEOUT_SECONDS)
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    seconds = [line["step_seconds"] for line in lines if line["kind"] == "train"]
    shutil.rmtree(run_dir)
    return {"step_seconds": seconds}


_MEASURE: dict[str, Callable[..., dict[str, Any]]] = {
    "steps": _measure_compute,
    "allreduces": _measure_network,
    "trainings": _measure_training,
}


def _run_to_json(hosts: EmulatedHosts, scratch: Path, count: int, command: list[str]) -> dict[str, Any]:
    out = scratch / "result.json"
    hosts.run([*HPCTRAIN, *command, "--out", out], hosts=range(count), timeout_seconds=TIMEOUT_SECONDS)
    return json.loads(out.read_text())


def _set_rates(hosts: EmulatedHosts, rate_mbit: float | None) -> None:
    for host in range(len(hosts.names)):
        hosts.set_rate(host, rate_mbit)


# Comparing


def compare(found: Measurements) -> list[Comparison]:
    """Return a comparison for every training of which everything is measured."""
    comparisons = []
    for model, hosts, rate in _trainings():
        training = found.get("trainings", {}).get(f"{model}/{hosts}/{rate}")
        step, profiled = (found.get("steps", {}).get(f"{model}/{count}") for count in (hosts, 2))
        two, all_of_them = (found.get("allreduces", {}).get(f"{count}/{rate}") for count in (2, hosts))
        if not (training and step and profiled and two and all_of_them):
            continue
        compute = {**step, "layers": profiled["layers"]}
        measured = tuple(training["step_seconds"][WARM_UP_STEPS:])
        predictions = [predicted(model, hosts, compute, fit) for fit in (two["fit"], _with_horovod(two, all_of_them))]
        comparisons.append(Comparison(model, hosts, rate, measured, *predictions))
    return comparisons


def predicted(model: str, hosts: int, compute: dict[str, Any], fit: dict[str, Any]) -> StepTime:
    """Return the performance model's step time from the two calibrations, as `hpctrain predict` makes it."""
    config = load_config("demo", settings(model, hosts))
    calibration = parse_calibration({"step": compute, "allreduce": {"fit": fit}})
    case = prepare(config, "local", calibration, 1, None)[2]
    # Compute was measured with all ranks on the cores that they share.
    return step_time(case.work, replace(case.machine, shared_cores=None), hosts)


def _with_horovod(two: dict[str, Any], all_of_them: dict[str, Any]) -> dict[str, Any]:
    """The fit of raw MPI on all hosts, with what Horovod adds to it on two."""
    fit, horovod = all_of_them["fit"], two["fit"]
    ratio = horovod["beta_seconds_per_byte"] / horovod["mpi_beta_seconds_per_byte"]
    return {
        **fit,
        "beta_seconds_per_byte": ratio * fit["mpi_beta_seconds_per_byte"],
        "horovod_overhead_seconds": horovod["horovod_overhead_seconds"],
    }


# The page

INTRODUCTION = """\
# Predicted against measured, on emulated hosts

Several hosts are emulated on one machine: Linux namespaces, with a bridge between them and the rate of each link
limited both ways. On them `hpctrain train` runs a small model (ResNet-20 at 32 pixels, {small} MB of gradients) and
a large one with little compute (AlexNet-BN at 67 pixels with ten classes, {large} MB), a rank of one thread on each
host, with made-up images. The median step after {warm_up} steps of warm-up is compared with what the performance model
says (`hpctrain predict`, with the calibrations below).

The model is given two things, measured apart from the training and from each other; nothing is fitted to the steps:

- compute: `hpctrain bench step` on as many hosts at once, because all hosts share the {cores} cores of the machine;
- the network: `hpctrain bench allreduce` at the rate of the links, either between two hosts and extrapolated to more
  (what one would do on a cluster), or on the very hosts of the training.

"""
COLUMNS = (
    "model",
    "hosts",
    "link, Mbit/s",
    "compute, s",
    "measured step, s (range)",
    "predicted, network from two hosts",
    "error",
    "predicted, network from all",
    "error",
)
CLOSING = """
The median error over {count} cases is **{two:.1%}** with the network measured between two hosts, and {all:.1%} with the
network measured on all of them.

By model, with the network between two hosts: {models}. Most of the large model's step is communication, and the same
cores compute, run TCP and forward the packets: a byte costs more when buckets follow each other without a pause than in
the benchmark, and more on eight hosts than on two. Hosts of their own do not have that.

    python -m benchmarks.emulated_prediction              # root: measures what is missing
    python -m benchmarks.emulated_prediction --page-only  # this page from docs/prediction-emulated/measurements.json
"""


def page(found: Measurements) -> str:
    """Return the comparison as Markdown."""
    comparisons = compare(found)
    if not comparisons:
        return ""
    sizes = {model: _gradient_bytes(found["steps"][f"{model}/2"]) / 1e6 for model in {c.model for c in comparisons}}
    text = INTRODUCTION.format(
        small=f"{sizes['small']:.1f}" if "small" in sizes else "1.1",
        large=f"{sizes['large']:.0f}" if "large" in sizes else "86",
        warm_up=WARM_UP_STEPS,
        cores=found["machine"]["cores"],
    )
    text += _row(COLUMNS) + _row(["---"] * len(COLUMNS))
    for c in comparisons:
        spread = f"{c.seconds:.3f} ({min(c.measured):.3f} to {max(c.measured):.3f})"
        both = [cell for p in (c.from_two, c.from_all) for cell in (f"{p.total:.3f}", f"{c.error(p):+.1%}")]
        text += _row([c.model, str(c.hosts), str(c.rate_mbit), f"{c.from_two.compute:.3f}", spread, *both])
    from_two = statistics.median(abs(c.error(c.from_two)) for c in comparisons)
    from_all = statistics.median(abs(c.error(c.from_all)) for c in comparisons)
    errors = {model: [abs(c.error(c.from_two)) for c in comparisons if c.model == model] for model in sizes}
    models = ", ".join(
        f"{model} {statistics.median(values):.1%}" for model, values in sorted(errors.items(), reverse=True)
    )
    return text + CLOSING.format(count=len(comparisons), two=from_two, all=from_all, models=models)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def _gradient_bytes(step: dict[str, Any]) -> int:
    return sum(layer["gradient_bytes"] for layer in step["layers"])


def main() -> None:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page and of prediction-emulated/")
    parser.add_argument("--only", default="", metavar="NAME", help="one case, such as small/2, 2/100, small/2/100")
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    path = arguments.docs / "prediction-emulated" / "measurements.json"
    if not arguments.page_only:
        if reason := why_impossible():
            sys.exit(f"no measurement: {reason}")
        measure(path, arguments.only)
    text = page(json.loads(path.read_text()))
    if text:
        write_file(arguments.docs / "prediction-emulated.md", text.encode())
        print(text)


if __name__ == "__main__":
    main()
