"""Who is named when nothing moves, and what a rank leaves behind."""

import io
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from hpctrain.parallel.world import World
from hpctrain.training import watchdog
from hpctrain.training.watchdog import (
    EVALUATE,
    INPUT,
    STEP,
    TimedConsole,
    Watchdog,
    Watched,
    name_the_missing,
    read_places,
)

HOSTS = ["a", "a", "b", "b"]


def test_ranks_without_a_word_are_named() -> None:
    assert "rank 2 on b, rank 3 on b does not answer" in name_the_missing({0: (5, STEP), 1: (5, STEP)}, HOSTS)


def test_ranks_behind_the_others_are_named() -> None:
    places = {0: (5, STEP), 1: (5, STEP), 2: (5, INPUT), 3: (5, STEP)}
    assert "rank 2 on b is behind the others, waiting for its input in step 5" in name_the_missing(places, HOSTS)
    assert "rank 3 on b is behind" in name_the_missing(places | {2: (5, STEP), 3: (4, EVALUATE)}, HOSTS)


def test_all_in_the_same_place() -> None:
    assert "all ranks are computing or reducing" in name_the_missing(dict.fromkeys(range(4), (5, STEP)), HOSTS)
    assert "file system" in name_the_missing({}, HOSTS)


def test_of_thousands_a_few_are_named() -> None:
    words = name_the_missing({0: (5, STEP)}, [f"node{i}" for i in range(2000)])
    assert "rank 1 on node1" in words and "and 1991 more" in words and len(words) < 400


def test_places_that_cannot_be_read_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "rank-0.txt").write_text("12 2\nrank 0 ...\n")
    (tmp_path / "rank-1.txt").write_text("")
    assert read_places(tmp_path) == {0: (12, 2)}
    assert read_places(tmp_path / "none") == {}


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the watchdog would have ended the job with."""
    messages: list[str] = []
    monkeypatch.setattr(watchdog, "end_job", lambda message, code: messages.append(message))
    monkeypatch.setattr(watchdog, "_GRACE_SECONDS", 0.05)
    yield messages


def wait_until(condition: object) -> None:
    deadline = time.monotonic() + 20
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stall_is_told_with_stacks(ended: list[str], lone_world: World, tmp_path: Path) -> None:
    (tmp_path / "rank-7.txt").write_text("of an earlier stall")
    watch = Watchdog(lone_world, tmp_path, limit_seconds=0.2)
    assert not (tmp_path / "rank-7.txt").exists()
    for step in (1, 2, 3):
        watch.at(INPUT, step)
        watch.at(STEP, step)
    wait_until(lambda: ended)
    watch.close()
    assert "no progress for" in ended[0] and "at step 3" in ended[0] and str(tmp_path) in ended[0]
    text = (tmp_path / "rank-0.txt").read_text()
    assert "rank 0 on node7" in text and "test_a_stall_is_told_with_stacks" in text
    assert read_places(tmp_path) == {0: (3, STEP)}


def test_who_moves_on_is_left_alone(ended: list[str], lone_world: World, tmp_path: Path) -> None:
    watch = Watchdog(lone_world, tmp_path, limit_seconds=0.3)
    reader = Watched([1, 2], watch.sign)
    for step in range(1, 40):
        watch.at(INPUT, step)
        assert reader.count(1) == 1
        time.sleep(0.02)
    watch.close()
    assert ended == [] and list(tmp_path.iterdir()) == []


def test_the_first_step_may_take_longer_and_so_may_what_usually_does(lone_world: World, tmp_path: Path) -> None:
    watch = Watchdog(lone_world, tmp_path, limit_seconds=100)
    watch.at(EVALUATE, 6)  # made up for after a restart
    watch.at(INPUT, 7)
    watch.at(STEP, 7)
    assert watch.allowed_seconds == 1000
    watch.at(INPUT, 8)
    assert watch.allowed_seconds == pytest.approx(100)
    time.sleep(0.2)
    watch.at(STEP, 8)
    assert 100.4 <= watch.allowed_seconds < 110
    watch.ending()
    assert watch.allowed_seconds == 1000
    watch.close()


def test_a_quiet_console_gets_a_line(lone_world: World, tmp_path: Path) -> None:
    text = io.StringIO()
    with redirect_stdout(text):
        console = TimedConsole(True)
        watch = Watchdog(lone_world, tmp_path, limit_seconds=10, quiet_seconds=0.3)
        watch.keep_alive_line(console)
        watch.at(INPUT, 12)
        wait_until(lambda: text.getvalue().count("\n") >= 2)
        watch.close()
    assert "step 12, waiting for its input for" in text.getvalue().splitlines()[0]
