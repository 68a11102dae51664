"""The side-by-side benchmark: turns and figures with contenders that only print, and the page from made-up figures."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers import figures, parts, plan, runner
from benchmarks.peers.budget import Budget
from benchmarks.peers.figures import Spread
from benchmarks.peers.page import ratio_lines, write_page
from benchmarks.peers.plan import Contender, Goal, Group
from benchmarks.peers.profile_step import ALL, REST, WAITING, summarize
from benchmarks.peers.startup import PHASES, Clock
from benchmarks.peers.turns import Turns, more_rounds

GROUP = Group(
    "Made up",
    "resnet20",
    "float32",
    steps=5,
    quick_steps=3,
    contenders=[
        Contender("A", ("-c", "pass"), quick=True),
        Contender("B", ("-c", "pass"), rounds=1),
        Contender("C", ("-c", "pass"), quick=True),
    ],
    goals=[Goal("A", "C", limit=1.5)],
)


def printing(rate: float, more: str = "") -> tuple[str, ...]:
    """A program that prints figures, whatever it is told."""
    line = json.dumps({"images_per_second": rate, "step_seconds": [1], "peak_rss_mb": 7, "start_seconds": 2})
    return ("-c", f"import sys\n{more}\nprint('chatter')\nprint({line!r})")


class Hours:
    """A clock that goes on by so many seconds with each contender."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def turns(
    quick: bool = False, failing: str = "", seconds: float = 1e9, each: float = 1.0
) -> tuple[str, list[dict[str, Any]], list[str]]:
    """Three rounds of GROUP in a budget of `seconds`, `each` for a contender; who ran, results and who was left out."""
    called: list[str] = []
    clock = Hours()

    def run(group: Group, contender: Contender) -> dict[str, Any]:
        called.append(contender.name)
        clock.now += each
        if contender.name == failing:
            raise runner.Failed("no luck")
        return {"images_per_second": 1.0}

    budget = Budget(seconds, clock)
    one = Turns(GROUP, quick, run, lambda text: None, budget, clock)
    one.take_round()
    more_rounds([one], 3, budget, lambda turns: None)
    return "".join(called), one.results, one.left_out


def test_contenders_take_turns_forward_and_back() -> None:
    called, results, _ = turns()
    assert called == "ABC" + "CA" + "AC"
    assert [(r["contender"], r["round"]) for r in results][:4] == [("A", 1), ("B", 1), ("C", 1), ("C", 2)]


def test_a_quick_run_leaves_contenders_out() -> None:
    assert turns(quick=True)[0] == "AC" + "CA" + "AC"


def test_who_fails_is_out_and_the_others_go_on() -> None:
    called, results, _ = turns(failing="A")
    assert called == "ABC" + "C" + "C"
    assert next(r for r in results if "error" in r)["error"] == "no luck"
    assert figures.of_contender(results, "A", "images_per_second") is None
    assert figures.ratio(results, GROUP.goals[0]) is None


def test_rounds_go_on_while_the_next_one_fits() -> None:
    # The first round takes 30 s, each of the others 20.
    assert turns(seconds=75, each=10)[0] == "ABC" + "CA" + "AC"
    assert turns(seconds=65, each=10)[0] == "ABC" + "CA"
    assert turns(seconds=45, each=10)[0] == "ABC"


def test_a_first_round_ends_with_the_time_and_says_who_is_missing() -> None:
    called, results, left_out = turns(seconds=25, each=10)
    assert called == "AB" and len(results) == 2
    assert left_out == ["Made up: C, round 1: the time was up"]


def test_the_end_of_the_time_ends_whoever_runs() -> None:
    with pytest.raises(runner.OutOfTime):
        runner.run_commands([[sys.executable, "-c", "import time; time.sleep(600)"]], until=time.monotonic() + 0.2)


def test_what_can_only_be_emulated_comes_last_and_once() -> None:
    able = plan.groups_for(["avx512f", "avx512_bf16"])
    assert able == list(plan.GROUPS)
    emulated = [group for group in plan.groups_for(["avx2"]) if group.precision == "mixed_bfloat16"]
    assert plan.groups_for(["avx2"])[-len(emulated) :] == emulated and len(emulated) == 2
    assert all(group.rounds == 1 and group.steps <= 2 for group in emulated)


