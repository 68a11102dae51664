#!/usr/bin/env python3
"""hpctrain's input pipeline beside what one would use instead, on ImageNet-like JPEGs (500x375, quality 92).

Heavy augmentation to 224x224, all in turn in one process, from the page cache, printed as images a second and as
ratios: shards of JPEGs; shards of raw 256x256 arrays; a tuned tf.data.TFRecordDataset that does the same work; and bare
decode-and-crop in TensorFlow, of JPEGs that are in memory already, with and without resizing, and with the smaller
boxes of TensorFlow's sampler. Goals: JPEG shards at least 1.0 times TFRecord and 0.85 times the bare decoding, raw
shards at least 4 times JPEG shards. Turns are short, as other work on the machine changes from second to second.

    python -m benchmarks.input_pipeline --work /tmp/input-benchmark
"""

import argparse
import io
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
from PIL import Image

from benchmarks.imagenet_like import jpegs
from hpctrain.bench.input import batches_per_second
from hpctrain.data.augment import training_boxes
from hpctrain.data.decode import MEAN_RGB, STDDEV_RGB
from hpctrain.data.order import SampleOrder
from hpctrain.data.pipeline import training_pipeline
from hpctrain.data.reader import ShardReader
from hpctrain.data.writer import ShardWriter

BATCH = 32
SIZE = 224
RAW_SIZE = 256
_READY_BATCHES = 8


def make_data(folder: Path, count: int) -> None:
    """Write the same images as JPEG shards, raw shards and TFRecords, unless they are there."""
    if (folder / "done").exists():
        return
    images = list(jpegs(count))
    labels = [i % 1000 for i in range(count)]
    names = [f"class{i:03d}" for i in range(1000)]
    shape = (RAW_SIZE, RAW_SIZE, 3)
    with (
        ShardWriter(folder / "jpeg", "train", num_records=count, num_shards=8, class_names=names) as jpeg,
        ShardWriter(
            folder / "raw",
            "train",
            num_records=count,
            num_shards=8,
            class_names=names,
            encoding="raw",
            image_shape=shape,
        ) as raw,
    ):
        for blob, label in zip(images, labels, strict=True):
            jpeg.add(blob, label=label, name="")
            pixels = np.asarray(Image.open(io.BytesIO(blob)).resize((RAW_SIZE, RAW_SIZE)))
            raw.add(pixels.tobytes(), label=label, name="")
    for file in range(8):
        with tf.io.TFRecordWriter(str(folder / f"train-{file:05d}-of-00008")) as writer:
            for i in range(file, count, 8):
                features = {
                    "image/encoded": tf.train.Feature(bytes_list=tf.train.BytesList(value=[images[i]])),
                    "image/class/label": tf.train.Feature(int64_list=tf.train.Int64List(value=[labels[i] + 1])),
                }
                example = tf.train.Example(features=tf.train.Features(feature=features))
                writer.write(example.SerializeToString())
    (folder / "done").touch()


def shards(directory: Path, threads: int) -> Iterator[Any]:
    """hpctrain's own pipeline."""
    reader = ShardReader(directory)
    order = SampleOrder(reader.num_records, BATCH)
    return iter(
        training_pipeline(reader, order, micro_batch=BATCH, image_size=SIZE, augmentation="heavy", threads=threads)
    )


def _options(threads: int) -> tf.data.Options:
    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    options.deterministic = False
    return options


def _decode_and_crop(blob: Any, box: Any) -> Any:
    return tf.image.decode_and_crop_jpeg(blob, box, channels=3, dct_method="INTEGER_FAST", fancy_upscaling=False)


def _draw_box(blob: Any) -> Any:
    shape = tf.io.extract_jpeg_shape(blob)
    begin, size, _ = tf.image.sample_distorted_bounding_box(
        shape,
        tf.constant([0.0, 0.0, 1.0, 1.0], shape=[1, 1, 4]),
        aspect_ratio_range=[0.75, 1.33],
        area_range=[0.08, 1.0],
        max_attempts=10,
        use_image_if_no_bounding_boxes=True,
    )
    return tf.concat([begin[:2], size[:2]], 0)


def _decode(blob: Any) -> Any:
    return tf.io.decode_jpeg(blob, channels=3, dct_method="INTEGER_FAST", fancy_upscaling=False)


def _crop_resize_normalize(blob: Any) -> Any:
    image = tf.image.resize(_decode_and_crop(blob, _draw_box(blob)), [SIZE, SIZE])
    image = tf.image.random_flip_left_right(image)
    # Constants as large as an image, which is faster than the usual three numbers.
    shape = (SIZE, SIZE, 3)
    shift = tf.constant(np.broadcast_to(-np.array(MEAN_RGB) / np.array(STDDEV_RGB), shape), tf.float32)
    return image * tf.constant(np.broadcast_to(1 / np.array(STDDEV_RGB), shape), tf.float32) + shift


