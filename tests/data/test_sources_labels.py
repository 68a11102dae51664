"""Labels of flat images: the development kit with its MATLAB file, and labels files of every common form."""

import io
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hpctrain.data import ShardReader
from hpctrain.data.prepare.sources import ImageList, SourceImage
from hpctrain.data.prepare.sources.labels import label_images
from hpctrain.data.prepare.sources.matfile import read_struct_array
from hpctrain.errors import UserError
from tests.data.source_inputs import WNIDS, class_folders, make_tar, run, shard_bytes, train_images, val_images

FIELDS = ("ILSVRC2012_ID", "WNID")
# The numbers of the kit are not in the order of the names; above them are synsets that hold others.
IDS = {1: WNIDS[2], 2: WNIDS[0], 3: WNIDS[3], 4: WNIDS[1], 5: "n00001740"}


def synsets(wnids: dict[int, str]) -> np.ndarray:
    """The struct array of meta.mat, with all its fields."""
    kinds = [
        (name, object)
        for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height")
    ]
    array = np.empty((len(wnids), 1), [*kinds, ("num_train_images", object)])
    for i, (number, wnid) in enumerate(wnids.items()):
        children = np.array([[1.0, 2.0]]) if number == 5 else np.zeros((1, 0))
        array[i, 0] = (
            float(number),
            wnid,
            f"thing {number}, Ding",
            "a gloss" * 40,
            2.0 * (number == 5),
            children,
            0.0,
            1300.0,
        )
    return array


def meta_mat(wnids: dict[int, str] = IDS, **options: Any) -> bytes:
    scipy_io = pytest.importorskip("scipy.io")
    buffer = io.BytesIO()
    scipy_io.savemat(buffer, {"other": np.arange(5), "synsets": synsets(wnids)}, **options)
    return buffer.getvalue()


def truth(number: int = 12) -> list[int]:
    return [1 + (7 * i) % 4 for i in range(number)]


