"""The training scripts as they run, with stand-ins for the launcher and the batch system's programs.

On a real Slurm the same is tested in tests/slurm; here every branch of the script is cheap.
"""

import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from hpctrain.jobs.templates import SUFFIXES, template_root

PATIENCE_SECONDS = 30

LAUNCHER = """#!/bin/bash
# A launcher of one rank: tells what it was started with, and acts as $ACT says.
printf '%s\\n' "$@" >"$NOTES/launched"
env >"$NOTES/environment"
case $ACT in
  exit:*) exit "${ACT#exit:}" ;;
  wait) trap 'echo USR1 >>"$NOTES/signals"; exit 85' USR1; trap 'echo TERM >>"$NOTES/signals"; exit 143' TERM
    : >"$NOTES/ready"; for ((i = 0; i < 200; i++)); do sleep 0.1; done ;;
  deaf) : >"$NOTES/ready"; exec sleep 30 ;;
esac
"""
RECORDER = """#!/bin/bash
printf '%s\\n' "${0##*/} $*" >>"$NOTES/calls"
case ${0##*/}:$1 in
  scontrol:show) echo "JobState=${JOB_STATE:-RUNNING} TimeLimit=1-02:00:00 TimeMin=N/A" ;;
  pbs_tmrsh:*) [[ $* != *true ]] || exit "${LOST:-0}"; exit "${TMRSH_CODE:-0}" ;;
  srun:*) [[ $* != *true ]] || exit "${LOST:-0}" ;;
  scontrol:requeue) exit "${SCONTROL_CODE:-0}" ;;
  sbatch:*) printenv REQUEUES >"$NOTES/requeues"; echo 77 ;;
  qsub:*) printenv REQUEUES >"$NOTES/requeues"; echo 77.server ;;
  qstat:*) printf 'Job Id: %s\n' "$2"
    printf '    %s\n' 'Job_Name = job' 'Account_Name = me' 'Resource_List.place = scatter'
    printf '    Resource_List.select = 2:ncpus=1:mpipro\n\tcs=1:ompthreads=1\n'
    printf '    %s\n' 'Resource_List.walltime = 00:10:00' 'Variable_List = PBS_O_HOME=/root' ;;
esac
"""
HPCTRAIN = """#!/bin/bash
printf '%s\\n' "$@" >"$NOTES/hpctrain"
exit "${HPCTRAIN_CODE:-0}"
"""


@dataclass
class Job:
    """A job script under way."""

    process: subprocess.Popen[str]
    out: Path
    run_dir: Path

    def wait_until_ready(self) -> None:
        end = time.monotonic() + PATIENCE_SECONDS
        while not (self.out / "ready").exists():
            assert time.monotonic() < end and self.process.poll() is None
            time.sleep(0.02)

    def end(self) -> tuple[int, str]:
        """Exit code and output."""
        try:
            output, _ = self.process.communicate(timeout=PATIENCE_SECONDS)
        finally:
            self.process.kill()
        return self.process.returncode, output

    def lines(self, name: str) -> list[str]:
        path = self.out / name
        return path.read_text().splitlines() if path.exists() else []

    def calls(self, *start: str) -> list[str]:
        return [call for call in self.lines("calls") if call.startswith(" ".join(start))]