def test_more_ranks_than_memory_holds_are_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "_available_mb", lambda: 10_000.0)
    before = [{"ranks": 2, "shared_out_mb": 700.0}, {"ranks": 16, "shared_out_mb": 500.0}]
    parts.check_memory(18, before)
    with pytest.raises(runner.LeftOut, match=r"20 ranks would take 10\.0 GB of the 10\.0 GB that are free"):
        parts.check_memory(20, before)


def test_a_contender_gets_its_work_and_its_figures_come_back() -> None:
    check = "assert sys.argv[sys.argv.index('--steps') + 1] == '3' and '--threads' in sys.argv"
    found = runner.run_contender(GROUP, Contender("A", printing(10.5, check), micro_batch=4), quick=True)
    assert found["images_per_second"] == 10.5 and found["start_seconds"] == 2


def test_processes_are_added_up_and_know_each_other() -> None:
    program = printing(4.0, "assert len(sys.argv[sys.argv.index('--ports') + 1].split(',')) == 2")
    found = runner.run_contender(GROUP, Contender("A", program, "processes", 2))
    assert found["images_per_second"] == 8.0 and found["peak_rss_mb"] == 7


def test_a_failure_is_told_with_its_reason(tmp_path: Path) -> None:
    with pytest.raises(runner.Failed, match="exit code 1: ValueError: too hot"):
        runner.run_contender(GROUP, Contender("A", ("-c", "raise ValueError('too hot')")))
    framed = "import sys; sys.exit('-' * 70 + '\\nNo slots were there.\\n' + '-' * 70)"
    with pytest.raises(runner.Failed, match=r"exit code 1: No slots were there\."):
        runner.run_contender(GROUP, Contender("A", ("-c", framed)))
    with pytest.raises(runner.Failed, match="0 of 1 processes"):
        runner.run_contender(GROUP, Contender("A", ("-c", "pass")))
    # One that fails must not leave the other one waiting for it.
    waits = "import sys, time\nsys.exit(3) if sys.argv[sys.argv.index('--process') + 1] == '1' else time.sleep(600)"
    with pytest.raises(runner.Failed, match="exit code 3"):
        runner.run_contender(GROUP, Contender("A", ("-c", waits), "processes", 2))


def test_no_time_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "TIMEOUT_SECONDS", 0.2)
    with pytest.raises(runner.Failed, match="not done after"):
        runner.run_commands([[sys.executable, "-c", "import time; time.sleep(600)"]])


def run_of(contender: str, number: int, rate: float, memory: float = 100.0) -> dict[str, Any]:
    found = {"group": "resnet50-fp32", "contender": contender, "round": number, "images_per_second": rate}
    return found | {"peak_rss_mb": memory, "start_seconds": 3.0, "step_seconds": [1.0], "seconds": 1.0}


def test_ratios_are_taken_within_rounds() -> None:
    runs = [run_of("A", 1, 10), run_of("C", 1, 5), run_of("A", 2, 30), run_of("C", 2, 10), run_of("A", 3, 1)]
    assert figures.ratio(runs, Goal("A", "C")) == Spread(2.5, 2.0, 3.0)


def test_a_median_meets_its_goal_from_either_side() -> None:
    assert figures.verdict(Spread(1.25, 1.0, 2.0), 1.25) == "met"
    assert figures.verdict(Spread(1.24, 1.0, 2.0), 1.25) == "**missed**"
    assert figures.verdict(Spread(1.24, 1.0, 2.0), 1.15, at_most=True) == "**missed**"
    assert figures.verdict(Spread(1.1, 1.0, 2.0), 1.15, at_most=True) == "met"
    assert figures.verdict(None, 1.0) == "" and figures.verdict(Spread(1, 1, 1), None) == ""


