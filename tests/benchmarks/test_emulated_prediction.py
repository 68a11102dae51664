"""The comparison of predictions with emulated hosts, on measurements that are made up so that the answer is known."""

import copy
from pathlib import Path
from typing import Any

import pytest

from benchmarks.emulated_prediction import DOCS, HOST_COUNTS, MODELS, WARM_UP_STEPS, cases, compare, page, settings
from hpctrain.config import load_config

ALPHA, GAMMA, OVERHEAD, COMPUTE, UPDATE = 1e-3, 0.0, 2e-3, 0.2, 0.05


def fit(rate_mbit: int) -> dict[str, Any]:
    beta = 8 / (rate_mbit * 1e6)
    return {
        "algorithm": "ring",
        "alpha_seconds": ALPHA,
        "beta_seconds_per_byte": beta,
        "gamma_seconds_per_byte": GAMMA,
        "horovod_overhead_seconds": OVERHEAD,
        "mpi_beta_seconds_per_byte": beta,
        "relative_error": 0.01,
    }


def step(model: str) -> dict[str, Any]:
    config = load_config("demo", settings(model, 2))
    layer = {"name": "all", "parameters": 250_000, "gradient_bytes": 1_000_000}
    times = {"forward_seconds": COMPUTE / 3, "backward_seconds": 2 * COMPUTE / 3}
    return {
        "kind": "step",
        "model": config.model.name,
        "micro_batch": config.train.micro_batch,
        "threads": 1,
        "step_seconds": COMPUTE + UPDATE,
        "forward_backward_seconds": COMPUTE,
        "update_seconds": UPDATE,
        "layers": [layer | times],
    }


@pytest.fixture
def made_up() -> dict[str, Any]:
    """Everything is measured; every step took a second after a slow start."""
    found: dict[str, Any] = {"machine": {"cores": 2}, "steps": {}, "allreduces": {}, "trainings": {}}
    for kind, name in cases():
        if kind == "steps":
            found[kind][name] = step(name.split("/")[0])
        elif kind == "allreduces":
            found[kind][name] = {"kind": "allreduce", "fit": fit(int(name.split("/")[1]))}
        else:
            found[kind][name] = {"step_seconds": [50.0] * WARM_UP_STEPS + [1.0, 0.9, 5.0, 1.1, 1.0]}
    return found


def test_settings_are_those_of_a_training_on_that_many_hosts() -> None:
    for model in MODELS:
        for hosts in HOST_COUNTS:
            assert load_config("demo", settings(model, hosts)).micro_batches_a_rank(hosts) == 1


def test_every_training_is_compared_with_what_its_own_measurements_say(made_up: dict[str, Any]) -> None:
    comparisons = compare(made_up)
    assert len(comparisons) == len(made_up["trainings"])
    assert {c.seconds for c in comparisons} == {1.0}
    for c in comparisons:
        assert c.from_two.total == pytest.approx(c.from_all.total)
        assert c.from_two.compute == pytest.approx(COMPUTE + UPDATE)
        assert c.error(c.from_two) == pytest.approx(c.from_two.total - 1)
    seconds = {(c.model, c.hosts, c.rate_mbit): c.from_two.exposed_communication for c in comparisons}
    assert seconds["small", 2, 100] > seconds["small", 2, 300] > seconds["small", 2, 1000]
    assert seconds["small", 8, 100] > seconds["small", 4, 100] > seconds["small", 2, 100]


def test_a_slower_network_between_all_hosts_shows_in_one_prediction_only(made_up: dict[str, Any]) -> None:
    slower = copy.deepcopy(made_up)
    slower["allreduces"]["8/100"]["fit"]["mpi_beta_seconds_per_byte"] *= 3
    before, after = (next(c for c in compare(f) if (c.hosts, c.rate_mbit) == (8, 100)) for f in (made_up, slower))
    assert after.from_two == before.from_two
    assert after.from_all.total > before.from_all.total


def test_what_is_not_measured_yet_is_left_out(made_up: dict[str, Any]) -> None:
    del made_up["trainings"]["small/4/300"], made_up["allreduces"]["8/1000"]
    left = {(c.model, c.hosts, c.rate_mbit) for c in compare(made_up)}
    gone = {("small", 4, 300), ("small", 8, 1000), ("large", 8, 1000)}
    assert left.isdisjoint(gone) and len(left) == 15 - len(gone)
    assert f"over {len(left)} cases" in page(made_up)
    assert page({"machine": {"cores": 2}}) == ""


def test_the_committed_page_is_that_of_the_committed_measurements() -> None:
    import json

    measurements = Path(DOCS) / "prediction-emulated" / "measurements.json"
    if not measurements.exists():
        pytest.skip("nothing is measured yet; benchmarks/emulated_prediction.py does it")
    assert (DOCS / "prediction-emulated.md").read_text() == page(json.loads(measurements.read_text()))
