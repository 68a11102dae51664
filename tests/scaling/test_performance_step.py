"""Layers, overlap, stragglers: the parts of a step are those one lays side by side by hand."""

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.errors import UserError
from hpctrain.models.sizes import SIZES
from hpctrain.parallel.buckets import assign_buckets
from hpctrain.scaling.performance.allreduce import Link, Network
from hpctrain.scaling.performance.architecture import MODELS, LayerShape, architecture
from hpctrain.scaling.performance.layers import Layer, layers_from_arithmetic, layers_from_profile
from hpctrain.scaling.performance.machine import Machine
from hpctrain.scaling.performance.overlap import communicate
from hpctrain.scaling.performance.run import RunPlan, run_time
from hpctrain.scaling.performance.step import Work, step_time
from hpctrain.scaling.performance.straggler import expected_maximum, straggler_seconds


@pytest.mark.parametrize("name", sorted(SIZES))
def test_layers_add_up_to_the_models(name: str) -> None:
    shapes = architecture(name)
    assert sum(sum(shape.tensors) for shape in shapes) == SIZES[name].parameters
    assert sum(shape.multiply_adds for shape in shapes) == SIZES[name].multiply_adds


@pytest.mark.parametrize(
    ("name", "image_size"),
    [("alexnet", 99), ("alexnet_bn", 67), ("resnet20", 32), ("resnet50", 224), ("resnet18", 65)],
)
def test_tensors_are_those_of_the_keras_model_in_its_order(name: str, image_size: int) -> None:
    from hpctrain.models import build, describe  # imports TensorFlow

    model = build(name, 10, image_size)
    own = [(variable.path.split("/")[-2], math.prod(variable.shape)) for variable in model.trainable_variables]
    shapes = architecture(name, 10, image_size)
    assert [(shape.name, size) for shape in shapes for size in shape.tensors] == own
    moving = [v for v in model.non_trainable_variables if "moving" in v.path]
    assert sum(shape.state for shape in shapes) == sum(math.prod(v.shape) for v in moving)
    assert sum(shape.multiply_adds for shape in shapes) == describe(model)["multiply_adds_per_image"]


def test_every_model_of_the_registry_is_known() -> None:
    from hpctrain.models.registry import names

    assert sorted(MODELS) == names()
    with pytest.raises(UserError, match="bench step"):
        architecture("my.module:net")


def test_time_goes_by_arithmetic_and_what_is_fixed_by_weights() -> None:
    shapes = [LayerShape("conv", (10,), 300), LayerShape("bn", (5, 5), 0), LayerShape("dense", (80,), 100)]
    layers = layers_from_arithmetic(shapes, 0.4, 0.3)
    assert [a.forward_seconds for a in layers] == pytest.approx([(0.3 + 0.03) / 3, 0.03 / 3, (0.1 + 0.24) / 3])
    assert all(a.backward_seconds == pytest.approx(2 * a.forward_seconds) for a in layers)
    assert layers[1].tensor_bytes == (20, 20)


def test_a_profile_is_scaled_and_split_into_the_tensors_that_are_known() -> None:
    rows = [
        {"name": "conv1", "gradient_bytes": 400, "forward_seconds": 0.1, "backward_seconds": 0.2},
        {"name": "relu", "gradient_bytes": 0, "forward_seconds": 0.05, "backward_seconds": 0.05},
        {"name": "mine", "gradient_bytes": 80, "forward_seconds": 0.2, "backward_seconds": 0.4},
    ]
    first, relu, mine = layers_from_profile(rows, 2.0, [LayerShape("conv1", (90, 10))])
    assert (first.tensor_bytes, relu.tensor_bytes, mine.tensor_bytes) == ((360, 40), (), (80,))
    assert (first.forward_seconds, mine.backward_seconds) == pytest.approx((0.2, 0.8))
    with pytest.raises(UserError, match=r"step\.layers"):
        layers_from_profile([{"name": "conv1"}], 1.0)


def test_buckets_start_when_their_last_gradient_and_the_wire_are_ready() -> None:
    layers = [Layer((4,), 1, 3), Layer((4,), 1, 2), Layer((4,), 1, 1)]
    # Backward: the last layer is done at 1, the middle one at 3, the first at 6. A bucket each, 2.5 s on the wire:
    # 1 to 3.5; 3.5 to 6, though ready at 3; 6 to 8.5.
    assert communicate(layers, 0, 4, lambda _: 2.5).exposed_seconds == 2.5
    # All in one: 6 to 6 + 3 * 2.5.
    assert communicate(layers, 0, 12, lambda num_bytes: num_bytes * 2.5 / 4).exposed_seconds == 7.5
    # Slow enough that the wire never rests: 1 + 3 * 4 - 6.
    assert communicate(layers, 0, 4, lambda _: 4).exposed_seconds == 7
    # Statistics go first, 0 to 4, and push all others back.
    small = communicate(layers, 8, 4, lambda _: 4)
    assert (small.exposed_seconds, small.total_seconds, small.num_messages) == (10, 16, 4)
    assert communicate(layers, 0, 4, lambda _: 2.5, overlap=False).exposed_seconds == 7.5


