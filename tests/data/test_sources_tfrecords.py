"""TFRecords as input: framing, checksums, the fields in any order, labels from 0 or 1, every kind of damage."""

import gzip
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.data import ShardReader
from hpctrain.data.prepare.sources import open_source
from hpctrain.data.prepare.sources.crc32c import crc32c, masked_crc32c
from hpctrain.data.prepare.sources.example import parse_example
from hpctrain.data.prepare.sources.files import PlacedFile
from hpctrain.errors import UserError
from tests.data.source_inputs import (
    WNIDS,
    class_folders,
    example,
    imagenet_example,
    record,
    run,
    shard_bytes,
    slow_crc32c,
    train_images,
    write_tfrecords,
)


def test_same_shards_as_from_folders(tmp_path: Path) -> None:
    images = train_images()
    run(class_folders(tmp_path / "tree", images), tmp_path / "out", "train", shards=3, seed=4)
    folder = write_tfrecords(tmp_path / "records", images)
    manifest = run(folder, tmp_path / "out2", "train", shards=3, seed=4)
    assert shard_bytes(tmp_path / "out" / "train") == shard_bytes(tmp_path / "out2" / "train")
    assert manifest.prepare["source"] == "TFRecords"
    run(folder, tmp_path / "out3", "train", shards=3, seed=4, workers=2)
    assert shard_bytes(tmp_path / "out3" / "train") == shard_bytes(tmp_path / "out2" / "train")
    one = write_tfrecords(tmp_path / "one", images, files=1)
    run(one / "train-00000-of-00001", tmp_path / "out4", "train", shards=3, seed=4)
    assert shard_bytes(tmp_path / "out4" / "train") == shard_bytes(tmp_path / "out" / "train")


@pytest.mark.parametrize("first_label", [0, 1])
def test_labels_without_synsets_are_numbers_in_the_class_list(first_label: int, tmp_path: Path) -> None:
    images = train_images()
    folder = write_tfrecords(
        tmp_path / "records", images, first_label=first_label, synsets=False, names=first_label == 0
    )
    with pytest.raises(UserError, match=rf"no image/class/synset, only labels from {first_label} to .*--classes FILE"):
        run(folder, tmp_path / "out", "train")
    listed = tmp_path / "classes.txt"
    listed.write_text("\n".join(WNIDS))
    run(folder, tmp_path / "out", "train", classes=listed)
    reader = ShardReader(tmp_path / "out" / "train")
    assert reader.class_names == WNIDS
    wanted = sorted((blob, label) for label, files in enumerate(images.values()) for blob in files.values())
    records = np.arange(reader.num_records)
    assert sorted(zip(reader.read(records), reader.labels(records).tolist(), strict=True)) == wanted
    assert len({reader.name(i) for i in records}) == len(records)


def test_labels_that_do_not_fit_the_class_list(tmp_path: Path) -> None:
    listed = tmp_path / "classes.txt"
    listed.write_text("\n".join(WNIDS))
    images = train_images()
    for first_label, words in [
        (2, "labels from 2 to 5, but .*classes.txt names 4 classes; expected labels from 1 to 4, or from 0 to at most"),
        (7, "labels from 7 to 10"),
    ]:
        folder = write_tfrecords(tmp_path / f"records{first_label}", images, first_label=first_label, synsets=False)
        with pytest.raises(UserError, match=words):
            run(folder, tmp_path / "out", "train", classes=listed)
    subset = {wnid: images[wnid] for wnid in WNIDS[:2]}  # labels 1 and 2 of 4 classes may count from 0 or from 1
    folder = write_tfrecords(tmp_path / "subset", subset, synsets=False)
    with pytest.raises(UserError, match="labels from 1 to 2, but"):
        run(folder, tmp_path / "out", "train", classes=listed)


def test_the_set_of_the_split_is_chosen(tmp_path: Path) -> None:
    images = train_images()
    folder = write_tfrecords(tmp_path / "records", images)
    write_tfrecords(folder, train_images(images=2), stem="validation", files=2)
    (folder / "labels.txt").write_text("ignored")
    assert run(folder, tmp_path / "out", "train").num_records == 24
    assert run(folder, tmp_path / "out", "val").num_records == 8
    (folder / "train-00001-of-00003").rename(folder / "elsewhere")
    with pytest.raises(UserError, match=r"lacks 1 of 3 TFRecord files, the first is number 1 \(train-00001-of-00003\)"):
        run(folder, tmp_path / "out2", "train")
    (folder / "train-00000-of-00009").write_bytes(b"")
    with pytest.raises(UserError, match="two sets, train-00000-of-00003 and train-00002-of-00003"):
        run(folder, tmp_path / "out2", "train")
    with pytest.raises(UserError, match="leave out --labels"):
        run(folder, tmp_path / "out2", "val", labels=folder / "labels.txt")
    other = write_tfrecords(tmp_path / "other", images, stem="a", files=1)
    write_tfrecords(other, images, stem="b", files=1)
    with pytest.raises(UserError, match=r"holds TFRecords of a, b; expected one set that is named for train"):
        run(other, tmp_path / "out2", "train")
    tfds = write_tfrecords(tmp_path / "tfds", images, stem="imagenet2012-train.tfrecord")
    write_tfrecords(tfds, images, stem="imagenet2012-validation.tfrecord")
    assert run(tfds, tmp_path / "out3", "train").num_records == 24


