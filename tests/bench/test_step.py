"""`hpctrain bench step` on a small network: figures that fit together, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpctrain.models import build, describe
from tests.training.conftest import Outcome

SMALL = ["demo", "model.num_classes=10", "train.micro_batch=4", "train.global_batch=8", "train.threads=1"]
KEYS = {
    *("kind", "model", "image_size", "precision", "micro_batch", "threads", "ranks", "host", "cpu"),
    *("step_seconds", "step_seconds_all", "images_per_second", "forward_backward_seconds", "update_seconds"),
    *("input_seconds", "bare_keras_step_seconds", "framework_overhead", "flops_per_image", "peak_flops", "peak_share"),
    "layers",
}


def check(result: dict[str, Any], ranks: int, steps: int) -> None:
    """The figures of a result fit together."""
    assert set(result) >= KEYS
    named = ("kind", "model", "image_size", "precision", "micro_batch", "threads", "ranks")
    assert [result[key] for key in named] == ["step", "resnet20", 32, "float32", 4, 1, ranks]
    step = result["step_seconds"]
    assert len(result["step_seconds_all"]) == steps
    assert min(result["step_seconds_all"]) <= step <= max(result["step_seconds_all"])
    assert result["images_per_second"] == pytest.approx(4 / step)
    assert result["framework_overhead"] == pytest.approx(step / result["bare_keras_step_seconds"])
    assert result["update_seconds"] > 0
    assert result["peak_share"] == pytest.approx(result["flops_per_image"] * 4 / step / result["peak_flops"])
    assert result["flops_per_image"] == 3 * describe(build("resnet20", 10, 32))["flops_per_image"]


@pytest.mark.mpi
def test_one_rank_with_data_and_layers(
    bench_json: Callable[..., Any], make_dataset: Callable[..., Any], tmp_path: Path
) -> None:
    split, _, _ = make_dataset()
    out = tmp_path / "step.json"
    options = ["--steps", "3", "--profile-seconds", "0", "--out", str(out)]
    result = bench_json(1, "step", *SMALL, f"data.path={split.parent}", *options)
    check(result, 1, 3)
    assert json.loads(out.read_text()) == result
    assert result["input_seconds"] > 0
    layers = result["layers"]
    whole = sum(layer["forward_seconds"] + layer["backward_seconds"] for layer in layers)
    assert whole == pytest.approx(result["forward_backward_seconds"])
    model = build("resnet20", 10, 32)
    expected = [(v.path.split("/")[0], 4 * v.value.shape.num_elements()) for v in model.trainable_variables]
    by_layer: dict[str, int] = {}
    for name, size in expected:
        by_layer[name] = by_layer.get(name, 0) + size
    found = {layer["name"]: layer["gradient_bytes"] for layer in layers if layer["parameters"]}
    assert list(found.items()) == list(by_layer.items()), "gradients in another order than the model's"
    assert sum(found.values()) == describe(model)["gradient_bytes"]


@pytest.mark.mpi
def test_two_ranks_and_their_allreduce(run_bench: Callable[..., Outcome], tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    options = ["--steps", "2", "--no-layers", "--allreduce", "--out", str(out)]
    outcome = run_bench(2, "step", *SMALL, "data.synthetic=true", *options)
    assert outcome.code == 0, outcome.stderr[-3000:]
    result = json.loads(out.read_text())
    check(result, 2, 2)
    assert result["layers"] == [] and result["input_seconds"] is None
    together = result["allreduce_step_seconds_all"]
    assert len(together) == 2 and min(together) <= result["allreduce_step_seconds"] <= max(together)
    assert result["parallel_efficiency"] > 0
    slowest = result["slowest_rank"]
    assert slowest["rank"] in (0, 1) and slowest["step_seconds"] >= result["step_seconds"] * 0.5
    for text in ("images/s", "train step", "update alone", "bare Keras", "parallel efficiency", "slowest: rank"):
        assert text in outcome.stdout
    assert "input pipeline was not measured: data.synthetic=true" in outcome.stdout


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["nothing"], "no recipe named"),
        (["demo", "train.micro_batches=4"], "train.micro_batch"),
        (["demo", "--steps", "0"], "--steps"),
        ([*SMALL, "data.synthetic=true", "--allreduce"], "two ranks or more"),
        ([*SMALL, "data.synthetic=true", "--out", "no/such/folder/x.json"], "no folder"),
    ],
)
def test_mistakes_are_one_sentence(refusal: Callable[..., str], arguments: list[str], text: str) -> None:
    assert text in refusal("step", *arguments)
