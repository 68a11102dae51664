"""Tars and images that somebody else has made: prepared, or one sentence; nothing is unpacked, memory is bounded."""

import io
import os
import struct
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.data.images import ImageError, prepare_jpeg, prepare_raw
from hpctrain.data.prepare import prepare
from hpctrain.data.prepare.sources.files import PlacedFile
from hpctrain.data.prepare.sources.tar_members import tar_members
from hpctrain.errors import UserError
from tests.conftest import image_bytes
from tests.security.conftest import bounded_memory, mutated_bytes, refused_or


def tar_of(names: list[str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for number, name in enumerate(names):
            content = image_bytes(number, 16, 16)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


TAR = tar_of(["cat/1.jpg", "dog/" + "x" * 150 + ".jpg", "dog/2.jpg"])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tars") / "images.tar"


@given(data=st.data())
def test_mutated_tars_are_walked_inside_the_file(data: st.DataObject, place: Path) -> None:
    place.write_bytes(data.draw(mutated_bytes(TAR)))

    def walk() -> None:
        with PlacedFile(place) as file:
            for member in tar_members(file):
                assert 0 <= member.offset <= member.offset + member.num_bytes <= file.num_bytes

    refused_or(walk)


def test_names_in_a_tar_are_names_only(tmp_path: Path) -> None:
    """Nothing is written where the members of a tar say."""
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "images.tar"
    path.write_bytes(tar_of(["../../evil/1.jpg", "../../evil/2.jpg", "/abs/3.jpg", "cat/4.jpg"]))
    refused_or(lambda: prepare(path, tmp_path / "out", "train", workers=1, quiet=True))
    outside = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")}
    assert all(name == "in/images.tar" or name.split("/")[0] in ("in", "out") for name in outside)
    assert not (tmp_path.parent / "evil").exists()


def sized_jpeg(width: int, height: int) -> bytes:
    """A small JPEG whose header claims to be of another size."""
    blob = bytearray(image_bytes(1, 16, 16))
    place = blob.index(b"\xff\xc0") + 5
    blob[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(blob)


@pytest.mark.parametrize("size", [(65535, 65535), (65535, 3000)])
def test_images_of_too_many_pixels_are_refused(size: tuple[int, int]) -> None:
    blob = sized_jpeg(*size)
    with bounded_memory():
        with pytest.raises(ImageError, match="pixels"):
            prepare_jpeg(blob)
        with pytest.raises(ImageError):
            prepare_jpeg(blob, decode=True)
        with pytest.raises(ImageError):
            prepare_raw(blob, 64)


@given(data=st.data())
def test_mutated_images(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["JPEG", "PNG", "BMP", "GIF", "WEBP"]))
    blob = data.draw(mutated_bytes(image_bytes(3, 16, 16, format=kind)))
    refused_or(lambda: prepare_jpeg(blob, resize=8, decode=True))


def test_a_sparse_member_larger_than_memory_is_refused(tmp_path: Path) -> None:
    """A tar with an image of a terabyte, which takes no room on the disk."""
    info = tarfile.TarInfo("cat/1.jpg")
    info.size = 1 << 40
    path = tmp_path / "images.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    os.truncate(path, 512 + (1 << 40) + 1024)
    with bounded_memory(), pytest.raises(UserError):
        prepare(path, tmp_path / "out", "train", shards=1, workers=1, quiet=True)
