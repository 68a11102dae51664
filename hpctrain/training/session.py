"""Everything a rank needs before its first step: TensorFlow settings, model, optimizer, schedule, batches."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import tensorflow as tf

from hpctrain.config import Config
from hpctrain.data.order import SampleOrder, steps_in
from hpctrain.data.pipeline import training_pipeline
from hpctrain.data.reader import ShardReader
from hpctrain.data.synthetic import synthetic_batches
from hpctrain.errors import UserError, nearest
from hpctrain.models import build
from hpctrain.optim import make_optimizer, make_schedule
from hpctrain.parallel.quiet import without_chatter
from hpctrain.parallel.rotation import take_turns
from hpctrain.parallel.world import World
from hpctrain.training.dataset import DataSet
from hpctrain.training.evaluate import Evaluator


def configure_tensorflow(config: Config, world: World) -> None:
    """Set threads, their CPUs, determinism and precision. All ranks call it, once, before TensorFlow runs anything."""
    tf.config.threading.set_intra_op_parallelism_threads(world.plan.threads)
    # Two operations at a time, as in the backward pass a layer's gradients of its input and of its kernel need not wait
    # for each other: a thread that has done its part of the one goes on with the other.
    tf.config.threading.set_inter_op_parallelism_threads(min(2, world.plan.threads))
    with without_chatter():
        tf.constant(0)
    if config.train.rotate_cpus:
        take_turns(world)
    if config.train.deterministic:
        tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(config.train.seed)
    keras.config.set_dtype_policy(config.train.precision)


def build_model(config: Config, num_classes: int) -> keras.Model:
    """Build the configured model with the initial weights of train.seed."""
    model = config.model
    return build(
        model.name, num_classes=num_classes, image_size=model.image_size, seed=config.train.seed, **model.options
    )


def total_steps(config: Config, num_records: int) -> int:
    """Steps the schedule spans."""
    return steps_in(config.train.epochs, num_records, config.train.global_batch)


def build_optimizer(config: Config) -> keras.optimizers.Optimizer:
    """Build the configured optimizer; the loop sets its rate before each step."""
    options = config.optimizer
    _check_options("optimizer.options", options.options, make_optimizer)
    return make_optimizer(
        options.name,
        options.learning_rate,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
        trust_coefficient=options.trust_coefficient,
        **options.options,
    )


def _check_options(key: str, options: Mapping[str, Any], function: Callable[..., Any]) -> None:
    """Raise UserError for an option that the function does not take as a keyword."""
    parameters = inspect.signature(function).parameters.values()
    valid = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in valid:
            raise UserError(f"there is no {key}.{option}; {nearest(option, valid)}")


def build_schedule(config: Config, num_records: int) -> Any:
    """Build the configured schedule: step (from 1) -> learning rate."""
    schedule = config.schedule
    _check_options("schedule.options", schedule.options, make_schedule)

    def steps(epochs: float) -> int:
        return round(epochs * num_records / config.train.global_batch)

    try:
        return make_schedule(
            schedule.name,
            config.optimizer.learning_rate,
            total_steps(config, num_records),
            steps(schedule.warmup_epochs),
            power=schedule.power,
            end_rate=schedule.end_rate,
            milestones=[steps(epoch) for epoch in schedule.milestones],
            factor=schedule.factor,
            **schedule.options,
        )
    except TypeError as error:
        raise UserError(f"schedule.options does not fit schedule.name={schedule.name}: {error}") from None


def training_batches(
    config: Config, data: DataSet, world: World, *, first_step: int, last_step: int, threads: int
) -> tuple[Iterator[Any], set[int]]:
    """Return this rank's micro-batches (images, labels) from `first_step` on, and the growing set of bad records."""
    micro_batches = config.micro_batches_a_rank(world.size)
    if data.train is None:
        batches = synthetic_batches(
            micro_batch=config.train.micro_batch,
            image_size=config.model.image_size,
            num_classes=data.num_classes,
            seed=config.train.seed,
            first=((first_step - 1) * world.size + world.rank) * micro_batches,
            micro_batches=micro_batches,
            stride=world.size * micro_batches,
        )
        return batches, set()
    pipeline = training_pipeline(
        data.train,
        sample_order(config, data),
        micro_batch=config.train.micro_batch,
        image_size=config.model.image_size,
        augmentation=config.data.augmentation,
        crop_fraction=config.data.crop_fraction,
        flip=config.data.flip,
        rank=world.rank,
        ranks=world.size,
        first_step=first_step,
        last_step=last_step,
        threads=threads,
        on_bad_record=config.data.on_bad_record,
        read_ahead_batches=config.data.read_ahead_batches,
    )
    return iter(pipeline), pipeline.bad_records


def sample_order(config: Config, data: DataSet) -> SampleOrder:
    """The order of the configuration over its data set."""
    return SampleOrder(
        data.num_records,
        config.train.global_batch,
        seed=config.train.seed,
        partitions=config.data.partitions,
        shuffle_block=config.data.shuffle_block,
    )


def build_evaluator(config: Config, model: keras.Model, reader: ShardReader, world: World, threads: int) -> Evaluator:
    """Build the evaluation of a model on a split, as the configuration has it."""
    return Evaluator(
        model,
        reader,
        world,
        micro_batch=config.evaluate.micro_batch or config.train.micro_batch,
        image_size=config.model.image_size,
        crop_fraction=config.data.crop_fraction,
        threads=threads,
        on_bad_record=config.data.on_bad_record,
    )