@given(
    st.lists(st.tuples(st.integers(1, 100), st.floats(0, 10)), min_size=1, max_size=20),
    st.integers(1, 300),
    st.floats(0, 5),
)
def test_exposed_is_never_more_than_all_nor_less_than_the_last_bucket(
    sizes: list[tuple[int, float]], bucket_bytes: int, byte_seconds: float
) -> None:
    layers = [Layer((size,), 0, seconds) for size, seconds in sizes]
    found = communicate(layers, 0, bucket_bytes, lambda num_bytes: num_bytes * byte_seconds)
    all_seconds = byte_seconds * sum(size for size, _ in sizes)
    last = assign_buckets([size for size, _ in sizes], bucket_bytes)[-1]
    assert found.total_seconds == pytest.approx(all_seconds)
    assert found.exposed_seconds <= all_seconds + 1e-6
    assert found.exposed_seconds >= byte_seconds * sum(sizes[i][0] for i in last) - 1e-6
    backward = sum(seconds for _, seconds in sizes)
    assert found.exposed_seconds >= all_seconds - backward - 1e-6


def test_the_largest_of_few_normal_numbers_is_known_exactly() -> None:
    assert expected_maximum(1) == pytest.approx(0, abs=1e-9)
    assert expected_maximum(2) == pytest.approx(1 / math.sqrt(math.pi))
    assert expected_maximum(3) == pytest.approx(1.5 / math.sqrt(math.pi))


@pytest.mark.parametrize("ranks", [100, 2048, 100_000])
def test_the_largest_of_many_follows_gumbel(ranks: int) -> None:
    a = math.sqrt(2 * math.log(ranks))
    euler = 0.5772156649015329
    gumbel = a - (math.log(math.log(ranks)) + math.log(4 * math.pi) - 2 * euler) / (2 * a)
    assert expected_maximum(ranks) == pytest.approx(gumbel, rel=0.02)
    assert expected_maximum(ranks) < a


def test_stragglers_agree_with_drawing_them() -> None:
    rng = random.Random(0)
    drawn = statistics.fmean(max(rng.gauss(10, 0.3) for _ in range(64)) for _ in range(2000)) - 10
    assert straggler_seconds(10, 0.03, 64) == pytest.approx(drawn, rel=0.03)


LINK = Link(1e-6, 1e-9, 1e-10)
MACHINE = Machine(Network(LINK, LINK), 0.01, 0.002, update_seconds=0.005, straggler_sigma=0.02)
WORK = Work(architecture("resnet20", 10), 1024, 16)


def test_a_rank_alone_only_computes() -> None:
    step = step_time(WORK, MACHINE, 1)
    assert step.compute == pytest.approx(64 * 0.162 + 0.005)
    assert step.total == step.compute


def test_parts_of_a_step_add_up_and_more_ranks_do_less_each() -> None:
    steps = [step_time(WORK, MACHINE, ranks) for ranks in (1, 2, 8, 64)]
    assert [step.compute for step in steps] == sorted((step.compute for step in steps), reverse=True)
    for step in steps:
        assert step.total == step.compute + step.exposed_communication + step.straggler + step.input
    assert steps[-1].straggler / steps[-1].compute == pytest.approx(0.02 * expected_maximum(64))
    assert steps[-1].communication.num_messages == 2  # 1.1 MB are one bucket, and the statistics


def test_only_the_last_micro_batch_hides_communication() -> None:
    slow = Link(1e-6, 1e-7)
    machine = Machine(Network(slow, slow), 0.01)
    one = step_time(Work(WORK.shapes, 32, 16), machine, 2)
    four = step_time(Work(WORK.shapes, 128, 16), machine, 2)
    assert four.compute == pytest.approx(4 * one.compute)
    assert four.exposed_communication == pytest.approx(one.exposed_communication) and one.exposed_communication > 0


def test_ranks_that_share_cores_take_turns() -> None:
    shared = Machine(Network(LINK, LINK), 0.01, shared_cores=2, threads_per_rank=2)
    step = step_time(WORK, shared, 4)
    assert step.compute == pytest.approx(step_time(WORK, shared, 1).compute)
    assert step.exposed_communication == pytest.approx(step.communication.total_seconds)


def test_compression_halves_what_is_exposed_on_a_slow_network() -> None:
    slow = Link(0, 1e-6)
    machine = Machine(Network(slow, slow), 1e-9)
    plain, compressed = (
        step_time(Work(WORK.shapes, 64, 16, compressed=c), machine, 4).exposed_communication for c in (False, True)
    )
    assert plain / compressed == pytest.approx(2, rel=0.01)


def test_a_run_is_its_steps_and_what_comes_between() -> None:
    machine = Machine(Network(LINK, LINK), 0.03, start_seconds=7, copy_bytes_per_second=1e6)
    step = step_time(WORK, machine, 4)
    run = run_time(RunPlan(10, 4096, 256, 2.0), WORK, machine, step, 4)
    assert run.num_steps == 40
    assert run.training == pytest.approx(40 * step.total)
    assert run.evaluation == pytest.approx(5 * 4 * 16 * 0.01)  # 5 times 4 micro-batches on each rank, forward only
    assert run.checkpoint == pytest.approx(10 * 2 * WORK.gradient_bytes / 1e6)
    assert run.total == pytest.approx(run.training + run.evaluation + run.checkpoint + 7)
    assert run_time(RunPlan(10, 4096, steps=3), WORK, machine, step, 4).num_steps == 3