def made_up() -> dict[str, Any]:
    """Two rounds in which hpctrain is 1.5 and 1.2 times PyTorch, and two ranks reach 0.9 of independent ones."""
    runs = [run_of(plan.OURS, 1, 15, 900), run_of(plan.OURS, 2, 12, 920), run_of(plan.KERAS, 1, 5, 1000)]
    runs[0]["flops_per_image"] = 23e9
    runs += [run_of(plan.TORCH, 1, 10), run_of(plan.TORCH, 2, 10)]
    runs += [run_of(plan.RANKS, 1, 10)]
    failed = {"group": "resnet50-fp32", "contender": plan.WORKERS, "round": 1, "error": "exit code 1: no"}
    size = {"bytes": 2**20, "horovod_seconds": 2e-3, "mpi_seconds": 1e-3, "mpi_in_place_seconds": 1.6e-3}
    start = {
        "phases": dict.fromkeys(PHASES, 1.5),
        "first_step_seconds": 13.5,
        "step_seconds": 0.25,
        "peak_rss_mb": 700.0,
    }
    bare = [run_of(name, 1, rate) for name, rate in ((plan.BARE, 12), (plan.BARE_TENSORFLOW, 10))]
    bare = [run | {"convolution_flops_per_image": 22e9} for run in bare]
    link_size: dict[str, Any] = {f"{path}_seconds": 0.2 for path in ("horovod", "mpi", "mpi_in_place")} | {
        "bytes": 20 * 2**20
    }
    link_size |= {f"{path}_range_seconds": [0.19, 0.21] for path in ("horovod", "mpi", "mpi_in_place")}
    tcp = {"one_way_bytes_per_second": [119e6], "both_ways_bytes_per_second": [118e6]}
    profile = summarize({"_MklNativeConv2D": 30.0, "HorovodGroupedAllreduce": 40.0, "Other": 5.0}, 100.0)
    return {
        "profile": [profile | {"group": "resnet50-fp32", "contender": "2 ranks"}],
        "link": {"rate_mbit": 1000, "tcp": tcp, "allreduce": {"ranks": 2, "repeats": 3, "sizes": [link_size]}},
        "machine": {
            "cpu": "Abacus 9",
            "instructions": ["avx2"],
            "cores": 2,
            "memory_gb": 8.0,
            "kernel": "6.1",
            "load_average": 0.25,
        },
        "versions": {"Python": "3.11.7", "keras": "3.10.0"},
        "quick": False,
        "date": "2026-01-02",
        "seconds": 1800.0,
        "notes": ["PyTorch was left out: No module named 'torch'"],
        "runs": [*runs, *bare, failed],
        "two_ranks": [
            {
                "model": "resnet50",
                "ranks": [0.9, 1.1, 0.8],
                "independent": [1.0, 1.0, 1.0],
                "ranks / together": 1.025,
                "by processor time": 0.975,
            }
        ],
        "allreduce": [{"sizes": [size]}],
        "start_up": [start | {"ranks": ranks, "images_per_second": rate} for ranks, rate in ((2, 256.0), (8, 192.0))],
        "input": {"jpeg shards": 1724, "tfrecord": 1267, "jpeg shards / tfrecord": [1.35, 1.36, 1.38]},
    }


def test_rows_tell_ratio_goal_and_verdict() -> None:
    rows = {row[1]: row for row in ratio_lines(made_up())}
    assert rows[f"{plan.OURS} / {plan.TORCH}"][2:] == ["1.35", "1.20", "1.50", "1.25", "met"]
    assert rows[f"{plan.RANKS} / {plan.APART}"][2:] == ["0.90", "0.80", "1.10", "0.98", "**missed**"]
    assert rows[f"{plan.OURS} / {plan.KERAS}"][2:] == ["3.00", "3.00", "3.00", "", ""]
    assert rows[f"{plan.OURS} / {plan.KERAS}, peak memory"][2:] == ["0.90", "0.90", "0.90", "at most 1.15", "met"]
    in_place = rows["Horovod as the trainer uses it / MPI_Allreduce in place, 1 MiB"]
    link = rows["Horovod as the trainer uses it / a link of 1 Gbit/s, 20 MiB"]
    assert link[2:] == ["0.84", "0.80", "0.88", "0.95", "**missed**"]
    assert in_place[2:] == ["0.80", "0.80", "0.80", "0.9", "**missed**"]
    assert rows["JPEG shards / tuned TFRecord pipeline"][2:] == ["1.36", "1.35", "1.38", "1.0", "met"]
    assert rows["images/s of 8 ranks / 2 ranks on 2 cores, 32 a rank"][2] == "0.75"
    assert not any("ddp" in words.lower() for words in rows)


