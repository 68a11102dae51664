"""Published trainings on ImageNet, and where a run would stand among them."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources

from hpctrain.scaling.run_data import RunData, number, steady_images_per_second, summarize

IMAGENET_IMAGES, IMAGENET_CLASSES = 1_281_167, 1_000


@dataclass(frozen=True)
class PublishedResult:
    """A training of `model` as its authors report it; accuracy in percent. None is what they do not say."""

    who: str
    year: int
    model: str
    batch: int
    processors: int
    processor_kind: str
    minutes: float
    top1_percent: float
    epochs: float | None
    source: str


@lru_cache(maxsize=1)
def published_results() -> tuple[PublishedResult, ...]:
    """Return the results that ship with the package, in the order of published_results.csv."""
    text = (resources.files("hpctrain.scaling") / "published_results.csv").read_text(encoding="utf-8")
    return tuple(
        PublishedResult(
            row["who"],
            int(row["year"]),
            row["model"],
            int(row["batch"]),
            int(row["processors"]),
            row["processor_kind"],
            float(row["minutes"]),
            float(row["top1_percent"]),
            float(row["epochs"]) if row["epochs"] else None,
            row["source"],
        )
        for row in csv.DictReader(text.splitlines())
    )


def results_of(model: str | None) -> list[PublishedResult]:
    """Return the published results of a model or its close relative: AlexNet and AlexNet-BN, ResNet-50 and its v1.5."""
    family = "alexnet" if model in ("alexnet", "alexnet_bn") else (model or "").removesuffix("_v15")
    return [result for result in published_results() if result.model.removesuffix("_bn") == family]


@dataclass(frozen=True)
class Standing:
    """A run beside the published results of its model, the fastest first.

    `minutes` is the time of the whole training: as it took, or at its rate for what was left out of it (`projected`).
    """

    label: str
    run: RunData
    results: list[PublishedResult]
    minutes: float | None
    projected: bool
    top1_percent: float | None

    @property
    def head(self) -> list[str]:
        """The titles of `rows`."""
        return ["who", "year", "model", "batch", "processors", "minutes", "top-1 %", "epochs", "source"]

    def rows(self) -> list[list[str]]:
        """Return the table's rows, the run's own in bold; it comes last when its time is not known."""
        timed = [(result.minutes, _published_row(result)) for result in self.results]
        timed.append((float("inf") if self.minutes is None else self.minutes, [f"**{c}**" for c in self._own_row()]))
        return [row for _, row in sorted(timed, key=lambda pair: pair[0])]

    def sentences(self) -> str:
        """Return what the table says of the run: its place, and why it may not compare."""
        text = []
        if self.minutes is not None:
            place = 1 + sum(result.minutes < self.minutes for result in self.results)
            how = "At its rate the whole training takes" if self.projected else "The training took"
            text.append(f"{how} {_minutes(self.minutes)} minutes: place {place} of {len(self.results) + 1} by time.")
        if self.top1_percent is not None:
            place = 1 + sum(result.top1_percent > self.top1_percent for result in self.results)
            text.append(f"Its top-1 of {self.top1_percent:.2f} % is place {place} by accuracy.")
        caution = _not_imagenet(self.run)
        if caution:
            text.append(caution)
        return " ".join(text)

    def _own_row(self) -> list[str]:
        summary = summarize(self.run)
        hosts, ranks = summary["num_hosts"], summary["ranks"]
        where = "-" if ranks is None else f"{ranks:,} ranks" + (f" on {hosts:,} hosts" if hosts else "")
        batch, epochs = summary["global_batch"], number(self.run.config.get("train.epochs"))
        return [
            self.label,
            str(self.run.manifest.get("started", "-"))[:4],
            str(summary["model"]),
            "-" if batch is None else f"{batch:,}",
            where,
            "-" if self.minutes is None else _minutes(self.minutes) + (" (projected)" if self.projected else ""),
            "-" if self.top1_percent is None else f"{self.top1_percent:.2f}",
            "-" if epochs is None else f"{epochs:g}",
            "this run",
        ]


def standing(label: str, run: RunData) -> Standing | None:
    """Return where a run stands, None for a model that nothing is published of here."""
    summary = summarize(run)
    results = results_of(summary["model"])
    if not results:
        return None
    minutes, projected = _whole_minutes(run)
    top1 = summary["top1"]
    return Standing(label, run, results, minutes, projected, None if top1 is None else 100 * top1)


def _whole_minutes(run: RunData) -> tuple[float | None, bool]:
    """The minutes of all epochs, and whether they are the run's rate times what it would have to do."""
    summary = summarize(run)
    all_known = len(run.of_kind("end")) == summary["num_sessions"]  # a session that was killed has not told its time
    if summary["end"] == "finished" and not run.config.get("train.steps") and summary["wall_seconds"] and all_known:
        return summary["wall_seconds"] / 60, False
    epochs, images = number(run.config.get("train.epochs")), _records(run)
    rate = steady_images_per_second(run.series("train", "step", "images_per_second")[1])
    if epochs is None or not rate or images is None:
        return None, True
    return epochs * images / rate / 60, True


def _records(run: RunData) -> float | None:
    return _data_fact(run, "num_records")


def _data_fact(run: RunData, key: str) -> float | None:
    facts = run.manifest.get("data")
    return number(facts.get(key)) if isinstance(facts, dict) else None


def _not_imagenet(run: RunData) -> str:
    images, classes = _records(run), _data_fact(run, "num_classes")
    if run.config.get("data.synthetic") is True:
        return "It trained on made-up data, so its accuracy says nothing, and reading its input cost nothing."
    if images is None or (images == IMAGENET_IMAGES and classes == IMAGENET_CLASSES):
        return ""
    of = "" if classes is None else f" of {classes:,.0f} classes"
    return (
        f"It trained on {images:,.0f} images{of} and not on ImageNet's {IMAGENET_IMAGES:,} of {IMAGENET_CLASSES:,}: "
        "neither time nor accuracy compares."
    )


def _published_row(result: PublishedResult) -> list[str]:
    return [
        result.who,
        str(result.year),
        result.model,
        f"{result.batch:,}",
        f"{result.processors:,} x {result.processor_kind}",
        _minutes(result.minutes),
        f"{result.top1_percent:g}",
        "-" if result.epochs is None else f"{result.epochs:g}",
        result.source,
    ]


def _minutes(minutes: float) -> str:
    return f"{minutes:,.0f}" if minutes >= 100 else f"{minutes:.3g}"


def labeled_standings(labeled: Sequence[tuple[str, RunData]]) -> list[Standing]:
    """Return the standings of those runs whose model is in the published results."""
    return [found for label, run in labeled if (found := standing(label, run)) is not None]
