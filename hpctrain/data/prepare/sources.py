"""Where images come from. A kind of input is one class: it lists its images once, and reads one in any process."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from hpctrain.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


class SourceImage(NamedTuple):
    """One image of the input."""

    name: str  # unique, the same wherever the input is copied to; kept in the shard
    class_name: str
    num_bytes: int  # as stored, a hint for the number of shards
    place: Any = None  # what the source needs to find it, for instance a position in a tar; small and picklable


@dataclass
class Listing:
    """All that an input holds, in an order that does not depend on the machine."""

    class_names: list[str]
    images: list[SourceImage]
    notes: list[str] = field(default_factory=list)  # for the user: what was ignored


class ImageSource(Protocol):
    """An input of images. Must be picklable and small: worker processes get a copy."""

    @property
    def kind(self) -> str:
        """What the manifest says the data were made from."""

    def list_images(self) -> Listing:
        """List the input once; a UserError says what is wrong with it."""

    def read(self, image: SourceImage) -> bytes:
        """Return the bytes of an image file."""


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
        folders, files = _entries(self.root)
        if not folders:
            raise UserError(f"{self.root} has no folders; expected one folder per class, with its images inside")
        if {folder.name for folder in folders} <= {"train", "val", "test", "validation"}:
            raise UserError(
                f"{self.root} holds {' and '.join(folder.name for folder in folders)} rather than one folder per "
                f"class; give one of them as the input, for instance {folders[0].path}"
            )
        ignored = [entry.name for entry in files]
        images: list[SourceImage] = []
        for folder in folders:
            self._walk(folder.name, folder.name, images, ignored, {_identity(folder.path)})
        if not images:
            raise UserError(f"no images below {self.root}; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
        notes = []
        if ignored:
            notes.append(f"{len(ignored):,} other files ignored, for instance {ignored[0]}")
        return Listing([folder.name for folder in folders], images, notes)

    def read(self, image: SourceImage) -> bytes:
        path = self.root / image.name
        try:
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}; make it readable and run this again") from error

    def _walk(
        self, class_name: str, below: str, images: list[SourceImage], ignored: list[str], above: set[tuple[int, int]]
    ) -> None:
        folders, files = _entries(self.root / below)
        for file in files:
            name = f"{below}/{file.name}"
            if file.name.lower().endswith(IMAGE_SUFFIXES):
                try:
                    num_bytes = file.stat().st_size
                except OSError as error:
                    raise UserError(f"cannot read {file.path}: {error.strerror}; remove it or mend the link") from error
                images.append(SourceImage(name, class_name, num_bytes))
            else:
                ignored.append(name)
        for folder in folders:
            identity = _identity(folder.path)
            if identity not in above:  # a link to a folder above would go round for ever
                self._walk(class_name, f"{below}/{folder.name}", images, ignored, above | {identity})


def _entries(folder: Path) -> tuple[list["os.DirEntry[str]"], list["os.DirEntry[str]"]]:
    """Folders and files inside a folder, without the hidden ones, each sorted by name."""
    try:
        with os.scandir(folder) as scan:
            entries = sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda entry: entry.name)
        folders = [entry for entry in entries if entry.is_dir()]
    except OSError as error:
        raise UserError(f"cannot list {folder}: {error.strerror}") from error
    inside = {entry.name for entry in folders}
    return folders, [entry for entry in entries if entry.name not in inside]


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
