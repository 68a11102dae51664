"""A Slurm cluster that all tests here share, and training jobs on it made from the project's own job script."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import VirtualCluster, why_impossible
from tests.slurm.processes import poll
from tests.training.conftest import EXACT, Run, metrics_of, read_run, shards

__all__ = ["shards"]  # the fixture of the training tests: real JPEGs in real shards

TEMPLATE = Path(__file__).parents[2] / "slurm" / "train.sbatch"
STEPS = 14
# No margin: jobs here stop because they are told to, not because of the clock.
SETTINGS = [*EXACT, f"train.steps={STEPS}", "evaluate.every_epochs=100", "checkpoint.stop_margin_seconds=0"]
# Seconds on a busy machine: a rank takes five to start when it has a core to itself.
START_SECONDS, END_SECONDS = 180, 300


@pytest.fixture(scope="session")
def session_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualCluster]:
    reason = why_impossible()
    if reason:
        pytest.skip(reason)
    with VirtualCluster(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
        if cluster.command("srun", "--mpi=pmix", "echo", "works", check=False).strip() != "works":
            pytest.skip("`srun --mpi=pmix` does not work: Slurm looks for libpmix.so, which .ci/run links (libpmix2)")
        yield cluster


@pytest.fixture
def cluster(session_cluster: VirtualCluster) -> Iterator[VirtualCluster]:
    """The cluster with all nodes idle and no jobs."""
    yield session_cluster
    session_cluster.tidy()


@dataclass
class Training:
    """A training job and its run directory."""

    cluster: VirtualCluster
    job: str
    run_dir: Path

    def wait_for_step(self, step: int) -> None:
        """Wait until the run has logged a step."""

        def reached() -> bool:
            assert not self.cluster.state(self.job).ended, self.cluster.output(self.job)
            return any(line["kind"] == "train" and line["step"] >= step for line in metrics_of(self.run_dir))

        poll(reached, f"step {step} of {self.run_dir}", START_SECONDS)

    def wait_for_restarts(self, count: int) -> None:
        """Wait until Slurm has queued the job again for the count-th time."""
        poll(lambda: self.cluster.state(self.job).restarts >= count, f"requeue {count} of {self.job}", 120)

    def finish(self) -> Run:
        """Insist that it trains to the end, and return what the run directory says."""
        state = self.cluster.wait(self.job, END_SECONDS)
        assert state.name == "COMPLETED", f"{state}\n{self.output}"
        return read_run(self.run_dir)

    @property
    def output(self) -> str:
        return self.cluster.output(self.job)

    def minutes(self) -> int:
        """Whole minutes the job has been running since its last start."""
        hours, minutes, _ = self.cluster.state(self.job).fields["RunTime"].split(":")
        return 60 * int(hours) + int(minutes)

    @property
    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.run_dir / "checkpoints").glob("step-*"))


class Trainer:
    """Submits the job script of the project, as a user does by hand."""

    def __init__(self, cluster: VirtualCluster, shards: Path, folder: Path) -> None:
        self.cluster, self.shards, self.folder = cluster, shards, folder

    def __call__(self, name: str, *options: str, overrides: tuple[str, ...] = (), **variables: Any) -> Training:
        """`sbatch OPTIONS train.sbatch OVERRIDES` into the run directory `name`, with the script's variables."""
        settings = {"DATA": self.shards, "RUN_DIR": self.folder / name, **variables}
        # The tests hold ranks for a while; to Horovod they seem lost.
        settings["HOROVOD_STALL_SHUTDOWN_TIME_SECONDS"] = 600
        log = f"--output={self.folder}/{name}-%j.out"
        job = self.cluster.submit("--time=20", log, *options, TEMPLATE, *SETTINGS, *overrides, **settings)
        return Training(self.cluster, job, self.folder / name)


@pytest.fixture
def train(cluster: VirtualCluster, shards: Path, tmp_path: Path) -> Trainer:
    return Trainer(cluster, shards, tmp_path)


@pytest.fixture(scope="session")
def uninterrupted(session_cluster: VirtualCluster, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A job on two nodes that nothing happens to, which others are compared with."""
    training = Trainer(session_cluster, shards, tmp_path_factory.mktemp("uninterrupted"))("run")
    training.finish()
    return training
