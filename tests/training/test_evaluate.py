"""Evaluation: every image once, the same result as the plain way, and the same bits on any number of ranks."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from hpctrain.data import ShardReader, ShardWriter
from hpctrain.data.augment import central_boxes
from hpctrain.data.decode import MEAN_RGB, STDDEV_RGB
from hpctrain.data.pipeline import evaluation_pipeline
from hpctrain.parallel.world import World
from hpctrain.training.evaluate import Evaluation, Evaluator
from tests.conftest import image_bytes

RECORDS, CLASSES, SIZE = 23, 8, 16


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    folder = tmp_path_factory.mktemp("val")
    with ShardWriter(folder, "val", RECORDS, 3, [f"class{i}" for i in range(CLASSES)]) as writer:
        for i in range(RECORDS):
            writer.add(image_bytes(i, 20 + i % 4, 30 - i % 5), i % CLASSES)
    return ShardReader(folder / "val")


@pytest.fixture(scope="module")
def model() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((SIZE, SIZE, 3)),
            keras.layers.Flatten(),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(CLASSES, kernel_initializer=keras.initializers.RandomNormal(0.0, 0.05, 1)),
        ]
    )


def evaluator(model: keras.Model, reader: ShardReader, world: World, micro_batch: int = 5, **options: Any) -> Evaluator:
    return Evaluator(model, reader, world, micro_batch=micro_batch, image_size=SIZE, **options)


@pytest.mark.parametrize("micro_batch", [1, 5, 23, 40])
def test_it_is_what_predict_and_numpy_give(
    model: keras.Model, reader: ShardReader, lone_world: World, micro_batch: int
) -> None:
    records = np.arange(RECORDS)
    boxes = central_boxes(*reader.sizes(records))
    images = []
    for blob, (top, left, height, width) in zip(reader.read(records), boxes, strict=True):
        pixels = tf.image.decode_and_crop_jpeg(
            blob, (top, left, height, width), 3, dct_method="INTEGER_FAST", fancy_upscaling=False
        )
        images.append((tf.image.resize(pixels, (SIZE, SIZE)).numpy() - MEAN_RGB) / STDDEV_RGB)
    logits = model.predict(np.array(images, np.float32), verbose=0).astype(np.float64)
    labels = records % CLASSES
    own = logits[records, labels]
    losses = np.log(np.exp(logits).sum(axis=1)) - own
    places = (logits > own[:, np.newaxis]).sum(axis=1)
    found = evaluator(model, reader, lone_world, micro_batch)()
    assert found.num_images == RECORDS
    assert found.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert (found.top1, found.top5) == ((places == 0).mean(), (places < 5).mean())
    assert 0 < found.top1 < found.top5 < 1, "a test that cannot fail"


def test_it_follows_the_weights_and_leaves_them_alone(
    model: keras.Model, reader: ShardReader, lone_world: World
) -> None:
    evaluate = evaluator(model, reader, lone_world)
    first = evaluate()
    before = [value.copy() for value in model.get_weights()]
    assert evaluate() == first  # no dropout, no moving averages
    assert all(np.array_equal(a, b) for a, b in zip(before, model.get_weights(), strict=True))
    model.set_weights([2 * value for value in before])
    assert evaluate().loss != first.loss
    model.set_weights(before)
    assert evaluate() == first


class Threads:
    """Stands for MPI between ranks that are threads of this process."""

    def __init__(self, size: int) -> None:
        self.values: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=60)

    def of(self, rank: int) -> "Threads.Rank":
        return Threads.Rank(self, rank)

    class Rank:
        def __init__(self, all_: "Threads", rank: int) -> None:
            self.all, self.rank = all_, rank

        def Ibarrier(self) -> "Threads.Rank":
            self.all.barrier.wait()
            return self

        def Test(self) -> bool:
            return True

        def allgather(self, value: Any) -> list[Any]:
            self.all.values[self.rank] = value
            self.all.barrier.wait()
            everything = list(self.all.values)
            self.all.barrier.wait()
            return everything


def on_ranks(size: int, world: World, run: Callable[[World], Evaluation]) -> list[Evaluation]:
    threads = Threads(size)
    results: list[Any] = [None] * size

    def work(rank: int) -> None:
        places, plans = world.places * size, world.plans * size
        results[rank] = run(replace(world, rank=rank, size=size, places=places, plans=plans, comm=threads.of(rank)))

    workers = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return results


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_any_number_of_ranks_gives_the_same_bits(
    model: keras.Model, reader: ShardReader, lone_world: World, ranks: int
) -> None:
    """Also when there are more ranks than the five micro-batches."""
    alone = evaluator(model, reader, lone_world)()
    assert on_ranks(ranks, lone_world, lambda world: evaluator(model, reader, world)()) == [alone] * ranks


def test_damaged_images_are_left_out_where_that_is_wanted(
    model: keras.Model, lone_world: World, make_dataset: Callable[..., tuple[Path, list[bytes], list[int]]]
) -> None:
    folder, blobs, _ = make_dataset(records=6, shards=1, split="val")
    (shard,) = folder.glob("*.h5")
    content = shard.read_bytes()
    place = content.index(blobs[2]) + 60
    shard.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    found = evaluator(model, ShardReader(folder), lone_world, on_bad_record="skip")()
    assert found.num_images == 5
    pipeline = evaluation_pipeline(ShardReader(folder), [0], micro_batch=6, image_size=SIZE, on_bad_record="skip")
    ((images, labels),) = [(images.numpy(), labels.numpy()) for images, labels in pipeline]
    logits = model.predict(images, verbose=0)[labels >= 0]
    assert found.top1 == (logits.argmax(axis=1) == labels[labels >= 0]).mean()
