"""Spare nodes and supervision in what `hpctrain submit` writes, and in the scripts as they run."""

import difflib

import pytest

from hpctrain.errors import UserError
from hpctrain.jobs.site import load_site
from hpctrain.jobs.submission import Request, prepare
from tests.jobs.test_scripts import BOTH, Start, again, start

__all__ = ["start"]

SYNTHETIC = ("data.synthetic=true",)


def script(site: str, nodes: int, spare_nodes: int) -> str:
    cores = 4 if site.startswith("generic") else None
    return prepare(Request("demo", SYNTHETIC, nodes, spare_nodes=spare_nodes, cores=cores), load_site(site)).script


def changes(site: str) -> tuple[list[str], list[str]]:
    """The lines that two spare nodes take away from the script of a job on four, and those that they add."""
    lines = difflib.ndiff(script(site, 4, 0).splitlines(), script(site, 4, 2).splitlines())
    found = [line for line in lines if line[0] in "+-"]
    return [line[2:] for line in found if line[0] == "-"], [line[2:] for line in found if line[0] == "+"]


def test_slurm_is_asked_for_spare_nodes_and_the_run_is_laid_out_without_them() -> None:
    removed, added = changes("generic-slurm")
    assert removed == ["#SBATCH --nodes=4", "##SBATCH --no-kill", "SPARE_NODES=${SPARE_NODES-0}"]
    assert added == ["#SBATCH --nodes=6", "#SBATCH --no-kill", "SPARE_NODES=${SPARE_NODES-2}"]
    assert "--nodes=4 --ntasks=4" in script("generic-slurm", 4, 2)


@pytest.mark.parametrize(("site", "more"), [("generic-pbs", []), ("nurion-knl", ["#PBS -W sandbox=PRIVATE"])])
def test_pbs_is_asked_for_spare_nodes_and_to_tolerate_failures(site: str, more: list[str]) -> None:
    removed, added = changes(site)
    (select,) = [line for line in removed if line.startswith("#PBS -l select=4:")]
    assert removed == [select, "SPARE_NODES=${SPARE_NODES-0}"]
    assert sorted(added) == sorted(
        [
            select.replace("select=4:", "select=6:"),
            "#PBS -W tolerate_node_failures=all",
            "SPARE_NODES=${SPARE_NODES-2}",
        ]
    )
    lines = script(site, 4, 2).splitlines()
    assert set(more) <= set(lines)


def test_the_limits_of_a_partition_count_spare_nodes() -> None:
    site = load_site("stampede2-knl")
    with pytest.raises(UserError, match="leave --spare-nodes out"):  # ibrun
        prepare(Request("demo", SYNTHETIC, 2, spare_nodes=1), site)
    with pytest.raises(UserError, match="leave --spare-nodes out"):
        prepare(Request("demo", SYNTHETIC, 1, spare_nodes=1), load_site("local"))
    refusal = prepare(Request("demo", SYNTHETIC, 2, spare_nodes=9, partition="debug"), load_site("crux")).refusal
    assert refusal is not None and "11 nodes" in refusal


@BOTH
@pytest.mark.parametrize(
    ("variables", "options"),
    [
        ({"SPARE_NODES": "2"}, ["--spare-nodes=2"]),
        ({"SUPERVISE": "yes", "SUPERVISE_OPTIONS": "--tries=3  --min-nodes=2"}, ["--spare-nodes=0", "--tries=3"]),
    ],
)
def test_the_supervisor_is_told_how_to_launch(
    scheduler: str, variables: dict[str, str], options: list[str], start: Start
) -> None:
    job = start(scheduler, "", LAUNCH="launcher -n 2 numactl --preferred=1", OVERRIDES="a=b c", **variables)
    code, output = job.end()
    assert code == 0, output
    words = job.lines("hpctrain")
    launch = words.index("--launch")
    assert words[0] == "supervise" and words[1 : 1 + len(options)] == options
    assert words[launch + 1].split() == ["launcher", "-n", "2", "numactl", "--preferred=1"]
    assert words[launch + 2 :] == ["--", "hpctrain", "train", "demo", "a=b c", "--run-dir", str(job.run_dir)]
    assert job.lines("launched") == []


@BOTH
@pytest.mark.parametrize(("code", "times"), [("85", 1), ("7", 0), ("2", 0), ("0", 0)])
def test_only_what_the_supervisor_wants_to_go_on_with_is_queued_again(
    scheduler: str, code: str, times: int, start: Start
) -> None:
    # The dead node that it excluded is no reason.
    job = start(scheduler, "", SUPERVISE="yes", HPCTRAIN_CODE=code, LOST="1")
    assert job.end()[0] == int(code)
    assert len(again(scheduler, job)) == times


def test_where_slurm_does_not_requeue_the_next_job_survives_its_nodes_too(start: Start) -> None:
    job = start("slurm", "", SPARE_NODES="1", HPCTRAIN_CODE="85", SCONTROL_CODE="1")
    assert job.end()[0] == 85
    (call,) = job.calls("sbatch")
    assert " --no-kill " in call and "--nodes=2" in call


@BOTH
@pytest.mark.parametrize(("code", "ended", "times"), [("1", "85", 1), ("137", "85", 1), ("0", "85", 1), ("2", "2", 0)])
def test_a_lost_node_is_told_from_a_program_that_fails(
    scheduler: str, code: str, ended: str, times: int, start: Start
) -> None:
    job = start(scheduler, f"exit:{code}", LOST="1")
    result, output = job.end()
    assert (str(result), len(again(scheduler, job))) == (ended, times), output
    assert ("because a node was lost" in output) == (times == 1)


@BOTH
def test_a_run_that_says_it_is_finished_is_believed(scheduler: str, start: Start) -> None:
    first = start(scheduler, "exit:0")
    assert first.end()[0] == 0
    (first.run_dir / "metrics.jsonl").write_text('{"kind": "end", "step": 3, "reason": "finished"}\n')
    job = start(scheduler, "exit:0", LOST="1")
    assert job.end()[0] == 0 and again(scheduler, job) == []


@BOTH
def test_spare_nodes_are_a_number(scheduler: str, start: Start) -> None:
    code, output = start(scheduler, "exit:0", SPARE_NODES="two").end()
    assert code == 2 and "SPARE_NODES is 'two'" in output
