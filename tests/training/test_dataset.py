"""The data of a run: what is refused before it begins."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hpctrain.config import load_config
from hpctrain.data import ShardWriter
from hpctrain.errors import UserError
from hpctrain.parallel.world import World
from hpctrain.training.dataset import open_data


def test_classes_of_val_are_those_of_train(make_dataset: Callable[..., Any], lone_world: World) -> None:
    folder, blobs, _ = make_dataset()
    data: Path = folder.parent
    config = load_config("demo", [f"data.path={data}", "model.num_classes=null"])
    assert open_data(config, lone_world).num_classes == 3
    for names in (["cat", "cow", "dog"], ["cat", "dog"], ["cow", "cat", "dog"]):
        with ShardWriter(data, "val", 1, 1, names, overwrite=True) as writer:
            writer.add(blobs[0], 1, "dir/image0.jpg")
        if names == ["cat", "cow", "dog"]:
            assert open_data(config, lone_world).val is not None
            continue
        with pytest.raises(UserError, match=r"train and val in .* do not have the same classes"):
            open_data(config, lone_world)
