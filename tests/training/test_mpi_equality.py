"""The result does not depend on the number of ranks, nor on being interrupted: bit for bit."""

import os
import signal
from pathlib import Path

import pytest

from tests.training.conftest import (
    EXACT,
    Launcher,
    Run,
    assert_same_bits,
    metrics_of,
    read_run,
    wait_for_step,
)

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("ranks", [2, 4])
def test_powers_of_two_ranks_give_the_same_bits(
    ranks: int, shards: Path, exact_run: Run, launcher: Launcher, tmp_path: Path
) -> None:
    launcher.train(ranks, tmp_path / "run", f"data.path={shards}", *EXACT)
    run = read_run(tmp_path / "run")
    assert len(run.losses) == 20
    assert_same_bits(run, exact_run)


def test_ranks_with_two_threads_each_give_the_same_bits_on_any_number(
    shards: Path, launcher: Launcher, tmp_path: Path
) -> None:
    runs = []
    for ranks in (1, 2):
        run_dir = tmp_path / str(ranks)
        launcher.train(ranks, run_dir, f"data.path={shards}", *EXACT, "train.threads=2", "train.steps=6")
        runs.append(read_run(run_dir))
    assert len(runs[0].losses) == 6
    assert_same_bits(*runs)


def test_three_ranks_agree_to_rounding(shards: Path, exact_run: Run, launcher: Launcher, tmp_path: Path) -> None:
    launcher.train(3, tmp_path / "run", f"data.path={shards}", *EXACT, "train.steps=4")
    run = read_run(tmp_path / "run")
    assert_agree_to_rounding(run, exact_run)


def assert_agree_to_rounding(run: Run, exact_run: Run) -> None:
    """Training amplifies a difference in the last bit more than tenfold a step at these rates."""
    for step, tolerance in enumerate((1e-6, 1e-4, 1e-3, 1e-2), start=1):
        assert run.losses[step] == pytest.approx(exact_run.losses[step], rel=tolerance)


def test_fast_mode_on_two_ranks_agrees_to_rounding(
    shards: Path, exact_run: Run, launcher: Launcher, tmp_path: Path
) -> None:
    launcher.train(2, tmp_path / "run", f"data.path={shards}", *EXACT, "train.deterministic=false", "train.steps=4")
    run = read_run(tmp_path / "run")
    assert_agree_to_rounding(run, exact_run)


def test_stopped_by_a_signal_and_resumed_on_other_ranks(
    shards: Path, exact_run: Run, launcher: Launcher, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = ("train", "demo", f"data.path={shards}", *EXACT, "--run-dir", str(run_dir))
    job = launcher.start(2, *arguments)
    wait_for_step(job, run_dir, 3)
    job.process.send_signal(signal.SIGUSR1)  # mpirun passes it on to the ranks
    stopped = job.wait()
    assert stopped.code == 85, stopped.stderr[-2000:]
    assert "SIGUSR1" in stopped.stdout and str(run_dir) in stopped.stdout
    last = metrics_of(run_dir)[-1]
    assert last["kind"] == "end" and last["reason"] == "preempted" and last["step"] < 20
    launcher.train(4, run_dir, f"data.path={shards}", *EXACT)
    assert_same_bits(read_run(run_dir), exact_run)


def test_killed_and_resumed(shards: Path, exact_run: Run, launcher: Launcher, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = (f"data.path={shards}", *EXACT, "checkpoint.every_steps=4", "checkpoint.keep=2")
    job = launcher.start(2, "train", "demo", *arguments, "--run-dir", str(run_dir))
    wait_for_step(job, run_dir, 10)
    os.kill(job.ranks()[1], signal.SIGKILL)
    assert job.wait(timeout_seconds=30).code not in (0, 85)
    checkpoints = sorted(path.name for path in (run_dir / "checkpoints").iterdir() if path.name.startswith("step-"))
    assert 1 <= len(checkpoints) <= 2 and all(int(name[5:]) % 4 == 0 for name in checkpoints)
    launcher.train(2, run_dir, *arguments)
    assert_same_bits(read_run(run_dir), exact_run)
