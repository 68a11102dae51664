"""A real study on this machine: 1 and 2 ranks of a small recipe, and figures that are those of the run directories."""

import csv
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from hpctrain import jobs
from hpctrain.scaling.study.gather import PARTS, gather

pytestmark = pytest.mark.mpi

FOLDER = Path(jobs.__file__).parent

RECIPE = ["demo", "data.synthetic=true", "data.synthetic_records=640", "model.num_classes=10", "train.threads=1"]
RECIPE += ["train.global_batch=16", "train.micro_batch=8"]
STUDY = ["--nodes", "1,2", "--mode", "strong", "--site", "local", "--steps", "20", "--warm-up", "10"]


def hpctrain(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = [sys.executable, "-m", "hpctrain", "study", *words]
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=300, check=False)


def test_one_and_two_ranks_here(tmp_path: Path) -> None:
    done = hpctrain(*RECIPE, *STUDY, "--out", "s", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {int(row["nodes"]): row for row in csv.DictReader((tmp_path / "s/report.csv").read_text().splitlines())}
    medians = {}
    for nodes in (1, 2):
        lines = [json.loads(line) for line in (tmp_path / f"s/nodes-{nodes}/metrics.jsonl").read_text().splitlines()]
        steps = [line["step_seconds"] for line in lines if line["kind"] == "train" and line["step"] > 10]
        assert len(steps) == 20 and lines[-1]["reason"] == "finished"
        assert json.loads((tmp_path / f"s/nodes-{nodes}/manifest.json").read_text())["ranks"] == nodes
        medians[nodes] = statistics.median(steps)
        row = rows[nodes]
        assert float(row["step_seconds"]) == pytest.approx(medians[nodes], rel=1e-6)
        assert float(row["images_per_second"]) == pytest.approx(16 / medians[nodes], rel=1e-6)
        # What all ranks logged of their steps adds up to what rank 0 measured, but for moments between clocks.
        parts = sum(float(row[f"{part}_seconds"]) for part in PARTS)
        assert parts == pytest.approx(statistics.mean(steps), rel=0.2)
    assert float(rows[2]["efficiency"]) == pytest.approx(medians[1] / medians[2] / 2, rel=1e-6)
    assert float(rows[1]["exposed_seconds"]) == 0 and float(rows[2]["exposed_seconds"]) > 0
    report = (tmp_path / "s/report.md").read_text()
    for name in ("speedup", "efficiency", "breakdown"):
        assert f"({name}.png)" in report and (tmp_path / f"s/{name}.png").is_file()
    assert json.loads((tmp_path / "s/calibration.json").read_text())["fitted"]["nodes"] == [1, 2]

    before = (tmp_path / "s/nodes-2/metrics.jsonl").stat().st_mtime_ns
    again = hpctrain(*RECIPE, *STUDY, "--out", "s", cwd=tmp_path)
    assert again.returncode == 0 and "nothing to submit: of 2 runs 2 done" in again.stdout
    assert (tmp_path / "s/nodes-2/metrics.jsonl").stat().st_mtime_ns == before


def test_a_failed_count_is_told_and_run_again_when_asked(tmp_path: Path) -> None:
    recipe = tmp_path / "broken.yaml"
    recipe.write_text("name: broken\nmodel: {name: 'my_module:net', num_classes: 10, image_size: 32}\n")
    with recipe.open("a") as file:
        file.write("data: {synthetic: true, synthetic_records: 640}\noptimizer: {learning_rate: 0.1}\n")
        file.write("train: {global_batch: 8, micro_batch: 8, epochs: 1}\n")
    words = ["broken.yaml", "--nodes", "1", "--mode", "strong", "--site", "local", "--out", "s"]
    words[0] = str(recipe)
    done = hpctrain(*words, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "failed with exit code 2" in done.stdout and "my_module" in done.stdout
    assert "1 node: failed (exit code 2)" in done.stdout
    again = hpctrain(*words, cwd=tmp_path)
    assert "--resubmit-failed runs them again" in again.stdout and not (tmp_path / "s/nodes-1-try-2").exists()
    hpctrain(*words, "--resubmit-failed", cwd=tmp_path)
    assert [run["run_dir"] for run in json.loads((tmp_path / "s/study.json").read_text())["runs"][0]["tries"]] == [
        "nodes-1",
        "nodes-1-try-2",
    ]
    assert gather(tmp_path / "s").measured == []


def test_a_launcher_that_is_missing_is_named(tmp_path: Path) -> None:
    profile = (FOLDER / "sites" / "local.yaml").read_text().replace("launcher: mpirun", "launcher: mpiexec.hydra")
    (tmp_path / "mine.yaml").write_text(profile.replace("name: local", "name: mine"))
    words = ["demo", "--nodes", "1", "--mode", "strong", "--site", "./mine.yaml", "--out", "s", "data.synthetic=true"]
    done = hpctrain(*words, cwd=tmp_path)
    assert done.returncode == 2 and "mpiexec.hydra, which is to start the ranks, cannot be started" in done.stderr
    assert "Traceback" not in done.stderr


NAP = """
import os, time
import keras
import tensorflow as tf

def nap(x):
    if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
        time.sleep(0.5)
    return x

class Nap(keras.layers.Layer):
    def call(self, x):
        return tf.ensure_shape(tf.numpy_function(nap, [x], tf.float32), x.shape) + 0 * x

def net(num_classes, image_size):
    images = keras.Input((image_size, image_size, 3))
    x = keras.layers.GlobalAveragePooling2D()(Nap()(keras.layers.Conv2D(2, 3)(images)))
    return keras.Model(images, keras.layers.Dense(num_classes)(x))
"""


def test_a_rank_that_takes_longer_is_waited_for(tmp_path: Path) -> None:
    (tmp_path / "sleepy.py").write_text(NAP)
    environ = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    environ["PYTHONPATH"] = str(tmp_path)
    words = ["mpirun", "--oversubscribe", "-n", "2", sys.executable, "-m", "hpctrain", "train", *RECIPE]
    words += ["model.name=sleepy:net", "train.global_batch=16", "train.steps=12", "log.every_steps=6"]
    words += ["log.tensorboard=false", "--run-dir", "run"]
    done = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["timing"]["steps"]) for line in lines if "timing" in line] == [(6, 6), (12, 6)]
    late = next(line["timing"] for line in lines if line.get("step") == 12)
    # Rank 1 sleeps for half a second; rank 0 waits that long for it, rank 1 not at all: about a quarter in the mean.
    assert late["slowest_compute_seconds"] > 0.5
    assert late["straggler_seconds"] > 0.1
