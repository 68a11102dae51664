"""`hpctrain bench allreduce` under a real mpirun, and what it refuses."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpctrain.bench.allreduce import parse_sizes
from hpctrain.bench.fit import bus_bandwidth, ring_seconds
from hpctrain.errors import UserError
from tests.training.conftest import Outcome

PATHS = ("horovod", "mpi", "mpi_in_place")


def test_sizes_are_powers_of_1024_in_order() -> None:
    assert parse_sizes("1M, 4k,64KiB,12,2GB,4096") == [12, 4096, 65536, 2**20, 2**31]


@pytest.mark.parametrize("text", ["", "4K,", "0", "6", "-4", "4.5M", "4T", "K", "four"])
def test_other_sizes_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--sizes"):
        parse_sizes(text)


def check(result: dict[str, Any], sizes: list[int], paths: tuple[str, ...]) -> None:
    """The figures of a result fit together."""
    assert result["kind"] == "allreduce" and result["ranks"] == 2 and result["hosts"] == 1
    assert "MPI" in result["mpi"]
    assert [row["bytes"] for row in result["sizes"]] == sizes
    errors = []
    fit = result["fit"]
    assert fit["algorithm"] == "ring"
    assert fit["gamma_seconds_per_byte"] > 0
    for row in result["sizes"]:
        for path in PATHS:
            seconds, rate = row[f"{path}_seconds"], row[f"{path}_busbw_bytes_per_second"]
            if path not in paths:
                assert seconds is None and rate is None and row[f"{path}_range_seconds"] is None
                continue
            low, high = row[f"{path}_range_seconds"]
            assert 0 < low <= seconds <= high
            assert rate == pytest.approx(bus_bandwidth(row["bytes"], seconds, 2))
        parameters = (fit[f"{name}_per_byte"] for name in ("beta_seconds", "gamma_seconds"))
        formula = ring_seconds(row["bytes"], 2, fit["alpha_seconds"], *parameters) + fit["horovod_overhead_seconds"]
        measured = row["horovod_seconds"] or row["mpi_in_place_seconds"]
        errors.append(abs(formula - measured) / measured)
    assert fit["relative_error"] == pytest.approx(sorted(errors)[len(errors) // 2])


@pytest.mark.mpi
def test_horovod_and_mpi_side_by_side(bench_json: Callable[..., Any], tmp_path: Path) -> None:
    out, plot = tmp_path / "result.json", tmp_path / "result.png"
    options = ["--sizes", "4K,64K,1M", "--repeats", "3", "--out", str(out), "--plot", str(plot)]
    result = bench_json(2, "allreduce", *options)
    check(result, [2**12, 2**16, 2**20], PATHS)
    assert json.loads(out.read_text()) == result
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.mpi
def test_raw_mpi_alone(run_bench: Callable[..., Outcome], tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    options = ["--sizes", "8,4K,1M", "--repeats", "2", "--no-horovod", "--out", str(out)]
    outcome = run_bench(2, "allreduce", *options)
    assert outcome.code == 0, outcome.stderr
    check(json.loads(out.read_text()), [8, 2**12, 2**20], ("mpi", "mpi_in_place"))
    for text in ("2 ranks, 1 host", "1,048,576", "GB/s", "alpha", "median error"):
        assert text in outcome.stdout


@pytest.mark.mpi
def test_one_rank_is_told_to_come_with_more(refusal: Callable[..., str]) -> None:
    assert "mpirun -n 2 hpctrain bench allreduce" in refusal("allreduce", "--sizes", "4K")


@pytest.mark.mpi
def test_a_folder_that_is_not_there_is_told_before_measuring(run_bench: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = run_bench(2, "allreduce", "--no-horovod", "--plot", str(tmp_path / "no" / "plot.png"))
    assert outcome.code == 2
    assert "no folder one can write to" in outcome.stderr and "Traceback" not in outcome.stderr
    assert "alpha" not in outcome.stdout
