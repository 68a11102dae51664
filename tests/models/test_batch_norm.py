"""The operation for batch normalization, residual and ReLU against float64, TensorFlow's operations, and itself."""

import hashlib
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from hpctrain import native
from hpctrain.models import batch_norm as module
from hpctrain.models.batch_norm import batch_norm
from hpctrain.models.registry import build
from tests.threads import digests

EPSILON = 1e-3
SHAPES = [(1, 1), (7, 1), (7, 3), (1, 17), (4099, 17), (3, 5, 5, 64), (50, 2048), (40, 31, 33, 3)]
# (relu, with a residual, copies of the output)
KINDS = [(False, False, 1), (True, False, 1), (True, False, 2), (True, True, 1), (True, True, 2)]


@pytest.fixture(params=["native", "TensorFlow's"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "native":
        assert native.batch_norm() is not None, "run `python -m hpctrain.native.build`"
    else:
        monkeypatch.setattr(module, "_operation", lambda: None)


def problem(shape: tuple[int, ...], with_residual: bool, copies: int, seed: int = 0) -> dict[str, Any]:
    """What goes in, as float32 numbers that bfloat16 has too, and the gradients of the outputs."""
    rng = np.random.default_rng(seed)

    def numbers(*size: int) -> np.ndarray:
        return np.array(tf.cast(tf.cast(rng.normal(0.3, 1.5, size), tf.bfloat16), tf.float32))

    return {
        "x": numbers(*shape),
        "gamma": numbers(shape[-1]),
        "beta": numbers(shape[-1]),
        "residual": numbers(*shape) if with_residual else None,
        "dy": [numbers(*shape) for _ in range(copies)],
    }


def computed(given: dict[str, Any], relu: bool, dtype: str = "float32", graph: bool = True) -> dict[str, np.ndarray]:
    """The outputs and the gradients, as float32."""

    def run() -> dict[str, Any]:
        x, gamma, beta = tf.cast(given["x"], dtype), tf.constant(given["gamma"]), tf.constant(given["beta"])
        residual = None if given["residual"] is None else tf.cast(given["residual"], dtype)
        sources = {"x": x, "gamma": gamma, "beta": beta} | ({} if residual is None else {"residual": residual})
        with tf.GradientTape() as tape:
            tape.watch(list(sources.values()))
            ys, mean, variance = batch_norm(
                x, gamma, beta, residual, epsilon=EPSILON, relu=relu, copies=len(given["dy"])
            )
        vectors = [tf.cast(dy, dtype) for dy in given["dy"]]
        gradients = tape.gradient(list(ys), sources, output_gradients=vectors)
        assert all(y.dtype == dtype and y.shape == x.shape for y in ys)
        assert gradients["x"].dtype == dtype and gradients["gamma"].dtype == mean.dtype == tf.float32
        return {"y": ys[0], "last y": ys[-1], "mean": mean, "variance": variance, **gradients}

    results = (tf.function(run) if graph else run)()
    return {name: np.asarray(tf.cast(value, tf.float32)) for name, value in results.items()}


def expected(given: dict[str, Any], relu: bool) -> dict[str, np.ndarray]:
    """The same in float64, by the formulas of the paper."""
    shape = given["x"].shape
    x, dy = given["x"].reshape(-1, shape[-1]).astype(np.float64), sum(d.astype(np.float64) for d in given["dy"])
    count, gamma = len(x), given["gamma"].astype(np.float64)
    deviation = np.sqrt(x.var(0) + EPSILON)
    normalized = (x - x.mean(0)) / deviation
    y = normalized * gamma + given["beta"]
    if given["residual"] is not None:
        y = y + given["residual"].reshape(y.shape)
    g = dy.reshape(y.shape)
    if relu:
        g, y = g * (y > 0), np.maximum(y, 0)
    dgamma, dbeta = (g * normalized).sum(0), g.sum(0)
    result = {
        "y": y.reshape(shape),
        "last y": y.reshape(shape),
        "mean": x.mean(0),
        "variance": x.var(0) * count / max(1, count - 1),
        "x": (gamma / deviation * (g - dbeta / count - normalized * dgamma / count)).reshape(shape),
        "gamma": dgamma,
        "beta": dbeta,
    }
    return result | ({"residual": g.reshape(shape)} if given["residual"] is not None else {})


def agree(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float, rows: int) -> None:
    """Equal but for rounding; and for masks where y is as good as zero, which can fall either way."""
    assert set(found) == set(wanted)
    for name, values in wanted.items():
        # Sums over the rows round like their largest terms do; everything else like numbers around one.
        scale = max(1.0, np.sqrt(rows)) if name in ("gamma", "beta") else 1.0
        np.testing.assert_allclose(found[name], values, rtol=tolerance, atol=tolerance * scale * 5, err_msg=name)


@pytest.mark.parametrize(("relu", "with_residual", "copies"), KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_what_the_formulas_say(
    either: None, shape: tuple[int, ...], relu: bool, with_residual: bool, copies: int
) -> None:
    given = problem(shape, with_residual, copies)
    agree(computed(given, relu), expected(given, relu), 2e-5, int(np.prod(shape[:-1])))


@pytest.mark.parametrize(("relu", "with_residual", "copies"), KINDS)
@pytest.mark.parametrize("shape", [(7, 3), (4, 9, 9, 64), (4099, 17)], ids=str)
def test_bfloat16_rounds_only_what_it_reads_and_writes(
    shape: tuple[int, ...], relu: bool, with_residual: bool, copies: int
) -> None:
    given = problem(shape, with_residual, copies)
    found, wanted = computed(given, relu, "bfloat16"), expected(given, relu)
    for name in ("mean", "variance"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6)
    for name in ("y", "last y"):  # the nearest bfloat16: half a unit in the eighth binary digit
        np.testing.assert_allclose(found[name], wanted[name], rtol=2**-8, atol=1e-5)
    # With a residual the sum of two gradients is rounded once, as dresidual; one in 2^9.
    agree(found, wanted, 2**-7, int(np.prod(shape[:-1])))


def test_bfloat16_rounds_to_the_nearest_with_ties_to_even() -> None:
    # Mean 0 and variance 1, so that y = x + beta in float32, which is then rounded.
    x = np.array([[1.0], [-1.0]] * 4, np.float32)
    for beta in (2**-8, 3 * 2**-8, 2**-8 + 2**-12, 2**-8 - 2**-12, 1e30, 3e38):
        ys, _, _ = batch_norm(
            tf.cast(x, tf.bfloat16), tf.ones(1), tf.constant([beta], tf.float32), None, epsilon=0.0, relu=False
        )
        wanted = tf.cast(tf.constant(x) + tf.constant(beta, tf.float32), tf.bfloat16)
        np.testing.assert_array_equal(tf.cast(ys[0], tf.float32), tf.cast(wanted, tf.float32))


@pytest.mark.parametrize(("mean", "deviation"), [(1e4, 1.0), (-300.0, 0.01), (1e-3, 1e-6), (1e6, 1e3)])
def test_a_large_mean_and_a_small_deviation_lose_no_digits(mean: float, deviation: float) -> None:
    x = np.random.default_rng(0).normal(mean, deviation, (5000, 8)).astype(np.float32)
    x[:16] += 20 * deviation  # the first rows need not be like the others
    _, batch_mean, variance = batch_norm(tf.constant(x), tf.ones(8), tf.zeros(8), None, epsilon=1e-12, relu=False)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(batch_mean, exact.mean(0), rtol=1e-7)
    np.testing.assert_allclose(variance, exact.var(0, ddof=1), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("relu", "with_residual", "copies"), KINDS)
def test_nan_stays_nan(relu: bool, with_residual: bool, copies: int, dtype: str) -> None:
    given = problem((60, 3), with_residual, copies)
    given["x"][30, 1] = np.nan
    found = computed(given, relu, dtype)
    assert np.isnan(found["y"][:, 1]).all() and np.isnan(found["gamma"][1]) and np.isnan(found["x"][:, 1]).all()
    assert np.isfinite(found["y"][:, [0, 2]]).all()
    if with_residual:
        given = problem((60, 3), with_residual, copies)
        given["residual"][5, 2] = np.nan
        wrong = np.isnan(computed(given, relu, dtype)["y"])
        assert wrong[5, 2] and wrong.sum() == 1


@pytest.mark.parametrize(("relu", "with_residual", "copies"), KINDS)
def test_eager_and_graph_have_the_same_bits(relu: bool, with_residual: bool, copies: int) -> None:
    # In a graph buffers are written over, eagerly they are kept.
    given = problem((9, 8, 8, 16), with_residual, copies)
    eager, graph = computed(given, relu, graph=False), computed(given, relu)
    for name, values in eager.items():
        np.testing.assert_array_equal(values, graph[name], err_msg=name)


def test_inputs_that_somebody_still_needs_are_not_written_over() -> None:
    given = problem((200, 32), True, 2)

    @tf.function
    def step(x: Any, residual: Any, dy: Any) -> tuple[Any, ...]:
        x, residual, dy = x * 1.0, residual * 1.0, dy * 1.0  # buffers that could be taken
        with tf.GradientTape() as tape:
            tape.watch([x, residual])
            ys, _, _ = batch_norm(x, given["gamma"], given["beta"], residual, epsilon=EPSILON, relu=True, copies=2)
        gradients = tape.gradient(list(ys), [x, residual], output_gradients=[dy, dy])
        return x + 0.0, residual + 0.0, dy + 0.0, ys[0] + 0.0, ys[1] + 0.0, *gradients

    arguments = [given["x"], given["residual"], given["dy"][0]]
    x, residual, dy, first, second, dx, dresidual = (np.asarray(v) for v in step(*map(tf.constant, arguments)))
    for found, wanted in zip((x, residual, dy), arguments, strict=True):
        np.testing.assert_array_equal(found, wanted)
    given["dy"][1] = given["dy"][0]
    wanted = computed(given, True)
    for found, name in ((first, "y"), (second, "y"), (dx, "x"), (dresidual, "residual")):
        np.testing.assert_array_equal(found, wanted[name])


@pytest.mark.parametrize("with_residual", [False, True])
def test_a_copy_that_nobody_reads_has_no_gradient(with_residual: bool) -> None:
    given = problem((50, 4), with_residual, 1)
    wanted = computed(given, True)

    @tf.function
    def gradient() -> Any:
        x = tf.constant(given["x"])
        with tf.GradientTape() as tape:
            tape.watch(x)
            residual = given["residual"]
            ys, _, _ = batch_norm(x, given["gamma"], given["beta"], residual, epsilon=EPSILON, relu=True, copies=2)
            loss = tf.reduce_sum(ys[1] * given["dy"][0])
        return tape.gradient(loss, x)

    np.testing.assert_array_equal(gradient(), wanted["x"])


def test_the_gradient_has_no_gradient() -> None:
    x = tf.constant(problem((8, 2), False, 1)["x"])
    with tf.GradientTape() as outer:
        outer.watch(x)
        with tf.GradientTape() as inner:
            inner.watch(x)
            ys, _, _ = batch_norm(x, tf.ones(2), tf.zeros(2), None, epsilon=EPSILON, relu=True)
            loss = tf.reduce_sum(ys[0] ** 2)
        first = inner.gradient(loss, x)
    with pytest.raises(LookupError, match="HpctrainBatchNormGrad"):
        outer.gradient(first, x)


def operation(**changes: Any) -> Any:
    x = tf.zeros((4, 3))
    arguments = {"x": x, "gamma": tf.ones(3), "beta": tf.zeros(3), "residual": [x], "copies": 1, "relu": True}
    return native.batch_norm().hpctrain_batch_norm(**arguments | {"epsilon": 1e-5} | changes)


@pytest.mark.parametrize(
    "call",
    [
        lambda: operation(x=tf.zeros((0, 3))),
        lambda: operation(x=tf.zeros(3)),
        lambda: operation(gamma=tf.ones(4)),
        lambda: operation(beta=tf.ones((3, 1))),
        lambda: operation(residual=[tf.zeros((4, 4))]),
        lambda: operation(residual=[tf.zeros((4, 3))] * 2),
        lambda: operation(relu=False),
    ],
)
def test_shapes_that_do_not_fit_are_an_error(call: Callable[[], Any]) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError, match="expected"):
        call()


def test_shapes_are_known_before_it_runs() -> None:
    @tf.function(input_signature=[tf.TensorSpec((None, 4, 4, 8)), tf.TensorSpec((None, 4, 4, 8))])
    def graph(x: Any, residual: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch([x, residual])
            ys, mean, variance = batch_norm(x, tf.ones(8), tf.zeros(8), residual, epsilon=EPSILON, relu=True, copies=2)
        gradients = tape.gradient(list(ys), [x, residual])
        assert [t.shape.as_list() for t in (*ys, *gradients)] == [[None, 4, 4, 8]] * 4
        assert mean.shape == variance.shape == (8,)
        return ys

    graph.get_concrete_function()


def digest() -> str:
    """A digest of all results for shapes of several chunks."""
    everything = hashlib.sha256()
    for shape in ((30011, 17), (12, 30, 31, 64), (500, 2048)):
        for relu, with_residual, copies in KINDS:
            for dtype in ("float32", "bfloat16"):
                for name, values in sorted(computed(problem(shape, with_residual, copies), relu, dtype).items()):
                    everything.update(name.encode() + values.tobytes())
    return everything.hexdigest()


def test_the_number_of_threads_does_not_matter() -> None:
    assert len(digests("from tests.models.test_batch_norm import digest; print(digest())", 1, 2, 4)) == 1


@pytest.mark.parametrize("name", ["resnet20", "resnet50", "alexnet_bn"])
def test_a_training_step_is_that_of_tensorflows_operations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = {"resnet20": 16, "resnet50": 32, "alexnet_bn": 67}[name]
    images = np.random.default_rng(0).normal(0, 1, (16, size, size, 3)).astype(np.float32)
    labels = np.arange(16) % 10

    def step() -> tuple[float, list[np.ndarray], list[np.ndarray]]:
        options = {"dropout": 0.0} if name == "alexnet_bn" else {}
        model = build(name, num_classes=10, image_size=size, seed=1, **options)

        @tf.function
        def run() -> Any:
            with tf.GradientTape() as tape, keras.StatelessScope() as scope:
                logits = model(images, training=True)
                loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
            moved = [scope.get_current_value(variable) for variable in model.non_trainable_variables]
            return loss, tape.gradient(loss, [v.value for v in model.trainable_variables]), moved

        loss, gradients, moved = run()
        return float(loss), [np.asarray(g) for g in gradients], [np.asarray(m) for m in moved if m is not None]

    loss, gradients, moved = step()
    monkeypatch.setattr(module, "_operation", lambda: None)
    wanted_loss, wanted_gradients, wanted_moved = step()
    # Fifty layers of few rows magnify rounding: the last digit of the images alone moves ResNet-50's gradient by 1.5 %.
    deep = name == "resnet50"
    assert loss == pytest.approx(wanted_loss, rel=1e-3 if deep else 1e-5)
    for found, wanted in zip(moved, wanted_moved, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)
    difference = np.sqrt(sum(np.sum((f - w) ** 2) for f, w in zip(gradients, wanted_gradients, strict=True)))
    assert difference <= (0.1 if deep else 0.01) * np.sqrt(sum(np.sum(w**2) for w in wanted_gradients))
