"""One run is broken in every way there is, one after the other, goes on each time, and ends as if nothing had been."""

import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from hpctrain.data.manifest import Manifest
from hpctrain.training.checkpoint import latest_checkpoint
from tests.faults.conftest import GONE_SECONDS, STEPS, Faults
from tests.training.conftest import HPCTRAIN, Run, assert_same_bits, metrics_of, read_run, wait_for_step

pytestmark = pytest.mark.mpi

HOST = os.uname().nodename
STALL_SECONDS = 3.0

# Fault, exit codes, what the last line of ours says (None: a killed rank says nothing; mpirun does).
CHAIN = [
    ("kill@start:0:1", {137, 9, 1}, None),
    ("kill@start:0:0", {137, 9, 1}, None),
    ("kill@step:3:1", {137, 9, 1}, None),
    ("kill@step:5:0", {137, 9, 1}, None),
    ("kill@save:6:0", {137, 9, 1}, None),
    ("kill@saving:6:1", {137, 9, 1}, None),
    ("kill@evaluate:1:0", {137, 9, 1}, None),
    ("kill@evaluate:1:1", {137, 9, 1}, None),
    ("raise@step:7:1", {1}, rf"RuntimeError: the memory of this node is broken \(rank 1 on {HOST}\)"),
    ("memory@step:7:1", {1}, rf"out of memory \(rank 1 on {HOST}\): .* smaller train.micro_batch"),
    (
        "nan@step:8:1",
        {2},
        rf"step 8: the loss or a gradient is NaN or infinite on rank 1 on {HOST}; lower .*resumes from step-00000007",
    ),
    ("full@step:8:0", {2}, r"could not be written \(File too large\); make room .*resumes"),
    ("term@step:8:1", {85}, None),
    ("int@step:9:0", {85}, None),
    ("usr1@step:10:*", {85}, None),
    ("stop@step:16:1", {1}, rf"no progress for \d+ s at step 16: rank 1 on {HOST} does not answer .*start again"),
    ("stop@step:20:0", {1}, rf"no progress for \d+ s at step 20: rank 0 on {HOST} does not answer .*start again"),
    ("hang@step:25:1", {1}, rf"at step 25: rank 1 on {HOST} is behind the others, .*/stacks; .*start again"),
]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("chain") / "run"


@pytest.mark.parametrize(("fault", "codes", "says"), CHAIN, ids=[fault for fault, _, _ in CHAIN])
def test_a_job_ends_and_says_why(fault: str, codes: set[int], says: str | None, faults: Faults, run_dir: Path) -> None:
    stalls = fault.startswith(("stop", "hang"))
    stops = 85 in codes  # after a whole step and a checkpoint, however busy the machine is
    ended = faults.run(run_dir, fault, f"train.stall_seconds={STALL_SECONDS if stalls else 60}")
    print(f"{fault}: exit code {ended.outcome.code}, {ended.seconds:.1f} s: {ended.said}")
    assert ended.outcome.code in codes, ended.outcome
    assert ended.seconds is not None and ended.seconds < GONE_SECONDS + 5 * stalls * STALL_SECONDS + 50 * stops
    if says is not None:
        assert re.search(says, ended.said), ended
    if "raise" not in fault:
        assert "Traceback" not in ended.outcome.stderr
    if ended.outcome.code == 85:
        assert "resumes it" in ended.outcome.stdout
    if fault.startswith("hang"):
        assert re.search(r'injected.py", line \d+ in act', (run_dir / "stacks" / "rank-1.txt").read_text())
    left = list((run_dir / "checkpoints").glob("step-*")) if run_dir.exists() else []
    if left:  # what is there is whole
        checkpoint, complaints = latest_checkpoint(run_dir / "checkpoints")
        assert checkpoint is not None and complaints == []


def test_what_was_broken_is_passed_over_and_nothing_is_lost(faults: Faults, run_dir: Path, undisturbed: Run) -> None:
    """The newest checkpoint is damaged, the clock of a rank jumps back a day, and nobody notices."""
    newest = sorted((run_dir / "checkpoints").glob("step-*"))[-1]
    (newest / "optimizer.npz").unlink()
    ended = faults.run(run_dir, "clock@step:25:1")
    assert ended.outcome.code == 0, ended.outcome.stderr[-3000:]
    assert "going back to an earlier checkpoint" in ended.outcome.stdout and newest.name in ended.outcome.stdout
    assert_same_bits(read_run(run_dir), undisturbed)
    assert max(read_run(run_dir).losses) == STEPS
    assert not (run_dir / "run.lock").exists()
    assert "NaN" not in (run_dir / "metrics.jsonl").read_text()


