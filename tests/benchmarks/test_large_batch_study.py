"""The study's runs do not know of each other, and its summary says what is in its table."""

from pathlib import Path

import pytest

from benchmarks.large_batch_study import BATCHES, SEEDS, Run, Trainer, largest_that_holds, table
from hpctrain.data import ShardWriter
from tests.conftest import image_bytes


def test_a_run_after_one_that_diverged_is_as_if_it_were_the_first(tmp_path: Path) -> None:
    for split in ("train", "val"):
        with ShardWriter(tmp_path, split, 64, 2, ["cat", "dog"]) as writer:
            for i in range(64):
                writer.add(image_bytes(i % 7, 20 + i % 2, 20), i % 2)
    trainer = Trainer(str(tmp_path), "sgd", 64)
    first = trainer.run(0.01, seed=1)
    assert 0 < first.loss < 2
    diverged = trainer.run(1e9, seed=0)
    assert not diverged.loss < 100
    again = trainer.run(0.01, seed=1)
    assert (again.loss, again.top1, again.steps) == (first.loss, first.top1, first.steps)


def test_a_batch_holds_as_far_as_the_mean_over_the_seeds_does() -> None:
    def runs(optimizer: str, holds_to: int) -> list[Run]:
        return [
            Run(optimizer, batch, 1.0, seed, 1.0, 10, 0.1, 0.9 if batch <= holds_to else 0.8, 1.0)
            for batch in BATCHES
            for seed in SEEDS
        ]

    both = runs("sgd", 128) + runs("lars", 1024)
    assert largest_that_holds(both, "sgd") == 128 and largest_that_holds(both, "lars") == 1024
    assert "| 128 | 10 | 1 | 90.0 (90.0 to 90.0) |" in table(both)
    assert "LARS stays within 3 points of the best at 64 up to a batch of 1,024." in table(both)


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_the_committed_results_are_complete(optimizer: str) -> None:
    from benchmarks.large_batch_study import BASE_RATES, read

    folder = Path(__file__).parents[2] / "docs" / "large-batch-study"
    runs = read(folder / "results.csv")
    for batch in BATCHES:
        own = [run for run in runs if (run.optimizer, run.batch) == (optimizer, batch)]
        assert {run.base_rate for run in own if run.seed == SEEDS[0]} == set(BASE_RATES[optimizer])
        assert {run.seed for run in own} == set(SEEDS)
    assert (folder / "table.md").read_text() == table(runs)
