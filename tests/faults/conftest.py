"""Real jobs of two ranks on a few real shards, with something going wrong in them."""

import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from hpctrain.data.prepare import prepare
from tests.training.conftest import Launcher, Outcome, Run, image, read_run

ROOT = Path(__file__).parents[2]
GONE_SECONDS = 10.0
SETTINGS = [
    "model.name=tests.faults.injected:model",
    "model.image_size=16",
    "data.shuffle_block=4",
    "data.augmentation=heavy",
    "train.deterministic=true",
    "train.threads=1",
    "train.global_batch=16",
    "train.micro_batch=4",
    "train.epochs=5",
    "schedule.warmup_epochs=1",
    "optimizer.learning_rate=1",
    "evaluate.every_epochs=0.5",
    "checkpoint.every_steps=2",
    "log.tensorboard=false",
]
STEPS = 30  # 5 epochs of 96 images, 16 at a time


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 images to train on and 20 to evaluate on, in two shards each."""
    root = tmp_path_factory.mktemp("faults")
    for split, count, first in (("train", 96, 0), ("val", 20, 10_000)):
        for i in range(count):
            folder = root / "images" / split / f"class{i % 4}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image(first + i, i % 4)).save(folder / f"{i:03d}.jpg")
        prepare(root / "images" / split, root / "shards", split, shards=2, workers=1, quiet=True)
    return root / "shards"


@dataclass
class Ended:
    """How a job with a fault ended."""

    outcome: Outcome
    said: str  # the last line of ours on stderr, empty if there is none
    seconds: float | None  # from the fault until every process was gone, None if nothing went wrong


class Faults:
    """Starts jobs, and sees that nothing is left of them."""

    def __init__(self, launcher: Launcher, shards: Path) -> None:
        self.launcher, self.shards = launcher, shards

    def command(self, run_dir: Path, *settings: str) -> list[str]:
        """What a rank runs, without the program."""
        return ["train", "demo", f"data.path={self.shards}", *SETTINGS, *settings, "--run-dir", str(run_dir)]

    def environment(self, fault: str = "") -> dict[str, str]:
        """Variables of a job that make it fail, and known again by a mark of its own."""
        moment = self.launcher.folder / f"moment-{uuid.uuid4().hex}"
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {"HPCTRAIN_TEST_FAULT": fault, "HPCTRAIN_TEST_FAULT_TIME": str(moment), "PYTHONPATH": paths}

    def run(
        self, run_dir: Path, fault: str = "", *settings: str, ranks: int = 2, other: list[str] | None = None
    ) -> Ended:
        """Run a job to its end, whatever that is. `other` is the command of one more rank that runs something else."""
        env = self.environment(fault)
        command = self.command(run_dir, *settings)
        if other is not None:
            command += [":", "-n", "1", *other]
        outcome = self.launcher.start(ranks, *command, **env).wait(timeout_seconds=180)
        mark = env["HPCTRAIN_TEST_FAULT_TIME"]
        deadline = time.monotonic() + GONE_SECONDS
        while left := processes_with(f"HPCTRAIN_TEST_FAULT_TIME={mark}"):
            assert time.monotonic() < deadline, f"processes {left} are left: {outcome.stderr[-2000:]}"
            time.sleep(0.05)
        moment = Path(mark)
        seconds = time.monotonic() - float(moment.read_text()) if moment.exists() else None
        said = [line for line in outcome.stderr.splitlines() if line.startswith("hpctrain:")]
        return Ended(outcome, said[-1] if said else "", seconds)


def processes_with(variable: str) -> list[int]:
    """The processes that have this variable in their environment and have not ended."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and variable.encode() in (entry / "environ").read_bytes().split(b"\0"):
                state = (entry / "stat").read_text().rsplit(")", 1)[1].split()[0]
                found += [] if state == "Z" else [int(entry.name)]
        except OSError:
            continue
    return found


@pytest.fixture(scope="session")
def faults(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faults]:
    launcher = Launcher(tmp_path_factory.mktemp("fault-jobs"))
    yield Faults(launcher, shards)
    for job in launcher.jobs:
        job.kill()


@pytest.fixture(scope="session")
def undisturbed(faults: Faults, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run in which nothing went wrong, on one rank."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    ended = faults.run(run_dir, ranks=1)
    assert ended.outcome.code == 0, ended.outcome.stderr[-3000:]
    assert not (run_dir / "run.lock").exists()
    return read_run(run_dir)