def test_an_update_that_is_no_number_can_be_left_out(faults: Faults, tmp_path: Path) -> None:
    """On all ranks, wherever it came from, and counted."""
    ended = faults.run(tmp_path / "run", "nan@step:3:1", "train.on_bad_step=skip", "train.epochs=1")
    assert ended.outcome.code == 0, ended.outcome.stderr[-3000:]
    assert "update of step 3 is left out" in ended.outcome.stdout
    lines = metrics_of(tmp_path / "run")
    losses = {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}
    assert [step for step, loss in losses.items() if loss is None] == [3]
    assert lines[-1]["skipped_updates"] == 1 and lines[-1]["reason"] == "finished"
    weights = read_run(tmp_path / "run").weights.values()
    assert all(np.isfinite(array).all() for array in weights)


@pytest.mark.parametrize("handling", ["stop", "skip"])
def test_a_loss_far_above_the_usual(handling: str, faults: Faults, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    settings = ["train.loss_spike=5", f"train.on_bad_step={handling}", "checkpoint.every_steps=100"]
    ended = faults.run(run_dir, "spike@step:15:*", *settings)
    print(f"spike: exit code {ended.outcome.code}: {ended.said}")
    if handling == "stop":
        assert ended.outcome.code == 2 and "step 15: the loss is" in ended.said, ended
        assert "5 times the usual" in ended.said and "resumes from step-00000014" in ended.said
        assert [path.name for path in (run_dir / "checkpoints").glob("step-*")] == ["step-00000014"]
        ended = faults.run(run_dir, "", *settings)
    assert ended.outcome.code == 0, ended.outcome.stderr[-3000:]
    assert metrics_of(run_dir)[-1]["skipped_updates"] == (1 if handling == "skip" else 0)


def test_weights_that_drift_apart_are_noticed(faults: Faults, tmp_path: Path) -> None:
    """A host that computes wrongly: the run ends before anything wrong is saved."""
    run_dir = tmp_path / "run"
    settings = ["train.check_weights_every=3", "checkpoint.every_steps=4"]
    ended = faults.run(run_dir, "drift@step:5:1", *settings)
    print(f"drift: exit code {ended.outcome.code}: {ended.said}")
    assert ended.outcome.code == 1, ended.outcome
    assert re.search(rf"after step 6 the weights of rank 1 on {HOST} are not those of rank 0, first in", ended.said)
    assert [path.name for path in (run_dir / "checkpoints").glob("step-*")] == ["step-00000004"]


def test_a_rank_that_is_slow_is_named(faults: Faults, tmp_path: Path) -> None:
    """Ten times slower than the other, whose steps take some hundredths of a second."""
    ended = faults.run(tmp_path / "run", "slow@step:10:1", "log.every_steps=5")
    assert ended.outcome.code == 0, ended.outcome.stderr[-3000:]
    found = re.search(rf"warning: {HOST} is slow: 0\.\d+ s a step.*", ended.outcome.stdout)
    assert found, ended.outcome.stdout
    print(found[0])


@pytest.mark.parametrize("damage", ["truncated", "bit-flipped", "missing"])
def test_a_damaged_shard_is_named(damage: str, faults: Faults, tmp_path: Path) -> None:
    broken = tmp_path / "shards"
    shutil.copytree(faults.shards, broken)
    entry = Manifest.load(broken / "train").shards[1]
    path = broken / "train" / entry.file
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        os.truncate(path, path.stat().st_size - 100)
    else:
        with open(path, "r+b") as file:
            file.seek(entry.data_offset + 50)
            byte = file.read(1)[0]
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 4]))
    ended = faults.run(tmp_path / "run", "", f"data.path={broken}")
    print(f"{damage}: exit code {ended.outcome.code}: {ended.said}")
    assert ended.outcome.code == 2 and entry.file in ended.said, ended
    assert "Traceback" not in ended.outcome.stderr


