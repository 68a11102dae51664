"""From the run directories of a study to figures for each node count, the warm-up left out.

The step is rank 0's: all ranks leave a step's reduction together, so theirs are as long. Speed-up and efficiency
compare median images a second with those of the smallest count that has been measured:

    speed-up S(n) = rate(n) / rate(base)        efficiency E(n) = S(n) base / n

so that a perfect study has S = n / base in weak and in strong scaling alike.
"""

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hpctrain.data.order import steps_in
from hpctrain.errors import UserError
from hpctrain.scaling.performance import Measurement
from hpctrain.scaling.run_data import RunData, num_warm_up, number, read_run
from hpctrain.scaling.study.energy import job_energy_joules
from hpctrain.scaling.study.plan import Study, load_study
from hpctrain.scaling.study.state import State, states

PARTS = ("input", "compute", "straggler", "exposed")
_RUN_DIR = re.compile(r"nodes-(\d+)(?:-repeat-\d+)?")


@dataclass(frozen=True)
class Spread:
    """A median, and the quartiles around it."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> "Spread":
        """Return the spread of at least one value."""
        if len(values) < 2:
            return Spread(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)

    def inverse(self, numerator: float) -> "Spread":
        """Return the spread of numerator / value: of a rate, where this is a time."""
        return Spread(numerator / self.median, numerator / self.high, numerator / self.low)

    def times(self, factor: float) -> "Spread":
        """Return the spread of factor * value, for a positive factor."""
        return Spread(self.median * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class HostTime:
    """A host among those that others waited for: `last` of `steps` steps, and how much longer its own part took."""

    host: str
    steps: int  # measured, that it took part in
    last: int
    expected: float  # how many that would be if all hosts of each run were alike
    excess: float  # of its own time over the mean of all ranks, as a share; of the intervals in which it was named


@dataclass(frozen=True)
class Count:
    """What was measured at one node count; times in seconds. What is not known is None."""

    nodes: int
    ranks: int | None
    global_batch: int
    states: tuple[State, ...]
    step: Spread | None = None  # over the measured steps of all repeats
    repeats: tuple[float, ...] = ()  # median step of each
    images_per_second: Spread | None = None
    speedup: Spread | None = None
    efficiency: Spread | None = None
    train_seconds: Spread | None = None  # the steps of the whole recipe
    node_hours: Spread | None = None  # of that
    energy_joules: float | None = None  # of a whole job of the study, mean of the repeats
    parts: dict[str, float] | None = None  # the mean step: PARTS, which add up to it
    measurements: tuple[Measurement, ...] = field(default=(), repr=False)

    @property
    def num_steps(self) -> int:
        """Measured steps in all repeats."""
        return sum(len(each.step_seconds) for each in self.measurements)


@dataclass(frozen=True)
class Results:
    """A study's figures, by ascending node count."""

    title: str
    mode: str
    site: str | None
    counts: tuple[Count, ...]
    hosts: tuple[HostTime, ...]  # the slowest first; empty where all ranks share a host
    notes: tuple[str, ...]
    study: Study | None = None  # its plan, where there is one

    @property
    def measured(self) -> list[Count]:
        """The counts that have figures."""
        return [count for count in self.counts if count.step is not None]

    @property
    def base(self) -> Count | None:
        """The count that others are compared with."""
        return next(iter(self.measured), None)


@dataclass(frozen=True)
class _Planned:
    """A run directory that belongs to a node count, and how it stands."""

    nodes: int
    global_batch: int
    state: State
    path: Path | None
    job: tuple[str, str] | None = None  # scheduler and id, of a job of its own


def gather(out: Path) -> Results:
    """Return the figures of a study directory; what was never measured, still runs or failed is in `Count.states`.

    A directory without study.json, as slurm/scaling.sbatch fills one by hand, is read by the names of its run
    directories: nodes-4, nodes-4-repeat-2. Raises UserError if there is no study.
    """
    study = load_study(out)
    if study is not None:
        return _results_of(study)
    found = sorted((int(m[1]), path) for path in out.glob("nodes-*") if (m := _RUN_DIR.fullmatch(path.name)))
    runs, data = [], {}
    for nodes, path in found:
        try:
            data[path] = read_run(path)
            batch = int(data[path].config.get("train.global_batch", 0))
        except UserError as error:
            runs.append(_Planned(nodes, 0, State("failed", str(error)), path))
            continue
        finished = any(end.get("reason") == "finished" for end in data[path].of_kind("end"))
        runs.append(_Planned(nodes, batch, State("done") if finished else State("failed", "it did not finish"), path))
    done = [run for run in runs if run.state.word == "done" and run.path is not None]
    if not done:
        raise UserError(f"{out} holds no study: neither study.json nor a finished run named nodes-1, nodes-2, ...")
    assert done[0].path is not None
    config = data[done[0].path].config
    mode = "strong" if len({run.global_batch for run in done}) == 1 else "weak"
    return _results(str(config.get("name")), mode, None, runs, None, float(config.get("train.epochs", 0)), ())


def _results_of(study: Study) -> Results:
    runs = []
    for run, state in zip(study.runs, states(study), strict=True):
        last = run.tries[-1] if run.tries else None
        job = None
        if last and last.job and study.arguments.how != "together":
            job = (last.scheduler, last.job)
        path = study.out / last.run_dir if last else None
        runs.append(_Planned(run.nodes, run.global_batch, state, path, job))
    notes: tuple[str, ...] = ()
    if any(run.tries and run.tries[-1].scheduler == "local" for run in study.runs):
        notes = (
            "The ranks of all counts shared the cores of one machine: this is a test of the study, not of scaling.",
        )
    title, epochs = str(study.config["name"]), float(study.config["train"]["epochs"])
    arguments = study.arguments
    results = _results(title, arguments.mode, arguments.site, runs, arguments.warm_up, epochs, notes)
    return replace(results, study=study)