def test_the_page_has_everything_that_was_measured() -> None:
    page = write_page(made_up())
    assert "Abacus 9 (avx2), 2 cores" in page and "Keras 3.10.0" in page and "in 30 minutes" in page
    # 13.5 images/s of 23 GFLOP on two cores of 256 GFLOP/s
    assert f"| {plan.OURS} | 16 | 13.5 | 12.0 to 15.0 | 61% | 910 | 3.0 | 2 |" in page
    assert "| 1 MiB | 2.000 | 1.000 | 1.600 | 0.80 | 0.80 | 0.80 |" in page
    assert "| **from mpirun to the end of the first step** | 13.50 | 13.50 |" in page
    assert f"- resnet50-fp32, {plan.WORKERS}: exit code 1: no" in page and "No module named 'torch'" in page
    assert "AlexNet-BN, float32\n" not in page
    # 12 images/s of 22 GFLOP and 10 of 23, on two cores
    assert "| ResNet-50, float32 | hpctrain | 132 | 52% | 115 | 45% | 87% | 83% |" in page
    assert "| ResNet-50, float32 | TensorFlow | 110 | 43% | 115 | 45% | 105% | 100% |" in page
    assert "| convolutions | 30.0 | 30.0 |" in page
    assert "| ResNet-50, float32 | 2 x 8 | 7.5 | 8.0 | 0.90 | 0.80 | 1.10 | 1.02 | 0.97 | 3 |" in page
    assert "| 20 MiB | 200.0 | 0.84 | 200.0 | 0.84 | 200.0 | 0.84 |" in page and "carries 0.952 of the link" in page


def test_kinds_of_operations_add_up_to_the_step() -> None:
    found = summarize({"HpctrainWinogradKernelGrad": 30.0, "HorovodAllreduce": 40.0, "Relu": 2.0, "Foo": 5.0}, 100.0)[
        "milliseconds"
    ]
    assert found["convolutions"] == 30 and found["activations and additions"] == 2 and found[REST] == 5
    assert found[WAITING] == 63 and sum(found.values()) == 2 * found[ALL]


def test_the_plan_is_consistent() -> None:
    for group in plan.GROUPS:
        names = [contender.name for contender in group.contenders]
        assert len(set(names)) == len(names)
        assert all(goal.above in names and goal.below in names for goal in group.goals)
        for contender in group.contenders:
            assert contender.processes == 1 or contender.launch != "one process"


def test_phases_add_up_to_the_first_step() -> None:
    clock = Clock(launched=100.0)
    clock.seconds = {"launch": 1.0, "imports": 5.0, "first_batch": 0.5}
    clock.steps, clock.first_step_done = [4.0, 0.25, 0.5], 112.0
    phases = clock.phases()
    assert phases["first_step"] == 4.0 - 0.5 - 0.25
    assert sum(phases.values()) == pytest.approx(12.0 - 0.25)


@pytest.mark.parametrize("model", ["resnet50", "alexnet_bn", "resnet20"])
def test_networks_of_all_frameworks_have_the_same_weights(model: str) -> None:
    pytest.importorskip("torch")
    from benchmarks.peers import torch_networks
    from benchmarks.peers.work import IMAGES
    from hpctrain.models import build

    size, classes = IMAGES[model]
    ours = build(model, image_size=size, num_classes=classes)
    theirs = torch_networks.build(model, classes)
    shapes = sorted(sorted(weight.shape) for weight in ours.trainable_variables)
    count = sum(weight.numel() for weight in theirs.parameters())
    assert count == sum(weight.shape.num_elements() for weight in (v.value for v in ours.trainable_variables))
    assert sorted(sorted(weight.shape) for weight in theirs.parameters()) == shapes


def test_a_group_can_have_other_steps() -> None:
    check = "assert sys.argv[sys.argv.index('--steps') + 1] == '9'"
    runner.run_contender(replace(GROUP, steps=9), Contender("A", printing(1.0, check)))
