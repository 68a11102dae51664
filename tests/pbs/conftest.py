"""Jobs on a PBS server that is there already, made from the project's own job script.

These tests run wherever `qsub` is on the PATH and `qstat -B` gets an answer, on a server that takes jobs of the user
who runs them; from root it does only after `qmgr -c "set server acl_roots += root"`. HPCTRAIN_TEST_PBS=standin takes a
stand-in instead: that tries the tests, not PBS.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from hpctrain.jobs import render
from hpctrain.jobs.templates import read_template
from tests.pbs import standin
from tests.slurm.processes import environments, poll
from tests.training.conftest import EXACT, Run, metrics_of, read_run, shards

__all__ = ["shards"]  # the fixture of the training tests: real JPEGs in real shards

STEPS = 14
# No margin: jobs here stop because they are told to, not because of the clock.
SETTINGS = [*EXACT, f"train.steps={STEPS}", "evaluate.every_epochs=100", "checkpoint.stop_margin_seconds=0"]
WALLTIME = "00:20:00"
# Seconds on a busy machine, and a scheduler may look at its queue but every ten minutes.
START_SECONDS, END_SECONDS = 900, 900
VARIABLES = ["HDF5_USE_FILE_LOCKING=FALSE", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS=600"]  # ranks are held for a while
if os.geteuid() == 0:
    VARIABLES += ["OMPI_ALLOW_RUN_AS_ROOT=1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"]


class Server:
    """PBS as a user sees it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def command(self, *arguments: str | Path, check: bool = True) -> str:
        """Run a program and return what it prints."""
        words = [str(argument) for argument in arguments]
        done = subprocess.run(words, capture_output=True, text=True, timeout=120, cwd=self.folder)
        if check and done.returncode:
            raise AssertionError(f"{' '.join(words)}: exit {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def qsub(self, *arguments: str | Path) -> str:
        """Submit, and return the job's id."""
        return self.command("qsub", *arguments).strip().splitlines()[-1]

    def state(self, job: str) -> str:
        """The letter of a job's state; F also where the server has forgotten it."""
        text = self.command("qstat", "-f", job, check=False)
        return (re.findall(r"^ +job_state = (\w)", text, re.M) or ["F"])[0]

    def wait(self, job: str) -> None:
        """Wait until a job has ended for good."""
        poll(lambda: self.state(job) == "F", f"the end of {job}", END_SECONDS)

    def hosts(self) -> int:
        """How many hosts could run a part of a job."""
        return len(set(re.findall(r"^ +resources_available\.host = (\S+)", self.command("pbsnodes", "-a"), re.M)))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("pbs")
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("HPCTRAIN_TEST_PBS") == "standin":
            patch.setenv("PATH", str(standin.install(folder / "standin")), prepend=os.pathsep)
        yield connect(folder)


def connect(folder: Path) -> Server:
    """Return the server of this machine, once it has run a job. Skips the tests if there is none for this user."""
    if shutil.which("qsub") is None:
        pytest.skip("there is no qsub on the PATH")
    if subprocess.run(["qstat", "-B"], capture_output=True, timeout=60).returncode:
        pytest.skip("there is a qsub, but `qstat -B` gets no answer from a server")
    (folder / "probe").write_text(f'#!/bin/sh\ntouch "{folder}/probed"\n')
    first = ["qsub", "-N", "probe", "-l", "select=1:ncpus=1", "-l", "walltime=00:01:00", "probe"]
    done = subprocess.run(first, capture_output=True, text=True, cwd=folder, timeout=60)
    if done.returncode:
        pytest.skip(f"qsub does not let this user submit: {done.stderr.strip()}")
    poll((folder / "probed").exists, "the first job, which only makes a file", START_SECONDS)
    return Server(folder)


@dataclass
class Training:
    """A run, and the job that began it."""

    server: Server
    job: str
    run_dir: Path

    def wait_for_step(self, step: int) -> None:
        """Wait until the run has logged a step."""

        def reached() -> bool:
            assert self.code() in (None, 0, 85), self.output
            return any(line["kind"] == "train" and line["step"] >= step for line in metrics_of(self.run_dir))

        poll(reached, f"step {step} of {self.run_dir}", START_SECONDS)

    def code(self) -> int | None:
        """How the last of its jobs ended; None while one runs."""
        try:
            return int((self.run_dir / "last-exit-code").read_text())
        except (FileNotFoundError, ValueError):
            return None

    def jobs(self) -> list[str]:
        """The further jobs that it has submitted by itself."""
        path = self.run_dir / "jobs.jsonl"
        return re.findall(r'"id": "([^"]+)"', path.read_text()) if path.exists() else []

    def finish(self) -> Run:
        """Insist that it trains to the end, in as many jobs as it takes, and return what the run directory says."""

        def ended() -> bool:
            assert self.code() in (None, 0, 85), self.output
            return self.code() == 0

        poll(ended, f"the end of {self.run_dir}", END_SECONDS)
        for job in [self.job, *self.jobs()]:
            self.server.wait(job)
        return read_run(self.run_dir)

    def ranks(self) -> dict[int, dict[str, str]]:
        """Process numbers and environments of its ranks. Skips the test where they are not on this machine."""
        mine = {self.job, *self.jobs()}
        ours = {p: e for p, e in environments() if e.get("PBS_JOBID") in mine and e.get("PMIX_RANK", "").isdigit()}
        if not ours:
            pytest.skip("the job runs on another host, where its processes cannot be told to wait")
        return ours

    @property
    def output(self) -> str:
        """What its jobs have written to their logs."""
        logs = sorted((self.run_dir.parent / "logs").glob("*.out"))
        return "".join(log.read_text(errors="replace") for log in logs)


Train = Callable[..., Training]


def trainer(server: Server, shards: Path, folder: Path) -> Train:
    def train(name: str, *options: str, nodes: int = 1, overrides: Sequence[str] = ()) -> Training:
        """`qsub OPTIONS train.pbs` into the run directory `name`: settings edited in, and some from outside."""
        settings: dict[str, str | render.Expanded] = {
            "HPCTRAIN_PREFIX": sys.prefix,
            "VARIABLES": render.lines_value(VARIABLES, "a variable"),
            "LAUNCH": f"mpirun -n {nodes} --map-by ppr:1:node --bind-to none",
            "LOG_DIR": str(folder / "logs"),
            "OVERRIDES": render.lines_value([*SETTINGS, *overrides], "an override"),
        }
        directives = {"-l select": f"{nodes}:ncpus=1:mpiprocs=1:ompthreads=1", "-l walltime": WALLTIME}
        script = folder / f"{name}.pbs"
        script.write_text(render.render(read_template("pbs", "train"), "pbs", directives, (), settings))
        told = f"DATA={shards},RUN_DIR={folder / name}"
        return Training(server, server.qsub("-N", "test", *options, "-v", told, script), folder / name)

    return train


@pytest.fixture
def train(server: Server, shards: Path, tmp_path: Path) -> Train:
    return trainer(server, shards, tmp_path)


@pytest.fixture(scope="session")
def uninterrupted(server: Server, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Training:
    """A job that nothing happens to, which others are compared with."""
    training = trainer(server, shards, tmp_path_factory.mktemp("uninterrupted"))("run")
    training.finish()
    return training
