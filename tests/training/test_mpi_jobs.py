"""Jobs of several ranks: failing, evaluating, compressing, complaining."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from hpctrain.data.manifest import Manifest
from hpctrain.data.reader import ShardReader
from tests.training.conftest import EXACT, VAL_IMAGES, Launcher, Run, metrics_of, read_run, wait_for_step

pytestmark = pytest.mark.mpi

QUICK = [*EXACT, "train.deterministic=false", "train.steps=3"]

FAILING_MODEL = '''
import os
import keras
import tensorflow as tf
from hpctrain.models import build


class Failing(keras.layers.Layer):
    """Raises on rank 1 when it is called for the fourth time."""

    calls = 0

    def call(self, x):
        def check(x):
            Failing.calls += 1
            if os.environ["PMIX_RANK"] == "1" and Failing.calls > 4:
                raise RuntimeError("the disk of this node is on fire")
            return x
        y = tf.numpy_function(check, [x], tf.float32, stateful=True)
        return x + 0.0 * tf.stop_gradient(tf.reshape(y, tf.shape(x)))

    def compute_output_shape(self, shape):
        return shape


def model(num_classes, image_size):
    inputs = keras.Input((image_size, image_size, 3))
    return keras.Model(inputs, build("resnet20", num_classes=num_classes, image_size=image_size)(Failing()(inputs)))
'''


def test_an_exception_on_one_rank_ends_all_with_the_reason_last(
    shards: Path, launcher: Launcher, tmp_path: Path
) -> None:
    (tmp_path / "mymodels.py").write_text(FAILING_MODEL)
    arguments = (f"data.path={shards}", *QUICK, "train.steps=100", "model.name=mymodels:model")
    job = launcher.start(2, "train", "demo", *arguments, "--run-dir", str(tmp_path / "run"), PYTHONPATH=str(tmp_path))
    outcome = job.wait()
    assert outcome.code not in (0, 2, 85)
    lines = [line for line in outcome.stderr.splitlines() if "hpctrain" in line]
    assert "the disk of this node is on fire" in outcome.stderr
    assert lines[-1].endswith(f"(rank 1 on {os.uname().nodename})"), lines[-1]


def test_a_killed_rank_ends_the_job(shards: Path, launcher: Launcher, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = (f"data.path={shards}", *QUICK, "train.steps=null", "train.epochs=1000")
    job = launcher.start(2, "train", "demo", *arguments, "--run-dir", str(run_dir))
    wait_for_step(job, run_dir, 2)
    ranks = job.ranks()
    started = time.monotonic()
    os.kill(ranks[0], signal.SIGKILL)
    assert job.wait(timeout_seconds=20).code != 0
    assert time.monotonic() - started < 10
    while any(is_alive(pid) for pid in ranks):
        assert time.monotonic() - started < 10
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may wait a while for its parent to take note."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_missing_shard_is_said_once_and_ends_all(shards: Path, launcher: Launcher, tmp_path: Path) -> None:
    broken = tmp_path / "shards"
    (broken / "train").mkdir(parents=True)
    for path in (shards / "train").iterdir():
        (broken / "train" / path.name).write_bytes(path.read_bytes())
    gone = sorted((broken / "train").glob("*.h5"))[1]
    gone.unlink()
    outcome = launcher.run(2, "train", "demo", f"data.path={broken}", *QUICK, "--run-dir", str(tmp_path / "run"))
    assert outcome.code == 2, outcome
    said = [line for line in outcome.stderr.splitlines() if line.startswith("hpctrain: error:")]
    assert len(said) == 1 and gone.name in said[0], outcome
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["train", "demo", "train.global_batch=32", "train.micro_batch=32"], "2 ranks"),
        (["train", "dem"], "demo"),
        (["train", "demo", "data.path=/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_a_mistake_is_one_sentence_from_rank_0(
    arguments: list[str], expected: str, launcher: Launcher, tmp_path: Path
) -> None:
    outcome = launcher.run(2, *arguments)
    assert outcome.code == 2, outcome
    said = [line for line in outcome.stderr.splitlines() if line.startswith("hpctrain: error:")]
    assert len(said) == 1 and expected in said[0], outcome
    assert "Traceback" not in outcome.stderr


def test_skipped_records_are_named_at_the_end(shards: Path, launcher: Launcher, tmp_path: Path) -> None:
    """One in train and one in val; both ranks stay in step, and the files they were made from are told."""
    broken = tmp_path / "shards"
    names = []
    for split in ("train", "val"):
        (broken / split).mkdir(parents=True)
        for path in (shards / split).iterdir():
            (broken / split / path.name).write_bytes(path.read_bytes())
        manifest = Manifest.load(broken / split)
        shard = manifest.shards[1]
        with open(broken / split / shard.file, "r+b") as file:
            file.seek(shard.data_offset + 20)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 16]))
        names.append(f"{split} record {shard.first_record} ({ShardReader(broken / split).name(shard.first_record)})")
    run_dir = tmp_path / "run"
    launcher.train(2, run_dir, f"data.path={broken}", *QUICK, "data.on_bad_record=skip")
    (end,) = [line for line in metrics_of(run_dir) if line["kind"] == "end"]
    assert end["skipped_records"] == names
    assert [line["num_images"] for line in metrics_of(run_dir) if line["kind"] == "eval"] == [VAL_IMAGES - 1]
    outcome = launcher.run(2, "evaluate", str(run_dir))
    assert outcome.code == 0 and names[1] in outcome.stderr


def test_training_reads_what_was_staged(shards: Path, launcher: Launcher, tmp_path: Path) -> None:
    """Every shard on the shared file system is spoiled once it is staged: none of them is read again."""
    shared, local = tmp_path / "shared", tmp_path / "local"
    shutil.copytree(shards, shared)
    outcome = launcher.run(2, "data", "stage", str(shared), str(local), "--partitions", "4")
    assert outcome.code == 0, outcome.stderr
    for path in shared.glob("*/*.h5"):
        path.write_bytes(bytes(path.stat().st_size))
    settings = ["data.partitions=4", f"data.staged={local}"]
    launcher.train(2, tmp_path / "run", f"data.path={shared}", *QUICK, *settings)
    outcome = launcher.run(2, "train", "demo", f"data.path={shared}", *QUICK, "data.staged=/nowhere/else")
    assert outcome.code == 2 and "hpctrain data stage" in outcome.stderr, outcome


def test_evaluate_gives_the_same_bits_on_any_ranks(shards: Path, launcher: Launcher, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    launcher.train(1, run_dir, f"data.path={shards}", *EXACT, "train.steps=6", "evaluate.every_epochs=100")
    logged = read_run(run_dir).evaluations[6]
    for ranks in (1, 2, 3):
        outcome = launcher.run(ranks, "evaluate", str(run_dir), "--json")
        assert outcome.code == 0, outcome.stderr[-2000:]
        result = json.loads(outcome.stdout)
        assert result["num_images"] == VAL_IMAGES
        assert (result["loss"], result["top1"], result["top5"]) == logged
    others = shutil.copytree(shards, tmp_path / "others")
    for split in ("train", "val"):  # of which only the names differ
        manifest = json.loads((others / split / "dataset.json").read_text())
        manifest["class_names"] = manifest["class_names"][::-1]
        (others / split / "dataset.json").write_text(json.dumps(manifest))
    for arguments in (["evaluate", str(run_dir), "--data", str(others)], ["train", "demo", f"--run-dir={run_dir}"]):
        if arguments[0] == "train":
            arguments += [f"data.path={others}", *EXACT, "train.steps=8", "--resume", "auto"]
        outcome = launcher.run(1, *arguments)
        assert outcome.code == 2 and "class" in outcome.stderr and "Traceback" not in outcome.stderr, outcome


@pytest.mark.parametrize(
    "setting", ["train.compression=bf16", "train.compression=fp16", "train.precision=mixed_bfloat16"]
)
def test_short_number_formats_train_alike(
    setting: str, shards: Path, exact_run: Run, launcher: Launcher, tmp_path: Path
) -> None:
    launcher.train(2, tmp_path / "run", f"data.path={shards}", *QUICK, setting)
    run = read_run(tmp_path / "run")
    tolerance = 0.05 if "precision" in setting else 0.003
    for step in range(1, 4):
        assert run.losses[step] == pytest.approx(exact_run.losses[step], rel=tolerance)
    assert all(weight.dtype == "float32" for weight in run.weights.values())


def test_doctor_sees_all_ranks(launcher: Launcher) -> None:
    outcome = launcher.run(2, "doctor", "--json")
    assert outcome.code == 0, outcome.stderr[-2000:] + outcome.stdout[-2000:]
    report = json.loads(outcome.stdout)
    assert [rank["rank"] for rank in report["ranks"]] == [0, 1]
    assert report["problems"] == []
    assert report["settings"]["OMPI_MCA_mpi_yield_when_idle"] == "1"
    assert all(rank["threads"] >= 1 for rank in report["ranks"])


def test_a_finished_run_is_not_trained_again(shards: Path, launcher: Launcher, tmp_path: Path) -> None:
    launcher.train(2, tmp_path / "run", f"data.path={shards}", *QUICK)
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    outcome = launcher.train(1, tmp_path / "run", f"data.path={shards}", *QUICK)
    assert "nothing is left to train" in outcome.stdout
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == before


def test_resuming_with_another_batch_is_refused(shards: Path, launcher: Launcher, tmp_path: Path) -> None:
    launcher.train(1, tmp_path / "run", f"data.path={shards}", *QUICK)
    before = {
        name: (tmp_path / "run" / name).read_bytes() for name in ("config.yaml", "manifest.json", "metrics.jsonl")
    }
    outcome = launcher.run(
        1, "train", "demo", f"data.path={shards}", *QUICK, "train.global_batch=48", "--run-dir", str(tmp_path / "run")
    )
    assert outcome.code == 2 and "train.global_batch" in outcome.stderr
    form = ("optimizer.options.momentum_correction=true", "--run-dir", str(tmp_path / "run"))
    outcome = launcher.run(1, "train", "demo", f"data.path={shards}", *QUICK, *form)
    assert outcome.code == 2 and "optimizer.options.rate" in outcome.stderr
    assert before == {name: (tmp_path / "run" / name).read_bytes() for name in before}


def test_a_new_run_may_begin_from_another_ones_checkpoint(shards: Path, launcher: Launcher, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    arguments = (f"data.path={shards}", *EXACT, "train.steps=3", "checkpoint.every_steps=1")
    launcher.train(1, first, *arguments)
    resumed = launcher.train(1, second, *arguments, "train.steps=5", "--resume", str(first))
    assert "steps 4 to 5" in resumed.stdout
    # The same command again goes on from the run's own newest checkpoint.
    again = launcher.train(1, second, *arguments, "train.steps=6", "--resume", str(first))
    assert "steps 6 to 6" in again.stdout
    damaged = sorted((second / "checkpoints").glob("step-*"))[-1] / "model.npz"
    damaged.write_bytes(damaged.read_bytes()[:-7])
    outcome = launcher.run(1, "evaluate", str(second), "--json")
    assert outcome.code == 0 and json.loads(outcome.stdout)["step"] == 5
    assert "step-00000006" in outcome.stderr and "damaged" in outcome.stderr


def test_ranks_prepare_the_same_shards_as_one_process(shards: Path, launcher: Launcher, tmp_path: Path) -> None:
    images = shards.parent / "images" / "train"
    outcome = launcher.run(3, "data", "prepare", str(images), str(tmp_path), "--split", "train", "--shards", "4")
    assert outcome.code == 0, outcome.stderr[-2000:]
    for path in sorted((shards / "train").iterdir()):
        assert (tmp_path / "train" / path.name).read_bytes() == path.read_bytes(), path.name
