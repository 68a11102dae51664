"""The program as a user meets it: help at once, and one sentence with exit code 2 for every mistake."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from hpctrain import __version__
from hpctrain.config import describe_keys, recipe_names

SMALL = ["data.synthetic=true", "data.synthetic_records=32", "model.image_size=16", "model.num_classes=4"]
SMALL += ["train.global_batch=16", "train.micro_batch=8", "train.epochs=1", "schedule.warmup_epochs=0"]


def hpctrain(
    *arguments: str, python: Sequence[str] = (), launcher: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    """Run the program to its end, as one process outside of any launcher."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("OMPI_COMM", "PMI"))}
    environ |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = [*launcher, sys.executable, *python, "-m", "hpctrain", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environ, timeout=120, check=False)


def sentence(*arguments: str, launcher: Sequence[str] = ()) -> str:
    """The one line that a mistake is answered with on stderr."""
    done = hpctrain(*arguments, launcher=launcher)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("hpctrain: error: ")
    return line


VERBS = ["train", "evaluate", "recipes", "doctor", "report", "data"]


def test_help_lists_the_verbs_and_loads_nothing_heavy() -> None:
    done = hpctrain("--help", python=("-X", "importtime"))
    assert done.returncode == 0
    assert all(f"\n  {verb} " in done.stdout for verb in VERBS)
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert {"hpctrain", "click"} <= loaded
    heavy = {"tensorflow", "keras", "h5py", "pydantic", "numpy", "yaml", "rich", "mpi4py", "matplotlib", "PIL"}
    assert not loaded & heavy


def test_no_arguments_and_version() -> None:
    bare = hpctrain()
    assert (bare.returncode, bare.stderr) == (0, "") and bare.stdout.strip() == hpctrain("--help").stdout.strip()
    assert __version__ in hpctrain("--version").stdout


@pytest.mark.parametrize("verb", [*VERBS, "recipes show", "data info"])
def test_every_verb_has_help(verb: str) -> None:
    done = hpctrain(*verb.split(), "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert f"{verb} " in done.stdout.splitlines()[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["no verb 'trian'", "did you mean train"]),
        (["--fast"], ["--fast"]),
        (["train"], ["RECIPE", "hpctrain train --help"]),
        (["train", "demo", "--rundir", "x"], ["--rundir", "--run-dir"]),
        (["train", "dmo"], ["'dmo'", "did you mean demo"]),
        (["train", "none.yaml"], ["none.yaml"]),
        (["train", "demo", "train.stps=3"], ["train.stps", "did you mean train.steps"]),
        (["train", "demo", "train.steps=soon"], ["train.steps", "'soon'", "integer"]),
        (["train", "demo", "train.global_batch=100"], ["global_batch 100", "micro_batch 32"]),
        (["train", "demo", "verbose"], ["'verbose'", "key.sub=value"]),
        (["recipes", "show", "resnet50"], ["'resnet50'", "resnet50-"]),
        (["recipes", "shw"], ["shw"]),
        (["evaluate", "nowhere"], ["nowhere", "run directory"]),
        (["report", "nowhere", "--out", "x"], ["nowhere"]),
        (["data", "info", "nowhere"], ["nowhere"]),
        (["data", "verify", "nowhere"], ["nowhere"]),
    ],
)
def test_mistakes(arguments: list[str], words: list[str]) -> None:
    text = sentence(*arguments)
    assert all(word in text for word in words), text


def test_data_that_is_not_there(tmp_path: Path) -> None:
    assert str(tmp_path / "none") in sentence("train", "demo", f"data.path={tmp_path}/none")


# Root may use everything, unless it gives that up; `setpriv` is of util-linux.
AS_OTHERS = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


@pytest.mark.skipif(bool(AS_OTHERS) and shutil.which(AS_OTHERS[0]) is None, reason="root without setpriv")
@pytest.mark.parametrize("command", ["data info {}", "data verify {}", "evaluate {}/closed", "train demo data.path={}"])
def test_what_may_not_be_used(command: str, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    (closed / "dataset.json").touch()
    closed.chmod(0)
    try:
        text = sentence(*command.format(tmp_path).split(), launcher=AS_OTHERS)
    finally:
        closed.chmod(0o700)
    assert str(closed) in text and "ermission" in text


def test_data_without_shards(tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").touch()
    text = sentence("train", "demo", f"data.path={tmp_path}", f"--run-dir={tmp_path}/run")
    assert str(tmp_path) in text and "hpctrain data prepare" in text
    assert not (tmp_path / "run").exists()


def test_a_run_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    text = sentence("train", "demo", *SMALL, "--run-dir", f"{tmp_path}/file/run")
    assert "file/run" in text and "--run-dir" in text


def test_a_lone_process_trains_as_a_world_of_one(tmp_path: Path) -> None:
    """No launcher: MPI starts as a singleton."""
    done = hpctrain("train", "demo", *SMALL, "log.tensorboard=false", "--run-dir", f"{tmp_path}/run")
    assert (done.returncode, done.stderr) == (0, "")
    assert "1 ranks" in done.stdout or "1 rank " in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 1), ("train", 2), ("end", 2)]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["ranks"] == 1 and manifest["versions"]["mpi"]
    assert (tmp_path / "run" / "checkpoints" / "step-00000002" / "state.json").is_file()


def test_recipes() -> None:
    done = hpctrain("recipes")
    assert done.returncode == 0 and done.stderr == ""
    assert all(name in done.stdout for name in recipe_names())


def test_a_recipe_is_shown_as_yaml_that_can_be_run(tmp_path: Path) -> None:
    shown = hpctrain("recipes", "show", "demo", "train.epochs=3").stdout
    path = tmp_path / "mine.yaml"
    path.write_text(shown)
    assert "epochs: 3" in shown
    assert hpctrain("recipes", "show", str(path)).stdout == shown


def test_every_key_is_explained() -> None:
    done = hpctrain("recipes", "show", "demo", "--keys")
    lines = done.stdout.splitlines()
    shown = [line.split(" = ")[0] for line in lines if line and not line.startswith(" ")]
    assert shown == [key for key, _, _, _ in describe_keys()]
    assert "train.global_batch = 128" in lines


def test_output_into_a_closed_pipe(tmp_path: Path) -> None:
    """`hpctrain recipes show demo --keys | head -1` says nothing about broken pipes."""
    command = f"{sys.executable} -m hpctrain recipes show demo --keys | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
