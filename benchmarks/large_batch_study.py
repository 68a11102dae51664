#!/usr/bin/env python3
"""How large a batch LARS and SGD stand with a fixed number of epochs, on data and a network that fit a laptop.

For each optimizer and each global batch, as many learning rates around the optimizer's scaling rule (linear for SGD,
Goyal et al.; square root for LARS, You et al.) are tried with one seed, and the best is repeated with two more.
Everything else is equal: epochs, warm-up, polynomial decay, momentum, weight decay. LARS is that of the paper's own
code, which leaves nothing out. The results go to OUT/results.csv as they come, and from there into OUT/table.md and
OUT/accuracy.png; a run that is there already is not repeated. `make large-batch-study` does all of it:

    python data_prep/make_sample.py demo/images
    hpctrain data prepare demo/images/train demo/shards --split train
    hpctrain data prepare demo/images/val demo/shards --split val
    python -m benchmarks.large_batch_study demo/shards docs/large-batch-study
"""

import argparse
import csv
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpctrain.config import load_config

BATCHES = (64, 128, 256, 512, 1024, 2048, 4096)
SEEDS = (0, 1, 2)
# Rates at the smallest batch; each is scaled to the others by the rule. Neighbors differ by the same factor for both.
BASE_RATES = {"sgd": (0.0012, 0.003, 0.0075, 0.019, 0.047), "lars": (0.8, 2.0, 5.0, 12.5, 31.0)}
RULES = {"sgd": lambda ratio: ratio, "lars": math.sqrt}
SETTINGS = (
    "model.name=benchmarks.large_batch_study:small_alexnet",
    "model.image_size=16",
    "train.micro_batch=64",
    "train.epochs=20",
    "schedule.warmup_epochs=4",
    "optimizer.weight_decay=5e-4",
    "optimizer.options.exclude_from_decay=null",
)
LARS_SETTINGS = ("optimizer.options.exclude_from_trust=null",)
HOLDS_WITHIN = 0.03  # of the best mean at the smallest batch


@dataclass(frozen=True)
class Run:
    """One training: what was set, and the held-out accuracy it ended with."""

    optimizer: str
    batch: int
    base_rate: float
    seed: int
    rate: float
    steps: int
    loss: float
    top1: float
    cpu_seconds: float


def small_alexnet(num_classes: int, image_size: int, seed: int = 0) -> Any:
    """Return a network of AlexNet's kind for small images: three convolutions, two dense layers, no batch norm."""
    import keras
    from keras import layers

    def start(number: int) -> Any:
        return keras.initializers.HeNormal(seed=100 * seed + number)

    def conv(filters: int, width: int, number: int) -> Any:
        return layers.Conv2D(
            filters, width, padding="same", activation="relu", kernel_initializer=start(number), name=f"conv{number}"
        )

    image = keras.Input((image_size, image_size, 3))
    x = layers.MaxPool2D(2, name="pool1")(conv(32, 5, 1)(image))
    x = layers.MaxPool2D(2, name="pool2")(conv(64, 3, 2)(x))
    x = layers.Flatten(name="flatten")(conv(64, 3, 3)(x))
    x = layers.Dense(256, activation="relu", kernel_initializer=start(4), name="fc4")(x)
    return keras.Model(image, layers.Dense(num_classes, kernel_initializer=start(5), name="fc5")(x), name="small")


