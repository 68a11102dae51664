"""Folders of images, as a data set is prepared from."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import image_bytes


@pytest.fixture
def make_tree(tmp_path: Path) -> Callable[..., Path]:
    """Make a folder of class folders: `make_tree("in", classes=3, images=5)`."""

    def make(name: str = "input", classes: int = 3, images: int = 7, height: int = 24) -> Path:
        root = tmp_path / name
        for c in range(classes):
            folder = root / f"class{c}"
            folder.mkdir(parents=True)
            for i in range(images):
                (folder / f"{i:03d}.JPEG").write_bytes(image_bytes(c * 1000 + i, height, 20 + 2 * i))
        return root

    return make
