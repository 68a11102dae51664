"""What is done with a finished or interrupted run outside of training: evaluation, and loading it as a Keras model."""

import json
import sys
import warnings
from pathlib import Path

import keras

from hpctrain.config import Config, load_config
from hpctrain.data.reader import ShardReader
from hpctrain.errors import UserError
from hpctrain.parallel.reduce import Reducer
from hpctrain.parallel.world import World
from hpctrain.training import session
from hpctrain.training.checkpoint import Checkpoint, arrays_to_variables
from hpctrain.training.dataset import skipped_records
from hpctrain.training.resume import CLASSES, load_checkpoint
from hpctrain.training.step import model_state


def evaluate_checkpoint(config: Config, world: World, reader: ShardReader, path: Path, as_json: bool) -> None:
    """Evaluate a run directory's newest checkpoint, or the given one, on a split; rank 0 prints the result."""
    session.configure_tensorflow(config, world)
    found: list[Checkpoint] = []  # on rank 0

    def load() -> tuple[int, int, str | None]:
        checkpoint, complaints = load_checkpoint(path)
        for complaint in complaints:
            print(f"warning: {complaint}; taking an earlier checkpoint", file=sys.stderr)
        found.append(checkpoint)
        return checkpoint.step, _num_classes(checkpoint, path), checkpoint.run.get(CLASSES)

    step, num_classes, trained_on = world.from_root(load)
    if reader.num_classes > num_classes:
        raise UserError(f"the data has {reader.num_classes} classes, the model was trained on {num_classes}")
    if trained_on not in (None, reader.manifest.classes_checksum):
        raise UserError(
            "the data does not have the classes that the model was trained on: the same number means another one there"
        )
    model = session.build_model(config, num_classes)
    variables = [*model.trainable_variables, *model_state(model)]
    world.from_root(lambda: arrays_to_variables(found[0].model, variables, "model"))
    Reducer(world).broadcast([variable.value for variable in variables])
    evaluator = session.build_evaluator(config, model, reader, world, world.plan.threads)
    result = evaluator()
    skipped = skipped_records(reader, evaluator.bad_records, world)
    if not world.is_root:
        return
    for one in skipped:
        print(f"warning: skipped {one}, which is damaged", file=sys.stderr)
    if as_json:
        values = {"loss": result.loss, "top1": result.top1, "top5": result.top5, "num_images": result.num_images}
        print(json.dumps({"step": step, **values}))
    else:
        print(
            f"step {step}: loss {result.loss:.4f}, top-1 {result.top1:.2%}, top-5 {result.top5:.2%} "
            f"of {result.num_images} images"
        )


def _num_classes(checkpoint: Checkpoint, path: Path) -> int:
    classes = checkpoint.run.get("model.num_classes")
    if type(classes) is not int or classes < 1:
        raise UserError(f"the checkpoint of {path} does not say how many classes its model has; choose another one")
    return classes


def load_model(run: str | Path) -> keras.Model:
    """Return the trained Keras model of a run directory, with the weights of its newest checkpoint.

    Raises UserError when there is none that can be read.
    """
    path = Path(run)
    if not (path / "config.yaml").is_file():
        raise UserError(f"{run} is no run directory: it has no config.yaml")
    config = load_config(path / "config.yaml")
    checkpoint, complaints = load_checkpoint(path)
    for complaint in complaints:
        warnings.warn(f"{complaint}; taking an earlier checkpoint", stacklevel=2)
    classes = config.model.num_classes or _num_classes(checkpoint, path)
    model = session.build_model(config, classes)
    arrays_to_variables(checkpoint.model, [*model.trainable_variables, *model_state(model)], "model")
    return model
