"""What every kind of input offers, and the list of its images in little memory."""

import itertools
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hpctrain.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
SPLIT_NAMES = {"train", "val", "test", "validation"}  # of folders and tars that hold classes and are none


class SourceImage(NamedTuple):
    """One image of the input."""

    class_name: str
    path: str  # below the folder of its class, whether there is such a folder or not; unique in the class
    num_bytes: int  # as stored
    file: str = ""  # the file of the input that holds it, with other images; "" where it is a file of its own
    offset: int = 0  # where in that file, in bytes

    @property
    def name(self) -> str:
        """`n01440764/n01440764_10026.JPEG`: unique, and the same whatever kind of input it comes in."""
        return f"{self.class_name}/{self.path}"


class ImageList(Sequence[SourceImage]):
    """Many images: about 60 bytes each in memory and in a pickle, so that a million can be sent to every rank."""

    def __init__(self, images: Sequence[SourceImage] = ()) -> None:
        self.class_names: list[str] = []
        self.files: list[str] = []
        self._class_numbers: dict[str, int] = {}
        self._file_numbers: dict[str, int] = {}
        self._class = array("i")
        self._file = array("i")
        self._num_bytes = array("q")
        self._offset = array("q")
        self._path_ends = array("q", [0])
        self._paths = bytearray()
        self.extend(images)

    def append(self, image: SourceImage) -> None:
        """Add one image."""
        self._class.append(_number(image.class_name, self.class_names, self._class_numbers))
        self._file.append(_number(image.file, self.files, self._file_numbers))
        self._num_bytes.append(image.num_bytes)
        self._offset.append(image.offset)
        self._paths += os.fsencode(image.path)
        self._path_ends.append(len(self._paths))

    def extend(self, images: Sequence[SourceImage]) -> None:
        """Add all of another list."""
        for image in images:
            self.append(image)

    def __len__(self) -> int:
        return len(self._class)

    @overload
    def __getitem__(self, index: int) -> SourceImage: ...

    @overload
    def __getitem__(self, index: slice) -> "ImageList": ...

    def __getitem__(self, index: "int | slice") -> "SourceImage | ImageList":
        if isinstance(index, slice):
            return self.select(np.arange(*index.indices(len(self))))
        i = range(len(self))[index]
        return SourceImage(
            self.class_names[self._class[i]],
            os.fsdecode(bytes(self._paths[self._path_ends[i] : self._path_ends[i + 1]])),
            self._num_bytes[i],
            self.files[self._file[i]],
            self._offset[i],
        )

    @property
    def class_index(self) -> NDArray[np.int32]:
        """Return int32[len]: the place of each image's class in `class_names`, which are in no particular order."""
        return np.array(self._class, np.int32)

    @property
    def num_bytes(self) -> NDArray[np.int64]:
        """Return int64[len]: the stored size of each image."""
        return np.array(self._num_bytes, np.int64)

    def select(self, indices: ArrayLike) -> "ImageList":
        """Return the images with these numbers, in this order."""
        chosen = np.asarray(indices, np.int64)
        result = ImageList()
        result.class_names, result._class_numbers = self.class_names, self._class_numbers
        result.files, result._file_numbers = self.files, self._file_numbers
        for name in ("_class", "_file", "_num_bytes", "_offset"):
            old: array[int] = getattr(self, name)
            setattr(result, name, array(old.typecode, np.asarray(old)[chosen].tobytes()))
        ends, all_paths = self._path_ends, memoryview(self._paths)
        paths = [bytes(all_paths[ends[i] : ends[i + 1]]) for i in chosen.tolist()]
        result._paths = bytearray().join(paths)
        result._path_ends = array("q", np.cumsum([0, *map(len, paths)], dtype=np.int64).tobytes())
        return result

    def with_class_names(self, class_names: Sequence[str]) -> "ImageList":
        """Return the same images with other names for `self.class_names`, one for each."""
        result = self[:]
        result.class_names = list(class_names)
        result._class_numbers = {name: i for i, name in enumerate(class_names)}
        return result

    def sorted(self) -> "ImageList":
        """Return the images by class and path; a UserError names one that is there twice.

        The order does not depend on the kind of input, the file system or the order in which a tar was made. A folder
        comes where its name does: `/` sorts before every other character.
        """
        classes = [os.fsencode(name) for name in self.class_names]
        ends, paths = self._path_ends, bytes(self._paths).replace(b"/", b"\0")
        keys = [classes[c] + b"\0" + paths[ends[i] : ends[i + 1]] for i, c in enumerate(self._class)]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        for i, j in itertools.pairwise(order):
            if keys[i] == keys[j]:
                where = f" (in {self[i].file} and {self[j].file})" if self[i].file else ""
                raise UserError(f"the input holds {self[i].name} twice{where}; names of images should be unique")
        del keys  # which are most of the memory
        return self.select(order)


def _number(name: str, names: list[str], numbers: dict[str, int]) -> int:
    number = numbers.setdefault(name, len(names))
    if number == len(names):
        names.append(name)
    return number


@dataclass
class Listing:
    """All that an input holds."""

    class_names: list[str]  # sorted; also those of empty class folders
    images: ImageList
    notes: list[str] = field(default_factory=list)  # for the user: what was ignored


class ImageSource(Protocol):
    """An input of images. Must be picklable and small: worker processes and other ranks get a copy."""

    @property
    def kind(self) -> str:
        """What the manifest says the data were made from."""

    def list_images(self) -> Listing:
        """List the input once, in any order; a UserError says what is wrong with it."""

    def read(self, image: SourceImage) -> bytes:
        """Return the bytes of an image file.

        A UserError says that the input cannot be read. An ImageError says that this image alone is damaged.
        """


def is_image(name: str) -> bool:
    """True where a file's name is that of an image: a known ending, and not hidden."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def ignored_note(ignored: Sequence[str]) -> list[str]:
    """Return the note, if one is due, that tells of files that are not images."""
    return [f"{len(ignored):,} other files ignored, for instance {ignored[0]}"] if ignored else []
