"""LARS and SGD against the float64 references, and as Keras optimizers."""

import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain import native
from hpctrain.errors import UserError
from tests.optim import lars_references

keras = pytest.importorskip("keras")
tf = pytest.importorskip("tensorflow")

from hpctrain.optim import LARS, SGD, KerasSchedule, make_optimizer, make_schedule  # noqa: E402

STEPS = 100
SHAPES = [(), (7,), (5, 3), (3, 3, 4, 8), (2, 6, 5), (4, 4), (1, 1), (64, 32), (9,)]
ZERO_WEIGHTS, ZERO_GRADIENTS = 5, 2  # positions in SHAPES: starts at zero; has no gradient in every third step


def problem(seed=0):
    """Return initial weights, the gradients of each step, and a rate that rises and falls, never to 0."""
    rng = np.random.default_rng(seed)
    weights = [rng.standard_normal(s) * 0.3 for s in SHAPES]
    weights[ZERO_WEIGHTS] = np.zeros(SHAPES[ZERO_WEIGHTS])
    gradients = [[rng.standard_normal(s) * 0.1 for s in SHAPES] for _ in range(STEPS)]
    for step in range(0, STEPS, 3):
        gradients[step][ZERO_GRADIENTS] = np.zeros(SHAPES[ZERO_GRADIENTS])
    schedule = make_schedule("poly", 2.0, STEPS, 20, end_rate=0.01)
    return weights, gradients, [schedule(step) for step in range(1, STEPS + 1)]


def run(optimizer, weights, gradients, rates, dtype="float32", compiled=True):
    """Return the weights after applying `optimizer`, the rate assigned from outside each step."""
    variables = [keras.Variable(w.astype(np.float32), dtype=dtype, name=f"v{i}") for i, w in enumerate(weights)]
    optimizer.build(variables)

    def step(*grads):
        optimizer.apply(grads, variables)

    step = tf.function(step) if compiled else step
    for grads, rate in zip(gradients, rates, strict=True):
        optimizer.learning_rate = rate
        step(*[tf.cast(g, dtype) for g in grads])
    return [np.asarray(tf.cast(v.value, tf.float64)) for v in variables]


def expected(reference, weights, gradients, rates, **options):
    """Return the weights after the same steps by a reference, from the float32 starting point, in float64."""
    result = []
    for position, weight in enumerate(weights):
        w, v, last = weight.astype(np.float32).astype(np.float64), np.zeros_like(weight), rates[0]
        for grads, rate in zip(gradients, rates, strict=True):
            w, v = reference(w, v, grads[position].astype(np.float32).astype(np.float64), rate, last, **options)
            last = rate
        result.append(w)
    return result


def assert_agree(actual, wanted, start, tolerance=1e-5):
    """Compare each variable's weights, relative to its largest: one that comes to pass near 0 has lost no precision."""
    for position, (a, w, first) in enumerate(zip(actual, wanted, start, strict=True)):
        scale = max(np.max(np.abs(w)), np.max(np.abs(first)))
        assert np.max(np.abs(a - w)) <= tolerance * scale, (position, a, w)


