"""pbs/train.pbs and `hpctrain submit` on a real PBS: what becomes of a run under launchers, limits and cancellation."""

import re
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from hpctrain.jobs.site import find_site
from tests.pbs.conftest import SETTINGS, STEPS, VARIABLES, WALLTIME, Server, Train, Training
from tests.slurm.processes import is_alive, poll, send
from tests.training.conftest import assert_same_bits, read_run

pytestmark = pytest.mark.pbs

HPCTRAIN = [sys.executable, "-m", "hpctrain"]


def test_a_job_trains(uninterrupted: Training) -> None:
    run = read_run(uninterrupted.run_dir)
    assert sorted(run.losses) == list(range(1, STEPS + 1))
    assert list(run.evaluations) == [STEPS]
    assert "1 rank" in uninterrupted.output and uninterrupted.jobs() == []


def test_two_nodes_give_the_same_bits(server: Server, train: Train, uninterrupted: Training) -> None:
    if server.hosts() < 2:
        pytest.skip("the server has one host only")
    training = train("run", nodes=2)
    assert_same_bits(training.finish(), read_run(uninterrupted.run_dir))
    assert "2 ranks on 2 hosts" in training.output


def test_each_job_of_an_array_is_a_run(server: Server, train: Train) -> None:
    array = train("run", "-J", "3-4", overrides=("train.steps=6",))
    assert re.fullmatch(r"\d+\[\]\..+", array.job)
    runs = [Training(server, array.job, array.run_dir / index).finish() for index in ("3", "4")]
    assert [sorted(run.losses) for run in runs] == [[1, 2, 3, 4, 5, 6]] * 2
    assert any((runs[0].weights[name] != runs[1].weights[name]).any() for name in runs[0].weights)


def test_jobs_wait_for_each_other_and_a_mistake_is_not_repeated(server: Server, train: Train, tmp_path: Path) -> None:
    mistaken = train("mistaken", overrides=("train.global_batch=97",))
    after = {}
    for kind in ("afterok", "afterany"):
        (tmp_path / kind).write_text(f'#!/bin/sh\ntouch "{tmp_path}/{kind}-ran"\n')
        resources = ["-l", "select=1:ncpus=1", "-l", "walltime=00:01:00"]
        after[kind] = server.qsub("-N", kind, *resources, "-W", f"depend={kind}:{mistaken.job}", tmp_path / kind)
    server.wait(mistaken.job)
    assert mistaken.code() == 2 and mistaken.jobs() == [], mistaken.output
    assert "97" in mistaken.output and "Traceback" not in mistaken.output
    poll((tmp_path / "afterany-ran").exists, "the job after any end", 300)
    server.wait(after["afterok"])
    assert not (tmp_path / "afterok-ran").exists()


def test_a_run_survives_the_walltime_and_a_warning(train: Train, uninterrupted: Training) -> None:
    """It goes on in two further jobs: after the end of its time, and after a signal to its ranks."""
    hours, minutes, seconds = map(int, WALLTIME.split(":"))
    margin = 3600 * hours + 60 * minutes + seconds - 180  # so the time is over after three minutes
    training = train("run", overrides=(f"checkpoint.stop_margin_seconds={margin}",))
    training.wait_for_step(3)
    ranks = training.ranks()
    send(ranks, signal.SIGSTOP)  # or the few steps might be over before the time is
    end = max(float(environ["HPCTRAIN_END_TIME"]) for environ in ranks.values())
    assert 0 < end - time.time() < margin + 180
    count = len(training.jobs())
    while time.time() < end - margin:
        time.sleep(1)
    send(ranks, signal.SIGCONT)
    poll(lambda: len(training.jobs()) > count, "a further job", 120)
    training.wait_for_step(7)
    ranks = training.ranks()
    send(ranks, signal.SIGUSR1)
    run = training.finish()
    assert len(training.jobs()) >= 2, training.output
    assert_same_bits(run, read_run(uninterrupted.run_dir))


def test_qdel_ends_all_of_it_and_it_does_not_come_back(server: Server, train: Train) -> None:
    training = train("run", overrides=("checkpoint.every_steps=2", "train.steps=null", "train.epochs=1000"))
    training.wait_for_step(5)
    ranks = training.ranks()
    server.command("qdel", training.job)
    server.wait(training.job)
    poll(lambda: not any(map(is_alive, ranks)), "the ranks to end", 60)
    assert training.jobs() == []
    assert sorted((training.run_dir / "checkpoints").glob("step-*"))[-1].name >= "step-00000004"


def own_site(folder: Path) -> Path:
    """The generic site with what these tests need."""
    site = yaml.safe_load(find_site("generic-pbs").read_text())
    site |= {"name": "tested", "environment": dict(entry.split("=", 1) for entry in VARIABLES)}
    (folder / "site.yaml").write_text(yaml.safe_dump(site))
    return folder / "site.yaml"


def submit(server: Server, shards: Path, run_dir: Path, *options: str) -> list[str]:
    """Submit with `hpctrain submit`, and return the ids of the jobs that it names."""
    site = own_site(run_dir.parent)
    where: list[str | Path] = ["--site", site, "--nodes", "1", "--cores", "1", "--time", WALLTIME, "--run-dir", run_dir]
    recipe = ["demo", f"data.path={shards}", *SETTINGS, "checkpoint.every_steps=2", "train.threads=1"]
    return re.findall(r"^job: (\S+)$", server.command(*HPCTRAIN, "submit", *recipe, *where, *options), re.M)


def test_a_run_is_submitted_watched_cancelled_and_gone_on_with(
    server: Server, shards: Path, uninterrupted: Training, tmp_path: Path
) -> None:
    run_dir = tmp_path / "with a space"
    (job,) = submit(server, shards, run_dir)
    first = Training(server, job, run_dir)
    first.wait_for_step(4)
    assert f"job {job}: RUNNING" in server.command(*HPCTRAIN, "status", run_dir)
    assert job in server.command(*HPCTRAIN, "cancel", run_dir)
    server.wait(job)
    assert "has no job that waits or runs" in server.command(*HPCTRAIN, "cancel", run_dir)

    (job,) = submit(server, shards, run_dir)
    second = Training(server, job, run_dir)
    server.wait(job)
    assert_same_bits(second.finish(), read_run(uninterrupted.run_dir))
    assert f"job {job}: " in server.command(*HPCTRAIN, "status", run_dir)


def test_a_chain_ends_with_its_run(server: Server, shards: Path, uninterrupted: Training, tmp_path: Path) -> None:
    jobs = submit(server, shards, tmp_path / "run", "--chain", "2")
    assert len(jobs) == 2
    for job in jobs:
        server.wait(job)
    training = Training(server, jobs[0], tmp_path / "run")
    assert "the job before finished this run: nothing is left to do" in training.output
    assert_same_bits(read_run(training.run_dir), read_run(uninterrupted.run_dir))
