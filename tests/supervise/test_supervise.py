"""`hpctrain supervise` as a process, on pretend hosts."""

import signal
import subprocess
import sys
import time

import pytest

from tests.supervise.conftest import Cluster


def test_a_run_that_finishes_is_launched_once_on_the_first_hosts(supervise: Cluster) -> None:
    run = supervise("run", "--spare-nodes", "1")
    code, output = run.end()
    assert code == 0, output
    assert run.launches == [["a", "b"]]
    assert output.splitlines()[-1].endswith("finished (exit code 0); no host was excluded")
    assert run.starts()[0].split()[3:5] == ["--resume", "none"]


@pytest.mark.parametrize("code", [85, 2])
def test_a_stop_and_a_mistake_are_passed_on_at_once(supervise: Cluster, code: int) -> None:
    run = supervise(f"exit:{code}")
    assert run.end()[0] == code
    assert len(run.launches) == 1 and len(run.events("probe")) == 1


def test_a_host_that_dies_is_replaced_by_the_spare(supervise: Cluster) -> None:
    run = supervise("wait", "--spare-nodes", "1")
    run.wait_for_step(12)
    run.kill_host("b")
    (run.cluster / "go").touch()
    code, output = run.end()
    assert code == 0, output
    assert run.launches == [["a", "b"], ["a", "c"]]
    assert "did not answer" in output.splitlines()[-1] and "b (" in output.splitlines()[-1]
    (end,) = run.events("end")
    assert list(end["excluded"]) == ["b"] and end["exit_code"] == 0 and end["hosts"] == ["a", "c"]
    assert [event["exit_code"] for event in run.events("ended")] == [137, 0]
    # It goes on from its checkpoint, whatever the first launch was told to start from.
    assert all("--resume" not in line for line in run.starts() if line.startswith("c "))


def test_a_launcher_that_waits_for_a_dead_host_is_ended_with_all_its_ranks(supervise: Cluster) -> None:
    run = supervise("wait", "--spare-nodes", "1", "--quiet-seconds", "1")
    (run.cluster / "hang").touch()
    run.wait_for_step(12)
    run.kill_host("b")
    run.wait_for(lambda: len(run.launches) == 2, "the second launch")
    (run.cluster / "go").touch()
    code, output = run.end()
    assert code == 0, output
    assert "is lost" in output and "did not end by itself and is killed" in output
    assert run.launches == [["a", "b"], ["a", "c"]]
    assert supervise.leftovers() == []


def test_a_run_that_hangs_on_healthy_hosts_is_ended_and_started_again(supervise: Cluster) -> None:
    run = supervise("wait", "--quiet-seconds", "1", "--stall-seconds", "4")
    run.wait_for_step(12)
    run.wait_for(lambda: len(run.launches) == 2, "the second launch")
    (run.cluster / "go").touch()
    code, output = run.end()
    assert code == 0 and run.launches == [["a", "b", "c"]] * 2, output
    assert "all hosts answer" in output and "no sign of life for 4 s: the run is ended" in output
    assert supervise.leftovers() == []


def test_hosts_that_do_not_answer_or_are_slow_are_left_out_from_the_start(supervise: Cluster) -> None:
    hosts, marks = "a,b,c,d,e,f", ("dead/a", "broken/b", "slow/d")
    run = supervise("run", "--spare-nodes", "3", "--probe-seconds", "3", hosts=hosts, marks=marks)
    code, output = run.end()
    assert code == 0, output
    assert run.launches == [["c", "e", "f"]]
    excluded = run.events("end")[0]["excluded"]
    assert set(excluded) == {"a", "b", "d"}
    assert "did not answer within 3 s" in excluded["a"] and "no daemon on that host" in excluded["b"]
    assert "9.0 times as long" in excluded["d"]


def test_a_program_that_crashes_at_the_same_step_is_not_tried_again_and_again(supervise: Cluster) -> None:
    run = supervise("crash:3:same")
    code, output = run.end()
    assert (code, len(run.launches)) == (9, 2), output
    assert "the second without a new checkpoint" in output