M_WD = {"momentum": 0.9, "weight_decay": 1e-2}
ALL = {**M_WD, "trust_coefficient": 0.05}
REF = {"m": 0.9, "wd": 1e-2}
REF_ETA = {**REF, "eta": 0.05}
VARIANTS = {
    "paper": (lambda: LARS.preset("paper", 1.0, **ALL), lars_references.caffe, REF_ETA),
    "mlperf": (
        lambda: LARS.preset("mlperf", 1.0, epsilon=0.03, **ALL),
        lars_references.mlperf,
        {**REF_ETA, "eps": 0.03},
    ),
    "tf_models": (lambda: LARS.preset("tf_models", 1.0, **ALL), lars_references.tf_models, REF_ETA),
    "optax": (lambda: LARS.preset("optax", 1.0, **ALL), lars_references.optax, REF_ETA),
    "optax_eps": (
        lambda: LARS.preset("optax", 1.0, epsilon=0.1, **ALL),
        lars_references.optax,
        {**REF_ETA, "eps": 0.1},
    ),
    "default": (lambda: LARS(1.0, **ALL), lars_references.mlperf, {**REF_ETA, "eps": 0.0}),
    "nesterov": (
        lambda: LARS(1.0, nesterov=True, **ALL),
        lars_references.mlperf,
        {**REF_ETA, "eps": 0, "nesterov": True},
    ),
    "tf_models_nesterov": (
        lambda: LARS.preset("tf_models", 1.0, nesterov=True, **ALL),
        lars_references.tf_models,
        {**REF_ETA, "nesterov": True},
    ),
    "outside": (lambda: LARS(1.0, rate="outside", **ALL), lars_references.outside, REF_ETA),
    "outside_nesterov": (
        lambda: LARS(1.0, rate="outside", nesterov=True, **ALL),
        lars_references.outside,
        {**REF_ETA, "nesterov": True},
    ),
    "clip": (lambda: LARS(1.0, clip=True, **ALL), lars_references.larc, REF_ETA),
    "ratio_only": (lambda: LARS(1.0, decay_in_update=False, **ALL), lars_references.ratio_only, REF_ETA),
    "tf_contrib": (lambda: LARS.preset("tf_contrib", 1.0, **ALL), lars_references.tf_contrib, REF_ETA),
    "tf_contrib_nesterov_eps": (
        lambda: LARS.preset("tf_contrib", 1.0, nesterov=True, epsilon=0.1, **ALL),
        lars_references.tf_contrib,
        {**REF_ETA, "nesterov": True, "eps": 0.1},
    ),
    "tf_models_popular": (
        lambda: LARS.preset("tf_models_popular", 1.0, **ALL),
        lars_references.tf_models_popular,
        REF_ETA,
    ),
    "tf_models_popular_nesterov": (
        lambda: LARS.preset("tf_models_popular", 1.0, nesterov=True, **ALL),
        lars_references.tf_models_popular,
        {**REF_ETA, "nesterov": True},
    ),
    "corrected": (lambda: LARS(1.0, momentum_correction=True, **ALL), lars_references.corrected, REF_ETA),
    "no_momentum": (
        lambda: LARS.preset("paper", 1.0, **{**ALL, "momentum": 0.0}),
        lars_references.caffe,
        {**REF_ETA, "m": 0.0},
    ),
    "small_momentum": (
        lambda: LARS.preset("paper", 1.0, **{**ALL, "momentum": 1e-6}),
        lars_references.caffe,
        {**REF_ETA, "m": 1e-6},
    ),
    "sgd": (lambda: SGD(1.0, **M_WD), lars_references.sgd_inside, REF),
    "sgd_nesterov": (lambda: SGD(1.0, nesterov=True, **M_WD), lars_references.sgd_inside, {**REF, "nesterov": True}),
    "sgd_outside": (lambda: SGD(1.0, rate="outside", **M_WD), lars_references.sgd_outside, REF),
    "lars_without_trust": (
        lambda: LARS(1.0, exclude_from_trust=lambda variable: True, **M_WD),
        lars_references.sgd_inside,
        REF,
    ),
}


@pytest.mark.parametrize("operation", ["own", "TensorFlow's"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_agrees_with_the_formula_after_100_steps(variant, operation, monkeypatch):
    if operation == "own":
        assert native.momentum() is not None, "run `python -m hpctrain.native.build`"
    else:
        monkeypatch.setattr(native, "momentum", lambda: None)
    make, reference, options = VARIANTS[variant]
    weights, gradients, rates = problem()
    if "sgd" in variant or variant == "lars_without_trust":
        rates = [rate / 20 for rate in rates]
    assert_agree(
        run(make(), weights, gradients, rates), expected(reference, weights, gradients, rates, **options), weights
    )


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), momentum=st.floats(0, 0.95), decay=st.floats(0, 0.05), eta=st.floats(1e-3, 0.1))
def test_agrees_with_the_paper_for_any_settings(seed, momentum, decay, eta):
    weights, gradients, rates = problem(seed)
    optimizer = LARS.preset("paper", 1.0, momentum=momentum, weight_decay=decay, trust_coefficient=eta)
    wanted = expected(lars_references.caffe, weights, gradients[:10], rates[:10], m=momentum, wd=decay, eta=eta)
    assert_agree(run(optimizer, weights, gradients[:10], rates[:10], compiled=False), wanted, weights)