def devkit(root: Path, number: int = 12) -> Path:
    folder = root / "ILSVRC2012_devkit_t12" / "data"
    folder.mkdir(parents=True)
    (folder / "meta.mat").write_bytes(meta_mat(do_compression=True))
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{i}\n" for i in truth(number)))
    (folder.parent / "readme.txt").write_text("the kit")
    with tarfile.open(root / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        archive.add(folder.parent, "ILSVRC2012_devkit_t12")
    return root / "ILSVRC2012_devkit_t12.tar.gz"


def val_tar(root: Path, number: int = 12) -> Path:
    (root / "ILSVRC2012_img_val.tar").write_bytes(make_tar(val_images(number)))
    return root / "ILSVRC2012_img_val.tar"


def expected_classes(number: int = 12) -> dict[str, str]:
    return {name: IDS[i] for name, i in zip(val_images(number), truth(number), strict=True)}


def classes_in(folder: Path) -> dict[str, str]:
    """Class by file name, as the shards have it."""
    reader = ShardReader(folder)
    labels = reader.labels(np.arange(reader.num_records))
    names = [reader.name(i) for i in range(reader.num_records)]
    assert [name.split("/")[0] for name in names] == [reader.class_names[label] for label in labels]
    return {name.split("/")[1]: reader.class_names[label] for name, label in zip(names, labels, strict=True)}


def test_val_tar_with_the_kit(tmp_path: Path) -> None:
    kit, tar = devkit(tmp_path), val_tar(tmp_path)
    run(class_folders(tmp_path / "train", train_images()), tmp_path / "out", "train")
    run(tar, tmp_path / "out", "val", labels=kit, shards=3)
    assert classes_in(tmp_path / "out" / "val") == expected_classes()
    assert ShardReader(tmp_path / "out" / "val").class_names == tuple(sorted(WNIDS))
    expected = shard_bytes(tmp_path / "out" / "val")
    flat = tmp_path / "flat"
    flat.mkdir()
    for name, blob in val_images().items():
        (flat / name).write_bytes(blob)
    sorted_out: dict[str, dict[str, bytes]] = {wnid: {} for wnid in WNIDS}
    for name, wnid in expected_classes().items():
        sorted_out[wnid][name] = val_images()[name]
    tree = class_folders(tmp_path / "val_tree", sorted_out)
    unpacked = tmp_path / "ILSVRC2012_devkit_t12"
    cases: list[tuple[Path, Path | None]] = [
        (flat, kit),
        (flat, unpacked),
        (tar, unpacked / "data"),
        (tar, tmp_path),
        (tree, None),
    ]
    for i, (place, labels) in enumerate(cases):
        run(place, tmp_path / f"out{i}", "val", labels=labels, shards=3)
        assert shard_bytes(tmp_path / f"out{i}" / "val") == expected, (place, labels)


def test_labels_files(tmp_path: Path) -> None:
    tar, wanted = val_tar(tmp_path), expected_classes()
    backwards = list(wanted.items())[::-1]
    texts = {
        "synset_labels.txt": "".join(f"{wnid}\n" for wnid in wanted.values()),
        "windows.txt": "\ufeff" + "".join(f"{wnid}\r\n" for wnid in wanted.values()) + "\r\n",
        "pairs.csv": "".join(f"{name},{wnid}\n" for name, wnid in backwards),
        "titles.csv": "filename,label\n" + "".join(f"{name}, {wnid}\n" for name, wnid in backwards),
        "quoted.csv": "".join(f'"val/{name}","{wnid}"\n' for name, wnid in backwards),
        "pairs.tsv": "".join(f"{name}\t{wnid}\n" for name, wnid in backwards),
        "pairs.txt": "".join(f"val/{name}  {wnid}\n" for name, wnid in backwards),
        "LOC_val_solution.csv": "ImageId,PredictionString\n"
        + "".join(f"{name[:-5]},{wnid} 1 2 3 4 {wnid} 5 6 7 8 \n" for name, wnid in backwards),
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
        run(tar, tmp_path / "out" / name, "val", labels=tmp_path / name)
        assert classes_in(tmp_path / "out" / name / "val") == wanted, name
    more = tmp_path / "more.csv"
    more.write_text(texts["pairs.csv"] + "ILSVRC2012_val_00049999.JPEG,n01440764\n")
    lines: list[str] = []
    run(tar, tmp_path / "more", "val", labels=more, quiet=False, echo=lines.append)
    assert any("1 lines of" in line and "ILSVRC2012_val_00049999.JPEG" in line for line in lines)


def test_wrong_labels_teach(tmp_path: Path) -> None:
    kit, tar = devkit(tmp_path), val_tar(tmp_path)
    data = tmp_path / "ILSVRC2012_devkit_t12" / "data"

    def labels(text: str | bytes) -> Path:
        path = tmp_path / "labels.csv"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    pairs = [f"{name},{wnid}" for name, wnid in expected_classes().items()]

    def with_truth(text: str) -> Path:
        (data / "ILSVRC2012_validation_ground_truth.txt").write_text(text)
        return data

    cases: list[tuple[Callable[[], Path | None], str]] = [
        (lambda: None, r"holds ILSVRC2012_val_00000001\.JPEG in no folder.*--labels"),
        (lambda: tmp_path / "none.csv", r"cannot read the labels .*none\.csv"),
        (lambda: labels("n01440764\n" * 11), "gives the classes of 11 images, in order, but the input holds 12"),
        (
            lambda: labels("\n".join(pairs[1:])),
            r"no class for 1 of the 12 images, the first is ILSVRC2012_val_00000001",
        ),
        (lambda: labels("\n".join([*pairs, pairs[0][:-1]])), "gives ILSVRC2012_val_00000001.JPEG two classes"),
        (lambda: labels("\n".join([*pairs, "a,b,c"])), "has 'a,b,c' among its lines"),
        (lambda: labels("\n".join([*pairs, "lonely.jpg"])), "has 'lonely.jpg' among its lines"),
        (lambda: labels(""), "is empty; expected a class name"),
        (lambda: labels(b"\x89PNG\0\1\2"), "not a text file of labels"),
        (lambda: labels(b"\x1f\x8bnot gzip at all"), "cannot read the development kit"),
        (lambda: labels(kit.read_bytes()[:300]), "cannot read the development kit"),
        (lambda: tar, r"img_val\.tar holds no data/meta\.mat; expected ImageNet's development kit"),
        (lambda: data.parent.parent / "ILSVRC2012_img_val.tar", r"holds no data/meta\.mat"),
        (lambda: with_truth("1\n2\nthree\n"), "has 'three' in line 3; expected an ILSVRC2012_ID"),
        (lambda: with_truth("1\n99\n"), "has '99' in line 2"),
        (lambda: with_truth("1\n2\n"), "gives the classes of 2 images"),
    ]
    for make, words in cases:
        with pytest.raises(UserError, match=words) as caught:
            run(tar, tmp_path / "out", "val", labels=make())
        assert "\n" not in str(caught.value)
    empty = tmp_path / "empty"
    empty.mkdir()
    tree = class_folders(tmp_path / "tree", train_images())
    for place, kit_or_not, words in [
        (tar, empty, r"empty holds no data/meta\.mat"),
        (tree, kit, "holds no images, whose classes --labels could tell"),
    ]:
        with pytest.raises(UserError, match=words):
            run(place, tmp_path / "out", "val", labels=kit_or_not)


@settings(max_examples=150)
@given(
    st.one_of(
        st.binary(max_size=80),
        st.lists(st.lists(st.sampled_from(['"', "a.jpg", "b.jpg", "n1", "", " ", "PredictionString"]), max_size=4)).map(
            lambda rows: "\n".join(",".join(row) for row in rows).encode()
        ),
        st.just(b"a.jpg," + b"x" * 200_000),
    )
)
def test_any_labels_file_gives_labels_or_a_sentence(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(content)
    images = ImageList([SourceImage("", name, 1) for name in ("a.jpg", "b.jpg")])
    try:
        labelled, _ = label_images(images, path)
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
    else:
        assert [image.path for image in labelled] == ["a.jpg", "b.jpg"] and all(labelled.class_names)


def test_class_that_train_does_not_have(tmp_path: Path) -> None:
    tar = val_tar(tmp_path)
    run(class_folders(tmp_path / "train", train_images(classes=3)), tmp_path / "out", "train")
    labels = tmp_path / "labels.txt"
    labels.write_text("".join(f"{wnid}\n" for wnid in expected_classes().values()))
    with pytest.raises(UserError, match=r"class 'n02119789' of the input is not in .*out/train"):
        run(tar, tmp_path / "out", "val", labels=labels)


@pytest.mark.parametrize("compressed", [True, False])
def test_meta_mat_is_read_as_scipy_reads_it(compressed: bool, tmp_path: Path) -> None:
    scipy_io = pytest.importorskip("scipy.io")
    wnids = {i: f"n{i:08d}" for i in range(1, 400)}
    content = meta_mat(wnids, do_compression=compressed)
    oracle = scipy_io.loadmat(io.BytesIO(content), squeeze_me=True)["synsets"]
    found = read_struct_array(content, "synsets", ("ILSVRC2012_ID", "WNID", "words", "num_children", "children"), "x")
    assert len(found) == len(oracle) == 399
    for mine, theirs in zip(found, oracle, strict=True):
        assert (mine["ILSVRC2012_ID"], mine["WNID"]) == (theirs["ILSVRC2012_ID"], theirs["WNID"])
        assert (mine["words"], mine["num_children"]) == (theirs["words"], theirs["num_children"])
        assert mine["children"] is None


def element(order: str, kind: int, data: bytes) -> bytes:
    return struct.pack(order + "II", kind, len(data)) + data + b"\0" * (-len(data) % 8)


def small(order: str, kind: int, data: bytes) -> bytes:
    return struct.pack(order + "I", len(data) << 16 | kind) + data.ljust(4, b"\0")


def array(order: str, kind: int, shape: tuple[int, ...], content: bytes, name: bytes = b"") -> bytes:
    head = element(order, 6, struct.pack(order + "II", kind, 0))
    head += element(order, 5, struct.pack(f"{order}{len(shape)}i", *shape))
    head += small(order, 1, name) if len(name) <= 4 else element(order, 1, name)
    return element(order, 14, head + content)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("packed", [True, False])
def test_both_byte_orders_and_every_type_of_number_and_text(order: str, packed: bool) -> None:
    """MATLAB stores a double that is a small integer as one, and ASCII as 8 or 16 bits: written by hand, as it does."""
    encoding = "utf-16-le" if order == "<" else "utf-16-be"
    numbers = [(1, "b"), (2, "B"), (3, "h"), (4, "H"), (5, "i"), (6, "I"), (7, "f"), (9, "d"), (12, "q"), (13, "Q")]
    texts = [(1, "latin-1"), (2, "latin-1"), (4, encoding), (16, "utf-8"), (17, encoding)]
    values = b""
    for i, (kind, code) in enumerate(numbers):
        text_kind, text_encoding = texts[i % len(texts)]
        number = struct.pack(order + code, 7 + i)
        values += array(order, 6, (1, 1), (small if len(number) <= 4 else element)(order, kind, number))
        values += array(order, 4, (1, 4), element(order, text_kind, f"n0{i:02d}".encode(text_encoding)))
    names = b"".join(name.encode().ljust(32, b"\0") for name in FIELDS)
    head = small(order, 5, struct.pack(order + "i", 32)) + element(order, 1, names)
    whole = array(order, 2, (len(numbers), 1), head + values, b"synsets")
    if packed:
        stream = zlib.compress(whole)
        whole = struct.pack(order + "II", 15, len(stream)) + stream
    header = b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(order + "H", 0x100) + (b"IM" if order == "<" else b"MI")
    scipy_io = pytest.importorskip("scipy.io")
    oracle = scipy_io.loadmat(io.BytesIO(header + whole), squeeze_me=True)["synsets"]
    found = read_struct_array(header + whole, "synsets", FIELDS, "x")
    assert found == [{"ILSVRC2012_ID": 7 + i, "WNID": f"n0{i:02d}"} for i in range(len(numbers))]
    assert [(int(one[0]), str(one[1])) for one in oracle] == [(7 + i, f"n0{i:02d}") for i in range(len(numbers))]


def test_wrong_mat_files_are_named_in_words() -> None:
    scipy_io = pytest.importorskip("scipy.io")

    def saved(**variables: Any) -> bytes:
        buffer = io.BytesIO()
        scipy_io.savemat(buffer, variables)
        return buffer.getvalue()

    good = meta_mat()
    header = good[:128]
    bomb = zlib.compress(bytes(70 << 20), 1)
    many = array(
        "<",
        2,
        (1 << 20, 1 << 10),
        small("<", 5, struct.pack("<i", 8)) + element("<", 1, b"a\0\0\0\0\0\0\0"),
        b"synsets",
    )
    cases = [
        (b"", "does not start like one"),
        (b"MATLAB 7.3 MAT-file".ljust(512, b"\0"), "does not start like one"),
        (header, "it holds nothing"),
        (saved(a=np.arange(3)), "it holds 'a'"),
        (saved(synsets=np.arange(3)), "it holds 'synsets'"),
        (saved(synsets={"WNID": "n1"}), "no field 'ILSVRC2012_ID', but 'WNID'"),
        (good[: len(good) // 2], "does not fit|ends inside"),
        (header + struct.pack("<II", 15, len(bomb)) + bomb, "cut off or larger than"),
        (header + struct.pack("<II", 15, 40) + b"\0" * 40, "Error -3"),
        (header + struct.pack("<II", 14, 0xFFFFFFF0), "does not fit"),
        (header + many, "no field|elements"),
    ]
    for content, words in cases:
        with pytest.raises(UserError, match=f"^kit: meta.mat is no MATLAB 5 file with a struct array.*({words})"):
            read_struct_array(content, "synsets", FIELDS, "kit: meta.mat")


@settings(max_examples=200)
@given(st.data())
def test_damaged_mat_gives_a_sentence_at_worst(data) -> None:
    content = bytearray(MAT)
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        read_struct_array(bytes(content[: data.draw(st.integers(0, len(content)))]), "synsets", FIELDS, "x")
    except UserError as error:
        assert "\n" not in str(error)


def _mat() -> bytes:
    try:
        return meta_mat({1: "n01440764", 2: "n01443537"})
    except pytest.skip.Exception:
        return bytes(200)


MAT = _mat()
