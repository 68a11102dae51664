"""The job script of a study with its counts side by side, with a stand-in for the launcher."""

import subprocess
from pathlib import Path

import pytest

from hpctrain.jobs.templates import SUFFIXES, template_root

LAUNCHER = """#!/bin/bash
printf '%s|' "${0##*/}" "$@" >>"$NOTES/launched"; echo >>"$NOTES/launched"
[[ $1 != --version ]] || { echo "mpirun (Open MPI) 5.0.8"; exit; }
here=$(date +%N).$$
: >"$NOTES/begun.$here"
for ((i = 0; i < 100; i++)); do  # until as many run as should at once
  begun=("$NOTES"/begun.*)
  [[ ${#begun[@]} -lt $AT_ONCE ]] || exit "$CODE"
  sleep 0.1
done
exit 99
"""
RUNS = "1 nodes-1 64 {0} -n 1\n2 nodes-2 128 {0} -n 2\n"


def run(tmp_path: Path, scheduler: str, launcher: str, **variables: str) -> tuple[int, str, list[list[str]]]:
    """Run the script in a job of three nodes, a, b, c; return exit code, output and how launchers were called."""
    tools, notes = tmp_path / "tools", tmp_path / "notes"
    tools.mkdir()
    notes.mkdir()
    scontrol = '#!/bin/bash\n[[ $1 != show ]] || printf "a\\nb\\nc\\n"\n'
    hpctrain = '#!/bin/bash\necho "hpctrain $*"\n'
    for name, text in ((launcher, LAUNCHER), ("scontrol", scontrol), ("hpctrain", hpctrain)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    (tmp_path / "nodes").write_text("a\nb\nc\n")
    slurm = {"SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "3", "SLURM_JOB_NODELIST": "[a-c]", "SLURM_NTASKS": "3"}
    pbs = {"PBS_JOBID": "1.s", "PBS_JOBNAME": "j", "PBS_O_WORKDIR": str(tmp_path), "PBS_NODEFILE": f"{tmp_path}/nodes"}
    script = template_root() / scheduler / f"scaling{SUFFIXES[scheduler]}"
    environ = {"PATH": f"{tools}:/usr/bin:/bin", "NOTES": str(notes), "OUT": "o ut", "LAUNCH": launcher, "CODE": "0"}
    environ |= {"slurm": slurm, "pbs": pbs}[scheduler] | variables
    done = subprocess.run(
        ["bash", script],
        env=environ,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    calls = [line.split("|")[:-1] for line in (notes / "launched").read_text().splitlines()]
    return done.returncode, done.stdout, [call for call in calls if "train" in call]


@pytest.mark.parametrize(
    ("scheduler", "launcher", "places"),
    [
        ("slurm", "srun", (["--relative=0"], ["--relative=1"])),
        ("slurm", "ibrun", (["-n", "1", "-o", "0"], ["-n", "2", "-o", "1"])),
        ("pbs", "mpiexec.hydra", (["-hosts", "a"], ["-hosts", "b,c"])),
        ("pbs", "mpirun", (["--host", "a:1"], ["--host", "b:1,c:1"])),
        ("pbs", "mpiexec", (["--hosts", "a"], ["--hosts", "b,c"])),
        ("pbs", "aprun", ([], [])),
    ],
)
def test_counts_side_by_side_run_at_once_on_nodes_of_their_own(
    scheduler: str, launcher: str, places: tuple[list[str], list[str]], tmp_path: Path
) -> None:
    code, output, calls = run(tmp_path, scheduler, launcher, RUNS=RUNS.format(launcher), SIDE_BY_SIDE="1", AT_ONCE="2")
    assert code == 0, output
    assert "hpctrain study report o ut" in output
    for call, place, n in zip(sorted(calls, key=lambda call: call[-3]), places, "12", strict=True):
        before = call[1 : call.index("hpctrain")]
        assert before[len(before) - 2 - len(place) :] == [*place, "-n", n]
        assert call[-5:] == [f"train.global_batch={64 * int(n)}", "--run-dir", f"o ut/nodes-{n}", "--resume", "none"]


def test_a_step_of_slurm_is_told_of_its_own_nodes_only(tmp_path: Path) -> None:
    code, output, _ = run(tmp_path, "slurm", "srun", RUNS=RUNS.format("srun"), SIDE_BY_SIDE="1", AT_ONCE="2")
    assert code == 0 and "env SLURM_JOB_NODELIST=b\\,c srun --relative=1 " in output, output


def test_what_does_not_fit_beside_the_others_comes_after_them(tmp_path: Path) -> None:
    runs = RUNS.format("srun") + "3 nodes-3 192 srun -n 3\n"
    code, output, calls = run(tmp_path, "slurm", "srun", RUNS=runs, SIDE_BY_SIDE="1", AT_ONCE="2")
    assert code == 0, output
    assert calls[-1][1:4] == ["--relative=0", "-n", "3"] and len(calls) == 3


@pytest.mark.parametrize("scheduler", ["slurm", "pbs"])
def test_a_count_that_fails_is_told_and_the_job_fails(scheduler: str, tmp_path: Path) -> None:
    launcher = {"slurm": "srun", "pbs": "mpiexec.hydra"}[scheduler]
    code, output, calls = run(
        tmp_path, scheduler, launcher, RUNS=RUNS.format(launcher), SIDE_BY_SIDE="1", AT_ONCE="2", CODE="3"
    )
    assert code == 3 and len(calls) == 2 and output.count("failed with exit code 3") == 2


def test_by_hand_the_counts_run_in_turn_on_the_first_nodes(tmp_path: Path) -> None:
    launcher = {"LAUNCH": "srun --mpi=pmix numactl -p 1", "STEPS": "7", "BATCH_PER_NODE": "64", "AT_ONCE": "1"}
    code, output, calls = run(tmp_path, "slurm", "srun", **launcher)
    assert code == 0, output
    assert [call[1:4] for call in calls] == [
        [f"--nodes={n}", f"--ntasks={n}", "--ntasks-per-node=1"] for n in (1, 2, 3)
    ]
    assert all(call[4:8] == ["--mpi=pmix", "numactl", "-p", "1"] for call in calls)
    assert [word for call in calls for word in call if "batch" in word] == [
        f"train.global_batch={64 * n}" for n in (1, 2, 3)
    ]