def test_float64_variables_keep_their_precision():
    weights, gradients, rates = problem()
    optimizer = LARS.preset("paper", 1.0, **ALL)
    gradients = [[g.astype(np.float32).astype(np.float64) for g in step] for step in gradients]
    rates = [float(np.float32(rate)) for rate in rates]
    actual = run(optimizer, weights, gradients, rates, dtype="float64")
    assert_agree(
        actual, expected(lars_references.caffe, weights, gradients, rates, **REF_ETA), weights, tolerance=1e-10
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("preset", ["paper", "tf_models"])
def test_norms_of_16_bit_variables_are_taken_in_float32(dtype, preset):
    # A running sum of ones stops growing at 256 in bfloat16, and 70 000 overflows float16.
    size = 70_000
    weights, gradients = [np.ones((size, 1))], [[np.ones((size, 1))]]
    optimizer = LARS.preset(preset, 1.0, momentum=0.9, weight_decay=0.0, trust_coefficient=0.5)
    actual = run(optimizer, weights, gradients, [0.5], dtype=dtype)
    np.testing.assert_allclose(actual[0], 0.75, rtol=1e-2)


def test_a_zero_rate_moves_nothing_at_first_and_clip_survives_it():
    for optimizer in (LARS(0.0, clip=True), LARS(0.0, clip=True, rate="outside"), LARS(0.0, momentum_correction=True)):
        weights, gradients, _ = problem()
        actual = run(optimizer, weights, gradients[:1], [0.0])
        for a, w in zip(actual, weights, strict=True):
            np.testing.assert_array_equal(a, w.astype(np.float32))


def test_momentum_correction_gives_the_weights_of_the_rate_outside():
    weights, gradients, rates = problem()
    inside = run(LARS(1.0, momentum_correction=True), weights, gradients, rates)
    for a, b in zip(inside, run(LARS(1.0, rate="outside"), weights, gradients, rates), strict=True):
        np.testing.assert_array_equal(a, b)


def test_nan_gradients_are_not_hidden():
    variable = keras.Variable(np.ones((2, 2), np.float32))
    LARS(1.0).apply([tf.constant([[1.0, np.nan], [0.0, 0.0]])], [variable])
    assert np.isnan(variable.numpy()).any()


def test_sparse_gradients_are_made_dense():
    dense = np.zeros((4, 2), np.float32)
    dense[1], dense[3] = 3.0, 1.0  # row 1 is looked up twice
    sparse = tf.IndexedSlices(tf.constant([[1.0, 1.0], [2.0, 2.0], [1.0, 1.0]]), tf.constant([1, 1, 3]), (4, 2))
    results = []
    for gradient in (tf.constant(dense), sparse):
        variable = keras.Variable(np.full((4, 2), 0.5, np.float32))
        LARS(1.0).apply([gradient], [variable])
        results.append(variable.numpy())
    np.testing.assert_array_equal(*results)


def test_variables_without_a_gradient_are_skipped_with_a_warning():
    variables = [keras.Variable(np.ones((2, 2), np.float32)) for _ in range(2)]
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        LARS(1.0).apply([None, tf.ones((2, 2))], variables)
    assert (variables[0].numpy() == 1).all() and (variables[1].numpy() != 1).all()


@pytest.mark.parametrize(
    "rule, left_out",
    [
        ("rank<=1", {"dense/bias", "bn/gamma"}),
        ("bn/", {"bn/gamma"}),
        (["gamma$", "^head/"], {"bn/gamma", "head/kernel"}),
        (["rank<=1", "^head/"], {"dense/bias", "bn/gamma", "head/kernel"}),
        (lambda variable: variable.path.endswith("kernel"), {"dense/kernel", "head/kernel"}),
        (None, set()),
        ([], set()),
        ("", set()),
        (False, set()),
    ],
)
def test_exclusions(rule, left_out):
    shapes = {"dense/kernel": (3, 3), "dense/bias": (3,), "bn/gamma": (3,), "head/kernel": (3, 2)}
    variables = []
    for path, shape in shapes.items():
        scope, name = path.split("/")
        with keras.name_scope(scope):
            variables.append(keras.Variable(np.ones(shape, np.float32), name=name))
    assert [v.path for v in variables] == list(shapes)
    # Without a gradient and with rate 1, a variable that decays shrinks by exactly the decay.
    SGD(1.0, momentum=0.0, weight_decay=0.5, exclude_from_decay=rule).apply(
        [tf.zeros(v.shape) for v in variables], variables
    )
    assert {v.path for v in variables if (v.numpy() == 1).all()} == left_out
    assert all((v.numpy() == 0.5).all() for v in variables if v.path not in left_out)


@keras.saving.register_keras_serializable(package="hpctrain-tests")
def leaves_out_the_first_layer(variable):
    return "first" in variable.path


def small_model():
    keras.utils.set_random_seed(7)
    return keras.Sequential(
        [
            keras.layers.Input((8,)),
            keras.layers.Dense(16, name="first"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(4),
        ]
    )


def small_data():
    rng = np.random.default_rng(3)
    return rng.standard_normal((32, 8)).astype(np.float32), rng.integers(0, 4, 32)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LARS(0.5, weight_decay=5e-4, momentum=0.8),
        lambda: LARS.preset("optax", KerasSchedule("poly", 2.0, 20, 5), exclude_from_trust=["bias", "gamma"]),
        lambda: LARS(0.5, exclude_from_decay=leaves_out_the_first_layer, clip=True, epsilon=1e-6),
        lambda: LARS(0.5, gradient_accumulation_steps=2),
        lambda: SGD(0.1, rate="outside", exclude_from_decay=None),
    ],
)
def test_a_compiled_model_continues_bit_for_bit_after_save_and_load(make, tmp_path):
    images, labels = small_data()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model = small_model()
    model.compile(make(), loss)
    model.fit(images, labels, batch_size=8, epochs=2, shuffle=False, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    for copy in (model, loaded):
        copy.fit(images, labels, batch_size=8, epochs=1, shuffle=False, verbose=0)
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(model.optimizer.variables, loaded.optimizer.variables, strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_an_unregistered_predicate_cannot_be_saved():
    with pytest.raises(UserError, match="register"):
        LARS(1.0, exclude_from_decay=lambda variable: True).get_config()


def test_config_is_json_and_makes_the_same_optimizer():
    optimizer = LARS(1, nesterov=True, norm="combined", rate="outside", exclude_from_trust=["a", "b"], epsilon=0.5)
    config = json.loads(json.dumps(optimizer.get_config()))
    assert LARS.from_config(config).get_config() == optimizer.get_config()


def test_state_is_iteration_learning_rate_and_one_buffer_a_variable():
    model = small_model()
    optimizer = LARS(0.5)
    optimizer.build(model.trainable_variables)
    paths = [v.path for v in optimizer.variables]
    assert paths[:2] == ["lars/iteration", "lars/learning_rate"]
    assert len(paths) == len(set(paths)) == 2 + len(model.trainable_variables)
    assert [tuple(v.shape) for v in optimizer.variables[2:]] == [tuple(v.shape) for v in model.trainable_variables]


def test_weight_decay_is_not_keras_decoupled_decay():
    variable = keras.Variable(np.ones((2, 2), np.float32))
    optimizer = LARS(0.0, weight_decay=0.5)
    optimizer.apply([tf.ones((2, 2))], [variable])
    assert (variable.numpy() == 1).all()
    with pytest.raises(UserError, match="exclude_from_decay"):
        optimizer.exclude_from_weight_decay(var_names=["bias"])


@pytest.mark.parametrize("jit", [False, True])
def test_compiled_with_and_without_xla_is_the_eager_update(jit):
    weights, gradients, _ = problem()
    wanted = run(LARS(2.0), weights, gradients[1:2], [2.0], compiled=False)
    variables = [keras.Variable(w.astype(np.float32)) for w in weights]
    optimizer = LARS(2.0)
    optimizer.build(variables)
    step = tf.function(lambda *grads: optimizer.apply(grads, variables), jit_compile=jit)
    step(*[tf.constant(g, tf.float32) for g in gradients[1]])
    assert_agree([v.numpy() for v in variables], wanted, weights, tolerance=1e-6)


REPEATED = """
import hashlib, os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import tensorflow as tf, numpy as np, keras
tf.config.threading.set_intra_op_parallelism_threads(1)
tf.config.threading.set_inter_op_parallelism_threads(1)
tf.config.experimental.enable_op_determinism()
from hpctrain.optim import LARS
keras.utils.set_random_seed(1)
rng = np.random.default_rng(0)
shapes = [(3, 3, 16, 32), (32,), (300, 70), (70,)]
variables = [keras.Variable(rng.standard_normal(s).astype("float32")) for s in shapes]
optimizer = LARS(1.0)
optimizer.build(variables)
step = tf.function(lambda *grads: optimizer.apply(grads, variables))
for rate in (0.5, 1.0, 2.0, 1.0):
    optimizer.learning_rate = rate
    step(*[tf.constant(rng.standard_normal(s).astype("float32")) for s in shapes])
print(hashlib.sha256(b"".join(v.numpy().tobytes() for v in [*variables, *optimizer.variables])).hexdigest())
"""


def test_two_processes_give_the_same_bits():
    outputs = [
        subprocess.run([sys.executable, "-c", REPEATED], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert outputs[0] == outputs[1] and len(outputs[0].strip()) == 64


@pytest.mark.parametrize(
    "options, part",
    [
        ({"norm": "combine"}, "combined"),
        ({"rate": "insid"}, "inside"),
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": -0.1}, "momentum"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"epsilon": float("nan")}, "epsilon"),
        ({"trust_coefficient": None}, "trust_coefficient"),
        ({"exclude_from_trust": "("}, "regular expression"),
        ({"norm": "combined", "decay_in_update": False}, "separate"),
        ({"adapt": "update"}, "outside"),
    ],
)
def test_wrong_options_are_named(options, part):
    with pytest.raises(UserError, match=part):
        LARS(1.0, **options)


def test_unknown_names_list_the_nearest():
    with pytest.raises(UserError, match="mlperf"):
        LARS.preset("mlperff", 1.0)
    with pytest.raises(UserError, match="lars"):
        make_optimizer("larss", 1.0)


def test_factory_makes_each_optimizer():
    lars = make_optimizer("lars", 2, momentum=0.8, trust_coefficient=0.01, norm="combined")
    assert isinstance(lars, LARS) and lars.get_config()["trust_coefficient"] == 0.01 and lars.norm == "combined"
    sgd = make_optimizer("sgd", 0.1, weight_decay=0.0)
    assert type(sgd) is SGD and sgd.weight_decay == 0.0
    assert isinstance(make_optimizer("lamb", 1), keras.optimizers.Lamb)
    with pytest.raises(UserError, match="lamb"):
        make_optimizer("lamb", 0.1, exclude_from_decay="bias")


def test_keras_schedule_gives_the_pure_functions_values():
    pure = make_schedule("step", 3.0, 30, 7, milestones=[10, 20])
    adapted = KerasSchedule("step", 3.0, 30, 7, milestones=[10, 20])
    looked_up = tf.function(adapted)
    for updates in range(30):
        assert float(looked_up(tf.constant(updates, tf.int64))) == np.float32(pure(updates + 1))
    assert float(adapted(100)) == np.float32(pure(30))