def test_crc32c_of_every_length() -> None:
    assert crc32c(b"123456789") == 0xE3069283
    data = np.random.default_rng(0).bytes(70_000)
    for length in [*range(20), 510, 511, 512, 513, 1000, 4095, 8191, 8192, 8193, 12_289, 40_001, 70_000]:
        assert crc32c(data[:length]) == slow_crc32c(data[:length]), length
    assert crc32c(bytes(9000)) == slow_crc32c(bytes(9000))


def test_a_damaged_image_is_a_bad_image(tmp_path: Path) -> None:
    """The checksum tells, where the decoder may not: then the image is listed or left out like others."""
    folder = write_tfrecords(tmp_path / "records", train_images(), files=1)
    path = folder / "train-00000-of-00001"
    content = bytearray(path.read_bytes())
    source = open_source(folder, "train")
    image = source.list_images().images[7]
    blob = source.read(image)
    content[content.index(blob) + len(blob) // 2] ^= 1
    path.write_bytes(content)
    lines: list[str] = []
    with pytest.raises(UserError, match=rf"1 of 24 images cannot be decoded, the first is {image.name}"):
        run(folder, tmp_path / "out", "train", quiet=False, echo=lines.append)
    expected = f"bad image {image.name}: the record at byte {image.offset} of {path} is damaged: its checksum is wrong"
    assert expected in lines
    assert run(folder, tmp_path / "out", "train", skip_bad=True).prepare["skipped"] == [image.name]


def test_damage_is_named_with_file_and_byte(tmp_path: Path) -> None:
    folder = write_tfrecords(tmp_path / "records", train_images(), files=2)
    path = folder / "train-00001-of-00002"
    content = path.read_bytes()
    with PlacedFile(path) as file:
        assert file.num_bytes == len(content)
    places = sorted(i.offset for i in open_source(folder, "train").list_images().images if i.file == path.name)
    third = places[2]
    blob = train_images()[WNIDS[0]]["n01440764_100.JPEG"]
    no_image = record(example({"image": blob, "label": 3, "file_name": b"x.JPEG"}))
    no_label = record(example({"image/encoded": blob}))
    cases = [
        (content[:-1], rf"cut off inside the record at byte {places[-1]}, which should end at byte {len(content)}"),
        (content[: third + 7], rf"cut off inside the record at byte {third};"),
        (content[: third + 100], rf"cut off inside the record at byte {third}, .*not {third + 100}"),
        (content[:third] + b"\xff" + content[third + 1 :], rf"damaged at byte {third}, or no TFRecord file"),
        (content[:third] + record(b"\x0a\x7fnot an example"), rf"the record at byte {third} is damaged: a field"),
        (record(no_image[12:-4]), "byte 0 has no image/encoded, but file_name, image, label"),
        (record(no_label[12:-4]), "byte 0 has no image/class/label, but image/encoded"),
        (record(imagenet_example(blob, -1, WNIDS[0], "x")), "byte 0 has label -1"),
        (record(imagenet_example(blob, 1, None, "x.JPEG")), "1 of 13 records in .* have no image/class/synset"),
        (gzip.compress(content), "is compressed; write its records again"),
        (content[:0], ""),
    ]
    for changed, words in cases:
        path.write_bytes(changed)
        if not words:
            assert len(open_source(folder, "train").list_images().images) == 12  # an empty file has no records
            continue
        with pytest.raises(UserError, match=words) as caught:
            open_source(folder, "train").list_images()
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_listing_skips_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = bytes(500_000)
    content = b"".join(
        record_fast(imagenet_example(blob, 1, WNIDS[0], f"{i}.JPEG", last=i % 2 == 0)) for i in range(10)
    )
    (tmp_path / "train-00000-of-00001").write_bytes(content)
    read: list[int] = []
    original = PlacedFile.read

    def counted(self: PlacedFile, offset: int, num_bytes: int) -> bytes:
        read.append(num_bytes)
        return original(self, offset, num_bytes)

    monkeypatch.setattr(PlacedFile, "read", counted)
    found = open_source(tmp_path, "train").list_images().images
    assert [image.num_bytes for image in found] == [500_000] * 10
    assert sum(read) < 100_000


def record_fast(data: bytes) -> bytes:
    """A TFRecord whose data's checksum is left out."""
    length = len(data).to_bytes(8, "little")
    return length + masked_crc32c(length).to_bytes(4, "little") + data + bytes(4)


features = st.dictionaries(
    st.sampled_from(
        ["image/encoded", "image/class/label", "image/class/synset", "image/filename", "image/height", "é"]
    ),
    st.one_of(st.binary(max_size=300), st.integers(-(2**63), 2**63 - 1), st.floats(width=32)),
)


@settings(max_examples=150)
@given(features, st.booleans(), st.integers(0, 9000))
def test_example_fields_in_any_order(features: dict[str, bytes | int | float], packed: bool, before: int) -> None:
    data = bytes(before) + example(features, packed)
    found = parse_example(
        lambda place, n: data[place : place + n],
        before,
        len(data),
        ("image/encoded",),
        ("image/class/synset", "image/filename"),
        ("image/class/label", "image/height"),
    )
    assert sorted(found.keys) == sorted(features)
    image = features.get("image/encoded")
    if isinstance(image, bytes):
        place = found.extents["image/encoded"]
        assert data[place.offset : sum(place)] == image
    else:
        assert not found.extents
    for key in ("image/class/synset", "image/filename"):
        assert found.texts.get(key) == (features[key] if isinstance(features.get(key), bytes) else None)
    for key in ("image/class/label", "image/height"):
        assert found.numbers.get(key) == (features[key] if isinstance(features.get(key), int) else None)


TWO_RECORDS = record(imagenet_example(b"not really an image", 1, WNIDS[0], "a.JPEG")) + record(
    imagenet_example(b"nor this one", 2, WNIDS[1], "b.JPEG", last=True)
)


@settings(max_examples=200)
@given(st.data())
def test_any_damage_ends_with_a_sentence_at_worst(tmp_path_factory: pytest.TempPathFactory, data) -> None:
    content = bytearray(TWO_RECORDS)
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(12, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged-00000-of-00001"
    path.write_bytes(content)
    try:
        source = open_source(path, "train")
        for image in source.list_images().images:
            source.read(image)
    except UserError as error:
        assert "\n" not in str(error)


def test_files_that_tensorflow_wrote(make_image: Callable[..., bytes], tmp_path: Path) -> None:
    tf = pytest.importorskip("tensorflow")
    images = train_images()
    number = 0
    folder = tmp_path / "records"
    folder.mkdir()
    for part in range(2):
        with tf.io.TFRecordWriter(str(folder / f"train-{part:05d}-of-00002")) as writer:
            for c, wnid in enumerate(WNIDS):
                for name, blob in list(images[wnid].items())[part::2]:

                    def text(*values: bytes):
                        return tf.train.Feature(bytes_list=tf.train.BytesList(value=values))

                    def numbers(*values: int):
                        return tf.train.Feature(int64_list=tf.train.Int64List(value=values))

                    feature = {
                        "image/height": numbers(24),
                        "image/channels": numbers(3),
                        "image/class/label": numbers(c + 1),
                        "image/class/synset": text(wnid.encode()),
                        "image/class/text": text(b"a fish"),
                        "image/object/bbox/xmin": tf.train.Feature(float_list=tf.train.FloatList(value=[0.5, 0.25])),
                        "image/object/bbox/label": numbers(1, 2, 3),
                        "image/format": text(b"JPEG"),
                        "image/filename": text(name.encode()),
                        "image/encoded": text(blob),
                    }
                    message = tf.train.Example(features=tf.train.Features(feature=feature))
                    writer.write(message.SerializeToString())
                    number += 1
    run(class_folders(tmp_path / "tree", images), tmp_path / "expected", "train", shards=3)
    run(folder, tmp_path / "out", "train", shards=3)
    assert number == 24
    assert shard_bytes(tmp_path / "out" / "train") == shard_bytes(tmp_path / "expected" / "train")
    assert "google.protobuf" in sys.modules  # the oracle was the real one
    own = write_tfrecords(tmp_path / "own", images, files=1) / "train-00000-of-00001"
    read = [bytes(item.numpy()) for item in tf.data.TFRecordDataset(str(own))]
    parsed = tf.io.parse_single_example(read[0], {"image/class/synset": tf.io.FixedLenFeature([], tf.string)})
    assert len(read) == 24 and parsed["image/class/synset"].numpy().decode() in WNIDS


def test_preparation_imports_no_tensorflow(tmp_path: Path) -> None:
    import subprocess

    folder = write_tfrecords(tmp_path / "records", train_images())
    program = (
        "import sys; from hpctrain.data.prepare import prepare\n"
        f"prepare({str(folder)!r}, {str(tmp_path / 'out')!r}, 'train', workers=1, quiet=True)\n"
        "assert not {'tensorflow', 'keras', 'scipy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
