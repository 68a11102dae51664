"""Fitting the model's parameters to what a scaling study measured, and predicting counts it did not measure.

Maximum a posteriori by Levenberg and Marquardt's method, in the logarithms of the parameters, which keeps them above
zero: it minimizes the squares of ln(predicted / measured) over their errors, and of the parameters' distances from
where they start over how uncertain that is. So parameters that the measurements do not tell, such as the latency of a
network behind a large model, stay where they were; and one count alone can be fitted.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hpctrain.config import Config
from hpctrain.data.processes import available_cores
from hpctrain.errors import UserError
from hpctrain.jobs.site import Site
from hpctrain.scaling.performance.build import Case, build_case
from hpctrain.scaling.performance.calibration import Calibration
from hpctrain.scaling.performance.machine import PARAMETERS, Machine
from hpctrain.scaling.performance.measurement import Measurement
from hpctrain.scaling.performance.predict import Prediction, count_ranks, predict_ranks
from hpctrain.scaling.performance.scaled import scaled
from hpctrain.scaling.performance.step import Work, step_time

# Standard errors of the logarithms of PARAMETERS where they start: a factor of e for compute and bandwidth, ...
_FREE_ERRORS = {"compute": 1.0, "alpha": 1.5, "beta": 1.0, "straggler_sigma": 0.7}
_MEASURED_ERROR = 0.3  # of what a calibration has measured, in jobs of another kind
_SMALLEST_ERROR = 0.01  # of a median step: no machine is the same twice
_SMALLEST_SIGMA = 1e-3
_ITERATIONS = 60
# Communication that hides behind the backward pass has no slope to follow: so it is also looked for where it does not.
_BETA_STARTS = (1.0, 6.0, 36.0)
_STEP = 1e-3


Residuals = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Fit:
    """A case with fitted parameters, and how it meets the measurements: (measurement, predicted seconds) each."""

    case: Case
    points: tuple[tuple[Measurement, float], ...]
    config: Config
    site: Site

    @property
    def relative_errors(self) -> list[float]:
        """predicted / measured - 1 of each measurement."""
        return [predicted / m.median_step_seconds - 1 for m, predicted in self.points]

    def predict(self, nodes: int, global_batch: int | None = None, ranks_per_node: int | None = None) -> Prediction:
        """Predict a node count, of the recipe's global batch when none is given. Raises UserError if it cannot be."""
        batch = global_batch or self.config.train.global_batch
        per_node = ranks_per_node or self.case.machine.network.ranks_per_node
        ranks = count_ranks(self.site, nodes, per_node)
        _check_divides(batch, ranks, self.case.work.micro_batch)
        return predict_ranks(replace(self.case, work=replace(self.case.work, global_batch=batch)), nodes, ranks)

    def to_calibration(self) -> dict[str, Any]:
        """Return the content of a calibration file with the fitted parameters, for `hpctrain predict --calibration`."""
        machine, work = self.case.machine, self.case.work
        link = machine.network.between
        seconds = machine.micro_batch_seconds(work.micro_batch)
        step = {
            "kind": "step",
            "model": self.config.model.name,
            "image_size": self.config.model.image_size,
            "precision": self.config.train.precision,
            "micro_batch": work.micro_batch,
            "threads": machine.threads_per_rank,
            "step_seconds": seconds + machine.update_seconds,
            "images_per_second": work.micro_batch / (seconds + machine.update_seconds),
            "forward_backward_seconds": seconds,
            "fixed_seconds": machine.fixed_seconds,
            "update_seconds": machine.update_seconds,
            "input_seconds": machine.input_seconds_per_image * work.micro_batch,
            "layers": list(work.profile),
        }
        allreduce = {
            "algorithm": machine.algorithm,
            "alpha_seconds": link.alpha_seconds,
            "beta_seconds_per_byte": link.beta_seconds_per_byte,
            "gamma_seconds_per_byte": link.gamma_seconds_per_byte,
            "horovod_overhead_seconds": machine.message_overhead_seconds,
            "relative_error": machine.model_error,
        }
        return {
            "step": step,
            "allreduce": {"kind": "allreduce", "fit": allreduce},
            "straggler_sigma": machine.straggler_sigma,
            "fitted": {
                "nodes": [m.nodes for m, _ in self.points],
                "ranks": [m.ranks for m, _ in self.points],
                "relative_errors": self.relative_errors,
                "parameters": list(PARAMETERS),
                "covariance": [list(row) for row in machine.covariance],
                "model_error": machine.model_error,
            },
        }