def test_a_run_that_gets_further_each_time_is_tried_as_often_as_allowed(supervise: Cluster) -> None:
    run = supervise("crash:6:later", "--tries", "3")
    code, output = run.end()
    assert (code, len(run.launches)) == (9, 3), output
    assert [event["checkpoint"] for event in run.events("ended")] == [5, 10, 15]
    assert run.events("end")[0]["exit_code"] == 9


@pytest.mark.parametrize(
    ("options", "code", "launches"),
    [
        (("--on-too-few", "continue"), 0, [["a", "b", "c"], ["a", "c"]]),
        (("--on-too-few", "requeue"), 85, [["a", "b", "c"]]),
        (("--min-nodes", "3"), 85, [["a", "b", "c"]]),
    ],
)
def test_too_few_nodes(supervise: Cluster, options: tuple[str, ...], code: int, launches: list[list[str]]) -> None:
    run = supervise("wait", *options, "--probe-seconds", "3")
    run.wait_for_step(12)
    run.kill_host("b")
    (run.cluster / "go").touch()
    assert run.end()[0] == code
    assert run.launches == launches


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_run_as_agreed(supervise: Cluster, number: signal.Signals) -> None:
    run = supervise("wait", "--spare-nodes", "1")
    run.wait_for_step(12)
    run.process.send_signal(number)
    code, output = run.end()
    assert (code, len(run.launches)) == (85, 1), output
    assert supervise.leftovers() == []


def test_a_signal_while_hosts_are_probed_launches_nothing(supervise: Cluster) -> None:
    run = supervise("run", "--spare-nodes", "1", "--probe-seconds", "3", marks=("dead/a",))
    run.wait_for(lambda: (run.run_dir / "supervise.jsonl").exists(), "the start")
    run.process.send_signal(signal.SIGUSR1)
    assert run.end()[0] == 85 and run.launches == []


def test_nothing_is_launched_again_when_the_walltime_is_nearly_over(supervise: Cluster) -> None:
    run = supervise("crash:3:same", HPCTRAIN_END_TIME=str(time.time() + 100))
    assert run.end()[0] == 85 and len(run.launches) == 1
    assert "too late" in [event["event"] for event in run.events()]


def test_ranks_of_a_host_are_counted_by_its_slots(supervise: Cluster) -> None:
    run = supervise("run", "--spare-nodes", "1", hosts="a:2,b:2,c:2")
    assert run.end()[0] == 0
    assert {" ".join(line.split()[:3]) for line in run.starts()} == {"a 0 4", "a 1 4", "b 2 4", "b 3 4"}


def test_a_launcher_that_cannot_choose_hosts_runs_without_recovery(supervise: Cluster) -> None:
    tool = supervise.folder / "my tools" / "ibrun"
    tool.write_text('#!/bin/sh\necho "ran $*"\nexit 9\n')
    tool.chmod(0o755)
    run = supervise("run", "--launch", f"'{tool}'")
    code, output = run.end()
    assert code == 9 and "running without recovery" in output and "ran " in output
    assert run.launches == []
    code, output = supervise("run", "--launch", "nosuchlauncher -n 2").end()
    assert code == 2 and "nosuchlauncher, which is to start the ranks, cannot be started" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--launch", ""), "--launch is empty"),
        (("--launch", "srun 'x"), "no line of shell words"),
        (("--spare-nodes", "3"), "leaves none of 3 hosts"),
        (("--hosts", "a,-b"), "no host name"),
        (("--hosts", ","), "no hosts to run on"),
    ],
)
def test_mistakes_are_one_sentence(supervise: Cluster, options: tuple[str, ...], sentence: str) -> None:
    code, output = supervise("run", *options).end()
    assert code == 2 and sentence in output and len(output.splitlines()) == 1


def test_nothing_heavy_is_imported() -> None:
    check = "import sys, hpctrain.supervise.commands, hpctrain.supervise.supervisor, hpctrain.doctor.node as node\n"
    check += (
        "heavy = {'tensorflow', 'mpi4py', 'horovod', 'h5py', 'matplotlib'} & set(sys.modules)\nassert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
