"""Recovery inside an allocation on a real Slurm: nodes that lose power or freeze while a run is supervised."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import VirtualCluster
from tests.slurm.conftest import Trainer, Training
from tests.slurm.processes import poll, send
from tests.training.conftest import assert_same_bits, read_run

pytestmark = pytest.mark.slurm

# Hosts that share two cores with other tests differ; what is slow is tested in tests/supervise.
OPTIONS = (
    "--slow-factor=50 --probe-seconds=60 --watch-seconds=2 --quiet-seconds=60 --grace-seconds=10 --pause-seconds=1"
)


def supervised(train: Trainer, *, nodes: int = 3, options: str = OPTIONS, **variables: Any) -> Training:
    """A run on two nodes with whatever more as spares."""
    asked = (f"--nodes={nodes}", "--no-kill")
    return train(
        "run", *asked, overrides=("checkpoint.every_steps=2",), SUPERVISE_OPTIONS=options, SUPERVISE="yes", **variables
    )


def events(run_dir: Path, name: str) -> list[dict[str, Any]]:
    records = map(json.loads, (run_dir / "supervise.jsonl").read_text().splitlines())
    return [record for record in records if record["event"] == name]


def fail_host(cluster: VirtualCluster, training: Training, how: str) -> None:
    training.wait_for_step(5)
    (cluster.freeze if how == "freeze" else cluster.power_off)("node2")


@pytest.mark.parametrize("launch", ["srun --mpi=pmix --cpu-bind=cores", "mpirun"])
@pytest.mark.parametrize("how", ["power off", "freeze"])
def test_a_run_goes_on_with_the_spare_node(
    how: str, launch: str, train: Trainer, cluster: VirtualCluster, uninterrupted: Training
) -> None:
    training = supervised(train, SPARE_NODES=1, LAUNCH=launch)
    fail_host(cluster, training, how)
    run = training.finish()
    assert cluster.state(training.job).restarts == 0, training.output
    assert [event["hosts"] for event in events(training.run_dir, "launch")] == [["node1", "node2"], ["node1", "node3"]]
    (end,) = events(training.run_dir, "end")
    assert list(end["excluded"]) == ["node2"] and end["exit_code"] == 0
    assert "excluded: node2 (" in training.output
    assert_same_bits(run, read_run(uninterrupted.run_dir))


def test_without_spares_it_goes_on_with_fewer_nodes(
    train: Trainer, cluster: VirtualCluster, uninterrupted: Training
) -> None:
    training = supervised(train, nodes=2)
    fail_host(cluster, training, "power off")
    run = training.finish()
    assert cluster.state(training.job).restarts == 0
    assert events(training.run_dir, "end")[0]["hosts"] == ["node1"]
    assert_same_bits(run, read_run(uninterrupted.run_dir))


def test_or_the_job_is_queued_again(train: Trainer, cluster: VirtualCluster, uninterrupted: Training) -> None:
    training = supervised(train, nodes=2, options=f"{OPTIONS} --on-too-few=requeue")
    fail_host(cluster, training, "power off")
    run = training.finish()
    state = cluster.state(training.job)
    assert state.restarts == 1
    assert "node2" not in cluster.command("scontrol", "show", "hostnames", state.fields["NodeList"])
    assert_same_bits(run, read_run(uninterrupted.run_dir))


def test_a_lost_node_without_a_supervisor_queues_the_job_again(
    train: Trainer, cluster: VirtualCluster, uninterrupted: Training
) -> None:
    training = train("run", overrides=("checkpoint.every_steps=2",))
    fail_host(cluster, training, "power off")
    training.wait_for_restarts(1)
    run = training.finish()
    assert "because a node was lost" in training.output or "NODE_FAIL" in training.output.replace(" ", "_")
    assert_same_bits(run, read_run(uninterrupted.run_dir))


def test_a_killed_rank_on_a_healthy_node_is_a_failure_and_not_repeated(train: Trainer, cluster: VirtualCluster) -> None:
    training = train("run", overrides=("checkpoint.every_steps=2",))
    training.wait_for_step(5)
    send([cluster.processes(training.job)[1]], signal.SIGKILL)
    state = cluster.wait(training.job)
    assert (state.name, state.restarts) == ("FAILED", 0), training.output
    assert state.exit_code not in (0, 2, 85)
    assert training.checkpoints[-1] >= "step-00000002"


def test_a_killed_rank_of_a_supervised_run_is_started_again_on_the_same_nodes(
    train: Trainer, cluster: VirtualCluster, uninterrupted: Training
) -> None:
    training = supervised(train, SPARE_NODES=1)
    training.wait_for_step(5)
    send([cluster.processes(training.job)[1]], signal.SIGKILL)
    run = training.finish()
    assert [event["hosts"] for event in events(training.run_dir, "launch")] == [["node1", "node2"]] * 2
    assert "no host was excluded" in training.output
    assert_same_bits(run, read_run(uninterrupted.run_dir))


def test_a_signal_stops_a_supervised_run_and_the_next_job_goes_on(
    train: Trainer, cluster: VirtualCluster, uninterrupted: Training
) -> None:
    training = supervised(train, SPARE_NODES=1)
    training.wait_for_step(3)
    cluster.command("scancel", "--batch", "--signal=USR1", training.job)
    training.wait_for_restarts(1)
    assert events(training.run_dir, "end")[0]["exit_code"] == 85
    assert_same_bits(training.finish(), read_run(uninterrupted.run_dir))


# slow: once in some runs slurmd itself died on the other node, beside the one that was switched off
@pytest.mark.slow
def test_another_node_notices_when_that_of_the_script_fails(
    train: Trainer, cluster: VirtualCluster, uninterrupted: Training
) -> None:
    training = supervised(train, SPARE_NODES=1)
    training.wait_for_step(5)
    cluster.power_off("node1")
    training.wait_for_restarts(1)
    run = training.finish()
    assert "node1" not in cluster.command(
        "scontrol", "show", "hostnames", cluster.state(training.job).fields["NodeList"]
    )
    assert_same_bits(run, read_run(uninterrupted.run_dir))


def test_scancel_ends_the_supervisor_too(train: Trainer, cluster: VirtualCluster) -> None:
    training = supervised(train, SPARE_NODES=1)
    training.wait_for_step(3)
    cluster.command("scancel", training.job)
    assert cluster.wait(training.job).name == "CANCELLED"
    poll(lambda: not cluster.everything_of(training.job), "the job's processes to end", 120)
    assert len(events(training.run_dir, "launch")) == 1
