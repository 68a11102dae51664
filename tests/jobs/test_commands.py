"""`hpctrain submit`, `status`, `cancel` and `templates`, with stand-ins for the batch systems' programs."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from hpctrain.errors import UserError
from hpctrain.jobs import commands

SYNTHETIC = ["data.synthetic=true", "model.num_classes=10"]

FAKE = """#!/bin/bash
printf '%s\\n' "${0##*/}" "$@" "" >>"$OUT/calls"
case ${0##*/} in
  sbatch) env >"$OUT/environment"; n=$(($(cat "$OUT/count" 2>/dev/null || echo 0) + 1)); echo $n >"$OUT/count"
    [[ ! -f $OUT/refuse ]] || { echo "sbatch: error: Invalid account" >&2; exit 1; }; echo "$((100 + n));cluster" ;;
  qsub) env >"$OUT/environment"; [[ $* != *"-J 1-1 "* ]] || { echo "qsub: illegal -J value" >&2; exit 2; }
    [[ $* == *-J* ]] && echo "7[].server" || echo 7.server ;;
  qdel) [[ ! -f $OUT/qdel ]] || { cat "$OUT/qdel" >&2; exit 1; } ;;
  squeue) [[ $* != *--jobs=* ]] || cat "$OUT/squeue" 2>/dev/null || { echo "Invalid job id specified" >&2; exit 1; } ;;
  sacct) cat "$OUT/sacct" 2>/dev/null ;;
  qstat) if [[ $1 == -x ]]; then
      cat "$OUT/history" 2>/dev/null || { echo "qstat: job_history_enable is set to false" >&2; exit 1; }
    else
      cat "$OUT/qstat" 2>/dev/null || { echo "qstat: Unknown Job Id 7.server" >&2; exit 153; }
    fi
    [[ ! -f $OUT/complaint ]] || { cat "$OUT/complaint" >&2; exit 1; } ;;
esac
"""


class Here:
    """A folder to work in, and stand-ins that write down how they were called."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def calls(self, program: str) -> list[list[str]]:
        text = (self.out / "calls").read_text() if (self.out / "calls").exists() else ""
        calls = [call.split("\n") for call in text.rstrip("\n").split("\n\n")]
        return [call[1:] for call in calls if call[0] == program]

    def environment(self) -> str:
        return (self.out / "environment").read_text()


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Here:
    out, tools = tmp_path / "out", tmp_path / "tools"
    out.mkdir()
    tools.mkdir()
    for name in ("sbatch", "squeue", "sacct", "scancel", "qsub", "qstat", "qdel"):
        (tools / name).write_text(FAKE)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setenv("OUT", str(out))
    work = tmp_path / "my work"
    work.mkdir()
    monkeypatch.chdir(work)
    return Here(out)


def run(command: click.Command, *arguments: str) -> Result:
    return CliRunner().invoke(command, arguments, catch_exceptions=False, standalone_mode=False)


def submit(
    *arguments: str, site: str = "generic-slurm", recipe: str = "demo", data: Sequence[str] = SYNTHETIC
) -> Result:
    return run(commands.submit, recipe, "--site", site, "--nodes", "2", *arguments, *data)


def test_submit_writes_the_script_and_tells_job_and_log(here: Here) -> None:
    lines = submit("--name", "first").stdout.splitlines()
    runs = Path.cwd() / "runs"
    assert lines == ["job: 101", f"log: {runs}/logs/first-101.out", f"run: {runs}/first"]
    assert (runs / "logs").is_dir()
    (call,) = here.calls("sbatch")
    assert call == ["--parsable", str(runs / "first" / "job.sbatch")]
    assert f'#SBATCH --output="{runs}/logs/first-%j.out"' in (runs / "first" / "job.sbatch").read_text()


def test_a_site_that_does_not_know_its_cores_is_told_of(here: Here) -> None:
    assert "give --cores N" in submit("--name", "first").stderr
    assert submit("--name", "second", "--cores", "8").stderr == ""


def test_a_dry_run_prints_the_same_script_and_does_nothing(here: Here) -> None:
    printed = submit("--dry-run", "--name", "first").stdout
    assert not Path("runs").exists() and here.calls("sbatch") == []
    submit("--name", "first")
    assert Path("runs/first/job.sbatch").read_text() == printed


