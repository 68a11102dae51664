"""Real shards, and real mpirun jobs on them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hpctrain.data.prepare import prepare

CLASSES = 6
TRAIN_IMAGES, VAL_IMAGES = 240, 70
BATCH = 96

HPCTRAIN = [sys.executable, "-m", "hpctrain"]
# What the equality tests run: 12 micro-batches, so that 1, 2, 3 and 4 ranks have 12, 6, 4 and 3 of them.
EXACT = [
    "model.name=resnet20",
    "data.augmentation=heavy",
    "data.shuffle_block=4",
    "train.deterministic=true",
    "train.threads=1",
    f"train.global_batch={BATCH}",
    "train.micro_batch=8",
    "train.epochs=16",
    "train.steps=20",
    "evaluate.every_epochs=4",
    "log.tensorboard=false",
]


def image(number: int, label: int) -> np.ndarray:
    """A picture of its class (a bar of some angle and color) with noise, of a size of its own."""
    random = np.random.default_rng(number)
    height, width = random.integers(34, 60, 2)
    y, x = np.mgrid[0:height, 0:width] / 50.0
    wave = np.sin(12 * (x * np.cos(label) + y * np.sin(label)) + random.uniform(0, 6))
    color = np.array([label % 2, label % 3 / 2, label / CLASSES])
    pixels = 128 + 60 * wave[..., None] * (0.4 + color) + 40 * (color - 0.5) + random.normal(0, 12, (height, width, 3))
    return np.clip(pixels, 0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of real JPEGs in real shards, train and val."""
    root = tmp_path_factory.mktemp("data")
    for split, count, first in (("train", TRAIN_IMAGES, 0), ("val", VAL_IMAGES, 10_000)):
        for i in range(count):
            label = i % CLASSES
            folder = root / "images" / split / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image(first + i, label)).save(folder / f"{i:04d}.jpg", quality=90)
        prepare(root / "images" / split, root / "shards", split, shards=4, workers=1, quiet=True)
    return root / "shards"


@dataclass
class Outcome:
    """How a finished job ended."""

    code: int
    stdout: str
    stderr: str
    seconds: float


class Job:
    """An mpirun of `hpctrain` in a process group of its own, so that all of it can be ended."""

    def __init__(self, ranks: int, arguments: Sequence[str], log: Path, env: dict[str, str]) -> None:
        self.stdout, self.stderr = log.with_suffix(".out"), log.with_suffix(".err")
        environ = {**os.environ, "PYTHONUNBUFFERED": "1", **env}
        for name in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
            environ.pop(name, None)
        if os.geteuid() == 0:
            environ.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
        command = ["mpirun", "--oversubscribe", "-n", str(ranks), *HPCTRAIN, *arguments]
        self._started = time.monotonic()
        with open(self.stdout, "wb") as out, open(self.stderr, "wb") as err:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=environ, start_new_session=True
            )

    def ranks(self) -> list[int]:
        """Process numbers of the ranks, in order of rank."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                variables = (entry / "environ").read_bytes().split(b"\0") if entry.name.isdigit() else []
                parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1]) if variables else 0
            except OSError:
                continue
            if parent == self.process.pid:
                found.update({int(v.split(b"=")[1]): int(entry.name) for v in variables if v.startswith(b"PMIX_RANK=")})
        return [found[rank] for rank in sorted(found)]

    def wait(self, timeout_seconds: float = 240) -> Outcome:
        """Wait for the end."""
        try:
            code = self.process.wait(timeout_seconds)
        finally:
            self.kill()
        out, err = (path.read_bytes().decode(errors="replace") for path in (self.stdout, self.stderr))
        return Outcome(code, out, err, time.monotonic() - self._started)

    def kill(self) -> None:
        """End whatever is left."""
        ranks = self.ranks() if self.process.poll() is None else []
        for pid in (*ranks, self.process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


class Launcher:
    """Starts jobs and ends those that a failing test has left."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs = folder, []

    def start(self, ranks: int, *arguments: str, **env: str) -> Job:
        """Start `mpirun -n RANKS hpctrain ARGUMENTS...` and return at once."""
        self.jobs.append(Job(ranks, arguments, self.folder / f"job{len(self.jobs)}", env))
        return self.jobs[-1]

    def run(self, ranks: int, *arguments: str, **env: str) -> Outcome:
        """Run it to the end."""
        return self.start(ranks, *arguments, **env).wait()

    def train(self, ranks: int, run_dir: Path, *arguments: str) -> Outcome:
        """Train the demo recipe and insist that it works."""
        outcome = self.run(ranks, "train", "demo", *arguments, "--run-dir", str(run_dir))
        assert outcome.code == 0, outcome.stderr[-3000:] + outcome.stdout[-1000:]
        return outcome


@pytest.fixture(scope="session")
def session_launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path_factory.mktemp("jobs"))
    yield launcher
    for job in launcher.jobs:
        job.kill()


@pytest.fixture
def launcher(tmp_path: Path) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path)
    yield launcher
    for job in launcher.jobs:
        job.kill()


@dataclass
class Run:
    """What a run directory says, for comparison to the last bit."""

    losses: dict[int, float]
    evaluations: dict[int, tuple[float, float, float]]
    weights: dict[str, np.ndarray]


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics.jsonl that may be written to right now."""
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def read_run(run_dir: Path) -> Run:
    """Read a run directory's metrics and newest weights."""
    lines = metrics_of(run_dir)
    train = [line for line in lines if line["kind"] == "train"]
    assert len({line["step"] for line in train}) == len(train), "a step is logged twice"
    newest = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    with np.load(newest / "model.npz", allow_pickle=False) as file:
        weights = {name: file[name] for name in file.files}
    return Run(
        {line["step"]: line["loss"] for line in train},
        {line["step"]: (line["loss"], line["top1"], line["top5"]) for line in lines if line["kind"] == "eval"},
        weights,
    )


def assert_same_bits(left: Run, right: Run) -> None:
    """Every loss, every evaluation and every weight are equal to the last bit."""
    assert left.losses == right.losses
    assert left.evaluations == right.evaluations
    assert list(left.weights) == list(right.weights)
    different = [name for name, value in left.weights.items() if value.tobytes() != right.weights[name].tobytes()]
    assert not different


@pytest.fixture(scope="session")
def exact_run(shards: Path, session_launcher: Launcher, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The uninterrupted run on one rank that others are compared with."""
    run_dir = tmp_path_factory.mktemp("exact") / "run"
    session_launcher.train(1, run_dir, f"data.path={shards}", *EXACT)
    return read_run(run_dir)


def wait_for_step(job: Job, run_dir: Path, step: int, timeout_seconds: float = 120) -> None:
    """Wait until a running job has logged a step."""
    deadline = time.monotonic() + timeout_seconds
    while not any(line["kind"] == "train" and line["step"] >= step for line in metrics_of(run_dir)):
        assert job.process.poll() is None, "the job ended early: " + job.stderr.read_text()[-2000:]
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.05)