class Trainer:
    """Trains with one optimizer and batch again and again, with the graphs built once."""

    def __init__(self, data: str, optimizer: str, batch: int) -> None:
        from hpctrain.parallel.reduce import Reducer
        from hpctrain.parallel.world import alone
        from hpctrain.training import dataset, session
        from hpctrain.training.step import TrainStep, model_state

        self.optimizer_name, self.batch, self.world = optimizer, batch, alone()
        own = LARS_SETTINGS if optimizer == "lars" else ()
        self.overrides = [
            *SETTINGS,
            *own,
            f"data.path={data}",
            f"optimizer.name={optimizer}",
            f"train.global_batch={batch}",
        ]
        self.config = load_config("demo", self.overrides)
        self.data = dataset.open_data(self.config, self.world)
        assert self.data.val is not None
        self.model = session.build_model(self.config, self.data.num_classes)
        self.optimizer = session.build_optimizer(self.config)
        self.step = TrainStep(self.model, self.optimizer, Reducer(self.world), micro_batches=batch // 64)
        self.evaluate = session.build_evaluator(self.config, self.model, self.data.val, self.world, 1)
        self.variables = [*self.model.trainable_variables, *model_state(self.model)]

    def run(self, base_rate: float, seed: int) -> Run:
        """Train from the initial weights of a seed and evaluate."""
        from hpctrain.training import session

        started = time.process_time()
        rate = base_rate * RULES[self.optimizer_name](self.batch / BATCHES[0])
        config = load_config("demo", [*self.overrides, f"train.seed={seed}", f"optimizer.learning_rate={rate!r}"])
        fresh = session.build_model(config, self.data.num_classes)
        by_path = {variable.path: variable for variable in fresh.variables}
        for variable in self.variables:
            variable.assign(by_path[variable.path])
        for variable in self.optimizer.variables:
            variable.assign(np.zeros(variable.shape))  # not times 0: what has diverged holds NaN
        schedule, steps = session.build_schedule(config, self.data.num_records), 0
        total = session.total_steps(config, self.data.num_records)
        batches, _ = session.training_batches(config, self.data, self.world, first_step=1, last_step=total, threads=1)
        for steps in range(1, total + 1):
            result = self.step(steps, batches, schedule(steps))
            if not math.isfinite(result.loss):
                break  # it has diverged, and nothing brings it back
        final = self.evaluate()
        seconds = round(time.process_time() - started, 1)
        return Run(self.optimizer_name, self.batch, base_rate, seed, rate, steps, final.loss, final.top1, seconds)


def study(task: tuple[str, str, int, list[Run]]) -> Iterator[Run]:
    """Try the rates of one optimizer and batch, then repeat the best; yields the runs that are not there yet."""
    data, optimizer, batch, done = task
    known = {(run.base_rate, run.seed): run for run in done}
    trainer: Trainer | None = None

    def result(base_rate: float, seed: int) -> Iterator[Run]:
        nonlocal trainer
        if (base_rate, seed) not in known:
            trainer = trainer or Trainer(data, optimizer, batch)
            known[base_rate, seed] = trainer.run(base_rate, seed)
            yield known[base_rate, seed]

    for base_rate in BASE_RATES[optimizer]:
        yield from result(base_rate, SEEDS[0])
    best = max(BASE_RATES[optimizer], key=lambda base_rate: known[base_rate, SEEDS[0]].top1)
    for seed in SEEDS[1:]:
        yield from result(best, seed)


def work(tasks: Any, results: Any) -> None:
    """What a process does: studies until there is none left."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"
    from hpctrain.parallel.quiet import import_tensorflow

    import_tensorflow()
    from hpctrain.parallel.world import alone
    from hpctrain.training.session import configure_tensorflow

    configure_tensorflow(load_config("demo"), alone())
    while (task := tasks.get()) is not None:
        for run in study(task):
            results.put(run)
            parent = multiprocessing.parent_process()
            if parent is None or not parent.is_alive():
                return  # nobody is there any more to write results down
    results.put(None)


def read(path: Path) -> list[Run]:
    """Return the runs of a CSV file that an earlier call wrote."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        types = Run.__annotations__
        return [Run(**{key: types[key](value) for key, value in row.items()}) for row in csv.DictReader(file)]


def run_all(data: str, path: Path, processes: int) -> list[Run]:
    """Run what is missing from the CSV file, on several processes of one thread each, and return all runs."""
    runs = read(path)
    context = multiprocessing.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    # Small batches first: they have the most steps.
    for batch in BATCHES:
        for optimizer in BASE_RATES:
            tasks.put((data, optimizer, batch, [r for r in runs if (r.optimizer, r.batch) == (optimizer, batch)]))
    for _ in range(processes):
        tasks.put(None)
    workers = [context.Process(target=work, args=(tasks, results), daemon=True) for _ in range(processes)]
    for worker in workers:
        worker.start()
    with open(path, "a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(Run.__annotations__))
        if not runs:
            writer.writeheader()
        running = processes
        while running:
            run = results.get()
            if run is None:
                running -= 1
                continue
            runs.append(run)
            writer.writerow(asdict(run))
            file.flush()
            print(
                f"{run.optimizer:5} batch {run.batch:5} rate {run.rate:8.4g} seed {run.seed}: top-1 {run.top1:.2%}",
                flush=True,
            )
    return runs


def best_runs(runs: list[Run], optimizer: str, batch: int) -> list[Run]:
    """Return the runs of the best rate of an optimizer at a batch, one for each seed."""
    own = [run for run in runs if (run.optimizer, run.batch) == (optimizer, batch)]
    tuned = max((run for run in own if run.seed == SEEDS[0]), key=lambda run: run.top1)
    return sorted((run for run in own if run.base_rate == tuned.base_rate), key=lambda run: run.seed)


def table(runs: list[Run]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| batch | steps | SGD rate | SGD top-1 % | LARS rate | LARS top-1 % |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for batch in BATCHES:
        cells = []
        for optimizer in ("sgd", "lars"):
            best = best_runs(runs, optimizer, batch)
            top1 = [100 * run.top1 for run in best]
            spread = f"{statistics.mean(top1):.1f} ({min(top1):.1f} to {max(top1):.1f})"
            cells.append(f"{best[0].rate:.3g} | {spread}")
        steps = max(run.steps for run in runs if run.batch == batch)
        lines.append(f"| {batch:,} | {steps} | {' | '.join(cells)} |")
    lines.append("")
    for optimizer, name in (("sgd", "SGD"), ("lars", "LARS")):
        lines.append(
            f"{name} stays within {100 * HOLDS_WITHIN:g} points of the best at {BATCHES[0]} "
            f"up to a batch of {largest_that_holds(runs, optimizer):,}."
        )
    lines.append(f"The runs took {sum(run.cpu_seconds for run in runs) / 60:.0f} minutes of one core.")
    return "\n".join(lines) + "\n"


def mean_top1(runs: list[Run], optimizer: str, batch: int) -> float:
    """Return the mean held-out accuracy of an optimizer's best rate at a batch over the seeds."""
    return statistics.mean(run.top1 for run in best_runs(runs, optimizer, batch))


def largest_that_holds(runs: list[Run], optimizer: str) -> int:
    """Return the largest batch up to which the mean stays within HOLDS_WITHIN of the best mean at the smallest."""
    target = max(mean_top1(runs, one, BATCHES[0]) for one in BASE_RATES) - HOLDS_WITHIN
    held = 0
    for batch in BATCHES:
        if mean_top1(runs, optimizer, batch) < target:
            break
        held = batch
    return held


def plot(runs: list[Run], path: Path) -> None:
    """Draw accuracy against batch: the mean over seeds as a line, each seed as a point."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for optimizer, label, color in (
        ("sgd", "SGD, linear scaling", "#d55e00"),
        ("lars", "LARS, square-root scaling", "#0072b2"),
    ):
        means = []
        for batch in BATCHES:
            top1 = [100 * run.top1 for run in best_runs(runs, optimizer, batch)]
            axes.plot([batch] * len(top1), top1, "o", color=color, alpha=0.4, markersize=4)
            means.append(statistics.mean(top1))
        axes.plot(BATCHES, means, color=color, label=label, linewidth=2)
    axes.set_xscale("log", base=2)
    axes.set_xticks(BATCHES, [f"{batch:,}" for batch in BATCHES])
    axes.set_xlabel("global batch (of 6,000 training images)")
    axes.set_ylabel("held-out top-1 (%)")
    axes.set_title("Accuracy after 20 epochs, best of 5 rates, 3 seeds", loc="left")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=100)


def main() -> None:
    """Run the study and write its files."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("data", help="shards of the sample data set, with train/ and val/")
    parser.add_argument("out", type=Path, help="directory for results.csv, table.md and accuracy.png")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = run_all(arguments.data, arguments.out / "results.csv", arguments.processes)
    (arguments.out / "table.md").write_text(table(runs))
    plot(runs, arguments.out / "accuracy.png")
    print(table(runs))


if __name__ == "__main__":
    main()
