"""Images as files in folders."""

import os
from dataclasses import dataclass
from pathlib import Path

from hpctrain.data.prepare.sources.base import (
    IMAGE_SUFFIXES,
    SPLIT_NAMES,
    ImageList,
    Listing,
    SourceImage,
    ignored_note,
    is_image,
)
from hpctrain.data.prepare.sources.labels import label_images
from hpctrain.errors import UserError


@dataclass(frozen=True)
class ClassFolders:
    """A folder with one folder per class, images anywhere below: `n01440764/n01440764_10026.JPEG`.

    Classes are the folders sorted by name. Hidden files and files with other endings are ignored.
    """

    root: Path
    kind: str = "class folders"

    def list_images(self) -> Listing:
        if not self.root.is_dir():
            raise UserError(f"the input {self.root} is not a directory; expected a folder with one folder per class")
        folders, files = entries(self.root)
        if not folders:
            raise UserError(f"{self.root} has no folders; expected one folder per class, with its images inside")
        if {folder.name for folder in folders} <= SPLIT_NAMES:
            raise UserError(
                f"{self.root} holds {' and '.join(folder.name for folder in folders)} rather than one folder per "
                f"class; give one of them as the input, for instance {folders[0].path}"
            )
        ignored = [entry.name for entry in files]
        images = ImageList()
        for folder in folders:
            self._walk(folder.name, "", images, ignored, {_identity(folder.path)})
        if not images:
            raise UserError(f"no images below {self.root}; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
        return Listing([folder.name for folder in folders], images, ignored_note(ignored))

    def read(self, image: SourceImage) -> bytes:
        return _read_whole(self.root / image.class_name / image.path)

    def _walk(
        self, class_name: str, below: str, images: ImageList, ignored: list[str], above: set[tuple[int, int]]
    ) -> None:
        folders, files = entries(self.root / class_name / below)
        for file in files:
            path = f"{below}{file.name}"
            if is_image(file.name):
                images.append(SourceImage(class_name, path, _size(file)))
            else:
                ignored.append(f"{class_name}/{path}")
        for folder in folders:
            identity = _identity(folder.path)
            if identity not in above:  # a link to a folder above would go round for ever
                self._walk(class_name, f"{below}{folder.name}/", images, ignored, above | {identity})


@dataclass(frozen=True)
class FlatFolder:
    """A folder of images, `ILSVRC2012_val_00000001.JPEG`, whose classes `labels` tells: a devkit or a labels file."""

    root: Path
    labels: Path
    kind: str = "folder of images"

    def list_images(self) -> Listing:
        files = entries(self.root)[1]
        images = ImageList([SourceImage("", file.name, _size(file)) for file in files if is_image(file.name)])
        if not images:
            raise UserError(
                f"{self.root} holds no images, whose classes --labels could tell; expected files ending in "
                f"{', '.join(IMAGE_SUFFIXES)}, or leave out --labels for a folder with one folder per class"
            )
        images, notes = label_images(images, self.labels)
        ignored = [file.name for file in files if not is_image(file.name)]
        return Listing(sorted(images.class_names), images, [*ignored_note(ignored), *notes])

    def read(self, image: SourceImage) -> bytes:
        return _read_whole(self.root / image.path)


def entries(folder: Path) -> tuple[list["os.DirEntry[str]"], list["os.DirEntry[str]"]]:
    """Folders and files inside a folder, without the hidden ones, each sorted by name."""
    try:
        with os.scandir(folder) as scan:
            found = sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda entry: entry.name)
        folders = [entry for entry in found if entry.is_dir()]
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}") from error
    inside = {entry.name for entry in folders}
    return folders, [entry for entry in found if entry.name not in inside]


def _size(file: "os.DirEntry[str]") -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {file.path}: {error.strerror}; remove it or mend the link") from error


def _read_whole(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; make it readable and run this again") from error


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
