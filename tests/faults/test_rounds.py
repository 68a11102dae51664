"""The long form: a run that is killed again and again at moments nobody chose, and ends as if nothing had been."""

import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.faults.conftest import GONE_SECONDS, Faults, processes_with
from tests.training.conftest import Job, Run, assert_same_bits, metrics_of, read_run

pytestmark = [pytest.mark.mpi, pytest.mark.slow]

ROUNDS = int(os.environ.get("HPCTRAIN_TEST_ROUNDS", "100"))
SEED = int(os.environ.get("HPCTRAIN_TEST_SEED", "1"))
EPOCHS = max(4, ROUNDS * 2)  # 12 steps a round, so that the last round still finds something to do
LONG = [f"train.epochs={EPOCHS}", "evaluate.every_epochs=2", "checkpoint.every_steps=1", "log.every_steps=1000"]
START_SECONDS = 6.0  # in which a rank gets to its first step


@pytest.fixture(scope="module")
def long_run(faults: Faults, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The long run that nothing happened to."""
    run_dir = tmp_path_factory.mktemp("long") / "run"
    ended = faults.run(run_dir, "", *LONG)
    assert ended.outcome.code == 0, ended.outcome.stderr[-3000:]
    return read_run(run_dir)


def test_killed_at_random_moments(faults: Faults, long_run: Run, tmp_path: Path) -> None:
    """Each round starts the run on 1 or 2 ranks, and kills a rank, all of them or the launcher at a random moment."""
    choose = random.Random(SEED)
    run_dir = tmp_path / "run"
    for number in range(ROUNDS):
        ranks = choose.choice([1, 2, 2])
        steps = choose.choice([0, 1, 1, 2, 5, 10])
        delay = choose.uniform(0.0, 1.0 if steps else START_SECONDS)
        victim = choose.choice(["rank 0", "last rank", "all", "launcher"])
        env = faults.environment("slow@step:1:*")
        job = faults.launcher.start(ranks, *faults.command(run_dir, *LONG), **env)
        mark = f"HPCTRAIN_TEST_FAULT_TIME={env['HPCTRAIN_TEST_FAULT_TIME']}"
        reached = wait_for_more_steps(job, run_dir, steps)
        time.sleep(delay)
        pids = job.ranks()
        chosen = {"rank 0": pids[:1], "last rank": pids[-1:], "all": pids, "launcher": [job.process.pid]}[victim]
        for pid in chosen:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        job.process.wait(timeout=30)
        deadline = time.monotonic() + GONE_SECONDS
        while left := processes_with(mark):
            assert time.monotonic() < deadline, f"round {number}: {left} survive the {victim}"
            time.sleep(0.05)
        print(f"round {number}: {ranks} ranks, {victim} killed after {reached} steps: {job.process.returncode}")
    ended = faults.run(run_dir, "", *LONG)
    assert ended.outcome.code == 0, ended.outcome.stderr[-3000:]
    assert_same_bits(read_run(run_dir), long_run)


def wait_for_more_steps(job: Job, run_dir: Path, steps: int) -> int:
    """Wait until the job has logged so many steps more than there were, or has ended; return how many it is."""
    before = steps_logged(run_dir)
    deadline = time.monotonic() + 180
    done = 0
    while job.process.poll() is None and done < steps:
        assert time.monotonic() < deadline
        time.sleep(0.1)
        done = len(steps_logged(run_dir) - before)
    return done


def steps_logged(run_dir: Path) -> set[int]:
    return {line["step"] for line in metrics_of(run_dir) if line["kind"] == "train"}