def fit_measurements(
    config: Config,
    site: Site,
    measurements: Sequence[Measurement],
    calibration: Calibration | None = None,
    cores: int | None = None,
) -> Fit:
    """Fit compute rate, alpha, beta and straggler noise to measured step times.

    They start from the calibration, else from the fewest ranks measured (compute, noise) and the site's profile
    (network). `cores` are those that the ranks of the site `local` shared, this machine's when not given. Raises
    UserError for no measurement, one without steps, or a batch that does not divide over its ranks.
    """
    if not measurements:
        raise UserError("there is nothing to fit: no node count of the study has finished")
    for m in measurements:
        if not m.step_seconds:
            raise UserError(f"the run {m.run or m.nodes} holds no step after its warm-up; let it run for more steps")
        _check_divides(m.global_batch, m.ranks, config.train.micro_batch)
    known = calibration or Calibration()
    case = _start(config, site, measurements, known, cores or available_cores())
    errors = dict(_FREE_ERRORS)
    if known.allreduce:
        errors["alpha"] = errors["beta"] = _MEASURED_ERROR
    if known.steps:
        errors["compute"] = _MEASURED_ERROR
    weights = np.array([1 / _relative_error(m) for m in measurements])
    measured = np.log([_own_seconds(m) for m in measurements])
    prior = np.array([1 / errors[name] for name in PARAMETERS])

    def residuals(theta: np.ndarray) -> np.ndarray:
        machine = _moved(case.machine, theta)
        predicted = np.log([_predicted(case.work, machine, m) for m in measurements])
        return np.concatenate([(predicted - measured) * weights, theta * prior])

    theta, jacobian = min(
        (_minimize(residuals, math.log(start)) for start in _BETA_STARTS),
        key=lambda found: float(np.sum(residuals(found[0]) ** 2)),
    )
    machine = _moved(case.machine, theta)
    misfit = np.array([math.log(_predicted(case.work, machine, m)) for m in measurements]) - measured
    # As many degrees of freedom as the prior leaves: those of its terms' share in each parameter are not used up.
    covariance = np.linalg.inv(jacobian.T @ jacobian)
    used = float(np.sum(1 - np.diag(covariance) * prior**2))
    free = max(1.0, len(measurements) - used)
    model_error = max(_SMALLEST_ERROR, math.sqrt(float(misfit @ misfit) / free))
    rows = tuple(tuple(float(value) for value in row) for row in covariance)
    machine = replace(machine, covariance=rows, model_error=model_error)
    points = tuple((m, _predicted(case.work, machine, m) + m.median_input_seconds) for m in measurements)
    return Fit(replace(case, machine=machine), points, config, site)


@dataclass(frozen=True)
class HeldOut:
    """The largest count of a study, predicted from the smaller ones."""

    measurement: Measurement
    prediction: Prediction
    fitted_on: tuple[int, ...]  # node counts

    @property
    def relative_error(self) -> float:
        """predicted / measured - 1."""
        return self.prediction.step_seconds / self.measurement.median_step_seconds - 1


def held_out(
    config: Config,
    site: Site,
    measurements: Sequence[Measurement],
    calibration: Calibration | None = None,
    cores: int | None = None,
) -> HeldOut:
    """Fit all but the largest rank count and predict that one. Raises UserError for fewer than three counts."""
    counts = sorted({m.ranks for m in measurements})
    if len(counts) < 3:
        raise UserError(f"a held-out prediction needs three rank counts or more, and the study has {len(counts)}")
    kept = [m for m in measurements if m.ranks < counts[-1]]
    largest = next(m for m in measurements if m.ranks == counts[-1])
    fit = fit_measurements(config, site, kept, calibration, cores)
    prediction = fit.predict(largest.nodes, largest.global_batch, largest.ranks_per_node)
    return HeldOut(largest, prediction, tuple(sorted({m.nodes for m in kept})))