def test_what_is_set_outside_does_not_change_the_job(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RECIPE", "DATA", "MAX_REQUEUES", "CHAIN_LINK", "SBATCH_PARTITION"):
        monkeypatch.setenv(name, "intruder")
    monkeypatch.setenv("MINE", "kept")
    submit()
    assert "intruder" not in here.environment() and "MINE=kept" in here.environment()


def test_a_chain_waits_link_by_link_and_an_array_is_one_job(here: Here) -> None:
    output = submit("--chain", "3", "--after", "55").output
    assert [line for line in output.splitlines() if line.startswith("job")] == ["job: 101", "job: 102", "job: 103"]
    dependencies = [call[1] for call in here.calls("sbatch")]
    assert dependencies == ["--dependency=afterok:55", "--dependency=afterany:101", "--dependency=afterany:102"]
    assert "CHAIN_LINK=3" in here.environment()
    assert "MAX_REQUEUES=${MAX_REQUEUES-0}" in Path("runs/demo/job.sbatch").read_text()
    assert "seeds-104_*.out" in submit("--array", "1-5", "--name", "seeds").output
    assert here.calls("sbatch")[-1][1] == "--array=1-5"
    assert "/seeds-%A_%a.out" in Path("runs/seeds/job.sbatch").read_text()
    (here.out / "squeue").write_text("104|104_1|RUNNING|0:1|1:0|None\n104|104_2|FAILED|0:1|1:0|NonZeroExitCode\n")
    assert "job 104: 1 RUNNING, 1 FAILED" in run(commands.status, "seeds").output


def test_two_jobs_do_not_write_one_run(here: Here) -> None:
    submit()
    (here.out / "squeue").write_text("101|101|RUNNING|0:10|1:00:00|None\n")
    with pytest.raises(UserError, match=r"job 101 of the run .* is RUNNING"):
        submit()
    submit("--after", "101")
    (here.out / "squeue").write_text("101|101|COMPLETED|0:10|1:00:00|None\n")
    assert "job: 103" in submit().output


def test_the_schedulers_own_words_are_told(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    (here.out / "refuse").touch()
    with pytest.raises(UserError, match="sbatch refused: sbatch: error: Invalid account"):
        submit()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="there is no sbatch on the PATH"):
        submit()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--array", "5-1"], "--array is '5-1'"),
        (["--array", "1,2"], "--array is '1,2'"),
        (["--after", "1; ls"], "--after is '1; ls'"),
        (["--array", "1-2", "--chain", "2"], "do not go together"),
        (["--requeue", "2", "--chain", "2"], "do not go together"),
        (["--array", "1-2", "train.seed=7"], "gives each run its own train.seed"),
    ],
)
def test_mistakes(here: Here, arguments: list[str], sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        submit(*arguments)
    assert sentence in str(caught.value)
    assert here.calls("sbatch") == [] and not Path("runs").exists()


def test_status_tells_state_progress_and_time_left(here: Here) -> None:
    submit("train.steps=100")
    folder = Path("runs/demo")
    assert "no step has been logged" in run(commands.status, "demo").output
    steps = [{"kind": "train", "step": i, "epoch": i / 10, "loss": 2.0, "images_per_second": 50.0} for i in (1, 2, 40)]
    lines = [json.dumps({**step, "step_seconds": 3.0}) for step in steps]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"kind": "tr']))
    (folder / "config.yaml").write_text(
        "name: demo\nmodel: {name: resnet20}\ntrain: {global_batch: 10, micro_batch: 10, epochs: 9, steps: 100}\n"
        "optimizer: {learning_rate: 1}\n"
    )
    (folder / "manifest.json").write_text('{"data": {"num_records": 1000}}')
    (here.out / "squeue").write_text("101|101|RUNNING|0:10|1:00:00|None\n")
    output = run(commands.status, "demo").output
    assert "job 101: RUNNING, 0:10 of 1:00:00" in output
    assert "step 40 of 100 (40%), epoch 4, loss 2, 50.0 images/s, about 3 min of training left" in output
    assert run(commands.status).output == output  # the only run
    (here.out / "squeue").unlink()
    assert "no longer known" in run(commands.status, "demo").output
    (here.out / "sacct").write_text("101|CANCELLED by 0|00:00:20|01:00:00\n")
    assert "job 101: CANCELLED, 00:00:20" in run(commands.status, "demo").output
    with pytest.raises(UserError, match="there is no run directory nothing"):
        run(commands.status, "nothing")


def test_cancel_ends_what_is_active(here: Here) -> None:
    submit("--chain", "2")
    (here.out / "squeue").write_text("101|101|COMPLETED|0:10|1:00:00|None\n102|102|PENDING|0:00|1:00:00|Dependency\n")
    assert run(commands.cancel, "runs/demo").output == "cancelled: 102\n"
    assert here.calls("scancel") == [["102"]]
    (here.out / "squeue").write_text("102|102_1|RUNNING|0:00|1:00:00|None\n102|102_2|COMPLETED|0:0|1:0|None\n")
    assert "cancelled: 102" in run(commands.cancel, "demo").output
    (here.out / "squeue").write_text("")
    assert "no job that waits or runs" in run(commands.cancel, "demo").output
    Path("runs/other").mkdir()
    with pytest.raises(UserError, match="no job of runs/other"):
        run(commands.cancel, "other")


def test_a_job_list_that_was_tampered_with_calls_nothing(here: Here) -> None:
    Path("runs/odd").mkdir(parents=True)
    lines = [
        '{"scheduler": "slurm", "id": "--me"}',
        '{"scheduler": "x", "id": "1"}',
        "[1]",
        '{"scheduler": ["pbs"]}',
        "{",
    ]
    Path("runs/odd/jobs.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError):
        run(commands.cancel, "odd")
    assert here.calls("squeue") == here.calls("scancel") == []


def test_pbs(here: Here) -> None:
    output = submit("--after", "5.server", "--name", "pbs-run", site="generic-pbs").stdout
    script = Path.cwd() / "runs" / "pbs-run" / "job.pbs"
    assert output.splitlines()[:2] == ["job: 7.server", f"log: {script.parent.parent}/logs/pbs-run-7.out"]
    assert here.calls("qsub") == [["-W", "depend=afterok:5.server", str(script)]]
    running = "Job Id: 7.server\n    Job_Name = pbs-run\n    resources_used.walltime = 00:01:00\n    job_state = R\n"
    running += "    Resource_List.wall\n\ttime = 01:00:00\n    Variable_List = A=x\n    job_state = F\n\n"
    (here.out / "qstat").write_text(running)
    (here.out / "complaint").write_text("qstat: Unknown Job Id 6.server\n")  # some are known, others not: it fails
    assert "job 7.server: RUNNING, 00:01:00 of 01:00:00" in run(commands.status, "pbs-run").stdout
    assert run(commands.cancel, "pbs-run").stdout == "cancelled: 7.server\n"
    assert here.calls("qdel") == [["7.server"]]
    submit("--chain", "2", "--after", "7.server", "--name", "chain", site="generic-pbs")
    assert here.calls("qsub")[-1] == [
        *("-W", "depend=afterany:7.server", "-v", "CHAIN_LINK=2"),
        str(script.parent.parent / "chain" / "job.pbs"),
    ]


def test_pbs_without_a_history_forgets_jobs_and_with_one_knows_how_they_ended(here: Here) -> None:
    submit("--name", "run", site="generic-pbs")
    assert "job 7.server: no longer known to the scheduler" in run(commands.status, "run").stdout
    (here.out / "history").write_text("Job Id: 7.server\n    job_state = F\n    Exit_status = 271\n")
    assert "job 7.server: FINISHED (exit status 271)" in run(commands.status, "run").stdout
    (here.out / "history").unlink()
    (here.out / "qstat").write_text("")
    (here.out / "complaint").write_text("qstat: cannot connect to server pbs (errno=15010)\n")
    with pytest.raises(UserError, match="qstat refused: qstat: cannot connect to server"):
        run(commands.status, "run")


def test_an_array_of_pbs_and_a_server_with_an_underscore(here: Here) -> None:
    assert "log: " in submit("--array", "1-3", "--name", "seeds", site="generic-pbs").stdout
    assert here.calls("qsub")[-1][:2] == ["-J", "1-3"]
    counts = "Queued:1 Running:1 Exiting:0 Expired:1 "
    (here.out / "qstat").write_text(f"Job Id: 7[].server\n    job_state = B\n    array_state_count = {counts}\n")
    assert f"job 7[].server: RUNNING ({counts.strip()})" in run(commands.status, "seeds").stdout
    Path("runs/other").mkdir()
    Path("runs/other/jobs.jsonl").write_text('{"scheduler": "pbs", "id": "8.pbs_server"}\n')
    (here.out / "qstat").write_text("Job Id: 8.pbs_server\n    job_state = Q\n    comment = Not Running: no CPUs\n")
    assert "job 8.pbs_server: QUEUED (Not Running: no CPUs)" in run(commands.status, "other").stdout


def test_jobs_by_which_the_runs_of_an_array_went_on_are_known(here: Here) -> None:
    member = Path("runs/seeds/2")
    member.mkdir(parents=True)
    Path("runs/seeds/jobs.jsonl").write_text('{"scheduler": "pbs", "id": "7[].server"}\n')
    (member / "jobs.jsonl").write_text('{"scheduler": "pbs", "id": "9.server"}\n')
    ended, runs = "Job Id: 7[].server\n    job_state = F\n\n", "Job Id: 9.server\n    job_state = R\n"
    (here.out / "qstat").write_text(ended + runs)
    assert "job 9.server: RUNNING" in run(commands.status, "seeds").stdout
    with pytest.raises(UserError, match=r"job 9\.server of the run .* is RUNNING"):
        submit("--array", "1-3", "--name", "seeds", site="generic-pbs")
    assert run(commands.cancel, "seeds").stdout == "cancelled: 9.server\n"


def test_the_last_of_a_chain_is_cancelled_first_and_what_has_just_ended_does_not_matter(here: Here) -> None:
    Path("runs/run").mkdir(parents=True)
    lines = [json.dumps({"scheduler": "pbs", "id": f"{number}.server"}) for number in (7, 8)]
    Path("runs/run/jobs.jsonl").write_text("\n".join(lines))
    states = "".join(
        f"Job Id: {number}.server\n    job_state = {letter}\n\n" for number, letter in ((7, "R"), (8, "H"))
    )
    (here.out / "qstat").write_text(states)
    (here.out / "qdel").write_text("qdel: Job has finished 7.server\n")
    assert run(commands.cancel, "run").stdout == "cancelled: 7.server 8.server\n"
    assert here.calls("qdel") == [["8.server", "7.server"]]
    (here.out / "qdel").write_text("qdel: Unauthorized Request  8.server\n")
    with pytest.raises(UserError, match="qdel refused: qdel: Unauthorized Request"):
        run(commands.cancel, "run")


def test_a_local_job_runs_in_the_foreground_and_passes_its_exit_code_on(
    here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix = Path("prefix")
    (prefix / "bin").mkdir(parents=True)
    (prefix / "bin" / "mpirun").write_text('#!/bin/bash\nprintf "%s\\n" "$@" >"$OUT/mpirun"\nexit 85\n')
    (prefix / "bin" / "mpirun").chmod(0o755)
    monkeypatch.setattr("sys.prefix", str(prefix.absolute()))
    local = ["demo", "--site", "local", "--nodes", "1"]
    assert run(commands.submit, *local, *SYNTHETIC).return_value == 85
    assert (here.out / "mpirun").read_text().splitlines()[-2:] == ["--run-dir", str(Path.cwd() / "runs" / "demo")]
    assert "hpctrain train demo" in run(commands.submit, *local, "--dry-run", *SYNTHETIC).output
    (prefix / "bin" / "mpirun").unlink()
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UserError, match="mpirun, which is to start the ranks, cannot be started"):
        run(commands.submit, *local, *SYNTHETIC)
    with pytest.raises(UserError, match="--chain needs a batch system"):
        run(commands.submit, *local, "--chain", "2", *SYNTHETIC)


def test_templates_are_listed_and_copied(here: Here) -> None:
    listed = run(commands.templates).output.splitlines()
    assert "train.sbatch" in {Path(line).name for line in listed} and all(Path(line).is_file() for line in listed)
    copied = run(commands.templates, "--copy", "mine").output.splitlines()
    assert [Path(line).name for line in copied] == [Path(line).name for line in listed]
    with pytest.raises(UserError, match="is there already"):
        run(commands.templates, "--copy", "mine")
