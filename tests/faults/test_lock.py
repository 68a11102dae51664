"""Who may have a run directory: one job at a time, and never one that has ended."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from hpctrain.errors import UserError
from hpctrain.training.lock import FILE_NAME, Holder, RunLock

BEAT, SILENT = 0.05, 0.4


class Listener:
    """What a lock says and does."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.lost: list[str] = []
        self.locks: list[RunLock] = []

    def take(self, run_dir: Path, silent: float = SILENT) -> RunLock:
        lock = RunLock(run_dir, beat_seconds=BEAT, silent_seconds=silent)
        lock.acquire(self.said.append, self.lost.append)
        self.locks.append(lock)
        return lock


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    for name in ("SLURM_JOB_ID", "PBS_JOBID"):
        monkeypatch.delenv(name, raising=False)
    listener = Listener()
    yield listener
    for lock in listener.locks:
        lock.release()


def holder(run_dir: Path) -> Holder:
    return Holder(**json.loads((run_dir / FILE_NAME).read_text()))


def leave(run_dir: Path, listener: Listener, age_seconds: float = 0.0, **changes: Any) -> Holder:
    """Leave a lock there as another process would have, which then fell silent."""
    lock = listener.take(run_dir)
    other = replace(holder(run_dir), **{"token": "another", **changes})
    lock.release()
    run_dir.mkdir(exist_ok=True)
    (run_dir / FILE_NAME).write_text(json.dumps(asdict(other)))
    then = time.time() - age_seconds
    os.utime(run_dir / FILE_NAME, (then, then))
    return other


def test_taken_and_given_back(listener: Listener, tmp_path: Path) -> None:
    run_dir = tmp_path / "a" / "run"
    lock = listener.take(run_dir)
    mine = holder(run_dir)
    assert (mine.pid, mine.host) == (os.getpid(), os.uname().nodename)
    lock.release()
    assert not run_dir.exists()  # nothing was put into it
    run_dir.mkdir(parents=True)
    (run_dir / "config.yaml").touch()
    listener.take(run_dir).release()
    assert os.listdir(run_dir) == ["config.yaml"]


def test_a_living_process_of_this_machine_keeps_it(listener: Listener, tmp_path: Path) -> None:
    listener.take(tmp_path)
    with pytest.raises(UserError) as caught:
        listener.take(tmp_path)
    assert f"process {os.getpid()} on {os.uname().nodename}" in str(caught.value) and "--run-dir" in str(caught.value)
    assert listener.said == []


def test_a_dead_process_of_this_machine_loses_it_at_once(listener: Listener, tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    leave(tmp_path, listener, pid=child.pid)
    listener.take(tmp_path)
    assert holder(tmp_path).pid == os.getpid() and listener.said == []


def test_a_process_number_that_is_used_again_is_another_process(listener: Listener, tmp_path: Path) -> None:
    leave(tmp_path, listener, started="1")
    listener.take(tmp_path)
    assert listener.said == []


def test_a_host_that_was_started_anew_holds_nothing(listener: Listener, tmp_path: Path) -> None:
    leave(tmp_path, listener, boot="an earlier one")
    listener.take(tmp_path)
    assert listener.said == []


@pytest.mark.parametrize("changes", [{"host": "node7", "boot": "another"}, {"namespace": "pid:[1]"}])
def test_a_silent_process_of_another_host_loses_it_after_a_while(
    changes: dict[str, str], listener: Listener, tmp_path: Path
) -> None:
    leave(tmp_path, listener, 0.0, **changes)
    started = time.monotonic()
    listener.take(tmp_path)
    assert time.monotonic() - started >= SILENT / 2
    assert holder(tmp_path).pid == os.getpid()
    assert "waiting up to" in listener.said[0]


def test_a_lock_that_is_old_already_is_not_waited_for(listener: Listener, tmp_path: Path) -> None:
    leave(tmp_path, listener, age_seconds=100, host="node7", boot="another")
    listener.take(tmp_path, silent=60)
    assert listener.said == []


def test_a_beating_process_of_another_host_keeps_it(listener: Listener, tmp_path: Path) -> None:
    """The holder is a process of ours under another name: its beat is what counts."""
    listener.take(tmp_path)
    path = tmp_path / FILE_NAME
    path.write_text(json.dumps(asdict(replace(holder(tmp_path), host="node7", boot="another", job="4711"))))
    with pytest.raises(UserError) as caught:
        listener.take(tmp_path, silent=60)
    assert "on node7, job 4711" in str(caught.value)


def test_giving_back_what_is_not_ours_any_more_does_nothing(listener: Listener, tmp_path: Path) -> None:
    lock = listener.take(tmp_path)
    other = replace(holder(tmp_path), token="another")
    (tmp_path / FILE_NAME).write_text(json.dumps(asdict(other)))
    lock.release()
    assert holder(tmp_path) == other


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"host": 1}', b"\0" * 50, b"\xff"])
def test_a_damaged_lock_is_a_silent_one(content: bytes, listener: Listener, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    listener.take(tmp_path)
    assert holder(tmp_path).pid == os.getpid()


def test_a_lock_removed_by_hand_comes_back(listener: Listener, tmp_path: Path) -> None:
    listener.take(tmp_path)
    (tmp_path / FILE_NAME).unlink()
    deadline = time.monotonic() + 10
    while not (tmp_path / FILE_NAME).exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_place_below_a_file(listener: Listener, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        listener.take(tmp_path / "file" / "run")
    assert "file/run" in str(caught.value) and "--run-dir" in str(caught.value)


def test_one_of_many_that_come_at_once_gets_it(tmp_path: Path) -> None:
    """Processes that find the same lock of a dead host; a winner holds on until all have tried."""
    (tmp_path / FILE_NAME).write_bytes(b"")
    old = time.time() - 100
    os.utime(tmp_path / FILE_NAME, (old, old))
    program = (
        "import sys; from pathlib import Path; from hpctrain.training.lock import RunLock; "
        "from hpctrain.errors import UserError; lock = RunLock(Path(sys.argv[1]))\n"
        "try: lock.acquire(print, print)\n"
        "except UserError: sys.exit(3)\n"
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path)]
    jobs = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(4)]
    deadline = time.monotonic() + 120
    while sum(job.poll() is not None for job in jobs) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for job in jobs:
        job.communicate(timeout=60)
    assert sorted(job.returncode for job in jobs) == [0, 3, 3, 3]