def _results(
    title: str,
    mode: str,
    site: str | None,
    runs: Sequence[_Planned],
    warm_up: int | None,
    epochs: float,
    notes: tuple[str, ...],
) -> Results:
    counts: list[Count] = []
    timings: list[tuple[RunData, list[dict[str, Any]]]] = []
    base: Count | None = None
    for nodes in sorted({run.nodes for run in runs}):
        own = [run for run in runs if run.nodes == nodes]
        done = [(run, read_run(run.path)) for run in own if run.state.word == "done" and run.path is not None]
        count = _count(own, done, warm_up, epochs)
        timings += [(data, _measured_timings(data, warm_up)) for _, data in done]
        if count.images_per_second is not None:
            base = base or count
            counts.append(_compared(count, base))
        else:
            counts.append(count)
    return Results(title, mode, site, tuple(counts), slowest_hosts(timings), notes)


def _count(
    own: Sequence[_Planned], done: Sequence[tuple[_Planned, RunData]], warm_up: int | None, epochs: float
) -> Count:
    nodes, batch = own[0].nodes, max(run.global_batch for run in own)
    found = tuple(run.state for run in own)
    measurements = [_measurement(run, data, warm_up) for run, data in done]
    measurements = [each for each in measurements if each.step_seconds]
    if not measurements:
        return Count(nodes, None, batch, found)
    step = Spread.of([seconds for each in measurements for seconds in each.step_seconds])
    records = number(done[0][1].manifest.get("data", {}).get("num_records"))
    train = step.times(steps_in(epochs, int(records), batch)) if records and epochs else None
    energies = [joules for run, _ in done if run.job and (joules := job_energy_joules(*run.job)) is not None]
    return Count(
        nodes,
        measurements[0].ranks,
        batch,
        found,
        step=step,
        repeats=tuple(each.median_step_seconds for each in measurements),
        images_per_second=step.inverse(batch),
        train_seconds=train,
        node_hours=train.times(nodes / 3600) if train else None,
        energy_joules=statistics.mean(energies) if energies else None,
        parts=_parts([timing for _, data in done for timing in _measured_timings(data, warm_up)]),
        measurements=tuple(measurements),
    )


def _compared(count: Count, base: Count) -> Count:
    """Return the count with its speed-up over the base's median and its efficiency."""
    assert count.images_per_second is not None and base.images_per_second is not None
    speedup = count.images_per_second.times(1 / base.images_per_second.median)
    return replace(count, speedup=speedup, efficiency=speedup.times(base.nodes / count.nodes))


def _measurement(run: _Planned, data: RunData, warm_up: int | None) -> Measurement:
    steps = [record for record in data.of_kind("train") if number(record.get("step_seconds"))]
    first = num_warm_up(len(steps)) if warm_up is None else warm_up
    steps = [record for record in steps if int(record["step"]) > first]
    inputs = [number(record.get("input_seconds")) for record in steps]
    return Measurement(
        nodes=run.nodes,
        ranks=int(number(data.manifest.get("ranks")) or run.nodes),
        global_batch=run.global_batch,
        step_seconds=[float(record["step_seconds"]) for record in steps],
        input_seconds=[seconds for seconds in inputs if seconds is not None] if None not in inputs else [],
        run=str(data.path),
    )


def _measured_timings(data: RunData, warm_up: int | None) -> list[dict[str, Any]]:
    """Return what the ranks logged together of their steps, where these all come after the warm-up."""
    records = data.of_kind("train")
    first = num_warm_up(len(records)) if warm_up is None else warm_up
    timed = [(record["step"], record["timing"]) for record in records if isinstance(record.get("timing"), dict)]
    return [timing for step, timing in timed if number(timing.get("steps")) and step - timing["steps"] >= first]


def _parts(timings: Sequence[dict[str, Any]]) -> dict[str, float] | None:
    """Return the means of the parts of a step over all steps, or None if none were recorded."""
    steps = sum(timing["steps"] for timing in timings)
    if not steps:
        return None
    return {part: sum(t[f"{part}_seconds"] * t["steps"] for t in timings) / steps for part in PARTS}


def slowest_hosts(timings: Sequence[tuple[RunData, Sequence[dict[str, Any]]]], limit: int = 5) -> tuple[HostTime, ...]:
    """Return the hosts that came last most often for how often each would if all were alike, from runs on several."""
    took_part: dict[str, int] = {}
    expected: dict[str, float] = {}
    last: dict[str, int] = {}
    own: dict[str, list[tuple[float, float]]] = {}
    for data, records in timings:
        hosts = [str(entry["host"]) for entry in data.manifest.get("hosts", []) if isinstance(entry, dict)]
        if len(hosts) < 2:
            continue
        for record in records:
            for host in hosts:
                took_part[host] = took_part.get(host, 0) + record["steps"]
                expected[host] = expected.get(host, 0.0) + record["steps"] / len(hosts)
            for entry in record["hosts"]:
                host = entry["host"]
                last[host] = last.get(host, 0) + entry["last"]
                own.setdefault(host, []).append((entry["own_seconds"], record["mean_own_seconds"]))
    found = [
        HostTime(
            host,
            took_part[host],
            last[host],
            expected[host],
            sum(a for a, _ in own[host]) / sum(b for _, b in own[host]) - 1,
        )
        for host in own
        if took_part.get(host)
    ]
    return tuple(sorted(found, key=lambda each: (-each.last / each.expected, -each.excess))[:limit])
