"""The performance model's parameters fitted to a study, and how well the small counts foretell the largest."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpctrain.config import Config
from hpctrain.errors import UserError
from hpctrain.jobs.site import load_site
from hpctrain.scaling.study.gather import Results

if TYPE_CHECKING:
    from hpctrain.scaling.performance.fit import Fit, HeldOut


@dataclass(frozen=True)
class Calibration:
    """A fit to all counts, and one without the largest where there are three or more."""

    fit: "Fit"
    held_out: "HeldOut | None"

    def to_json(self) -> str:
        """Return the text of calibration.json, for `hpctrain predict --calibration`."""
        return json.dumps(self.fit.to_calibration(), indent=1) + "\n"

    def markdown(self) -> str:
        """Return a report's section: the parameters, how they meet the measurements, the held-out check."""
        machine = self.fit.case.machine
        link = machine.network.between
        lines = [
            "## Fitted parameters",
            "",
            "Of the performance model (docs/prediction.md), fitted to the steps of all counts and kept in "
            "`calibration.json` for `hpctrain predict --calibration`.",
            "",
            "| parameter | value |",
            "|---|---|",
            f"| forward and backward of a micro-batch | "
            f"{1e3 * machine.micro_batch_seconds(self.fit.case.work.micro_batch):.4g} ms |",
            f"| alpha: latency of a message | {1e6 * link.alpha_seconds:.3g} us |",
            f"| 1 / beta: bandwidth | {1e-9 / link.beta_seconds_per_byte:.3g} GB/s |",
            f"| straggler noise of a rank's step | {machine.straggler_sigma:.2%} |",
            "",
            "| nodes | ranks | measured ms a step | model | error |",
            "|---|---|---|---|---|",
        ]
        for (measured, seconds), error in zip(self.fit.points, self.fit.relative_errors, strict=True):
            lines.append(
                f"| {measured.nodes:,} | {measured.ranks:,} | {1e3 * measured.median_step_seconds:,.4g} | "
                f"{1e3 * seconds:,.4g} | {error:+.1%} |"
            )
        lines += ["", self._held_out_text()]
        return "\n".join(lines)

    def _held_out_text(self) -> str:
        if self.held_out is None:
            return "With three counts or more, the largest would be predicted from the others here, as a check."
        measured, predicted = self.held_out.measurement, self.held_out.prediction
        fitted_on = ", ".join(f"{nodes:,}" for nodes in self.held_out.fitted_on)
        return (
            f"Held out: fitted on {fitted_on} nodes alone, the model predicts {1e3 * predicted.step_seconds:,.4g} ms a "
            f"step on {measured.nodes:,} nodes; measured {1e3 * measured.median_step_seconds:,.4g} ms "
            f"({self.held_out.relative_error:+.1%})."
        )


def calibrate(results: Results) -> tuple[Calibration | None, str | None]:
    """Return the fit of a study's results, or None and why there is none."""
    from hpctrain.scaling.performance.fit import fit_measurements, held_out

    measurements = [measurement for count in results.measured for measurement in count.measurements]
    if not measurements or results.study is None:
        return None, None
    try:
        site = load_site(results.study.arguments.site)
        config = Config.model_validate(results.study.config)
        fit = fit_measurements(config, site, measurements)
        enough = len({measurement.ranks for measurement in measurements}) >= 3
        return Calibration(fit, held_out(config, site, measurements) if enough else None), None
    except UserError as error:
        return None, f"the performance model was not fitted: {error}"
