"""The parts of the supervisor: launch words, hosts, what counts as unfit, what is known of the run."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.errors import UserError
from hpctrain.jobs.layout import launch_arguments, layout
from hpctrain.jobs.site import load_site, site_names
from hpctrain.supervise.hosts import Allocation, cancel_steps, down_in_slurm, find_allocation
from hpctrain.supervise.launchers import family, for_probe, on_hosts, ranks_per_node, variables, version_of
from hpctrain.supervise.probe import Answer, read_answer, slownesses, telling_line, unfit
from hpctrain.supervise.supervisor import Try, hopeless
from hpctrain.supervise.training import newest_checkpoint, read_command

VERSIONS = {"mpirun": "mpirun (Open MPI) 5.0.11", "mpiexec": "mpiexec version 1.2.12"}

# launch words, hosts, ranks a host, words for these hosts
CASES = [
    (
        "srun --mpi=pmix --cpu-bind=cores",
        "srun --nodes=2 --ntasks=4 --ntasks-per-node=2 --nodelist=b,d --kill-on-bad-exit=0 --wait=120 --mpi=pmix "
        "--cpu-bind=cores",
    ),
    (
        "srun --mpi=pmix --nodes=3 -n 6 --ntasks-per-node=2 -c 4 -w a,b,c -K --no-kill --cpu-bind=cores numactl -N 1",
        "srun --nodes=2 --ntasks=4 --ntasks-per-node=2 --nodelist=b,d --kill-on-bad-exit=0 --wait=120 --mpi=pmix -c 4 "
        "--cpu-bind=cores numactl -N 1",
    ),
    ("/usr/bin/srun -N3 -n6 --kill-on-bad-exit=1", "/usr/bin/srun @srun"),
    (
        "mpirun --hostfile /tmp/h -x PATH -n 6 --map-by ppr:2:node:PE=4 --bind-to core",
        "mpirun -n 4 --host b:2,d:2 -x PATH --map-by ppr:2:node:PE=4 --bind-to core",
    ),
    ("mpirun -np 6 -H a:2,b:2,c:2 -N 2", "mpirun -n 4 --host b:2,d:2"),
    ("prterun -n 6", "prterun -n 4 --host b:2,d:2"),
    (
        "mpiexec.hydra -f /tmp/h -n 6 -ppn 2 -genv I_MPI_PIN_DOMAIN 4:compact numactl --preferred=1",
        "mpiexec.hydra -hosts b,d -n 4 -ppn 2 -genv I_MPI_PIN_DOMAIN 4:compact numactl --preferred=1",
    ),
    (
        "mpiexec -n 6 --ppn 2 --hostfile h --depth=4 --cpu-bind depth",
        "mpiexec --hosts b,d -n 4 --ppn 2 --depth=4 --cpu-bind depth",
    ),
    ("aprun -n 6 -N 2 -d 32 -j 2 -cc depth", "aprun -n 4 -N 2 -L b,d -d 32 -j 2 -cc depth"),
    ("aprun -n6 -N2 -L a,b,c", "aprun -n 4 -N 2 -L b,d"),
]
SRUN = "--nodes=2 --ntasks=4 --ntasks-per-node=2 --nodelist=b,d --kill-on-bad-exit=0 --wait=120"


@pytest.mark.parametrize(("words", "expected"), CASES)
def test_launch_words_for_some_hosts(words: str, expected: str) -> None:
    kind = family(words.split(), VERSIONS.get(words.split()[0], ""))
    assert kind is not None
    result = on_hosts(kind, words.split(), ["b", "d"], 2)
    assert result == expected.replace("@srun", SRUN).split()
    assert on_hosts(kind, result, ["b", "d"], 2) == result  # and again
    if "6" in words:
        assert ranks_per_node(kind, words.split(), 3) == 2


def test_crays_nodes_are_numbers() -> None:
    assert on_hosts("aprun", ["aprun"], ["nid00042", "nid00000"], 1)[-1] == "42,0"


@pytest.mark.parametrize("name", [name for name in site_names() if load_site(name).scheduler != "local"])
def test_the_words_of_every_site_are_understood(name: str) -> None:
    site = load_site(name)
    words = launch_arguments(site, layout(site, 8))
    kind = family(words, VERSIONS.get(words[0], ""))
    if words[0] == "ibrun":
        assert kind is None
        return
    assert kind is not None and ranks_per_node(kind, words, 8) == site.ranks_per_node
    moved = on_hosts(kind, words, [f"h{i}" for i in range(8)], site.ranks_per_node)
    kept = [word for word in words if not word.lstrip("-").split("=")[0].startswith(("n", "ppn", "N"))]
    assert set(kept) <= {*moved, str(8 * site.ranks_per_node)}
    probe = for_probe(kind, words, "h3")
    assert "h3" in " ".join(probe) and "h2" not in " ".join(probe)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            "srun --mpi=pmix --ntasks-per-node=2 --cpu-bind=cores",
            "srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist=b --kill-on-bad-exit=0 --wait=120 --mpi=none "
            "--cpu-bind=none",
        ),
        (
            "mpirun --prtemca plm_ssh_agent /a -n 4 --map-by ppr:2:node:PE=4 --bind-to core",
            "mpirun -n 1 --host b:1 --bind-to none --prtemca plm_ssh_agent /a",
        ),
        ("mpiexec -n 4 --ppn 2 --depth=8 --cpu-bind depth", "mpiexec --hosts b -n 1 --ppn 1 --cpu-bind none"),
        ("mpiexec.hydra -n 4 -ppn 2", "mpiexec.hydra -hosts b -n 1 -ppn 1 -genv I_MPI_PIN 0"),
        ("aprun -n 4 -N 2 -cc depth", "aprun -n 1 -N 1 -L b -cc none"),
    ],
)
def test_a_probe_is_one_process_that_may_use_the_whole_host(words: str, expected: str) -> None:
    kind = family(words.split(), VERSIONS.get(words.split()[0], ""))
    assert kind is not None
    assert for_probe(kind, words.split(), "b") == expected.split()


def test_launchers_are_told_apart() -> None:
    assert family(["mpirun"], "Intel(R) MPI Library for Linux* OS, Version 2021.9") == "hydra"
    assert family(["mpiexec"], "HYDRA build details:") == "hydra"
    assert family(["/opt/bin/mpiexec"], "mpiexec (Open MPI) 4.1.4") == "openmpi"
    assert family(["mpirun"], "") is None and family(["ibrun"]) is None and family(["jsrun"]) is None
    assert version_of("srun") == "" and version_of("/nowhere/mpirun") == ""


@pytest.mark.parametrize(
    ("words", "default", "expected"),
    [("mpirun", 3, 3), ("mpirun", None, 1), ("mpirun -N 2", 3, 2), ("mpirun --map-by ppr:4:socket -n 8", None, 2)],
)
def test_ranks_of_a_node(words: str, default: int | None, expected: int) -> None:
    assert ranks_per_node("openmpi", words.split(), 4, default) == expected


def test_ranks_that_do_not_divide_over_the_nodes_are_refused() -> None:
    with pytest.raises(UserError, match="7 ranks, which do not divide over 2 nodes"):
        ranks_per_node("openmpi", ["mpirun", "-n", "7"], 2)


# Hosts


def test_where_hosts_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodefile = tmp_path / "nodes"
    nodefile.write_text("n2\nn2\nn1\nn1\n")
    assert find_allocation(None, None, {"PBS_NODEFILE": str(nodefile)}) == Allocation(("n2", "n1"), 2, "pbs")
    nodefile.write_text("# comment\nn2 slots=4\n\nn1 slots=3 max_slots=9\n")
    assert find_allocation(None, nodefile, {}) == Allocation(("n2", "n1"), 3, "none")
    assert find_allocation("a,b:2", None, {"PBS_NODEFILE": "x"}) == Allocation(("a", "b"), 1, "none")
    tool = tmp_path / "scontrol"
    tool.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-3]" ] && printf "n1\\nn2\\nn3\\n"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    job = {"SLURM_JOB_NODELIST": "n[1-3]", "SLURM_NTASKS_PER_NODE": "2"}
    assert find_allocation(None, None, job) == Allocation(("n1", "n2", "n3"), 2, "slurm")
    with pytest.raises(UserError, match="names no host"):
        find_allocation(None, None, {"SLURM_JOB_NODELIST": "m1"})
    with pytest.raises(UserError, match="no Slurm or PBS job"):
        find_allocation(None, None, {})
    with pytest.raises(UserError, match="cannot read the host file"):
        find_allocation(None, tmp_path / "nothing", {})


def test_what_slurm_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, output in (
        ("sinfo", "a idle\\nb down*\\nb down*\\nc allocated*\\n"),
        ("squeue", "7.batch batch\\n7.0 hpctrain\\n7.1 hpctrain-guard\\n7.extern extern\\n7.3 prted\\n"),
    ):
        (tmp_path / name).write_text(f'#!/bin/sh\nprintf "{output}"\n')
    (tmp_path / "scancel").write_text(f'#!/bin/sh\necho "$@" >"{tmp_path}/cancelled"\n')
    for name in ("sinfo", "squeue", "scancel"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert down_in_slurm(["a", "b", "c"]) == {"b"}
    cancel_steps("7")
    assert (tmp_path / "cancelled").read_text().split() == ["--quiet", "7.0", "7.3"]


# Which hosts are fit


def answer(seconds: float = 1.0, memory: float = 1e9, error: str = "") -> Answer:
    return Answer("", seconds, memory, error)


def test_unfit_hosts_are_told_with_the_reason() -> None:
    answers = {"a": answer(), "b": answer(1.1), "c": answer(3.0), "d": Answer("did not answer"), "e": answer(1, 2e8)}
    found = unfit(answers | {"f": answer(error="Read-only file system")}, 2.0)
    assert found == {
        "c": "a matrix product takes 3.0 times as long as on the other hosts",
        "d": "did not answer",
        "e": "copying memory takes 5.0 times as long as on the other hosts",
        "f": "Read-only file system",
    }


def test_what_all_hosts_complain_of_is_not_their_fault() -> None:
    assert unfit({host: answer(error="No space left on device") for host in "abc"}, 2.0) == {}


def test_hosts_that_could_not_measure_are_not_slow() -> None:
    assert unfit({"a": Answer("", None, None), "b": answer(), "c": answer()}, 2.0) == {}
    assert unfit({}, 2.0) == {}


@given(st.dictionaries(st.text(min_size=1), st.floats(0.01, 100), min_size=1), st.floats(1.1, 10))
def test_at_least_half_of_the_hosts_are_never_slow(seconds: dict[str, float], factor: float) -> None:
    answers = {host: answer(value) for host, value in seconds.items()}
    found = unfit(answers, factor)
    assert len(found) <= len(answers) // 2
    assert min(seconds, key=lambda host: seconds[host]) not in found
    assert all(factors >= 1 for factors, _ in slownesses(answers).values())


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ('Welcome!\n{"gemm_seconds": 0.5, "memory_bytes_per_second": 2.0, "errors": {}}\nbye\n', Answer("", 0.5, 2.0)),
        ('{"gemm_seconds": null, "errors": {"files": "x: full"}}', Answer("", None, None, "x: full")),
        ("", Answer("the probe printed no answer")),
        ('[1]\n{"a": 1}\n{', Answer("the probe printed no answer")),
    ],
)
def test_answers(output: str, expected: Answer) -> None:
    assert read_answer(output) == expected


@pytest.mark.parametrize(
    ("output", "line"),
    [
        ("srun: error: no connection to n2\nsrun: Job step aborted\n", "srun: error: no connection to n2"),
        ("----\nPRTE has lost n2\n----\n", "PRTE has lost n2"),
        ("Traceback\n  File x\nModuleNotFoundError: numpy\n", "ModuleNotFoundError: numpy"),
        ("\n--\n", "no message"),
    ],
)
def test_one_line_of_what_a_launcher_says(output: str, line: str) -> None:
    assert telling_line(output) == line


# The run


def test_the_command_is_understood() -> None:
    words = ["hpctrain", "train", "demo", "train.global_batch=64", "train.micro_batch=8", "--resume", "none"]
    training = read_command([*words, "train.steps=2", "--run-dir=r"])
    assert training.run_dir == Path("r") and training.config is not None and training.config.train.steps == 2
    assert training.again() == (*words[:5], "train.steps=2", "--run-dir=r")
    assert [training.largest_count(most, 1, 1, 8) for most in (8, 7, 3)] == [8, 4, 2]
    assert training.largest_count(7, 5, 1, 8) is None
    assert read_command(["python", "-m", "hpctrain", "train", "demo", "--run-dir", "r"]).config is not None
    assert read_command(["./train", "demo", "--run-dir", "r"]).config is None
    with pytest.raises(UserError, match="no --run-dir"):
        read_command(["hpctrain", "train", "demo"])
    with pytest.raises(UserError, match="there is no recipe named"):
        read_command(["hpctrain", "train", "dmo", "--run-dir", "r"])


def test_a_deterministic_run_on_a_power_of_two_of_ranks_stays_on_one() -> None:
    words = ["hpctrain", "train", "demo", "train.global_batch=96", "train.micro_batch=8", "--run-dir", "r"]
    assert read_command(words).largest_count(3, 1, 1, 4) == 3
    assert read_command([*words, "train.deterministic=true"]).largest_count(3, 1, 1, 4) == 2
    assert read_command([*words, "train.deterministic=true"]).largest_count(3, 1, 1, 6) == 3


def test_a_run_is_finished_when_it_says_so_or_has_its_last_checkpoint(tmp_path: Path) -> None:
    words = ["hpctrain", "train", "demo", "train.steps=20", "--run-dir", str(tmp_path)]
    training = read_command(words)
    assert newest_checkpoint(tmp_path) == 0 and not training.finished()
    (tmp_path / "manifest.json").write_text(json.dumps({"data": {"num_records": 1280}}))
    (tmp_path / "checkpoints" / "step-00000010").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-00000030.tmp").mkdir()
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"kind": "end", "reason": "preempted"}\n')
    assert newest_checkpoint(tmp_path) == 10 and not training.finished()
    metrics.write_text('{"kind": "train", "step": 12}\n{"kind": "end", "reason": "fin')
    assert not training.finished()
    metrics.write_text('{"kind": "end", "reason": "finished"}\n')
    assert training.finished()
    metrics.unlink()
    (tmp_path / "checkpoints" / "step-00000020").mkdir()
    assert training.finished()
    assert not read_command([*words, "train.steps=null"]).finished()
    assert read_command(["other", "--run-dir", str(tmp_path)]).finished()


@pytest.mark.parametrize(
    ("tries", "expected"),
    [
        ([(False, False)], False),
        ([(False, True), (False, False)], True),
        ([(False, False), (False, True)], False),
        ([(True, False), (False, False)], False),
        ([(False, False), (True, False)], False),
        ([(True, False), (False, False), (False, False)], True),
    ],
)
def test_a_program_that_fails_by_itself(tries: list[tuple[bool, bool]], expected: bool) -> None:
    assert hopeless([Try(1, lost, progressed) for lost, progressed in tries]) == expected


def test_a_step_of_slurm_is_told_of_its_own_nodes_only() -> None:
    assert variables("srun", ["n2", "n3"]) == {"SLURM_JOB_NODELIST": "n2,n3"}
    assert variables("openmpi", ["n2", "n3"]) == {}
