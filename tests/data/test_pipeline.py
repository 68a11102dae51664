"""The input pipeline on real shards: the right pixels in the right order, and plain words about bad records."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from numpy.typing import NDArray

from hpctrain.data import ShardReader, ShardWriter, decode, record_source
from hpctrain.data.augment import central_boxes, training_boxes
from hpctrain.data.decode import MEAN_RGB, STDDEV_RGB
from hpctrain.data.manifest import Manifest
from hpctrain.data.order import SampleOrder
from hpctrain.data.pipeline import InputPipeline, evaluation_pipeline, training_pipeline
from hpctrain.data.shard import DataError
from tests.conftest import image_bytes

RECORDS, SIZE = 21, 24
Batch = tuple[NDArray[np.float32], NDArray[np.int32]]


@pytest.fixture(params=["own operation", "TensorFlow's operations"], autouse=True)
def operations(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs with the compiled operation, and with what stands in for it where it was not compiled."""
    if request.param == "own operation":
        assert decode.crop_resize() is not None, "run `python -m hpctrain.native.build`"
    else:
        monkeypatch.setattr(decode, "crop_resize", lambda: None)


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> ShardReader:
    """A split of JPEGs of different sizes and shapes."""
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, "train", RECORDS, 4, ["cat", "cow", "dog"]) as writer:
        for i in range(RECORDS):
            writer.add(image_bytes(i, 40 + 7 * (i % 5), 90 - 11 * (i % 6)), i % 3)
    return ShardReader(folder / "train")


def batches_of(pipeline: InputPipeline) -> list[Batch]:
    return [(images.numpy(), labels.numpy()) for images, labels in pipeline]


def train_batches(reader: ShardReader, order: SampleOrder, **options: Any) -> list[Batch]:
    arguments = {"micro_batch": 4, "image_size": SIZE, "augmentation": "heavy", "last_step": 4, **options}
    return batches_of(training_pipeline(reader, order, **arguments))


def joined(batches: list[Batch]) -> Batch:
    return np.concatenate([images for images, _ in batches]), np.concatenate([labels for _, labels in batches])


def assert_same(left: list[Batch], right: list[Batch]) -> None:
    """The same images in the same order, to the last bit, however they are cut into batches."""
    for a, b in zip(joined(left), joined(right), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)


def bilinear(pixels: NDArray[np.floating], size: int) -> NDArray[np.float64]:
    """Resize [height, width, 3] to a square, pixel centers at half-integers, no filter against aliasing."""
    for axis in (0, 1):
        length = pixels.shape[axis]
        place = (np.arange(size) + 0.5) * length / size - 0.5
        low = np.floor(place)
        shape = [1, 1, 1]
        shape[axis] = size
        share = (place - low).reshape(shape)
        lower = np.take(pixels, np.clip(low, 0, length - 1).astype(int), axis)
        upper = np.take(pixels, np.clip(low + 1, 0, length - 1).astype(int), axis)
        pixels = lower * (1 - share) + upper * share
    return pixels.astype(np.float64)


def expected_image(reader: ShardReader, record: int, box: NDArray[np.int32], flip: bool) -> NDArray[np.float64]:
    """Decode all of the image, then crop, resize, mirror and normalize in NumPy."""
    (blob,) = reader.read([record])
    pixels = tf.image.decode_jpeg(blob, channels=3, dct_method="INTEGER_FAST", fancy_upscaling=False).numpy()
    top, left, height, width = box
    image = bilinear(pixels[top : top + height, left : left + width].astype(np.float64), SIZE)
    image = image[:, ::-1] if flip else image
    return (image - MEAN_RGB) / STDDEV_RGB


def assert_close(found: NDArray[np.float32], expected: NDArray[np.float64]) -> None:
    """Equal but for the colors at the edge of the crop: a decoder that stops there has no neighbors to blend in."""
    levels = np.abs(found - expected) * STDDEV_RGB
    inner = levels[2:-2, 2:-2]
    assert inner.max() < 0.01
    assert levels.mean() < 0.5 and levels.max() < 25


