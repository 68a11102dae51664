"""Images in tars, read where they lie: nothing is unpacked."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from hpctrain.data.prepare.sources.base import (
    IMAGE_SUFFIXES,
    SPLIT_NAMES,
    ImageList,
    Listing,
    SourceImage,
    ignored_note,
    is_image,
)
from hpctrain.data.prepare.sources.files import OpenFiles, PlacedFile, in_threads
from hpctrain.data.prepare.sources.folders import entries
from hpctrain.data.prepare.sources.labels import label_images
from hpctrain.data.prepare.sources.tar_members import TarMember, tar_members
from hpctrain.errors import UserError

Tar = TypeVar("Tar")


@dataclass(frozen=True)
class TarFile:
    """One tar: of a tar per class, as ILSVRC2012_img_train.tar; of class folders; or of images whose classes `labels`
    tells, as ILSVRC2012_img_val.tar."""

    path: Path
    labels: Path | None = None
    kind: str = "tar"
    _open: OpenFiles = field(default_factory=OpenFiles, repr=False, compare=False)

    def list_images(self) -> Listing:
        with PlacedFile(self.path, random=True) as file:
            found = _sort_members(tar_members(file))
            if found.tars and (found.images or self.labels):
                other = f"an image, {found.images[0].path}" if found.images else "the labels are given as well"
                raise UserError(
                    f"{self.path} holds a tar, {found.tars[0].name}, but {other}; expected a tar per class, or images"
                )
            if found.tars:
                return _list_class_tars(
                    lambda tar: tar_members(file, tar.offset, tar.offset + tar.num_bytes, tar.name),
                    [(tar.name, "", tar) for tar in found.tars],
                    found.ignored,
                    self.path,
                )
        if not found.images:
            raise _no_images(self.path)
        if self.labels is None:
            images, notes = _by_folder(found.images, self.path), list[str]()
        else:
            flat = ImageList([image._replace(path=image.path.rsplit("/", 1)[-1]) for image in found.images])
            images, notes = label_images(flat, self.labels)
        return Listing(sorted(images.class_names), images, [*ignored_note(found.ignored), *notes])

    def read(self, image: SourceImage) -> bytes:
        return _read(self._open, self.path, image)


@dataclass(frozen=True)
class ClassTars:
    """A folder with one tar per class: `n01440764.tar` with `n01440764_10026.JPEG`."""

    root: Path
    kind: str = "class tars"
    _open: OpenFiles = field(default_factory=OpenFiles, repr=False, compare=False)

    def list_images(self) -> Listing:
        names = [file.name for file in entries(self.root)[1]]
        tars = [name for name in names if name.endswith(".tar")]
        ignored = [name for name in names if not name.endswith(".tar")]
        return _list_class_tars(self._members, [(name, name, name) for name in tars], ignored, self.root)

    def read(self, image: SourceImage) -> bytes:
        return _read(self._open, self.root / image.file, image)

    def _members(self, name: str) -> Iterable[TarMember]:
        with PlacedFile(self.root / name, random=True) as file:
            yield from tar_members(file)


@dataclass
class _Members:
    """What a tar holds; the paths of its images are those in the tar."""

    images: ImageList = field(default_factory=ImageList)
    tars: list[TarMember] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)


def _sort_members(members: Iterable[TarMember], file: str = "", class_name: str = "") -> _Members:
    found = _Members()
    for member in members:
        parts = [part for part in member.name.split("/") if part not in ("", ".")]
        if class_name and parts[:1] == [class_name]:
            del parts[0]
        path = "/".join(parts)
        hidden = any(part.startswith(".") for part in parts)
        if not hidden and is_image(path):
            found.images.append(SourceImage(class_name, path, member.num_bytes, file, member.offset))
        elif not hidden and path.endswith(".tar"):
            found.tars.append(member)
        else:
            found.ignored.append(path)
    return found


def _list_class_tars(
    members: Callable[[Tar], Iterable[TarMember]], tars: Sequence[tuple[str, str, Tar]], ignored: list[str], where: Path
) -> Listing:
    """List the tars of classes: each with its name, the file that holds its images, and what `members` takes."""

    def walk(tar: tuple[str, str, Tar]) -> tuple[str, _Members]:
        name, file, key = tar
        class_name = name.rsplit("/", 1)[-1].removesuffix(".tar")
        return class_name, _sort_members(members(key), file, class_name)

    classes, images, ignored = set(), ImageList(), list(ignored)
    for class_name, found in in_threads(walk, tars):
        classes.add(class_name)
        images.extend(found.images)
        ignored += [f"{class_name}/{path}" for path in found.ignored]
        if found.tars:
            raise UserError(f"{where}: the tar of {class_name} holds a tar, {found.tars[0].name}; expected images")
    if not images:
        raise _no_images(where)
    if classes <= SPLIT_NAMES:
        raise UserError(
            f"{where} holds tars of {' and '.join(sorted(classes))} rather than one tar per class; give one of them as "
            "the input"
        )
    return Listing(sorted(classes), images, ignored_note(ignored))


def _by_folder(images: ImageList, where: Path) -> ImageList:
    """Give each image the class of its folder. What all folders have in common, as `train/`, is left out."""
    common: list[str] | None = None
    for image in images:
        above = image.path.split("/")[:-1]
        if not above:
            raise UserError(
                f"{where} holds {image.path} in no folder that would tell its class; give the classes with --labels: "
                "ILSVRC2012_devkit_t12.tar.gz or a labels file"
            )
        common = above[:-1] if common is None else common
        same = 0
        while same < min(len(common), len(above) - 1) and common[same] == above[same]:
            same += 1
        common = common[:same]
    skip = len(common or [])
    result = ImageList()
    for image in images:
        parts = image.path.split("/")
        result.append(image._replace(class_name=parts[skip], path="/".join(parts[skip + 1 :])))
    if {"train", "val"} & set(result.class_names) and len(result.class_names) < 5:
        raise UserError(
            f"{where} holds {' and '.join(sorted(result.class_names))} rather than one folder per class; make a tar "
            "of each and give one of them as the input"
        )
    return result


def _read(files: OpenFiles, path: Path, image: SourceImage) -> bytes:
    blob = files.read(path, image.offset, image.num_bytes)
    if len(blob) < image.num_bytes:
        raise UserError(
            f"{path} has become shorter: {image.name} should have {image.num_bytes} bytes from byte {image.offset} on"
        )
    return blob


def _no_images(where: Path) -> UserError:
    return UserError(
        f"no images in {where}; expected files ending in {', '.join(IMAGE_SUFFIXES)}, or a tar of them per class"
    )
