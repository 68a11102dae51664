"""slurm/train.sbatch on a real Slurm: what becomes of a run under launchers, limits, failures and cancellation."""

import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.slurm.cluster import VirtualCluster
from tests.slurm.conftest import STEPS, Trainer, Training
from tests.slurm.processes import is_alive, is_pending, poll, send
from tests.training.conftest import assert_same_bits, read_run

pytestmark = pytest.mark.slurm

EXIT_PREEMPTED = 85


def has_ended(pid: int) -> bool:
    return not is_alive(pid)


def has_pending(pid: int) -> bool:
    return is_pending(pid, signal.SIGUSR1)


def wait_until(condition: Callable[[int], bool], pids: list[int], what: str) -> None:
    """Wait until something is true of each process."""
    poll(lambda: all(map(condition, pids)), what, 120)


def test_srun_trains_on_two_nodes(uninterrupted: Training) -> None:
    run = read_run(uninterrupted.run_dir)
    assert sorted(run.losses) == list(range(1, STEPS + 1))
    assert list(run.evaluations) == [STEPS]
    assert "2 ranks on 2 hosts" in uninterrupted.output


def test_mpirun_gives_the_same_bits(train: Trainer, uninterrupted: Training) -> None:
    training = train("run", LAUNCH="mpirun")
    assert_same_bits(training.finish(), read_run(uninterrupted.run_dir))
    assert "2 ranks on 2 hosts" in training.output


def test_each_job_of_an_array_is_a_run(train: Trainer, cluster: VirtualCluster) -> None:
    array = train("run", "--array=3-4", "--nodes=1", overrides=("train.steps=6",))
    # The last job of an array has the number of the array, by which Slurm also means all of its jobs.
    last = Training(cluster, f"{array.job}_4", array.run_dir / "4")
    assert cluster.state(last.job).fields["JobId"] == array.job
    last.wait_for_step(2)
    cluster.command("scancel", "--batch", "--signal=USR1", last.job)
    runs = [Training(cluster, f"{array.job}_3", array.run_dir / "3").finish(), last.finish()]
    assert [cluster.state(f"{array.job}_{index}").restarts for index in (3, 4)] == [0, 1]
    assert [sorted(run.losses) for run in runs] == [[1, 2, 3, 4, 5, 6]] * 2
    assert any((runs[0].weights[name] != runs[1].weights[name]).any() for name in runs[0].weights)


def test_jobs_wait_for_each_other(train: Trainer, cluster: VirtualCluster, tmp_path: Path) -> None:
    mistaken = train("mistaken", overrides=("train.global_batch=97",))
    on_success = cluster.submit(f"--dependency=afterok:{mistaken.job}", "--kill-on-invalid-dep=yes", "--wrap=true")
    mark = f"--wrap=touch '{tmp_path}/ran'"
    on_any_end = cluster.submit(f"--dependency=afterany:{mistaken.job}", f"--output={tmp_path}/any.out", mark)
    assert cluster.state(on_any_end).name == "PENDING"
    state = cluster.wait(mistaken.job)
    assert (state.name, state.exit_code, state.restarts) == ("FAILED", 2, 0), mistaken.output
    assert "97" in mistaken.output and "Traceback" not in mistaken.output
    assert cluster.wait(on_any_end).name == "COMPLETED" and (tmp_path / "ran").exists()
    assert cluster.wait(on_success).name == "CANCELLED"


def test_a_run_survives_the_walltime_twice(train: Trainer, cluster: VirtualCluster, uninterrupted: Training) -> None:
    """Slurm's own warning before the end of the limit, then one that is sent; the job requeues itself each time."""
    training = train("run", "--signal=B:USR1@90")
    for count, step in enumerate((3, 6)):
        training.wait_for_step(step)
        ranks = list(cluster.processes(training.job).values())
        assert len(ranks) == 2
        send(ranks, signal.SIGSTOP)  # or the few steps might be over before the warning comes
        if count == 0:
            # A limit that ends in one to two minutes. Slurm looks at limits every 30 s, and so warns now.
            cluster.command("scontrol", "update", f"jobid={training.job}", f"timelimit={training.minutes() + 2}")
        else:
            cluster.command("scancel", "--batch", "--signal=USR1", training.job)
        wait_until(has_pending, ranks, "the warning in all ranks")
        send(ranks, signal.SIGCONT)
        wait_until(has_ended, ranks, "the ranks to stop")
        training.wait_for_restarts(count + 1)
        assert f"step-{step:08d}" <= training.checkpoints[-1] < f"step-{STEPS:08d}"
        cluster.command("scontrol", "update", f"jobid={training.job}", "timelimit=20")
    run = training.finish()
    assert cluster.state(training.job).restarts == 2
    assert_same_bits(run, read_run(uninterrupted.run_dir))


def test_a_dead_node_costs_only_the_steps_since_the_checkpoint(
    train: Trainer, cluster: VirtualCluster, uninterrupted: Training
) -> None:
    """A node that just stops answering, as in a power cut: nobody says goodbye, Slurm finds out and requeues."""
    training = train("run", overrides=("checkpoint.every_steps=2",))
    training.wait_for_step(5)
    cluster.freeze("node2")
    poll(lambda: cluster.node_state("node2").startswith("down"), "Slurm to miss node2", 120)
    poll(lambda: cluster.state(training.job).name in ("PENDING", "RUNNING"), "the requeue", 120)
    cluster.power_off("node2")
    run = training.finish()
    state = cluster.state(training.job)
    assert state.restarts == 1
    assert "node2" not in cluster.command("scontrol", "show", "hostnames", state.fields["NodeList"])
    assert_same_bits(run, read_run(uninterrupted.run_dir))


def test_scancel_ends_all_of_it_and_it_does_not_come_back(train: Trainer, cluster: VirtualCluster) -> None:
    training = train("run", overrides=("checkpoint.every_steps=2", "train.steps=null", "train.epochs=1000"))
    training.wait_for_step(5)
    processes = cluster.everything_of(training.job)
    assert len(processes) >= 4
    started = time.monotonic()
    cluster.command("scancel", training.job)
    assert cluster.wait(training.job).name == "CANCELLED"
    wait_until(has_ended, processes, "the job's processes to end")
    assert time.monotonic() - started < 60
    assert training.checkpoints[-1] >= "step-00000004"
    newest = training.run_dir / "checkpoints" / training.checkpoints[-1]
    with np.load(newest / "model.npz", allow_pickle=False) as weights:
        assert all(np.isfinite(weights[name]).all() for name in weights.files)
    assert cluster.state(training.job).restarts == 0
