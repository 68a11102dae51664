"""The watch over a run's numbers: weights that drift apart are noticed and named, norms are those of the step."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from hpctrain.optim import LARS
from hpctrain.parallel.launch import Place
from hpctrain.parallel.reduce import Reducer
from hpctrain.parallel.world import World
from hpctrain.training.step import TrainStep
from hpctrain.training.watch import (
    NormWatch,
    WeightsDiffer,
    check_same_weights,
    local_rates,
    summarize,
    weight_checksums,
)
from tests.training.test_step import micro_batches, network


class Together(World):
    """Rank 0 of a world whose other ranks have answered already."""

    answers: Sequence[Sequence[Any]]

    def allgather(self, value: Any) -> list[Any]:
        own, *later = self.answers
        object.__setattr__(self, "answers", later)
        assert np.array_equal(own[0], value)
        return list(own)


def weights(**changes: float) -> list[Any]:
    """Three Keras variables; a change is added to one number of one of them."""
    found = []
    for name, shape in (("a", (2, 3)), ("b", ()), ("c", (5,))):
        value = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
        if name in changes:
            value = value + np.float32(changes[name])
        found.append(keras.Variable(value, name=name))
    return found


def check(*ranks: dict[str, float], hosts: str = "") -> None:
    """Run the check on rank 0 of ranks with these changes, each on a host of its own or on those of these letters."""
    sums = [weight_checksums(weights(**changes)) for changes in ranks]
    from hpctrain.data.checksum import crc32

    names = list(hosts) or [f"node{rank}" for rank in range(len(ranks))]
    places = tuple(Place(name, (0,), (0,), {0: 0}) for name in names)
    world = Together(0, len(ranks), "node0", places, (), None, "")
    object.__setattr__(world, "answers", [[crc32(one.tobytes()) for one in sums], sums])
    check_same_weights(40, weights(**ranks[0]), world)


def test_the_same_weights_pass(lone_world: World) -> None:
    check({}, {}, {})
    check_same_weights(1, weights(), lone_world)


def test_one_rank_of_many_is_named_with_the_first_variable() -> None:
    with pytest.raises(
        WeightsDiffer, match=r"step 40 the weights of rank 2 on node2 are not those .* 3 ranks, first in b"
    ):
        check({}, {}, {"b": 1e-7 + 1, "c": 1}, {})
    with pytest.raises(WeightsDiffer, match=r"rank 0 on node0 are not those of the other 2 ranks, first in a"):
        check({"a": 1}, {}, {})


def test_of_two_ranks_neither_is_blamed() -> None:
    with pytest.raises(WeightsDiffer, match=r"rank 1 on node1 are not those of rank 0, first in c.*unlike the others"):
        check({}, {"c": 1})


def test_the_ranks_of_a_host_are_one_witness() -> None:
    wrong = {"a": 1.0}  # in what four ranks of a host have in common
    with pytest.raises(WeightsDiffer, match=r"rank 4 on b, rank 5 on b are not those of rank 0"):
        check(wrong, wrong, wrong, wrong, {}, {}, hosts="aaaabb")
    with pytest.raises(WeightsDiffer, match=r"rank 3 on a are not those of the other 2 ranks"):
        check(wrong, wrong, wrong, wrong, {}, {}, hosts="aaaabc")


def test_many_ranks_are_counted() -> None:
    with pytest.raises(WeightsDiffer, match=r"rank 7 on node7 and 2 more are not those of the other 12 ranks"):
        check({"a": 1}, *[{"a": float(rank)} for rank in range(2, 11)], *[{}] * 12)


def test_a_single_bit_changes_a_checksum() -> None:
    before = weight_checksums(weights())
    one = weights()
    bits = np.array(one[2].value.numpy())
    bits.view(np.uint32)[3] ^= 1
    one[2].assign(bits)
    assert (weight_checksums(one) != before).tolist() == [False, False, True]


class NotedStep(TrainStep):
    """The hook as the training loop has it."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.norms = NormWatch(self.weights)

    def _reduce(self, payload: list[Any]) -> list[Any]:
        total = super()._reduce(payload)
        self.norms.record(total[: len(self.weights)])
        return total