def test_data_that_disappears_is_named(faults: Faults, tmp_path: Path) -> None:
    """The shards are emptied while the job runs."""
    gone = tmp_path / "shards"
    shutil.copytree(faults.shards, gone)
    run_dir = tmp_path / "run"
    command = faults.command(run_dir, f"data.path={gone}", "train.epochs=2000")
    job = faults.launcher.start(2, *command, **faults.environment("slow@step:1:0"))
    wait_for_step(job, run_dir, 2)
    for path in (gone / "train").glob("*.h5"):
        os.truncate(path, 100)
    outcome = job.wait(timeout_seconds=60)
    said = [line for line in outcome.stderr.splitlines() if line.startswith("hpctrain:")]
    print(f"gone: exit code {outcome.code}: {said}")
    assert outcome.code == 2 and str(gone) in said[-1] and "Traceback" not in outcome.stderr, outcome


def test_ranks_that_differ_are_named(faults: Faults, tmp_path: Path) -> None:
    """A rank has another configuration, another one another version of the package."""
    run_dir = tmp_path / "run"
    other = [*HPCTRAIN, *faults.command(run_dir, "train.seed=5")]
    ended = faults.run(run_dir, ranks=1, other=other)
    print(f"configuration: {ended.said}")
    assert ended.outcome.code == 2 and f"rank 1 on {HOST} has train.seed 5" in ended.said, ended
    (tmp_path / "sitecustomize.py").write_text("import hpctrain\nhpctrain.__version__ = '0.0.1'\n")
    path = f"PYTHONPATH={tmp_path}{os.pathsep}{faults.environment()['PYTHONPATH']}"
    ended = faults.run(run_dir, ranks=1, other=["env", path, *HPCTRAIN, *faults.command(run_dir)])
    print(f"version: {ended.said}")
    assert ended.outcome.code == 2 and f"rank 1 on {HOST} has hpctrain 0.0.1" in ended.said, ended
    assert not run_dir.exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a rank another file system")
def test_a_rank_with_other_shards_is_named(faults: Faults, tmp_path: Path) -> None:
    """Of the same names and sizes, as an older copy on a node's own disk might be."""
    other = tmp_path / "shards"
    shutil.copytree(faults.shards, other)
    entries = Manifest.load(other / "train").shards
    first, second = (other / "train" / entry.file for entry in entries[:2])
    size = min(first.stat().st_size, second.stat().st_size)
    second.write_bytes(first.read_bytes()[:size].ljust(entries[1].file_bytes, b"\0")[: entries[1].file_bytes])
    run_dir = tmp_path / "run"
    mount = ["unshare", "--mount", "sh", "-euc", 'mount --bind "$1" "$2"; shift 2; exec "$@"', "sh"]
    mount += [str(other), str(faults.shards)]
    ended = faults.run(run_dir, ranks=1, other=[*mount, *HPCTRAIN, *faults.command(run_dir)])
    print(f"other shards: exit code {ended.outcome.code}: {ended.said}")
    assert ended.outcome.code == 2 and entries[1].file in ended.said and "copy" in ended.said, ended


def test_a_second_job_on_a_run_directory_is_refused(faults: Faults, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    job = faults.launcher.start(1, *faults.command(run_dir, "train.epochs=2000"), **faults.environment("slow@step:1:0"))
    wait_for_step(job, run_dir, 2)
    ended = faults.run(run_dir, ranks=1)
    print(f"second: {ended.said}")
    assert ended.outcome.code == 2 and f"is in use by process {job.ranks()[0]} on {HOST}" in ended.said, ended
    job.process.send_signal(signal.SIGUSR1)
    assert job.wait().code == 85
    steps = [line["step"] for line in metrics_of(run_dir) if line["kind"] == "train"]
    assert steps == list(range(1, len(steps) + 1))


def test_a_directory_that_cannot_be_written(faults: Faults, tmp_path: Path) -> None:
    """Something is in the way of the checkpoints: what a read-only mount amounts to, for root too."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "checkpoints").write_text("")
    ended = faults.run(run_dir)
    print(f"unwritable: {ended.said}")
    assert ended.outcome.code == 2 and str(run_dir) in ended.said and "--run-dir" in ended.said, ended
    assert not (run_dir / "run.lock").exists()
