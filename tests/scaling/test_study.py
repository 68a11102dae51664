"""Studies: what they plan and submit, and that their figures are those one computes by hand from run directories."""

import csv
import json
import os
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.errors import UserError
from hpctrain.scaling.study.commands import study
from hpctrain.scaling.study.energy import parse_energy
from hpctrain.scaling.study.gather import PARTS, Spread, gather
from hpctrain.scaling.study.plan import Arguments, load_study, make_study, parse_nodes
from hpctrain.scaling.study.report import write_study_report

SYNTHETIC = ("data.synthetic=true", "data.synthetic_records=6400", "model.num_classes=10", "train.global_batch=64")
FAKE = """#!/bin/bash
printf '%s\\n' "${0##*/}" "$@" "" >>"$NOTES/calls"
case ${0##*/} in
  sbatch|qsub) n=$(($(cat "$NOTES/count" 2>/dev/null || echo 0) + 1)); echo $n >"$NOTES/count"; echo "$((100 + n))" ;;
  squeue) cat "$NOTES/squeue" 2>/dev/null || { [[ $* != *--jobs=* ]] || exit 1; } ;;
  sacct) cat "$NOTES/sacct" 2>/dev/null ;;
esac
"""


class Batch:
    """Stand-ins for a batch system's programs, which write down how they were called."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def calls(self, program: str) -> list[list[str]]:
        path = self.out / "calls"
        calls = [call.split("\n") for call in (path.read_text() if path.exists() else "").rstrip("\n").split("\n\n")]
        return [call[1:] for call in calls if call[0] == program]

    def say(self, program: str, *lines: str) -> None:
        (self.out / program).write_text("".join(f"{line}\n" for line in lines))


@pytest.fixture
def batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Batch:
    out, tools = tmp_path / "out", tmp_path / "tools"
    out.mkdir()
    tools.mkdir()
    for name in ("sbatch", "squeue", "sacct", "qsub", "qstat"):
        (tools / name).write_text(FAKE)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setenv("NOTES", str(out))
    work = tmp_path / "my work"
    work.mkdir()
    monkeypatch.chdir(work)
    return Batch(out)


def call(*words: str, site: str = "generic-slurm") -> Result:
    arguments = ["demo", "--site", site, "--out", "s", "--steps", "5", "--warm-up", "2", *words, *SYNTHETIC]
    return CliRunner().invoke(study, arguments, catch_exceptions=False, standalone_mode=False)


def arguments(nodes: tuple[int, ...] = (1, 2, 4), **others: Any) -> Arguments:
    given: dict[str, Any] = {"recipe": "demo", "overrides": SYNTHETIC, "mode": "strong", "site": "generic-slurm"}
    return Arguments(nodes=nodes, **{**given, **others})


def write_run(
    path: Path, seconds: list[float], *, batch: int = 64, ranks: int = 1, reason: str | None = "finished", **times: Any
) -> None:
    """Write what a run of these step times leaves behind; `times` are the parts of its last steps."""
    path.mkdir(parents=True, exist_ok=True)
    records: list[dict[str, Any]] = [
        {"kind": "train", "step": i, "step_seconds": s, "images_per_second": batch / s, "input_seconds": s / 10}
        for i, s in enumerate(seconds, 1)
    ]
    if times:
        records[-1]["timing"] = times
    if reason:
        records.append({"kind": "end", "step": len(seconds), "reason": reason, "train_seconds": sum(seconds)})
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    config = {"name": "demo", "train": {"global_batch": batch, "epochs": 10}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    hosts = [{"host": f"node{rank + 1}", "ranks": [rank]} for rank in range(ranks)]
    manifest = {"ranks": ranks, "hosts": hosts, "data": {"num_records": 6400}}
    (path / "manifest.json").write_text(json.dumps(manifest))


def finish_all(out: Path, seconds: dict[int, float]) -> None:
    """Write a finished run of constant step time for every run that a study has begun."""
    plan = load_study(out)
    assert plan is not None
    for run in plan.runs:
        if run.tries:
            write_run(out / run.tries[-1].run_dir, [9.0, 9.0] + [seconds[run.nodes]] * 5, batch=run.global_batch)


# Planning


def test_a_weak_study_grows_the_batch_from_the_smallest_count_and_a_strong_one_keeps_it(tmp_path: Path) -> None:
    weak = make_study(arguments((2, 4, 6), mode="weak"), tmp_path)
    assert [(run.nodes, run.global_batch) for run in weak.runs] == [(2, 64), (4, 128), (6, 192)]
    strong = make_study(arguments((2, 4, 6), repeats=2), tmp_path)
    assert {run.global_batch for run in strong.runs} == {64}
    assert [(run.repeat, run.nodes) for run in strong.runs] == [(1, 2), (1, 4), (1, 6), (2, 2), (2, 4), (2, 6)]


def test_epochs_are_added_only_where_a_run_would_end_before_its_last_step(tmp_path: Path) -> None:
    enough = make_study(arguments(steps=50), tmp_path)  # 10 epochs of 100 steps
    assert not any(text.startswith("train.epochs") for text in enough.overrides)
    more = make_study(arguments(steps=2000, warm_up=10), tmp_path)
    assert "train.epochs=21" in more.overrides and "train.steps=2010" in more.overrides  # 2010 of 100 an epoch
    assert more.config["train"]["epochs"] == 10  # of which the time to train is told


def test_runs_see_only_the_training_split_unless_evaluation_is_asked_for(
    make_dataset: Callable[..., tuple[Path, list[bytes], list[int]]], tmp_path: Path
) -> None:
    data = make_dataset(records=64, shards=2)[0].parent
    quiet = make_study(arguments(overrides=(f"data.path={data}",)), tmp_path)
    assert f"data.path={data / 'train'}" in quiet.overrides and quiet.config["data"]["path"] == str(data)
    asked = make_study(arguments(overrides=(f"data.path={data}", "evaluate.every_epochs=1")), tmp_path)
    assert f"data.path={data / 'train'}" not in asked.overrides


@given(st.sets(st.integers(1, 4096), min_size=1, max_size=6), st.integers(1, 3), st.integers(1, 2000))
def test_a_plan_is_read_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, nodes: set[int], repeats: int, steps: int
) -> None:
    out = tmp_path_factory.mktemp("plan")
    plan = make_study(arguments(tuple(sorted(nodes)), repeats=repeats, steps=steps), out)
    plan.save()
    assert load_study(out) == plan
    assert len({run.next_dir() for run in plan.runs}) == len(nodes) * repeats


@pytest.mark.parametrize("text", ["", "1,,2", "0,1", "1,x", "2,2", "-1"])
def test_node_counts_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--nodes"):
        parse_nodes(text)


def test_nothing_is_submitted_when_one_count_does_not_divide(batch: Batch) -> None:
    with pytest.raises(UserError, match="does not divide over 3 ranks"):
        call("--nodes", "1,3", "--mode", "strong", "train.micro_batch=16")
    with pytest.raises(UserError, match=r"train\.steps of a study's runs is set by --steps"):
        call("--nodes", "1,2", "--mode", "strong", "train.steps=7")
    assert not Path("s").exists() and batch.calls("sbatch") == []


# Submitting


def test_separate_jobs_have_their_own_size_batch_and_directory(batch: Batch) -> None:
    call("--nodes", "1,2", "--mode", "weak", "--account", "me", "train.micro_batch=16", "log.tensorboard=true")
    assert [c[-1] for c in batch.calls("sbatch")] == [str(Path(f"s/nodes-{n}/job.sbatch").absolute()) for n in (1, 2)]
    assert all("--dependency" not in word for c in batch.calls("sbatch") for word in c)
    script = Path("s/nodes-2/job.sbatch").read_text()
    for line in ("#SBATCH --nodes=2", "#SBATCH --account=me", "#SBATCH --job-name=study-2-1"):
        assert line in script
    overrides = re.search(r"^OVERRIDES=.*?'\n(.*?)'}", script, re.M | re.S)
    assert overrides is not None
    words = overrides[1].split()
    assert {"train.steps=7", "train.global_batch=128", "log.every_steps=10"} <= set(words)
    # Given twice the last one counts: the user's.
    assert [w for w in words if w.startswith("log.tensorboard")] == ["log.tensorboard=false", "log.tensorboard=true"]
    plan = load_study(Path("s"))
    assert plan is not None and [run.tries[0].job for run in plan.runs] == ["101", "102"]
    assert json.loads(Path("s/nodes-2/jobs.jsonl").read_text())["id"] == "102"


@pytest.mark.parametrize("site", ["generic-slurm", "generic-pbs"])
def test_a_chain_waits_for_any_end_of_the_job_before(site: str, batch: Batch) -> None:
    call("--nodes", "1,2,4", "--mode", "strong", "--chain", "train.micro_batch=16", site=site)
    calls = batch.calls("sbatch" if site == "generic-slurm" else "qsub")
    assert [[w for w in c if "after" in w] for c in calls] == (
        [[], ["--dependency=afterany:101"], ["--dependency=afterany:102"]]
        if site == "generic-slurm"
        else [[], ["depend=afterany:101"], ["depend=afterany:102"]]
    )


@pytest.mark.parametrize("site", ["generic-slurm", "generic-pbs"])
def test_all_together_are_one_job_of_the_scaling_template(site: str, batch: Batch) -> None:
    call("--nodes", "1,2", "--mode", "weak", "--together", "--repeats", "2", "train.micro_batch=16", site=site)
    (submitted,) = batch.calls("sbatch" if site == "generic-slurm" else "qsub")
    script = Path(submitted[-1]).read_text()
    assert ("#SBATCH --nodes=3" if site == "generic-slurm" else "#PBS -l select=3:ncpus=1") in script
    assert "YOUR_ACCOUNT" in script and "SIDE_BY_SIDE=${SIDE_BY_SIDE-yes}" in script
    assert json.loads(Path("s/together/jobs.jsonl").read_text())["id"] == "101"
    runs = re.search(r"^RUNS=.*?'\n(.*?)'}", script, re.M | re.S)
    assert runs is not None
    lines = [line.split() for line in runs[1].strip().splitlines()]
    assert [line[:3] for line in lines] == [
        ["1", "nodes-1", "64"],
        ["2", "nodes-2", "128"],
        ["1", "nodes-1-repeat-2", "64"],
        ["2", "nodes-2-repeat-2", "128"],
    ]
    assert all(line[3] == ("srun" if site == "generic-slurm" else "mpirun") for line in lines)


def test_called_again_it_submits_only_what_is_missing_and_failed_only_when_told(batch: Batch) -> None:
    words = ("--nodes", "1,2,4", "--mode", "strong", "train.micro_batch=16")
    call(*words)
    write_run(Path("s/nodes-1"), [9.0, 9.0] + [0.5] * 5)
    batch.say("squeue", "102|102|RUNNING|1:00|10:00|None", "103|103|FAILED|1:00|10:00|NonZeroExitCode")
    said = call(*words).output
    assert "1 of 3 runs failed; --resubmit-failed" in said and "nothing to submit: of 3 runs 1 done" in said
    assert len(batch.calls("sbatch")) == 3
    call(*words, "--resubmit-failed")
    assert [c[-1].split("/")[-2] for c in batch.calls("sbatch")[3:]] == ["nodes-4-try-2"]
    plan = load_study(Path("s"))
    assert plan is not None and [len(run.tries) for run in plan.runs] == [1, 1, 2]


def test_a_chain_goes_on_from_its_jobs_that_still_wait_or_run(batch: Batch) -> None:
    words = ("--nodes", "1,2,4", "--mode", "strong", "--chain", "train.micro_batch=16")
    call(*words)
    states = (
        "101|101|FAILED|1:00|10:00|None",
        "102|102|RUNNING|1:00|9:00|None",
        "103|103|PENDING|0:00|9:00|Dependency",
    )
    batch.say("squeue", *states)
    call(*words, "--resubmit-failed")
    assert batch.calls("sbatch")[-1][1] == "--dependency=afterany:103"


def test_other_arguments_are_refused(batch: Batch) -> None:
    call("--nodes", "1,2", "--mode", "strong", "train.micro_batch=16")
    with pytest.raises(UserError, match=r"holds a study with --nodes 1,2, not 1,2,4"):
        call("--nodes", "1,2,4", "--mode", "strong", "train.micro_batch=16")
    with pytest.raises(UserError, match=r"--mode strong, not weak"):
        call("--nodes", "1,2", "--mode", "weak", "train.micro_batch=16")
    assert len(batch.calls("sbatch")) == 2


def test_a_submission_that_is_cut_short_is_gone_on_with(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--nodes", "1,2", "--mode", "strong", "train.micro_batch=16")
    sbatch = batch.out.parent / "tools" / "sbatch"
    sbatch.write_text(FAKE.replace("n=$((", '[[ ! -e "$NOTES/count" ]] || { echo "no more jobs" >&2; exit 1; }; n=$(('))
    with pytest.raises(UserError, match="no more jobs"):
        call(*words)
    sbatch.write_text(FAKE)
    batch.say("squeue", "101|101|PENDING|0:00|10:00|Priority")
    call(*words)
    plan = load_study(Path("s"))
    assert plan is not None and [[each.job for each in run.tries] for run in plan.runs] == [["101"], ["102"]]


def test_report_is_a_verb_and_not_a_recipe(batch: Batch) -> None:
    with pytest.raises(UserError, match="nowhere holds no study"):
        CliRunner().invoke(study, ["report", "nowhere"], catch_exceptions=False, standalone_mode=False)
    with pytest.raises(click.MissingParameter):
        study.make_context("study", ["demo"])


# Gathering


def test_the_figures_of_a_study_by_hand(batch: Batch) -> None:
    call("--nodes", "1,2,4", "--mode", "strong", "train.micro_batch=16")
    # 64 images in 0.8, 0.4, 0.25 s; the two steps of warm-up do not count.
    finish_all(Path("s"), {1: 0.8, 2: 0.4, 4: 0.25})
    one, two, four = gather(Path("s")).counts
    assert [c.images_per_second.median for c in (one, two, four) if c.images_per_second] == pytest.approx(
        [80, 160, 256]
    )
    assert [c.speedup.median for c in (one, two, four) if c.speedup] == pytest.approx([1, 2, 3.2])
    assert [c.efficiency.median for c in (one, two, four) if c.efficiency] == pytest.approx([1, 1, 0.8])
    assert four.train_seconds is not None and four.train_seconds.median == pytest.approx(1000 * 0.25)  # 10 x 100 steps
    assert four.node_hours is not None and four.node_hours.median == pytest.approx(4 * 250 / 3600)
    assert [state.word for c in (one, two, four) for state in c.states] == ["done"] * 3
    assert four.num_steps == 5 and four.energy_joules is None


def test_a_weak_study_has_its_own_batches_and_steps(batch: Batch) -> None:
    call("--nodes", "2,4", "--mode", "weak", "train.micro_batch=16")
    finish_all(Path("s"), {2: 0.5, 4: 0.625})
    _, four = gather(Path("s")).counts
    assert four.global_batch == 128 and four.images_per_second is not None
    assert four.images_per_second.median == pytest.approx(128 / 0.625)
    assert four.speedup is not None and four.efficiency is not None
    assert four.speedup.median == pytest.approx(1.6) and four.efficiency.median == pytest.approx(0.8)
    assert four.train_seconds is not None and four.train_seconds.median == pytest.approx(500 * 0.625)


def test_the_spread_is_over_steps_and_repeats(batch: Batch) -> None:
    call("--nodes", "1", "--mode", "strong", "--repeats", "2", "train.micro_batch=16")
    write_run(Path("s/nodes-1"), [9, 9, 1.0, 2.0, 3.0, 4.0, 5.0])
    write_run(Path("s/nodes-1-repeat-2"), [9, 9, 2.0, 3.0, 4.0, 5.0, 6.0])
    (count,) = gather(Path("s")).counts
    values = [1, 2, 3, 4, 5, 2, 3, 4, 5, 6]
    quartiles = statistics.quantiles(values, n=4, method="inclusive")
    assert count.step is not None
    assert [count.step.low, count.step.median, count.step.high] == pytest.approx(quartiles)
    assert count.repeats == (3.0, 4.0)


@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=30), st.floats(0.1, 1e5))
def test_a_rates_spread_is_that_of_the_times_turned_around(values: list[float], images: float) -> None:
    rate = Spread.of(values).inverse(images)
    assert rate.low <= rate.median * (1 + 1e-12) and rate.median <= rate.high * (1 + 1e-12)
    assert rate.median * statistics.median(values) == pytest.approx(images)


def test_the_parts_of_a_step_are_those_after_the_warm_up(tmp_path: Path) -> None:
    parts: dict[str, Any] = {
        "input_seconds": 0.01,
        "compute_seconds": 0.2,
        "straggler_seconds": 0.03,
        "exposed_seconds": 0.06,
    }
    hosts = [{"host": "node2", "own_seconds": 0.3, "last": 20}, {"host": "node1", "own_seconds": 0.2, "last": 0}]
    write_run(tmp_path / "nodes-2", [0.3] * 40, ranks=2, steps=20, **parts, hosts=hosts, mean_own_seconds=0.25)
    metrics = tmp_path / "nodes-2" / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    early = {"steps": 5, **dict.fromkeys(parts, 9.0), "hosts": [], "mean_own_seconds": 9.0}
    lines[4] = json.dumps({**json.loads(lines[4]), "timing": early})
    metrics.write_text("\n".join(lines))
    results = gather(tmp_path)
    (count,) = results.counts
    assert count.parts == pytest.approx({part: parts[f"{part}_seconds"] for part in PARTS})
    assert [(h.host, h.last, h.expected, h.steps) for h in results.hosts] == [
        ("node2", 20, 10, 20),
        ("node1", 0, 10, 20),
    ]
    assert [h.excess for h in results.hosts] == pytest.approx([0.2, -0.2])


def test_missing_waiting_running_and_failed_counts_are_told(batch: Batch) -> None:
    call("--nodes", "1,2,4,8", "--mode", "strong", "train.micro_batch=8")
    write_run(Path("s/nodes-1"), [9.0, 9.0] + [0.5] * 5)
    write_run(Path("s/nodes-2"), [9.0, 9.0, 0.5], reason=None)
    batch.say(
        "squeue", "102|102|RUNNING|1:00|9:00|None", "103|103|PENDING|0:00|9:00|Priority", "104|104|FAILED|1|9|None"
    )
    results, files = write_study_report(Path("s"))
    assert [count.states[0].word for count in results.counts] == ["done", "running", "waiting", "failed"]
    text = files[0].read_text()
    assert "2 nodes: running (job 102, step 3)" in text and "(Priority)" in text and "8 nodes: failed (job 104" in text
    rows = list(csv.DictReader(Path("s/report.csv").read_text().splitlines()))
    assert [(row["nodes"], row["runs_done"], row["images_per_second"]) for row in rows] == [
        ("1", "1", "128"),
        ("2", "0", ""),
        ("4", "0", ""),
        ("8", "0", ""),
    ]
    assert all((Path("s") / f"{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("speedup", "efficiency"))


def test_a_study_with_nothing_measured_is_reported_too(batch: Batch) -> None:
    call("--nodes", "1,2", "--mode", "strong", "train.micro_batch=16")
    batch.say("squeue", "101|101|PENDING|0:00|9:00|None", "102|102|PENDING|0:00|9:00|None")
    done = CliRunner().invoke(study, ["report", "s"], catch_exceptions=False, standalone_mode=False)
    assert "1 node: waiting (job 101 is PENDING)" in done.output
    assert not list(Path("s").glob("*.png"))


def test_a_study_is_reported_where_there_is_no_scheduler_but_not_gone_on_with(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--nodes", "1,2", "--mode", "strong", "train.micro_batch=16")
    call(*words)
    write_run(Path("s/nodes-1"), [9.0, 9.0] + [0.5] * 5)
    monkeypatch.setenv("PATH", "/nowhere")
    results = gather(Path("s"))
    assert [count.states[0].word for count in results.counts] == ["done", "unknown"]
    with pytest.raises(UserError, match=r"nothing is known of job 102; there is no squeue"):
        call(*words)


def test_a_broken_plan_is_told_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "study.json").write_text('{"format": 1, "arguments": ')
    with pytest.raises(UserError, match="no study that can be read"):
        gather(tmp_path)


def test_energy_is_the_jobs_own_or_that_of_its_programs() -> None:
    assert parse_energy("12|7200000\n12.batch|100\n12.0|200\n", "12") == 7.2e6
    assert parse_energy("12|\n12.batch|100\n12.extern|90\n12.0|200\n12.1|300\n", "12") == 500
    assert parse_energy("12|0\n12.batch|0\n12.0|18446744073709551614\n", "12") is None
    assert parse_energy("", "12") is None


def test_energy_is_reported_where_slurm_counts_it(batch: Batch) -> None:
    call("--nodes", "1", "--mode", "strong", "train.micro_batch=16")
    finish_all(Path("s"), {1: 0.5})
    batch.say("sacct", "101|7200000")
    results, files = write_study_report(Path("s"))
    assert results.counts[0].energy_joules == 7.2e6 and "2 kWh" in files[0].read_text()
