"""`hpctrain predict`, fits and calibrations, from recipe and files to what is printed."""

import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hpctrain.cli import cli
from hpctrain.config import Config, load_config
from hpctrain.errors import UserError
from hpctrain.jobs.site import Network, Node, Site
from hpctrain.scaling import predict
from hpctrain.scaling.performance import Measurement, fit_measurements, held_out, load_calibration
from hpctrain.scaling.performance.build import build_case
from hpctrain.scaling.performance.calibration import Calibration, line_through, parse_calibration
from hpctrain.scaling.performance.fit import Fit
from hpctrain.scaling.performance.predict import Impossible, Prediction
from hpctrain.scaling.performance.scaled import scaled
from hpctrain.scaling.performance.step import step_time


def step_json(micro_batch: int = 16, seconds: float = 0.2, model: str = "resnet20") -> dict[str, Any]:
    return {
        "kind": "step",
        "model": model,
        "micro_batch": micro_batch,
        "threads": 1,
        "step_seconds": seconds + 0.01,
        "forward_backward_seconds": seconds,
        "update_seconds": 0.01,
        "input_seconds": None,
        "layers": [],
    }


def allreduce_json(**fit: float) -> dict[str, Any]:
    parameters = {"alpha_seconds": 1e-5, "beta_seconds_per_byte": 1e-9, "gamma_seconds_per_byte": 0.0} | fit
    return {"kind": "allreduce", "ranks": 2, "hosts": 2, "fit": {"algorithm": "ring", **parameters}}


SITE = Site(
    name="eight",
    description="",
    source="",
    nodes=64,
    network=Network(latency_seconds=1e-5, seconds_per_byte=1e-9, source="made up"),
    images_per_second={"resnet20": 100.0, "resnet50": 10.0},
    scheduler="slurm",
    launcher="srun",
    node=Node(sockets=1, cores_per_socket=4),
)


def small_config(*overrides: str) -> Config:
    return load_config(
        "demo", ["train.global_batch=1024", "train.micro_batch=16", "data.path=null", "data.synthetic=true", *overrides]
    )


def one(config: Config, nodes: int, calibration: Calibration | None = None, site: Site = SITE) -> Prediction:
    (found,) = predict(config, site, [nodes], calibration)
    assert isinstance(found, Prediction), found
    return found


def test_a_site_s_rate_is_the_time_of_a_node() -> None:
    assert one(small_config(), 1).step_seconds == pytest.approx(10.24)
    assert one(small_config(), 1).efficiency == pytest.approx(1)


def test_counts_that_cannot_be_get_a_sentence_each() -> None:
    found = predict(small_config(), SITE, [1, 3, 16, 64, 65])
    assert [isinstance(each, Prediction) for each in found] == [True, False, True, True, False]
    assert isinstance(found[1], Impossible) and "does not divide over 3 ranks" in found[1].problem
    assert isinstance(found[4], Impossible) and "64 nodes" in found[4].problem


def test_intervals_hold_the_prediction_and_efficiency_falls() -> None:
    found = [each for each in predict(small_config(), SITE, [1, 4, 16, 64]) if isinstance(each, Prediction)]
    efficiencies = [each.efficiency for each in found]
    assert efficiencies == sorted(efficiencies, reverse=True)
    for each in found:
        assert each.step_interval[0] < each.step_seconds < each.step_interval[1]
        assert each.train_interval[0] < each.train_seconds < each.train_interval[1]
        assert each.node_hours == pytest.approx(each.nodes * each.train_seconds / 3600)


def test_what_binds_follows_the_machine() -> None:
    config = small_config()
    assert one(config, 16).binding == "compute"
    fast = step_json(seconds=1e-6) | {"update_seconds": 0.0}
    slow_wire = parse_calibration([fast, allreduce_json(beta_seconds_per_byte=1e-6)])
    assert one(config, 16, slow_wire).binding == "network bandwidth"
    slow_start = parse_calibration([fast, allreduce_json(alpha_seconds=1e-2, beta_seconds_per_byte=1e-15)])
    assert one(config, 16, slow_start).binding == "network latency"
    slow_input = parse_calibration(step_json() | {"input_seconds": 5.0})
    real = small_config("data.synthetic=false", "data.path=/data")
    assert one(real, 16, slow_input).binding == "input"


