"""What a run leaves behind: readable while it is written, whole after a kill, and without secrets."""

import json
from pathlib import Path
from typing import Any

import pytest

from hpctrain.config import Config, load_config
from hpctrain.errors import UserError
from hpctrain.parallel.world import World
from hpctrain.training.run_dir import MetricsLog, new_run_dir, prepare_run_dir, read_metrics


@pytest.fixture
def config() -> Config:
    return load_config("demo", ["train.epochs=3", "data.path=shards"])


def manifest_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text())


def test_a_run_directory_says_what_ran_where(tmp_path: Path, config: Config, lone_world: World) -> None:
    prepare_run_dir(tmp_path / "a" / "run", config, lone_world, {"num_records": 12})
    path = tmp_path / "a" / "run"
    # It repeats the run from any other folder too.
    assert load_config(path / "config.yaml") == load_config(config.model_dump(), [f"data.path={Path.cwd()}/shards"])
    assert (path / "checkpoints").is_dir()
    manifest = manifest_of(path)
    assert manifest["ranks"] == 1 and manifest["threads_per_rank"] == 1
    assert manifest["hosts"] == [{"host": "node7", "ranks": [0], "threads": 1}]
    assert manifest["data"] == {"num_records": 12}
    assert {"hpctrain", "python", "keras", "numpy", "mpi"} <= set(manifest["versions"])
    assert manifest["versions"]["mpi"] == "No MPI 1.0"
    assert manifest["earlier_starts"] == []


def test_a_resumed_run_remembers_its_earlier_starts(tmp_path: Path, config: Config, lone_world: World) -> None:
    starts = []
    for _ in range(3):
        prepare_run_dir(tmp_path, config, lone_world, {})
        starts.append(manifest_of(tmp_path)["started"])
    assert [start["started"] for start in manifest_of(tmp_path)["earlier_starts"]] == starts[:2]
    (tmp_path / "manifest.json").write_text('{"cut o')
    prepare_run_dir(tmp_path, config, lone_world, {})
    assert manifest_of(tmp_path)["earlier_starts"] == []


def test_secrets_stay_out(tmp_path: Path, config: Config, lone_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = ["WANDB_API_KEY", "HPCTRAIN_TOKEN", "TF_s3_secret", "AWS_SECRET_ACCESS_KEY", "HTTP_PROXY", "MY_PASSWORD"]
    secrets += ["HOROVOD_AUTH", "SLURM_JWT", "I_MPI_HYDRA_PASSWORD", "PGPASSWORD", "SSH_CONNECTION"]
    for name in secrets:
        monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    prepare_run_dir(tmp_path, config, lone_world, {})
    assert "hunter2" not in (tmp_path / "manifest.json").read_text()
    environment = manifest_of(tmp_path)["environment"]
    assert environment["OMP_NUM_THREADS"] == "3" and environment["SLURM_JOB_ID"] == "4711"


def test_a_run_directory_below_a_file(tmp_path: Path, config: Config, lone_world: World) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        prepare_run_dir(tmp_path / "file" / "run", config, lone_world, {})
    assert "file/run" in str(caught.value) and "--run-dir" in str(caught.value)


def test_new_run_directories_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    paths = []
    for _ in range(4):
        paths.append(new_run_dir("demo"))
        paths[-1].mkdir(parents=True)
    assert len(set(paths)) == 4
    assert all(path.parent == Path("runs") and path.name.startswith("demo-") for path in paths)


def write_log(path: Path, steps: range, from_step: int = 0) -> None:
    log = MetricsLog(path, from_step=from_step, tensorboard=False)
    for step in steps:
        log.write("train", step, {"loss": 1 / step, "epoch": step / 3})
        if step % 4 == 0:
            log.write("eval", step, {"top1": 0.5})
    log.write("end", steps[-1], {"reason": "preempted"})
    log.close()


def test_metrics_are_json_lines(tmp_path: Path) -> None:
    write_log(tmp_path, range(1, 6))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["kind"], line["step"]) for line in lines] == [
        ("train", 1),
        ("train", 2),
        ("train", 3),
        ("train", 4),
        ("eval", 4),
        ("train", 5),
        ("end", 5),
    ]
    assert lines[2]["loss"] == 1 / 3


def test_a_resumed_run_continues_its_log_where_its_checkpoint_was(tmp_path: Path) -> None:
    """Every step is there once: what the try before wrote beyond the checkpoint is dropped, its end too if it is."""
    write_log(tmp_path, range(1, 8))
    write_log(tmp_path, range(5, 10), from_step=4)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, 10))
    assert [line["step"] for line in lines if line["kind"] == "eval"] == [4, 8]
    assert [line["step"] for line in lines if line["kind"] == "end"] == [9]
    write_log(tmp_path, range(10, 12), from_step=9)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines if line["kind"] == "end"] == [9, 11]
    write_log(tmp_path, range(1, 3))  # and a run that starts anew starts an empty one
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 2]


@pytest.mark.parametrize("rest", [b'{"kind": "train", "st', b'{"kind": "train", "step": 4, "loss": 0.2}', b"\0" * 100])
def test_a_kill_in_the_middle_of_a_line(tmp_path: Path, rest: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    write_log(tmp_path, range(1, 4))
    with open(path, "ab") as file:
        file.write(rest)
    assert [line["step"] for line in read_metrics(path) if line["kind"] == "train"][:3] == [1, 2, 3]
    write_log(tmp_path, range(4, 6), from_step=3)
    whole = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in whole if line["kind"] == "train"] == [1, 2, 3, 4, 5]


def test_what_matters_is_on_disk_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, from_step=0, tensorboard=False)
    log.write("train", 1, {"loss": 1.0})
    log.write("eval", 1, {"top1": 0.1})
    assert [line["kind"] for line in read_metrics(tmp_path / "metrics.jsonl")] == ["train", "eval"]
    log.write("train", 2, {"loss": 1.0})
    log.flush()
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3
    log.close()


def test_tensorboard_reads_the_event_files(tmp_path: Path) -> None:
    import tensorflow as tf

    log = MetricsLog(tmp_path, from_step=0, tensorboard=True)
    for step in (1, 2, 3):
        log.write("train", step, {"loss": 0.5 * step, "note": "text"}, tensorboard=step != 2)
    log.write("eval", 3, {"top1": 0.25}, tensorboard=True)
    log.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    assert "tfevents" in file.name
    found = {}
    for event in tf.compat.v1.train.summary_iterator(str(file)):
        for value in event.summary.value:
            assert value.metadata.plugin_data.plugin_name == "scalars"
            found[value.tag, event.step] = float(tf.make_ndarray(value.tensor))
    assert found == {("train/loss", 1): 0.5, ("train/loss", 3): 1.5, ("eval/top1", 3): 0.25}
