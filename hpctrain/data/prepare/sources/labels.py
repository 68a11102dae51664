"""The classes of images that do not lie in class folders: from ImageNet's development kit, or from a labels file."""

import csv
import gzip
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Literal

from hpctrain.data.prepare.sources.base import ImageList
from hpctrain.data.prepare.sources.matfile import read_struct_array
from hpctrain.errors import UserError

_MAX_FILE_BYTES = 64 << 20
_META = "meta.mat"
_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def label_images(images: ImageList, labels: Path) -> tuple[ImageList, list[str]]:
    """Return the images with the class names that a development kit or a labels file gives them, and notes.

    In order means in the order of the files' names, as ImageNet numbers them.
    """
    names = [image.path.rsplit("/", 1)[-1] for image in images]
    given = _read_labels(labels)
    notes: list[str] = []
    if isinstance(given, Mapping):
        classes, notes = _by_name(names, given, labels)
    elif len(given) != len(names):
        raise UserError(
            f"{labels} gives the classes of {len(given):,} images, in order, but the input holds {len(names):,}; "
            "expected one for each, or lines of a file name and its class"
        )
    else:
        order = sorted(range(len(names)), key=names.__getitem__)
        classes = [""] * len(names)
        for position, i in enumerate(order):
            classes[i] = given[position]
    labelled = ImageList([image._replace(class_name=name) for image, name in zip(images, classes, strict=True)])
    return labelled, notes


def read_class_list(path: Path) -> list[str]:
    """Read a file of different class names, one a line, in label order."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the class list {path}: {error}") from error
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if not names or len(set(names)) != len(names):
        raise UserError(f"the class list {path} should hold different class names, one a line, in label order")
    return names


def _by_name(names: Sequence[str], given: Mapping[str, str], labels: Path) -> tuple[list[str], list[str]]:
    def key(name: str) -> str:
        return name if name in given else name.rsplit(".", 1)[0]  # some lists leave the ending out

    missing = [name for name in names if key(name) not in given]
    if missing:
        raise UserError(
            f"{labels} gives no class for {len(missing):,} of the {len(names):,} images, the first is {missing[0]}; "
            "expected lines such as `ILSVRC2012_val_00000001.JPEG,n01751748`"
        )
    used = {key(name) for name in names}
    unused = [name for name in given if name not in used][:1]
    notes = (
        [f"{len(given) - len(used):,} lines of {labels} name no image here, the first {unused[0]}"] if unused else []
    )
    return [given[key(name)] for name in names], notes


def _read_labels(path: Path) -> Mapping[str, str] | Sequence[str]:
    """Class by file name, or classes in the order of the files' names."""
    if path.is_dir():
        return _devkit_folder(path)
    try:
        with open(path, "rb") as file:
            start = file.read(2)
            if start == b"\x1f\x8b":
                return _devkit_archive(path, "r:gz")
            content = start + file.read(_MAX_FILE_BYTES)
    except OSError as error:
        raise UserError(f"cannot read the labels {path}: {error.strerror}") from error
    if tarfile.is_tarfile(path):
        return _devkit_archive(path, "r:")
    return _parse_lines(content, path)


def _parse_lines(content: bytes, path: Path) -> Mapping[str, str] | Sequence[str]:
    expected = (
        "expected a class name (WNID) a line in the order of the images, or lines of a file name and its class, or "
        "ILSVRC2012_devkit_t12.tar.gz"
    )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text or len(content) > _MAX_FILE_BYTES:
        raise UserError(f"{path} is not a text file of labels; {expected}")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty; {expected}")
    delimiter = next((character for character in ",\t" if character in lines[0]), None)
    if delimiter:
        try:
            rows = [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=delimiter)]
        except csv.Error as error:
            raise UserError(f"{path} is not a text file of labels ({error}); {expected}") from error
    else:
        rows = [line.split(maxsplit=1) for line in lines]
    if all(len(row) == 1 and row[0] for row in rows):
        return [row[0] for row in rows]
    wrong = next((i for i, row in enumerate(rows) if len(row) != 2 or not all(row)), None)
    if wrong is not None:
        raise UserError(
            f"{path} has {lines[wrong][:80]!r} among its lines, which is not a name and a class; {expected}"
        )
    if rows[0][1] == "PredictionString":  # of Kaggle: a class and a box, as often as there are objects
        rows = [[name, boxes.split()[0]] for name, boxes in rows[1:]]
    elif "." not in rows[0][0] and all("." in name for name, _ in rows[1:]):
        rows = rows[1:]  # a line of titles
    classes: dict[str, str] = {}
    for name, class_name in rows:
        if classes.setdefault(name.rsplit("/", 1)[-1], class_name) != class_name:
            raise UserError(f"{path} gives {name} two classes, {classes[name.rsplit('/', 1)[-1]]} and {class_name}")
    return classes


def _devkit_folder(folder: Path) -> list[str]:
    found = {}
    for name in (_META, _TRUTH):
        places = [path for pattern in (name, f"data/{name}", f"*/data/{name}") for path in sorted(folder.glob(pattern))]
        if not places:
            raise _not_a_devkit(folder, name)
        try:
            with open(places[0], "rb") as file:
                found[name] = file.read(_MAX_FILE_BYTES)
        except OSError as error:
            raise UserError(f"cannot read {places[0]}: {error.strerror}") from error
    return _devkit(found, folder)


def _devkit_archive(path: Path, mode: Literal["r:", "r:gz"]) -> list[str]:
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(path, mode) as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if name in (_META, _TRUTH) and member.isfile() and member.size <= _MAX_FILE_BYTES:
                    file = archive.extractfile(member)
                    assert file is not None
                    found[name] = file.read()
                if len(found) == 2:
                    break
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, OSError) as error:
        raise UserError(
            f"cannot read the development kit {path} ({error}); expected ILSVRC2012_devkit_t12.tar.gz as downloaded"
        ) from error
    for name in (_META, _TRUTH):
        if name not in found:
            raise _not_a_devkit(path, name)
    return _devkit(found, path)


def _not_a_devkit(path: Path, missing: str) -> UserError:
    return UserError(
        f"{path} holds no data/{missing}; expected ImageNet's development kit, ILSVRC2012_devkit_t12.tar.gz or the "
        "folder that it unpacks to, or a labels file"
    )


def _devkit(files: Mapping[str, bytes], path: Path) -> list[str]:
    """Return the WNID of each validation image: line i of the ground truth is the ILSVRC2012_ID of image i."""
    class_of: dict[int, str] = {}
    for synset in read_struct_array(files[_META], "synsets", ("ILSVRC2012_ID", "WNID"), f"{path}: {_META}"):
        number, wnid = synset["ILSVRC2012_ID"], synset["WNID"]
        if not isinstance(number, (int, float)) or not float(number).is_integer() or not isinstance(wnid, str):
            raise UserError(f"{path}: {_META} has a synset without a number and a WNID: {number!r}, {wnid!r}")
        if class_of.setdefault(int(number), wnid) != wnid:
            raise UserError(f"{path}: {_META} gives ILSVRC2012_ID {int(number)} to {class_of[int(number)]} and {wnid}")
    result = []
    for i, line in enumerate(files[_TRUTH].split(), 1):
        if not line.isdigit() or len(line) > 9 or int(line) not in class_of:
            text = line[:40].decode("ascii", "replace")
            raise UserError(f"{path}: {_TRUTH} has {text!r} in line {i}; expected an ILSVRC2012_ID of {_META}")
        result.append(class_of[int(line)])
    return result