def test_advice_is_the_model_run_again() -> None:
    config = small_config()
    calibration = parse_calibration([step_json(seconds=1e-3), allreduce_json(beta_seconds_per_byte=1e-7)])
    before = one(config, 64, calibration)
    advice = {each.change: each.saving for each in before.advice}
    after = one(small_config("train.compression=bf16"), 64, calibration)
    assert advice["train.compression=bf16"] == pytest.approx(1 - after.train_seconds / before.train_seconds)
    assert advice["train.compression=bf16"] > 0.1
    savings = [each.saving for each in before.advice]
    assert savings == sorted(savings, reverse=True) and min(savings) >= 0.01


def test_deterministic_runs_overlap_nothing() -> None:
    calibration = parse_calibration([step_json(model="alexnet"), allreduce_json()])
    settings = ("model.name=alexnet", "model.image_size=227")
    plain, fixed = (
        one(small_config(*settings, f"train.deterministic={d}"), 16, calibration) for d in ("false", "true")
    )
    assert fixed.step.exposed_communication > plain.step.exposed_communication
    assert fixed.algorithm == "halving_doubling" and plain.algorithm == "ring"


def test_calibrations_of_all_kinds(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    for content in (step_json(), [step_json(), allreduce_json()], {"step": step_json(), "allreduce": allreduce_json()}):
        path.write_text(json.dumps(content))
        assert load_calibration(path).steps == [step_json()]
    path.write_text(json.dumps({"straggler_sigma": 0.5, "start_seconds": None, "fitted": None}))
    assert one(small_config(), 16, load_calibration(path)).step.straggler > 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("3", "an object was expected"),
        ('{"kind": "input"}', "no measurement"),
        (json.dumps(step_json(seconds=-1.0)), "forward_backward_seconds is -1.0"),
        (json.dumps({"kind": "allreduce", "fit": None}), "at least two ranks"),
        ('{"straggler_sigma": "x"}', "straggler_sigma is 'x'"),
        ('{"fitted": 3}', "fitted is 3"),
    ],
)
def test_calibrations_that_are_none(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "c.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_calibration(path)


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        load_calibration(tmp_path / "none.json")
    with pytest.raises(UserError, match="measured with alexnet"):
        predict(small_config(), SITE, [1], parse_calibration(step_json(model="alexnet")))
    with pytest.raises(UserError, match="no rate for alexnet"):
        predict("alexnet-512", SITE, [1])


def test_a_relative_s_rate_goes_by_arithmetic() -> None:
    config = small_config("model.name=resnet50_v15", "model.image_size=224")
    assert one(config, 1).step_seconds == pytest.approx(102.4 * 4_089_184_256 / 3_857_973_248, rel=1e-6)


def test_a_far_relative_s_rate_is_none() -> None:
    far = SITE.model_copy(update={"images_per_second": {"resnet50": 10.0}})
    with pytest.raises(UserError, match="no rate for resnet20"):
        predict(small_config(), far, [1])


def test_two_sizes_of_micro_batch_tell_the_fixed_part() -> None:
    fixed, per_image = line_through([step_json(n, 0.05 + 0.01 * n) for n in (8, 16, 64)])
    assert (fixed, per_image) == pytest.approx((0.05, 0.01))
    assert line_through([step_json(16, 0.2)]) == pytest.approx((0, 0.0125))
    falling = [step_json(8, 0.2), step_json(16, 0.5)]  # more than twice for twice the images: no fixed part
    assert line_through(falling)[0] == 0


def test_the_verb_prints_a_table_or_json() -> None:
    arguments = ["predict", "resnet50-32k-90epochs", "--site", "stampede2-knl", "--nodes", "512,4096"]
    shown = CliRunner().invoke(cli, arguments)
    assert shown.exit_code == 0, shown.output
    assert "binds" in shown.output and "4,096 nodes: train.global_batch 32768 does not divide" in shown.output
    result = CliRunner().invoke(cli, [*arguments, "--json", "train.micro_batch=8"])
    content = json.loads(result.output)
    assert [each["nodes"] for each in content["predictions"]] == [512, 4096]
    assert content["predictions"][1]["step_seconds"] > 8 / 79


@pytest.mark.parametrize("nodes", ["", "a", "1,,2", "0"])
def test_bad_counts_are_named(nodes: str) -> None:
    result = CliRunner().invoke(cli, ["predict", "demo", "--site", "local", "--nodes", nodes])
    assert isinstance(result.exception, UserError) and "--nodes" in str(result.exception)


# Fits: measurements are drawn from the model itself with known parameters, and noise.


def study(factors: dict[str, float], counts: tuple[int, ...], noise: float = 0.01) -> tuple[Config, list[Measurement]]:
    config = small_config("train.micro_batch=4")
    case = build_case(config, SITE, Calibration())
    machine = scaled(case.machine, factors)
    rng = random.Random(3)
    measurements = []
    for nodes in counts:
        seconds = step_time(replace(case.work, global_batch=4 * nodes), machine, nodes).total
        steps = [seconds * rng.gauss(1, noise) for _ in range(100)]
        measurements.append(Measurement(nodes, nodes, 4 * nodes, steps))
    return config, measurements


def test_a_fit_finds_the_parameters_that_the_measurements_tell() -> None:
    config, measurements = study({"compute": 1.5, "beta": 30.0}, (1, 2, 4, 8, 16))
    fit = fit_measurements(config, SITE, measurements)
    machine = fit.case.machine
    assert machine.seconds_per_image == pytest.approx(0.015, rel=0.03)
    assert machine.network.between.beta_seconds_per_byte == pytest.approx(3e-8, rel=0.1)
    assert max(abs(error) for error in fit.relative_errors) < 0.02


def test_a_fit_foretells_the_count_that_is_held_out() -> None:
    config, measurements = study({"compute": 1.5, "beta": 30.0}, (1, 2, 4, 8, 16, 64))
    found = held_out(config, SITE, measurements)
    assert found.measurement.nodes == 64 and found.fitted_on == (1, 2, 4, 8, 16)
    assert abs(found.relative_error) < 0.05
    low, high = found.prediction.step_interval
    assert low < found.measurement.median_step_seconds < high


def test_a_fitted_calibration_predicts_the_same(tmp_path: Path) -> None:
    config, measurements = study({"compute": 1.5, "beta": 30.0}, (1, 4, 16))
    fit = fit_measurements(config, SITE, measurements)
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(fit.to_calibration()))
    again = one(config, 64, load_calibration(path))
    direct = fit.predict(64)
    assert again.step_seconds == pytest.approx(direct.step_seconds, rel=1e-6)
    assert again.step_interval == pytest.approx(direct.step_interval, rel=1e-6)


