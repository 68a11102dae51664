"""Every recipe loads, its arithmetic fits, and what it names takes a training step."""

import json

import numpy as np
import pytest

from hpctrain.config import Config, load_config, recipe_names
from hpctrain.parallel.world import World

IMAGENET = 1_281_167
SMALL_IMAGE = {"alexnet": 67, "alexnet_bn": 67}
RECIPES = {name: load_config(name) for name in recipe_names()}


def _kind(config: Config) -> str:
    """What decides whether a recipe's step works, apart from numbers."""
    parts = [config.model.name, config.model.options, config.optimizer.name, config.optimizer.options]
    return json.dumps(parts, sort_keys=True)


ONE_OF_EACH_KIND = list({_kind(config): name for name, config in RECIPES.items()}.values())


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_named_for_what_it_is(name: str) -> None:
    config = RECIPES[name]
    assert config.name == name
    assert config.source and config.description
    if name == "demo":
        return
    model, batch, *_ = name.split("-")
    assert model == config.model.name
    count = int(batch.removesuffix("k")) * (1024 if batch.endswith("k") else 1)
    assert config.train.global_batch == count
    assert config.model.image_size == (227 if model.startswith("alexnet") else 224)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipes_schedule_rises_to_its_rate_and_falls(name: str) -> None:
    from hpctrain.training.session import build_schedule, total_steps

    config = RECIPES[name]
    schedule = build_schedule(config, IMAGENET)
    rates = np.array([schedule(step) for step in range(1, total_steps(config, IMAGENET) + 1)])
    peak = config.optimizer.learning_rate
    warmup = round(config.schedule.warmup_epochs * IMAGENET / config.train.global_batch)
    assert rates.max() == pytest.approx(peak, rel=1e-3)
    assert int(rates.argmax()) + 1 == pytest.approx(max(1, warmup), abs=1)
    assert rates[-1] <= 1.001e-3 * peak + config.schedule.end_rate
    assert (rates >= 0).all()


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_a_recipe_of_each_kind_takes_a_step(name: str, lone_world: World) -> None:
    import tensorflow as tf

    from hpctrain.parallel.reduce import Reducer
    from hpctrain.training import session
    from hpctrain.training.step import TrainStep

    size = SMALL_IMAGE.get(RECIPES[name].model.name, 32)
    overrides = ["train.global_batch=2", "train.micro_batch=2", "data.synthetic=true", f"model.image_size={size}"]
    config = load_config(name, overrides)
    model = session.build_model(config, 10)
    before = [variable.numpy().copy() for variable in model.trainable_variables]
    step = TrainStep(model, session.build_optimizer(config), Reducer(lone_world), micro_batches=1)
    random = np.random.default_rng(0)
    images = tf.constant(random.standard_normal((2, size, size, 3), np.float32))
    result = step(1, iter([(images, tf.constant([1, 2]))]), learning_rate=0.01)
    assert np.isfinite(result.loss)
    moved = [bool((new.numpy() != old).any()) for new, old in zip(model.trainable_variables, before, strict=True)]
    assert sum(moved) > len(moved) // 2
