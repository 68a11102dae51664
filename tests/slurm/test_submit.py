"""`hpctrain submit`, `status` and `cancel` against a real Slurm."""

import re
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import VirtualCluster
from tests.slurm.conftest import SETTINGS, Training
from tests.training.conftest import assert_same_bits, read_run

pytestmark = pytest.mark.slurm

HPCTRAIN = [sys.executable, "-m", "hpctrain"]


def submit(cluster: VirtualCluster, shards: Path, run_dir: Path) -> Training:
    """Submit to two nodes, and return the job that the program says it is."""
    where: list[str | Path] = ["--site", "generic-slurm", "--nodes", "2", "--time", "00:20:00", "--run-dir", run_dir]
    recipe = ["demo", f"data.path={shards}", *SETTINGS, "checkpoint.every_steps=2"]
    said = cluster.command(*HPCTRAIN, "submit", *recipe, *where)
    (job,) = re.findall(r"^job: (\d+)$", said, re.M)
    return Training(cluster, job, run_dir)


def test_a_run_is_submitted_watched_cancelled_and_gone_on_with(
    cluster: VirtualCluster, shards: Path, uninterrupted: Training, tmp_path: Path
) -> None:
    run_dir = tmp_path / "runs" / "with a space"
    first = submit(cluster, shards, run_dir)
    first.wait_for_step(4)
    assert f"job {first.job}: RUNNING" in cluster.command(*HPCTRAIN, "status", run_dir)
    assert first.job in cluster.command(*HPCTRAIN, "cancel", run_dir)
    assert cluster.wait(first.job).name == "CANCELLED", first.output
    assert f"job {first.job}: CANCELLED" in cluster.command(*HPCTRAIN, "status", run_dir)

    second = submit(cluster, shards, run_dir)
    assert_same_bits(second.finish(), read_run(uninterrupted.run_dir))
    assert "steps 1 to" not in second.output
    assert f"job {second.job}: COMPLETED" in cluster.command(*HPCTRAIN, "status", run_dir)
