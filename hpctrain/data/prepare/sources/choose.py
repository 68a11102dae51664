"""Which kind of input a path is, told by looking at it."""

import re
from pathlib import Path

from hpctrain.data.prepare.sources.base import IMAGE_SUFFIXES, ImageSource, is_image
from hpctrain.data.prepare.sources.files import PlacedFile
from hpctrain.data.prepare.sources.folders import ClassFolders, FlatFolder, entries
from hpctrain.data.prepare.sources.tar_members import BLOCK_BYTES, is_tar_header
from hpctrain.data.prepare.sources.tars import ClassTars, TarFile
from hpctrain.data.prepare.sources.tfrecords import HEAD_BYTES, TFRecords, find_tfrecords, record_length
from hpctrain.errors import UserError

_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
_EXPECTED = (
    "a folder with one folder of images per class, ILSVRC2012_img_train.tar or ILSVRC2012_img_val.tar (with --labels), "
    "a folder of one tar per class, or TFRecords"
)


def open_source(path: Path, split: str, labels: Path | None = None, classes: Path | None = None) -> ImageSource:
    """Return the source for an input: what lies at `path`, with `labels` for images without class folders.

    `split` chooses among TFRecords of several splits in one folder; `classes` names their classes where they do not.
    A UserError says what was found and what is expected.
    """
    if path.is_dir():
        return _folder(path, split, labels, classes)
    if not path.is_file():
        raise UserError(f"the input {path} is not a directory and not a file; expected {_EXPECTED}")
    with PlacedFile(path) as file:
        head = file.read(0, BLOCK_BYTES)
    for magic, tool in _COMPRESSED.items():
        if head.startswith(magic):
            raise UserError(
                f"{path} is compressed, so that images cannot be read where they lie; unpack it once with "
                f"`{tool} {path.name}` and give the result"
            )
    if is_tar_header(head):
        return TarFile(path, labels)
    try:
        record_length(head[:HEAD_BYTES], path, 0)
    except UserError:
        raise UserError(f"{path} is neither a tar nor a TFRecord file; expected {_EXPECTED}") from None
    return _tfrecords(path.parent, (path.name,), labels, classes)


def _folder(path: Path, split: str, labels: Path | None, classes: Path | None) -> ImageSource:
    folders, files = entries(path)
    names = [file.name for file in files]
    if records := find_tfrecords(path, names, split):
        return _tfrecords(path, records, labels, classes)
    if labels is not None:
        return FlatFolder(path, labels)
    tars = [name for name in names if name.endswith(".tar")]
    whole = [name for name in tars if re.fullmatch(r"ILSVRC2012_.*\.tar", name)]
    if whole:
        raise UserError(f"{path} holds {' and '.join(whole)}; give one of them as the input, not the folder")
    class_tars = [name for name in tars if re.fullmatch(r"n\d{8}\.tar", name)]
    if class_tars and folders:
        raise UserError(
            f"{path} holds both class folders ({folders[0].name}) and class tars ({class_tars[0]}); move one kind away"
        )
    if tars and not folders:
        return ClassTars(path)
    if folders:
        return ClassFolders(path)
    if any(map(is_image, names)):
        raise UserError(
            f"{path} holds images in no folders that would tell their classes; give these with --labels: "
            "ILSVRC2012_devkit_t12.tar.gz or a labels file"
        )
    compressed = [name for name in names if re.fullmatch(r".*(\.tar\.\w+|\.tgz)", name)]
    if compressed:
        raise UserError(
            f"{path} holds {compressed[0]}, which is compressed, so that images cannot be read where they lie; unpack "
            "such files once (`gunzip`) to plain tars"
        )
    raise UserError(
        f"{path} has no folders, no images ({', '.join(IMAGE_SUFFIXES)}), no tars and no TFRecords "
        f"(train-00000-of-01024); expected {_EXPECTED}"
    )


def _tfrecords(root: Path, files: tuple[str, ...], labels: Path | None, classes: Path | None) -> TFRecords:
    if labels is not None:
        raise UserError(f"{root} holds TFRecords, which have their labels inside; leave out --labels")
    return TFRecords(root, files, classes)