def tfrecords(folder: Path, threads: int) -> Iterator[Any]:
    """What ResNet examples for TensorFlow do, tuned: interleaved files, shuffle buffer, parallel map, no order kept."""
    features = {
        "image/encoded": tf.io.FixedLenFeature([], tf.string),
        "image/class/label": tf.io.FixedLenFeature([], tf.int64),
    }

    def parse(record: Any) -> tuple[Any, Any]:
        example = tf.io.parse_single_example(record, features)
        return _crop_resize_normalize(example["image/encoded"]), tf.cast(example["image/class/label"] - 1, tf.int32)

    files = tf.data.Dataset.list_files(str(folder / "train-*"), shuffle=True)
    dataset = files.interleave(
        lambda file: tf.data.TFRecordDataset(file, buffer_size=8 << 20), cycle_length=8, num_parallel_calls=threads
    )
    dataset = dataset.shuffle(1000).repeat().map(parse, num_parallel_calls=threads)
    return iter(dataset.batch(BATCH, drop_remainder=True).prefetch(2).with_options(_options(threads)))


def bare(folder: Path, threads: int, crop: bool = True, resize: bool = False, sampler: bool = False) -> Iterator[Any]:
    """Decode all of an image or a box, and resize if so: nothing is read or made a batch.

    The box is the one that hpctrain cuts out, or one of TensorFlow's sampler.
    """
    reader = ShardReader(folder / "jpeg" / "train")
    records = np.arange(min(1000, reader.num_records))
    blobs = reader.read(records)
    boxes, _ = training_boxes("heavy", *reader.sizes(records), records, np.zeros_like(records), seed=0)
    if sampler:
        boxes = np.stack([_draw_box(blob).numpy() for blob in blobs])

    def decode(blob: Any, box: Any) -> Any:
        pixels = _decode_and_crop(blob, box) if crop else _decode(blob)
        return tf.reduce_sum(tf.image.resize(pixels, [SIZE, SIZE])[0]) if resize else tf.shape(pixels)

    dataset = tf.data.Dataset.from_tensor_slices((blobs, boxes))
    dataset = dataset.repeat().map(decode, num_parallel_calls=threads)
    return iter(dataset.batch(BATCH).prefetch(2).with_options(_options(threads)))


def main() -> None:
    """Measure in rounds and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="folder for the data, about 1 GB; kept")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=0.6, help="of each measurement")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    make_data(arguments.work, arguments.images)
    kinds = {
        "jpeg shards": lambda: shards(arguments.work / "jpeg" / "train", arguments.threads),
        "raw shards": lambda: shards(arguments.work / "raw" / "train", arguments.threads),
        "tfrecord": lambda: tfrecords(arguments.work, arguments.threads),
        "bare decode": lambda: bare(arguments.work, arguments.threads, crop=False),
        "bare decode, crop": lambda: bare(arguments.work, arguments.threads),
        "bare decode, sampler's crop": lambda: bare(arguments.work, arguments.threads, sampler=True),
        "bare decode, crop, resize": lambda: bare(arguments.work, arguments.threads, resize=True),
    }
    pipelines = {kind: make() for kind, make in kinds.items()}
    rates: dict[str, list[float]] = {kind: [] for kind in kinds}
    for _ in range(1 + arguments.rounds):
        for kind, batches in pipelines.items():
            for _ in range(_READY_BATCHES):  # which the pipeline made in the meantime
                next(batches)
            rates[kind].append(BATCH * batches_per_second(batches, arguments.seconds))
            time.sleep(0.2)  # it works ahead for a moment, and then does nothing
    for found in rates.values():
        del found[0]
    # Ratios are taken within each round, as other work on the machine changes from one to the next.
    ratios = {
        "jpeg shards / tfrecord": ("jpeg shards", "tfrecord"),
        "jpeg shards / bare decode": ("jpeg shards", "bare decode"),
        "jpeg shards / bare decode, crop": ("jpeg shards", "bare decode, crop"),
        "jpeg shards / bare decode, sampler's crop": ("jpeg shards", "bare decode, sampler's crop"),
        "jpeg shards / bare decode, crop, resize": ("jpeg shards", "bare decode, crop, resize"),
        "raw shards / jpeg shards": ("raw shards", "jpeg shards"),
    }
    result: dict[str, Any] = {kind: round(statistics.median(found)) for kind, found in rates.items()}
    for name, (above, below) in ratios.items():
        pairs = [a / b for a, b in zip(rates[above], rates[below], strict=True)]
        result[name] = [round(value, 3) for value in (min(pairs), statistics.median(pairs), max(pairs))]
    if arguments.json:
        print(json.dumps(result, indent=1))
        return
    for key, value in result.items():
        print(f"{key:42}", f"{value} images/s" if isinstance(value, int) else "min {} median {} max {}".format(*value))


if __name__ == "__main__":
    main()