@pytest.mark.parametrize("augmentation", ["none", "weak", "heavy"])
def test_training_batches_are_the_crops_of_the_records_in_order(reader: ShardReader, augmentation: str) -> None:
    order = SampleOrder(RECORDS, 12, seed=3, partitions=2, shuffle_block=2)
    batches = train_batches(reader, order, augmentation=augmentation, crop_fraction=0.8)
    assert len(batches) == 4 * 3
    assert {images.shape for images, _ in batches} == {(4, SIZE, SIZE, 3)}
    images, labels = joined(batches)
    assert images.dtype == np.float32 and labels.dtype == np.int32
    records, epochs = (np.concatenate(both) for both in zip(*map(order.batch, range(1, 5)), strict=True))
    assert np.array_equal(labels, records % 3)
    heights, widths = reader.sizes(records)
    boxes, flips = training_boxes(augmentation, heights, widths, records, epochs, 3, crop_fraction=0.8)
    assert flips.any() == (augmentation != "none")
    for i, record in enumerate(records):
        assert_close(images[i], expected_image(reader, record, boxes[i], flips[i]))


def test_the_number_of_threads_changes_nothing(reader: ShardReader) -> None:
    order = SampleOrder(RECORDS, 12)
    one = train_batches(reader, order, threads=1)
    assert_same(one, train_batches(reader, order, threads=2))
    assert_same(one, train_batches(reader, order, threads=5, micro_batch=12))


