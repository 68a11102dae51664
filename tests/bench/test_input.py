"""`hpctrain bench input` on real shards."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hpctrain.bench.commands import bench
from hpctrain.errors import UserError

QUICK = ["--image-size", "16", "--micro-batch", "4", "--seconds", "0.2", "--repeats", "2", "--threads", "1"]


def test_it_measures_the_training_pipeline(make_dataset: Callable[..., Any]) -> None:
    folder, blobs, _ = make_dataset()
    outcome = CliRunner().invoke(bench, ["input", str(folder), *QUICK, "--drop-cache", "--json"])
    assert outcome.exit_code == 0, outcome.output
    result = json.loads(outcome.stdout)
    low, high = sorted(result["images_per_second"])
    assert 0 < low <= result["median_images_per_second"] <= high
    mean_bytes = sum(map(len, blobs)) / len(blobs)
    assert result["megabytes_per_second"] == pytest.approx(result["median_images_per_second"] * mean_bytes / 1e6)
    told = CliRunner().invoke(bench, ["input", str(folder), *QUICK])
    assert "images/s" in told.stdout and str(folder) in told.stdout


def test_a_batch_larger_than_the_data_is_refused(make_dataset: Callable[..., Any]) -> None:
    folder, _, _ = make_dataset()
    with pytest.raises(UserError, match="less than one batch of 64"):
        CliRunner().invoke(bench, ["input", str(folder), "--micro-batch", "64"], catch_exceptions=False)


def test_no_data_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data prepare"):
        CliRunner().invoke(bench, ["input", str(tmp_path)], catch_exceptions=False)
