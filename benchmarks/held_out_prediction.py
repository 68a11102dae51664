"""The largest node count predicted from the smaller ones; writes docs/prediction-held-out.md.

Run with `python -m benchmarks.held_out_prediction`. It takes the training steps that `benchmarks.emulated_prediction`
has measured on emulated hosts and nothing else of it: neither the measured network nor the measured compute. The
model's parameters are fitted to the steps on fewer hosts, and the most hosts are predicted.
"""

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.emulated_prediction import MODELS, WARM_UP_STEPS, settings
from hpctrain.config import load_config
from hpctrain.data.atomic import write_file
from hpctrain.jobs.site import Site, load_site
from hpctrain.scaling.performance import HeldOut, Measurement, held_out

_TCP_LATENCY_SECONDS = 5e-5  # between two processes, nominal; a tenth or twice of it changes nothing here

DOCS = Path(__file__).resolve().parents[1] / "docs"
MEASUREMENTS = DOCS / "prediction-emulated" / "measurements.json"


def studies(found: Mapping[str, Any]) -> dict[tuple[str, int], list[Measurement]]:
    """Return the measured trainings as one study for each model and link rate (Mbit/s), of three counts or more."""
    grouped: dict[tuple[str, int], list[Measurement]] = {}
    for name, training in found.get("trainings", {}).items():
        model, hosts, rate = name.split("/")
        count = int(hosts)
        steps = [float(seconds) for seconds in training["step_seconds"][WARM_UP_STEPS:]]
        batch = count * MODELS[model].micro_batch
        grouped.setdefault((model, int(rate)), []).append(Measurement(count, count, batch, steps, run=name))
    return {key: sorted(rows, key=lambda m: m.ranks) for key, rows in sorted(grouped.items()) if len(rows) >= 3}


def predictions(found: Mapping[str, Any]) -> dict[tuple[str, int], HeldOut]:
    """Fit each study without its largest count, and predict that one."""
    cores = int(found["machine"]["cores"])  # all hosts share the cores of one machine
    return {
        (model, rate): held_out(load_config("demo", settings(model, rows[-1].ranks)), _site(rate), rows, cores=cores)
        for (model, rate), rows in studies(found).items()
    }


def _site(rate_mbit: int) -> Site:
    """The site `local` with the nominal network that a profile would tell: the rate of the links, TCP's latency."""
    site = load_site("local")
    network = {"seconds_per_byte": 8 / (rate_mbit * 1e6), "latency_seconds": _TCP_LATENCY_SECONDS}
    return site.model_copy(update={"network": site.network.model_copy(update=network)})


def document(found: Mapping[str, Any]) -> str:
    """Return the text of docs/prediction-held-out.md."""
    results = predictions(found)
    lines = [
        "# The largest count predicted from the smaller ones",
        "",
        "Written by `python -m benchmarks.held_out_prediction` from the training steps of "
        "[prediction-emulated.md](prediction-emulated.md), on emulated hosts that share one machine's cores. Compute "
        "rate, latency, bandwidth and noise of the performance model ([prediction.md](prediction.md)) are fitted to "
        "the steps on the smaller counts alone, starting from the nominal rate of the links; the largest count is then "
        "predicted.",
        "",
        "| model | link, Mbit/s | fitted on | predicted | measured, s | predicted, s (90 % interval) | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for (model, rate), result in results.items():
        low, high = result.prediction.step_interval
        lines.append(
            f"| {model} | {rate:,} | {', '.join(map(str, result.fitted_on))} | {result.measurement.nodes} | "
            f"{result.measurement.median_step_seconds:.3f} | {result.prediction.step_seconds:.3f} "
            f"({low:.3f} to {high:.3f}) | {result.relative_error:+.1%} |"
        )
    errors = [abs(result.relative_error) for result in results.values()]
    inside = sum(
        low <= result.measurement.median_step_seconds <= high
        for result in results.values()
        for low, high in [result.prediction.step_interval]
    )
    lines += [
        "",
        f"The median error is {statistics.median(errors):.1%}, the largest {max(errors):.1%}; "
        f"{inside} of {len(errors)} measured steps lie in the interval.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measurements", type=Path, default=MEASUREMENTS, help="of benchmarks.emulated_prediction")
    parser.add_argument("--out", type=Path, default=DOCS / "prediction-held-out.md", help="file to write")
    arguments = parser.parse_args()
    if not arguments.measurements.is_file():
        parser.error(f"there is no {arguments.measurements}; run python -m benchmarks.emulated_prediction first")
    found = json.loads(arguments.measurements.read_text(encoding="utf-8"))
    if not studies(found):
        parser.error(f"{arguments.measurements} has no model and rate with three host counts")
    text = document(found)
    write_file(arguments.out, text.encode())
    print(text.splitlines()[-1])


if __name__ == "__main__":
    main()