def test_one_count_alone_is_fitted_and_its_interval_is_wider_far_away() -> None:
    config, measurements = study({}, (2,))
    fit: Fit = fit_measurements(config, SITE, measurements)
    assert abs(fit.relative_errors[0]) < 0.01

    def width(nodes: int) -> float:
        low, high = fit.predict(nodes, global_batch=4 * nodes).step_interval
        return high / low

    assert width(64) > width(2)


def test_input_is_part_of_the_measured_step() -> None:
    config, measurements = study({}, (1, 2, 4))
    slower = [
        replace(m, step_seconds=[s + 0.02 for s in m.step_seconds], input_seconds=[0.02] * 100) for m in measurements
    ]
    fit = fit_measurements(config, SITE, slower)
    assert fit.case.machine.input_seconds_per_image == pytest.approx(0.005)
    assert max(abs(error) for error in fit.relative_errors) < 0.02


def test_studies_that_cannot_be_fitted() -> None:
    config, measurements = study({}, (1, 2))
    with pytest.raises(UserError, match="nothing to fit"):
        fit_measurements(config, SITE, [])
    with pytest.raises(UserError, match="no step"):
        fit_measurements(config, SITE, [replace(measurements[0], step_seconds=[])])
    with pytest.raises(UserError, match="three rank counts"):
        held_out(config, SITE, measurements)
    with pytest.raises(UserError, match="does not divide"):
        fit_measurements(config, SITE, [replace(measurements[1], global_batch=7)])


def test_predicting_loads_no_tensorflow() -> None:
    code = (
        "import sys; from hpctrain.scaling import predict\n"
        "predict('resnet50-8k', 'stampede2-knl', [256])\n"
        "assert not {'tensorflow', 'keras', 'matplotlib', 'mpi4py', 'horovod'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_measurements_survive_json() -> None:
    measurement = Measurement(2, 4, 64, [1.0, 2.0, 9.0], [0.1, 0.1, 0.2], "runs/a")
    assert Measurement.from_json(json.loads(json.dumps(measurement.to_json()))) == measurement
    assert (measurement.median_step_seconds, measurement.ranks_per_node) == (2.0, 2)
