"""Two ranks beside two processes: the ratios of made-up steps, and what one may type wrong."""

import sys

import pytest

from benchmarks import two_ranks
from benchmarks.two_ranks import Step


def test_ratios_are_of_the_slower_rank_to_each_process(capsys: pytest.CaptureFixture[str]) -> None:
    ranks = [[Step(2.0, 1.5), Step(1.9, 1.5)]] * 3
    apart = [[Step(1.0, 0.9), Step(2.2, 2.0)]] * 3
    two_ranks.report("resnet50", "float32", ranks, apart)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "resnet50, float32, 8 images a rank, 3 rounds"
    assert lines[1] == "  seconds of a step: ranks 2.000, slower process 2.200"
    ratios = {name.strip(): float(rest.split()[0]) for name, rest in ((line[:22], line[22:]) for line in lines[2:])}
    independent = 1 / 1.0 + 1 / 2.2  # batches a second of both
    assert ratios == {
        "ranks / independent": round(2 / 2.0 / independent, 3),
        "ranks / together": round(2.2 / 2.0, 3),
        "by processor time": round(2.9 / 3.0, 3),
    }


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["resnet18"], "there is no model resnet18; take of resnet50, alexnet_bn, resnet20"),
        (["--rounds", "1"], "--rounds is 1; there are no quartiles of fewer than 2"),
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