def run(kind: type[Any], world: World, deterministic: bool, want: Sequence[int] = ()) -> tuple[Any, list[Any]]:
    keras.utils.set_random_seed(1)
    step = kind(
        network(),
        LARS(0.5, weight_decay=1e-3),
        Reducer(world, deterministic=deterministic),
        micro_batches=2,
        deterministic=deterministic,
    )
    noted = []
    for number in (1, 2, 3):
        if isinstance(step, NotedStep):
            step.norms.want(number in want)
        before = [weight.value.numpy() for weight in step.weights]
        step(number, iter(micro_batches(2, 2 * number)), 0.1)
        if number in want:
            noted.append((step.norms.norms(), before))
    return step, noted


@pytest.mark.parametrize("deterministic", [True, False])
def test_norms_are_those_of_the_step_and_change_no_bit(deterministic: bool, lone_world: World) -> None:
    plain, _ = run(TrainStep, lone_world, deterministic)
    watched, noted = run(NotedStep, lone_world, deterministic, want=[2])
    for a, b in zip(plain.weights, watched.weights, strict=True):
        if deterministic:
            assert a.value.numpy().tobytes() == b.value.numpy().tobytes()
        else:
            np.testing.assert_allclose(a.value.numpy(), b.value.numpy(), rtol=1e-5)
    (norms, before), *_ = noted
    np.testing.assert_allclose(norms[1], [float((w.astype(float) ** 2).sum()) for w in before], rtol=1e-5)
    assert (norms[0] > 0).all()
    assert not np.allclose(norms, watched.norms.norms())  # step 3 was not wanted
    assert not watched.norms.norms().any()


@pytest.mark.parametrize("norm", ["separate", "combined"])
def test_local_rates_are_the_optimizers_own(norm: str) -> None:
    random = np.random.default_rng(3)
    variables = [
        keras.Variable(random.normal(size=shape), dtype="float32", name=f"stage{i}_x")
        for i, shape in enumerate([(3, 4), (4,), (4, 2)])
    ]
    gradients = [random.normal(size=variable.shape).astype(np.float32) for variable in variables]
    optimizer = LARS(0.1, norm=norm, weight_decay=0.05, epsilon=1e-3)
    optimizer.build(variables)
    watch = NormWatch(variables)
    watch.want(True)
    watch.record([tf.constant(gradient) for gradient in gradients])
    found = local_rates(watch.norms(), optimizer)
    assert sorted(found) == [0, 2]
    for i, rate in found.items():
        w, g = variables[i].value.numpy().astype(float), gradients[i].astype(float)
        below = np.linalg.norm(g + 0.05 * w) if norm == "combined" else np.linalg.norm(g) + 0.05 * np.linalg.norm(w)
        assert rate == pytest.approx(1e-3 * np.linalg.norm(w) / (below + 1e-3), rel=1e-4)
    summary = summarize(watch.norms(), variables, optimizer)
    assert summary["gradient_norm"] == pytest.approx(np.sqrt(sum((g**2).sum() for g in gradients)), rel=1e-5)
    assert summary["layers"]["stage0"]["trust_ratio"] == pytest.approx([found[0]] * 3)
    assert "trust_ratio" not in summary["layers"]["stage1"]
    assert set(summary["layers"]) == {"stage0", "stage1", "stage2"}


def test_other_optimizers_have_no_local_rates() -> None:
    assert local_rates(np.ones((3, 2)), keras.optimizers.SGD()) == {}


DRIFT = """
import sys
from hpctrain.parallel.world import run_rank, start

def main():
    world = start()
    import keras, numpy as np
    from hpctrain.training.watch import check_same_weights
    variables = [keras.Variable(np.ones(1000, "float32"), name=name) for name in ("first", "second")]
    check_same_weights(1, variables, world)
    if world.rank == 1:
        variables[1].assign_add(np.eye(1, 1000, 7, dtype="float32")[0] * 1e-6)
    check_same_weights(2, variables, world)
    return 0

run_rank(main)
"""


@pytest.mark.mpi
def test_drift_between_real_ranks_ends_them_all(tmp_path: Path) -> None:
    program = tmp_path / "drift.py"
    program.write_text(DRIFT)
    mpirun = Path(sys.executable).with_name("mpirun")
    done = subprocess.run(
        [str(mpirun), "--oversubscribe", "-n", "2", sys.executable, str(program)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode != 0
    assert "hpctrain: WeightsDiffer: after step 2 the weights of rank 1 on" in done.stderr
    assert "first in second" in done.stderr
