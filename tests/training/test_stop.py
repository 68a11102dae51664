"""What makes a run stop before its end, and what does not."""

import os
import signal
import time
from collections.abc import Iterator

import pytest

from hpctrain.training.stop import EXIT_PREEMPTED, StopRequest, job_end_time

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    request = StopRequest()
    yield request
    request.close()


def test_nothing_asks(stop: StopRequest) -> None:
    assert not stop.requested and stop.reason == ""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_asks_and_is_named(stop: StopRequest, number: signal.Signals) -> None:
    os.kill(os.getpid(), number)
    assert stop.requested and number.name in stop.reason


def test_the_first_reason_stays(stop: StopRequest) -> None:
    for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
        os.kill(os.getpid(), number)
    assert "SIGUSR1" in stop.reason


def test_a_second_ctrl_c_ends_at_once(stop: StopRequest) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.requested
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_batch_systems_may_ask_again_and_again(stop: StopRequest) -> None:
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested


def test_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    request = StopRequest()
    assert [signal.getsignal(number) for number in SIGNALS] != before
    request.close()
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_the_end_of_the_job_asks_a_margin_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    request = StopRequest(end_time_seconds=1500, margin_seconds=100)
    try:
        assert not request.requested
        now[0] = 1399.9
        assert not request.requested
        now[0] = 1400.0
        assert request.requested and "walltime" in request.reason
    finally:
        request.close()


def test_a_step_and_an_evaluation_are_begun_only_if_they_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    request = StopRequest(end_time_seconds=1500, margin_seconds=100)
    try:
        request.step_seconds = 80
        now[0] = 1239.0  # a vote at 1319 would be heard at 1399
        assert not request.requested and not request.leaves_no_time_for(160)
        now[0] = 1240.0
        assert request.requested
    finally:
        request.close()
    request = StopRequest(end_time_seconds=1500, margin_seconds=100)
    try:
        assert request.leaves_no_time_for(160) and "walltime" in request.reason and request.requested
    finally:
        request.close()
    request = StopRequest()
    try:
        assert not request.leaves_no_time_for(1e9)
    finally:
        request.close()


def test_when_the_job_ends() -> None:
    assert job_end_time({}) is None
    assert job_end_time({"SLURM_JOB_END_TIME": "1700000000"}) == 1.7e9
    assert job_end_time({"SLURM_JOB_END_TIME": "1700000000", "HPCTRAIN_END_TIME": "1600000000.5"}) == 1600000000.5
    assert job_end_time({"SLURM_JOB_END_TIME": "1700000000", "HPCTRAIN_END_TIME": "soon"}) == 1.7e9
    assert job_end_time({"SLURM_JOB_END_TIME": "UNLIMITED"}) is None


def test_job_scripts_know_the_exit_code() -> None:
    assert EXIT_PREEMPTED == 85