Start = Callable[..., Job]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    """Start a training script in a folder with a space in its name."""
    home = tmp_path / "my work"
    tools, out = home / "tools", home / "out"
    tools.mkdir(parents=True)
    out.mkdir()
    programs = {"launcher": LAUNCHER, "hpctrain": HPCTRAIN}
    programs |= dict.fromkeys(("scontrol", "squeue", "sbatch", "qsub", "qstat", "pbs_tmrsh", "srun"), RECORDER)
    for name, text in programs.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    nodes = home / "nodes"
    nodes.write_text("alpha\nbeta\n")
    slurm = {"SLURM_JOB_ID": "12", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_JOB_NAME": "job"}
    pbs = {"PBS_JOBID": "12.server", "PBS_JOBNAME": "job", "PBS_O_WORKDIR": str(home), "PBS_NODEFILE": str(nodes)}

    def begin(
        scheduler: str,
        act: str,
        arguments: tuple[str, ...] = (),
        kind: str = "train",
        script: Path | None = None,
        **variables: str | None,
    ) -> Job:
        script = script or template_root() / scheduler / f"{kind}{SUFFIXES[scheduler]}"
        given: Mapping[str, str | None] = {
            "PATH": f"{tools}:/usr/bin:/bin",
            "HOME": str(tmp_path),
            "NOTES": str(out),
            "ACT": act,
            "LAUNCH": "launcher",
            "RUN_DIR": "runs/a run",
            "LOG_DIR": "",
            **({"slurm": slurm, "pbs": pbs}[scheduler]),
            **variables,
        }
        process = subprocess.Popen(
            ["bash", script, *arguments],
            env={name: value for name, value in given.items() if value is not None},
            cwd={"slurm": home, "pbs": tmp_path}[scheduler],  # PBS starts jobs in $HOME
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        return Job(process, out, home / "runs" / "a run")

    return begin


BOTH = pytest.mark.parametrize("scheduler", ["slurm", "pbs"])


def again(scheduler: str, job: Job) -> list[str]:
    return job.calls("scontrol", "requeue") if scheduler == "slurm" else job.calls("qsub")


@BOTH
def test_a_signal_reaches_the_launcher_and_the_job_goes_on_once(scheduler: str, start: Start) -> None:
    job = start(scheduler, "wait")
    job.wait_until_ready()
    job.process.send_signal(signal.SIGUSR1)
    code, output = job.end()
    assert (code, job.lines("signals")) == (85, ["USR1"]), output
    assert len(again(scheduler, job)) == 1 and "1 of at most 20" in output
    assert (job.run_dir / "last-exit-code").read_text() == "85\n"


def test_slurms_sigterm_becomes_sigusr1_and_a_cancelled_job_does_not_come_back(start: Start) -> None:
    job = start("slurm", "wait", JOB_STATE="CANCELLED")
    job.wait_until_ready()
    job.process.terminate()
    code, output = job.end()
    assert (code, job.lines("signals")) == (85, ["USR1"]), output
    assert again("slurm", job) == [] and not job.calls("sbatch") and "was cancelled" in output


def test_slurms_sigterm_to_a_job_that_may_run_requeues_it(start: Start) -> None:
    job = start("slurm", "wait")
    job.wait_until_ready()
    job.process.terminate()
    assert job.end()[0] == 85
    assert len(again("slurm", job)) == 1


def test_pbs_sigterm_saves_and_submits_nothing(start: Start) -> None:
    job = start("pbs", "wait")
    job.wait_until_ready()
    job.process.terminate()
    code, output = job.end()
    assert (code, job.lines("signals")) == (85, ["USR1"]), output
    assert again("pbs", job) == []


def test_pbs_ends_all_processes_of_a_job_at_once_and_that_is_no_crash(start: Start) -> None:
    job = start("pbs", "wait", CHAIN_LINK="2")
    job.wait_until_ready()
    os.killpg(job.process.pid, signal.SIGTERM)  # the launcher dies of it
    code, output = job.end()
    assert code == 85 and again("pbs", job) == [], output
    assert start("pbs", "exit:0", CHAIN_LINK="2").end()[0] == 0  # what PBS starts again goes on


def test_pbs_runs_what_prepares_a_node_once_on_each_and_hears_of_failures(start: Start, tmp_path: Path) -> None:
    (tmp_path / "my work" / "nodes").write_text("alpha\nalpha\nbeta\nbeta\n")
    job = start("pbs", "exit:0", STAGE_ENV="packed.tar", STAGE_DIR="/tmp/st age")
    assert job.end()[0] == 0
    number = subprocess.run(["cksum"], input=f"{job.run_dir}\n", capture_output=True, text=True, check=True).stdout
    staged = f"/tmp/st age/hpctrain-{os.getuid()}-{number.split()[0]}-a run"  # another folder of that name has its own
    made = [call for call in job.calls("pbs_tmrsh") if "mkdir" in call]
    assert sorted(made) == [f"pbs_tmrsh {host} /bin/mkdir -p -- {staged}" for host in ("alpha", "beta")]
    unpacked = [call for call in job.calls("pbs_tmrsh alpha") if "stage_env.py" in call]
    folder = tmp_path / "my work"
    assert len(unpacked) == 1 and unpacked[0].endswith(f"{folder}/stage_env.py {folder}/packed.tar {staged}/env")
    assert len([call for call in job.calls("pbs_tmrsh") if call.endswith(f"rm -rf -- {staged}")]) == 2
    job = start("pbs", "exit:0", STAGE_ENV="packed.tar", STAGE_DIR="/tmp/st age", TMRSH_CODE="3")
    code, output = job.end()
    assert code == 3 and "failed with exit code 3" in output


@BOTH
@pytest.mark.parametrize("code", [0, 1, 2, 137, 143])
def test_what_finished_or_crashed_is_not_requeued(scheduler: str, code: int, start: Start) -> None:
    job = start(scheduler, f"exit:{code}")
    assert job.end()[0] == code
    assert again(scheduler, job) == [] and not job.calls("sbatch")


@BOTH
def test_a_program_that_dies_of_the_signal_was_stopped_not_broken(scheduler: str, start: Start) -> None:
    job = start(scheduler, "deaf")
    job.wait_until_ready()
    time.sleep(0.1)  # until the stand-in has become `sleep`, which has no trap
    job.process.send_signal(signal.SIGUSR1)
    code, output = job.end()
    assert code == 85 and len(again(scheduler, job)) == 1, output


@BOTH
def test_the_limit_of_requeues(scheduler: str, start: Start) -> None:
    job = start(scheduler, "exit:85", MAX_REQUEUES="3", REQUEUES="2")
    assert job.end()[0] == 85 and len(again(scheduler, job)) == 1
    job = start(scheduler, "exit:85", MAX_REQUEUES="3", REQUEUES="3")
    code, output = job.end()
    assert code == 85 and len(again(scheduler, job)) == 1 and "MAX_REQUEUES=3" in output


def test_slurm_counts_its_own_restarts(start: Start) -> None:
    job = start("slurm", "exit:85", MAX_REQUEUES="3", SLURM_RESTART_COUNT="3")
    assert job.end()[0] == 85 and again("slurm", job) == []


def test_where_slurm_does_not_requeue_the_script_is_submitted_again(start: Start) -> None:
    told = {"PARTITION": "short", "ACCOUNT": "me", "QOS": "debug"}
    variables = {f"SLURM_JOB_{name}": value for name, value in told.items()}
    variables |= {"SLURM_NTASKS_PER_NODE": "16", "SLURM_CPUS_PER_TASK": "4"}
    job = start("slurm", "exit:85", ("a=b c",), SCONTROL_CODE="1", SLURM_RESTART_COUNT="2", **variables)
    assert job.end()[0] == 85
    (call,) = job.calls("sbatch")
    asked = "--partition=short --account=me --qos=debug --ntasks-per-node=16 --cpus-per-task=4 --time=1-02:00:00 /"
    assert "--dependency=afterany:12" in call and asked in call and call.endswith("/.again.sbatch a=b c")
    assert job.lines("requeues") == ["3"]
    assert '"id": "77"' in (job.run_dir / "jobs.jsonl").read_text()
    assert (job.run_dir / ".again.sbatch").read_bytes() == (template_root() / "slurm" / "train.sbatch").read_bytes()


def test_a_job_of_an_array_requeues_itself_alone(start: Start) -> None:
    job = start("slurm", "exit:85", SLURM_ARRAY_JOB_ID="12", SLURM_ARRAY_TASK_ID="5")
    assert job.end()[0] == 85
    assert again("slurm", job) == ["scontrol requeue 12_5"]


def test_pbs_tells_the_next_job_what_this_one_was_told(start: Start) -> None:
    awkward = '\n  model.name=it\'s \\ $(x), "y"\n'
    job = start("pbs", "exit:85", DATA="/da ta", OVERRIDES=awkward, PBS_O_QUEUE="long")
    assert job.end()[0] == 85
    (call,) = job.calls("qsub")
    asked = "-l select=2:ncpus=1:mpiprocs=1:ompthreads=1 -l place=scatter -l walltime=00:10:00 -N job -A me -q long"
    assert f"-W depend=afterany:12.server {asked} -v REQUEUES=1 /" in call and call.endswith("/.again.pbs")
    assert '"id": "77.server"' in (job.run_dir / "jobs.jsonl").read_text()

    (job.out / "launched").unlink()
    script = job.run_dir / ".again.pbs"
    for requeues in ("1", "2"):  # the further job, and the one that follows it
        again = start("pbs", "exit:85", script=script, REQUEUES=requeues, OVERRIDES=None, DATA=None)
        assert again.end()[0] == 85
        words = ["hpctrain", "train", "demo", "data.path=/da ta", 'model.name=it\'s \\ $(x), "y"', "--run-dir"]
        assert job.lines("launched") == [*words, str(job.run_dir)]
        assert script.read_text().count("export DATA='/da ta' # told by qsub -v") == 1
        (job.out / "launched").unlink()


@BOTH
def test_a_chain_ends_with_its_run(scheduler: str, start: Start) -> None:
    first = start(scheduler, "exit:85", MAX_REQUEUES="0")
    assert first.end()[0] == 85 and again(scheduler, first) == []
    assert start(scheduler, "exit:0", CHAIN_LINK="2", MAX_REQUEUES="0").end()[0] == 0
    (first.out / "launched").unlink()
    third = start(scheduler, "exit:0", CHAIN_LINK="3", MAX_REQUEUES="0")
    assert third.end()[0] == 0 and third.lines("launched") == []
    (first.run_dir / "last-exit-code").write_text("1\n")
    fourth = start(scheduler, "exit:0", CHAIN_LINK="4", MAX_REQUEUES="0")
    assert fourth.end()[0] == 1 and fourth.lines("launched") == []


@BOTH
def test_the_program_gets_arguments_variables_and_the_end_of_the_job(scheduler: str, start: Start) -> None:
    index = {"slurm": "SLURM_ARRAY_TASK_ID", "pbs": "PBS_ARRAY_INDEX"}[scheduler]
    variables = {
        "DATA": "/da ta",
        "PARTITIONS": "4",
        "OVERRIDES": "\n  model.name=it's $(x)\n\n  train.steps=2\n",
        "VARIABLES": "\n  ONE=a b\n  TWO=$(x)\n",
        "SETUP": "export THREE=3; unset_before=${UNSET_BEFORE}",
        "SLURM_CPUS_PER_TASK": "6",
        index: "5",
    }
    job = start(scheduler, "exit:0", **variables)
    code, output = job.end()
    assert code == 0, output
    words = ["hpctrain", "train", "demo", "data.path=/da ta", "data.partitions=4"]
    words += ["model.name=it's $(x)", "train.steps=2", "train.seed=5", "--run-dir", str(job.run_dir / "5")]
    assert job.lines("launched") == words
    environ = dict(line.split("=", 1) for line in job.lines("environment") if "=" in line)
    assert (environ["ONE"], environ["TWO"], environ["THREE"]) == ("a b", "$(x)", "3")
    if scheduler == "pbs":
        assert abs(float(environ["HPCTRAIN_END_TIME"]) - time.time() - 600) < PATIENCE_SECONDS
    else:
        assert environ["SRUN_CPUS_PER_TASK"] == environ["OMP_NUM_THREADS"] == "6"


def test_pbs_logs_go_to_a_file_named_by_job(start: Start) -> None:
    job = start("pbs", "exit:0", LOG_DIR="my logs")
    assert job.end() == (0, "")
    assert "finished" in (job.run_dir.parent.parent / "my logs" / "job-12.out").read_text()


def test_open_mpi_under_pbs_is_told_hosts_variables_and_a_way_to_them(start: Start, tmp_path: Path) -> None:
    tools = tmp_path / "my work" / "tools"
    for name in ("mpirun", "pbs_tmrsh"):
        (tools / name).write_text(
            '#!/bin/bash\n[[ $1 != --version ]] || { echo "mpirun (Open MPI) 5"; exit; }\n'
            'while [[ $1 != --hostfile ]]; do shift; done; cat "$2" >"$NOTES/hosts"\n'
            'printf "%s\\n" "$@" >"$NOTES/launched"\n'
            '"$PRTE_MCA_plm_ssh_agent" -x beta echo "a b"\n'
            if name == "mpirun"
            else '#!/bin/bash\n[[ $2 == /bin/true ]] || printf "%s\\n" "$@" >"$NOTES/tmrsh"\n'
        )
        (tools / name).chmod(0o755)
    job = start("pbs", "", LAUNCH="mpirun -n 2 -x OMP_NUM_THREADS", VARIABLES="A=1")
    code, output = job.end()
    assert code == 0, output
    assert job.lines("hosts") == ["alpha slots=1", "beta slots=1"]
    words = job.lines("launched")
    exported = [word for before, word in itertools.pairwise(words) if before == "-x"]
    assert exported == ["PATH", "A", "HPCTRAIN_END_TIME", "OMP_NUM_THREADS"]  # the last was there already
    assert job.lines("tmrsh") == ["beta", "/bin/sh", "-c", "echo a b"]


TMRSH = """#!/bin/bash
# Like PBS's: in $HOME, with hardly any variables, on a node with a name of its own.
host=$1; shift; cd "$HOME"
exec env -i PATH=/usr/bin:/bin HOME="$HOME" OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \\
  unshare --uts /bin/sh -c 'hostname "$0"; exec "$@"' "$host" "$@"
"""


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("nodes", "launch", "hosts"),
    [
        ("a-name-pbs-has-for-it\n" * 2, "mpirun -n 2 --map-by ppr:2:node --bind-to none", ["{here}"] * 2),
        ("{here}\nbeta\n", "mpirun -n 2 --map-by ppr:1:node --bind-to none", ["{here}", "beta"]),
    ],
    ids=["one node", "two nodes"],
)
def test_open_mpi_really_starts_on_the_nodes_of_a_pbs_job(
    nodes: str, launch: str, hosts: list[str], start: Start, tmp_path: Path
) -> None:
    folder, here = tmp_path / "my work", os.uname().nodename
    mpirun = shutil.which("mpirun")
    if mpirun is None:
        pytest.skip("needs mpirun")
    if "beta" in hosts and subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode:
        pytest.skip("only root can give a node a name of its own")
    (folder / "nodes").write_text(nodes.format(here=here))
    (folder / "tools" / "pbs_tmrsh").write_text(TMRSH)
    (folder / "tools" / "hpctrain").write_text('#!/bin/sh\necho "rank on $(hostname) in $PWD with $A"\n')
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    path = f"{folder}/tools:{Path(mpirun).parent}:/usr/bin:/bin"
    job = start("pbs", "", LAUNCH=launch, VARIABLES="A=b c", PBS_ENVIRONMENT="PBS_BATCH", PATH=path, **root)
    code, output = job.end()
    assert code == 0, output
    ranks = sorted(line for line in output.splitlines() if line.startswith("rank on"))
    assert ranks == sorted(f"rank on {host.format(here=here)} in {folder} with b c" for host in hosts)


@BOTH
@pytest.mark.parametrize(
    ("kind", "variables", "words"),
    [
        ("evaluate", {"RUN": "r un", "DATA": "d ata"}, ["evaluate", "r un", "--data", "d ata"]),
        (
            "prepare",
            {"INPUT": "in put", "OUTPUT": "out", "SPLIT": "val", "OPTIONS": "\n  --labels=dev kit\n  --shards=4\n"},
            ["data", "prepare", "in put", "out", "--split", "val", "--labels=dev kit", "--shards=4"],
        ),
    ],
)
def test_the_other_scripts(
    scheduler: str, kind: str, variables: dict[str, str], words: list[str], start: Start
) -> None:
    job = start(scheduler, "exit:0", kind=kind, **variables)
    code, output = job.end()
    assert code == 0 and "finished" in output, output
    assert job.lines("launched") == ["hpctrain", *words]
    assert start(scheduler, "exit:3", kind=kind).end()[0] == 3


@BOTH
def test_a_scaling_study_goes_on_after_a_size_that_fails(scheduler: str, start: Start) -> None:
    variables = {"NODE_COUNTS": "1 2", "BATCH_PER_NODE": "64", "OUT": "o ut", "SLURM_NTASKS": "2", "DATA": "d ata"}
    job = start(scheduler, "exit:3", kind="scaling", **variables)
    code, output = job.end()
    assert code == 3 and output.count("failed with exit code 3") == 2, output
    words = ["-n", "2", "hpctrain", "train", "demo", "data.path=d ata", "train.steps=100", "train.global_batch=128"]
    assert job.lines("launched") == [*words, "--run-dir", "o ut/nodes-2", "--resume", "none"]
    assert start(scheduler, "exit:0", kind="scaling", **variables).end()[0] == 0


def test_no_process_is_left_when_the_job_has_ended(start: Start) -> None:
    job = start("slurm", "wait")
    job.wait_until_ready()
    job.process.send_signal(signal.SIGUSR1)
    job.end()
    with pytest.raises(ProcessLookupError):
        os.killpg(job.process.pid, 0)