def _start(config: Config, site: Site, measurements: Sequence[Measurement], known: Calibration, cores: int) -> Case:
    """The case before the fit: compute rate and noise of the fewest ranks, unless a calibration has them."""
    fewest = min(measurements, key=lambda m: m.ranks)
    local = site.scheduler == "local"
    threads = (config.train.threads or max(1, cores // fewest.ranks)) if local else 1
    if not known.steps:
        micro_batches = fewest.global_batch // (fewest.ranks * config.train.micro_batch)
        slowdown = max(1.0, fewest.ranks * threads / cores) if local else 1.0
        step = {
            "kind": "step",
            "model": config.model.name,
            "micro_batch": config.train.micro_batch,
            "forward_backward_seconds": _own_seconds(fewest) / micro_batches / slowdown,
            "threads": threads,
        }
        known = replace(known, steps=[step], source="the study's fewest ranks")
    if known.straggler_sigma is None:
        known = replace(known, straggler_sigma=max(_SMALLEST_SIGMA, _spread(fewest)))
    case = build_case(config, site, known, fewest.ranks_per_node, cores=cores)
    machine = case.machine
    per_image = statistics.median(
        m.median_input_seconds * m.ranks / m.global_batch / machine.slowdown(m.ranks) for m in measurements
    )
    return replace(case, machine=replace(machine, input_seconds_per_image=per_image))


def _own_seconds(m: Measurement) -> float:
    """A typical step without its wait for input, which is measured by itself."""
    return max(0.01 * m.median_step_seconds, m.median_step_seconds - m.median_input_seconds)


def _predicted(work: Work, machine: Machine, m: Measurement) -> float:
    no_input = replace(machine, input_seconds_per_image=0.0)
    return step_time(replace(work, global_batch=m.global_batch), no_input, m.ranks).total


def _spread(m: Measurement) -> float:
    """The relative deviation of its steps, by the median distance from the median, which outliers leave alone."""
    middle = m.median_step_seconds
    return 1.4826 * statistics.median(abs(s - middle) for s in m.step_seconds) / middle


def _relative_error(m: Measurement) -> float:
    """The standard error of the median step, 1.25 deviations over the root of their number."""
    return max(_SMALLEST_ERROR, 1.2533 * _spread(m) / math.sqrt(len(m.step_seconds)))


def _moved(machine: Machine, theta: np.ndarray) -> Machine:
    return scaled(machine, {name: math.exp(float(value)) for name, value in zip(PARAMETERS, theta, strict=True)})


def _minimize(residuals: Residuals, log_beta: float) -> tuple[np.ndarray, np.ndarray]:
    """Return theta with the least sum of squares, from zero and this beta on, and the Jacobian there."""
    theta = np.array([log_beta if name == "beta" else 0.0 for name in PARAMETERS])
    now = residuals(theta)
    damping = 1e-3
    jacobian = _jacobian(residuals, theta)
    for _ in range(_ITERATIONS):
        normal = jacobian.T @ jacobian
        move = np.linalg.solve(normal + damping * np.diag(np.diag(normal)), -jacobian.T @ now)
        move = np.clip(move, -2, 2)
        new = residuals(theta + move)
        if new @ new < now @ now:
            converged = float(np.max(np.abs(move))) < 1e-7
            theta, now, damping = theta + move, new, damping / 3
            jacobian = _jacobian(residuals, theta)
            if converged:
                break
        else:
            damping *= 4
            if damping > 1e12:
                break
    return theta, jacobian


def _jacobian(residuals: Residuals, theta: np.ndarray) -> np.ndarray:
    columns = []
    for i in range(len(theta)):
        offset = np.zeros(len(theta))
        offset[i] = _STEP
        columns.append((residuals(theta + offset) - residuals(theta - offset)) / (2 * _STEP))
    return np.stack(columns, axis=1)


def _check_divides(global_batch: int, ranks: int, micro_batch: int) -> None:
    if global_batch % (ranks * micro_batch):
        raise UserError(
            f"a global batch of {global_batch} does not divide over {ranks} ranks in micro-batches of {micro_batch}; "
            "choose counts and batches that do"
        )