@pytest.mark.parametrize("group_records", [1, 8, 9])
def test_how_many_batches_are_handed_over_at_once_changes_nothing(
    reader: ShardReader, group_records: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train_batches(reader, SampleOrder(RECORDS, 12), threads=2, last_step=5)
    monkeypatch.setattr(record_source, "_GROUP_RECORDS", group_records)
    found = train_batches(reader, SampleOrder(RECORDS, 12), threads=2, last_step=5)
    assert len(found) == len(expected) == 15  # three a step
    assert_same(found, expected)


def test_ranks_get_the_slices_of_the_global_batch(reader: ShardReader) -> None:
    order = SampleOrder(RECORDS, 24, seed=1, partitions=3)
    whole = train_batches(reader, order, last_step=2)
    for ranks in (2, 3):
        micro_batches = 6 // ranks
        parts = [train_batches(reader, order, last_step=2, rank=rank, ranks=ranks) for rank in range(ranks)]
        steps = [slice(step * micro_batches, (step + 1) * micro_batches) for step in range(2)]
        in_order = [batch for step in steps for part in parts for batch in part[step]]
        assert_same(in_order, whole)


@pytest.mark.parametrize("partitions", [1, 4, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_all_ranks_together_read_every_record_once_an_epoch(ranks: int, partitions: int, tmp_path: Path) -> None:
    """48 records, told apart by the gray of their pixels, in two epochs of 2 global batches of 24."""
    with ShardWriter(tmp_path, "train", 48, 8, ["x"], encoding="raw", image_shape=(4, 4, 3)) as writer:
        for i in range(48):
            writer.add(np.full((4, 4, 3), 5 * i, np.uint8), 0)
    order = SampleOrder(48, 24, partitions=partitions, shuffle_block=2)
    seen: list[list[int]] = [[], []]
    for rank in range(ranks):
        options: dict[str, Any] = {"micro_batch": 24 // ranks, "image_size": 2, "rank": rank, "ranks": ranks}
        for step, (images, _) in enumerate(train_batches(ShardReader(tmp_path / "train"), order, **options)):
            gray = images[:, 0, 0, 0] * STDDEV_RGB[0] + MEAN_RGB[0]
            seen[step // 2] += np.rint(gray / 5).astype(int).tolist()
    assert [sorted(records) for records in seen] == [list(range(48))] * 2


def test_a_resumed_run_goes_on_with_the_next_sample(reader: ShardReader) -> None:
    order = SampleOrder(RECORDS, 8)
    assert_same(train_batches(reader, order, first_step=3), train_batches(reader, order)[4:])


def test_without_a_last_step_it_is_endless(reader: ShardReader) -> None:
    order = SampleOrder(RECORDS, 4)
    endless = training_pipeline(reader, order, micro_batch=4, image_size=SIZE, augmentation="heavy")
    taken = [(images.numpy(), labels.numpy()) for images, labels in islice(endless, 20)]
    assert_same(taken, train_batches(reader, order, last_step=20))


@pytest.mark.parametrize("micro_batch", [4, 7, 50])
def test_evaluation_has_every_record_once_and_fills_up(reader: ShardReader, micro_batch: int) -> None:
    count = -(-RECORDS // micro_batch)
    batches = batches_of(evaluation_pipeline(reader, range(count), micro_batch=micro_batch, image_size=SIZE))
    assert len(batches) == count
    images, labels = joined(batches)
    assert labels[:RECORDS].tolist() == [i % 3 for i in range(RECORDS)]
    assert (labels[RECORDS:] == -1).all() and len(labels) == count * micro_batch
    assert np.isfinite(images).all()
    heights, widths = reader.sizes(np.arange(RECORDS))
    for record, box in enumerate(central_boxes(heights, widths)):
        assert_close(images[record], expected_image(reader, record, box, False))


def test_evaluation_batches_of_one_rank(reader: ShardReader) -> None:
    options: dict[str, Any] = {"micro_batch": 4, "image_size": SIZE}
    everything = batches_of(evaluation_pipeline(reader, range(6), **options))
    assert_same(batches_of(evaluation_pipeline(reader, range(2, 5), **options)), everything[2:5])
    assert batches_of(evaluation_pipeline(reader, [], **options)) == []


def damage(folder: Path, record: int, blobs: list[bytes]) -> str:
    """Flip a byte in the middle of a record; returns its shard's file name."""
    shard = next(s for s in reversed(Manifest.load(folder).shards) if s.first_record <= record)
    path = folder / shard.file
    content = bytearray(path.read_bytes())
    content[shard.data_offset + sum(map(len, blobs[shard.first_record : record])) + len(blobs[record]) // 2] ^= 1
    path.write_bytes(content)
    return shard.file


def test_a_damaged_record_ends_the_run_in_words(make_dataset: Callable[..., Any]) -> None:
    folder, blobs, _ = make_dataset()
    file = damage(folder, 13, blobs)
    with pytest.raises(DataError) as caught:
        train_batches(ShardReader(folder), SampleOrder(20, 20), last_step=1)
    text = str(caught.value)
    assert file in text and "record 13" in text and "dir/image13.jpg" in text and "checksum" in text
    assert "\n" not in text and "Traceback" not in text
    assert caught.value.record == 13


def test_damaged_records_can_be_skipped(make_dataset: Callable[..., Any]) -> None:
    """They count for nothing, everything else stays where it was, and they are listed."""
    folder, blobs, labels = make_dataset()
    good = train_batches(ShardReader(folder), SampleOrder(20, 20), last_step=2)
    damage(folder, 13, blobs)
    damage(folder, 2, blobs)
    order = SampleOrder(20, 20)
    batches = training_pipeline(
        ShardReader(folder),
        order,
        micro_batch=4,
        image_size=SIZE,
        augmentation="heavy",
        last_step=2,
        on_bad_record="skip",
    )
    images, found = joined(batches_of(batches))
    records = np.concatenate([order.batch(1)[0], order.batch(2)[0]])
    bad = np.isin(records, [2, 13])
    assert (found[bad] == -1).all() and np.array_equal(found[~bad], np.array(labels)[records[~bad]])
    assert np.array_equal(images[~bad], joined(good)[0][~bad])
    assert np.isfinite(images).all()
    assert batches.bad_records == {2, 13}


def write_records(folder: Path, wrong: bytes, height: int, width: int) -> ShardReader:
    """Five images and one record more, number 4, whose checksum is right."""
    with ShardWriter(folder, "train", 6, 2, ["x"]) as writer:
        for i in range(6):
            writer.add(wrong if i == 4 else image_bytes(i, height, width), 0, f"{i}.jpg", height, width)
    return ShardReader(folder / "train")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (b"GIF89a, no JPEG at all", "not a JPEG image that can be decoded"),
        (image_bytes(1, 30, 40)[:300], "not a JPEG image that can be decoded"),
        (image_bytes(1, 10, 12), "image of 10 x 12 pixels, but its index says 30 x 40"),
    ],
    ids=["text", "cut off", "smaller"],
)
def test_records_that_are_no_images_are_named(tmp_path: Path, wrong: bytes, words: str) -> None:
    """Their checksums are right, so it is not the disk that is at fault but the preparation."""
    reader = write_records(tmp_path, wrong, 30, 40)
    with pytest.raises(DataError) as caught:
        train_batches(reader, SampleOrder(6, 6), micro_batch=6, last_step=1)
    text = str(caught.value)
    assert "record 4 " in text and "train-00001-of-00002.h5" in text and "4.jpg" in text and words in text


@pytest.mark.parametrize("read_ahead_batches", [1, 9])
def test_records_that_are_no_images_can_be_skipped(tmp_path: Path, read_ahead_batches: int) -> None:
    """Several of them, met in the middle of a step: each batch that was delivered before comes once, none is lost."""
    with ShardWriter(tmp_path, "train", 24, 3, ["x"]) as writer:
        for i in range(24):
            writer.add(b"no image" if i in (4, 11, 12) else image_bytes(i, 30, 40), 0, f"{i}.jpg", 30, 40)
    order = SampleOrder(24, 12)
    batches = training_pipeline(
        ShardReader(tmp_path / "train"),
        order,
        micro_batch=3,
        image_size=SIZE,
        rank=1,
        ranks=2,
        first_step=2,
        last_step=7,
        on_bad_record="skip",
        read_ahead_batches=read_ahead_batches,
    )
    _, labels = joined(batches_of(batches))
    records = np.concatenate([order.batch(step, 1, 2)[0] for step in range(2, 8)])
    assert np.array_equal(labels, np.where(np.isin(records, (4, 11, 12)), -1, 0))
    assert batches.bad_records == set(records.tolist()) & {4, 11, 12}


def test_dropping_the_page_cache_changes_nothing(make_dataset: Callable[..., Any]) -> None:
    folder, blobs, _ = make_dataset()
    assert ShardReader(folder, page_cache="drop").read(range(20)) == blobs


def test_a_shard_that_goes_missing(make_dataset: Callable[..., Any]) -> None:
    folder, _, _ = make_dataset()
    reader = ShardReader(folder)
    missing = folder / Manifest.load(folder).shards[2].file
    missing.unlink()
    with pytest.raises(DataError, match=missing.name):
        train_batches(reader, SampleOrder(20, 20), last_step=1)


def test_raw_pixels(tmp_path: Path) -> None:
    """Without JPEG in between the pixels are exact; zeros at the end of a record are pixels too."""
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (10, 18, 18, 3)).astype(np.uint8)
    pixels[3:5] = 0
    with ShardWriter(tmp_path, "val", 10, 2, ["a", "b"], encoding="raw", image_shape=(18, 18, 3)) as writer:
        for i, image in enumerate(pixels):
            writer.add(image, i % 2)
    reader = ShardReader(tmp_path / "val")
    batches = evaluation_pipeline(reader, range(3), micro_batch=4, image_size=18, crop_fraction=1.0)
    images, labels = joined(batches_of(batches))
    assert labels.tolist() == [0, 1] * 5 + [-1, -1]
    assert np.allclose(images[:10], (pixels - np.array(MEAN_RGB)) / STDDEV_RGB, atol=1e-5)
    order = SampleOrder(10, 10, seed=4)
    images, _ = joined(train_batches(reader, order, micro_batch=5, last_step=1, augmentation="weak"))
    records, epochs = order.batch(1)
    sides = np.full(10, 18)
    boxes, flips = training_boxes("weak", sides, sides, records, epochs, 4)
    for i, (top, left, height, width) in enumerate(boxes):
        crop = bilinear(pixels[records[i], top : top + height, left : left + width].astype(float), SIZE)
        crop = crop[:, ::-1] if flips[i] else crop
        assert np.allclose(images[i], (crop - MEAN_RGB) / STDDEV_RGB, atol=1e-4)


def test_normalized_pixels_have_mean_0_and_deviation_1_where_imagenet_has() -> None:
    assert np.allclose(np.array(MEAN_RGB) / 255, [0.485, 0.456, 0.406])
    assert np.allclose(np.array(STDDEV_RGB) / 255, [0.229, 0.224, 0.225])
