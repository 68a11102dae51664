"""Two ranks beside two processes: made-up steps, real programs that are stopped, and what one may type wrong."""

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers import two_ranks
from benchmarks.peers.runner import Failed, OutOfTime
from benchmarks.peers.slices import Program, Trace

# Ran from 0 to 2, from 10 to 12, 20 to 22 and 30 to 33: 2, 4, 6 and 9 seconds in all until the end of each.
SLICES = [(0.0, 2.0), (10.0, 12.0), (20.0, 22.0), (30.0, 33.0)]
STEPPING = """
import sys, time
from pathlib import Path
from benchmarks.peers.slices import step_forever

def step():
    until = time.process_time() + 0.01
    while time.process_time() < until:
        pass
    if Path(sys.argv[2]).exists():
        sys.exit(3)
step_forever(step, Path(sys.argv[1]))
"""


def test_time_in_which_a_program_was_stopped_does_not_count() -> None:
    # Steps end after 1, 3, 4.5, 5.5 and 8 seconds of running.
    trace = Trace(SLICES, [1.0, 11.0, 20.5, 21.5, 32.0], [0.5, 2.5, 4.0, 4.75, 7.0])
    assert trace.step_seconds().tolist() == [2.0, 1.5, 1.0, 2.5]
    # From 2 to 4 seconds of running: half of the first step and 1 of 1.5 seconds of the next one.
    assert trace.steps_in_slices() == pytest.approx([0.5 + 1 / 1.5, 0.5 / 1.5 + 1 + 0.5 / 2.5])
    assert trace.processor_seconds_a_step() == pytest.approx(6.5 / 4)


def test_ratios_are_of_both_ranks_to_both_processes() -> None:
    slices = [(100.0 * i, 100.0 * i + 50.0) for i in range(6)]

    def steps(seconds: float, processor_seconds: float) -> Trace:
        running = np.arange(1, int(300 / seconds)) * seconds
        ends = 100 * (running // 50) + running % 50
        return Trace(slices, ends.tolist(), (np.arange(len(ends)) * processor_seconds).tolist())

    found = two_ranks.summarize([steps(2.0, 1.5)] * 2, [steps(1.0, 0.75), steps(2.5, 2.5)])
    assert found["ranks"] == pytest.approx([1.0]) and found["independent"] == pytest.approx([1.4])
    assert found["ranks / together"] == pytest.approx(2.5 / 2.0)
    assert found["by processor time"] == pytest.approx(3.25 / 3.0)


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    """Two processes with steps of 10 ms, which end when there is a file `stop`."""
    command = [sys.executable, "-c", STEPPING, str(tmp_path / "steps"), str(tmp_path / "stop")]
    program = Program("2 processes", [command] * 2, 2, tmp_path / "steps", {})
    yield program
    program.end()


def test_a_program_takes_steps_in_its_slices_only(program: Program, tmp_path: Path) -> None:
    def lines() -> int:
        return sum(file.read_text().count("\n") for file in (tmp_path / "steps").iterdir())

    program.wait(math.inf)
    time.sleep(0.1)  # what was on its way is there
    for _ in range(3):
        before = lines()
        time.sleep(0.3)
        assert lines() == before
        program.run(math.inf, 0.3)
        assert lines() > before
    for trace in program.traces(math.inf):
        assert len(trace.slices) == 5 and len(trace.steps_in_slices()) == 3
        # No more than a step a 10 ms, whatever was stopped in between.
        assert 0 < trace.steps_in_slices().sum() <= 1.01 * sum(b - a for a, b in trace.slices[1:-1]) / 0.01
        assert trace.processor_seconds_a_step() >= 0.01


def test_a_program_that_ends_is_told(program: Program, tmp_path: Path) -> None:
    program.wait(math.inf)
    (tmp_path / "stop").touch()
    with pytest.raises(Failed, match="2 processes ended with exit code 3; see above"):
        for _ in range(100):
            program.run(math.inf, 0.1)


def test_the_time_for_all_is_kept(program: Program) -> None:
    program.wait(math.inf)
    with pytest.raises(OutOfTime, match="the time was up"):
        program.run(time.monotonic(), 0.01)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["resnet18"], "there is no model resnet18; take of resnet50, alexnet_bn, resnet20"),
        (["--seconds", "10"], "--seconds is 10; two rounds of each take 32"),
        ([], "there is no mpirun on the PATH; put the bin folder of the environment there"),
    ],
)
def test_mistakes(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(sys, "argv", ["two_ranks", *arguments])
    with pytest.raises(SystemExit, match="2"):
        two_ranks.main()
    assert capsys.readouterr().err.endswith(f"error: {sentence}\n")
