"""Writes the kinds of input that ImageNet comes as, small."""

import io
import struct
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hpctrain.data.manifest import Manifest
from hpctrain.data.prepare import prepare
from tests.conftest import image_bytes

WNIDS = ("n01440764", "n01443537", "n01484850", "n02119789")


def run(*arguments: Any, **options: Any) -> Manifest:
    return prepare(*arguments, **{"workers": 1, "quiet": True, **options})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def shard_bytes(folder: Path) -> dict[str, bytes]:
    """The shards of a split, without the manifest."""
    files = {path.name: path.read_bytes() for path in sorted(folder.glob("*.h5"))}
    assert files
    return files


def train_images(images: int = 6, classes: int = 4) -> dict[str, dict[str, bytes]]:
    """Images by class and file name, named as ImageNet's."""
    return {
        wnid: {f"{wnid}_{100 + 7 * i}.JPEG": image_bytes(1000 * c + i, 24, 20 + i) for i in range(images)}
        for c, wnid in enumerate(WNIDS[:classes])
    }


def val_images(number: int = 12) -> dict[str, bytes]:
    return {f"ILSVRC2012_val_{i:08d}.JPEG": image_bytes(5000 + i, 24, 20 + i) for i in range(1, number + 1)}


def make_tar(members: Mapping[str, bytes] | Iterable[tuple[str, bytes]], format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for name, content in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def tar_of_tars(images: Mapping[str, Mapping[str, bytes]]) -> bytes:
    return make_tar({f"{wnid}.tar": make_tar(files) for wnid, files in images.items()})


def class_folders(root: Path, images: Mapping[str, Mapping[str, bytes]]) -> Path:
    for wnid, files in images.items():
        (root / wnid).mkdir(parents=True)
        for name, content in files.items():
            (root / wnid / name).write_bytes(content)
    return root


def slow_crc32c(data: bytes) -> int:
    """Bit by bit, after RFC 3720."""
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (0x82F63B78 if state & 1 else 0)
    return state ^ 0xFFFFFFFF


def record(data: bytes) -> bytes:
    """A TFRecord."""

    def masked(part: bytes) -> bytes:
        crc = slow_crc32c(part)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    result = b""
    while value > 127:
        result += bytes([value & 127 | 128])
        value >>= 7
    return result + bytes([value])


def message(number: int, content: bytes) -> bytes:
    """A field with a length."""
    return varint(number << 3 | 2) + varint(len(content)) + content


def example(features: Mapping[str, bytes | int | float], packed: bool = True) -> bytes:
    """A tf.train.Example with its features in the given order."""
    entries = b""
    for key, value in features.items():
        if isinstance(value, bytes):
            feature = message(1, message(1, value))
        elif isinstance(value, float):
            feature = message(2, message(1, struct.pack("<f", value)))
        else:
            feature = message(3, message(1, varint(value)) if packed else varint(1 << 3) + varint(value))
        entries += message(1, message(1, key.encode()) + message(2, feature))
    return message(1, entries)


def imagenet_example(blob: bytes, label: int, synset: str | None, name: str | None, last: bool = False) -> bytes:
    """With the fields that TensorFlow's own script for ImageNet writes; the image among them, or last."""
    head: dict[str, bytes | int | float] = {
        "image/height": 24,
        "image/colorspace": b"RGB",
        "image/object/bbox/xmin": 0.25,
    }
    tail: dict[str, bytes | int | float] = {"image/class/label": label, "image/class/text": b"a fish, or none"}
    if synset is not None:
        tail["image/class/synset"] = synset.encode()
    if name is not None:
        tail["image/filename"] = name.encode()
    image: dict[str, bytes | int | float] = {"image/encoded": blob}
    return example({**head, **tail, **image} if last else {**head, **image, **tail})


def write_tfrecords(
    folder: Path,
    images: Mapping[str, Mapping[str, bytes]],
    files: int = 3,
    stem: str = "train",
    first_label: int = 1,
    synsets: bool = True,
    names: bool = True,
) -> Path:
    """Deal the images out to files, in another order than by name."""
    folder.mkdir(exist_ok=True)
    parts = [b""] * files
    number = 0
    for c, (wnid, blobs) in enumerate(images.items()):
        for name, blob in reversed(blobs.items()):
            data = imagenet_example(
                blob, c + first_label, wnid if synsets else None, name if names else None, number % 2 == 0
            )
            parts[number % files] += record(data)
            number += 1
    for i, content in enumerate(parts):
        (folder / f"{stem}-{i:05d}-of-{files:05d}").write_bytes(content)
    return folder
