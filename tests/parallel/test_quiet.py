"""What a rank loads: thousands of them do so at once, from one file system."""

import gc
import importlib
import subprocess
import sys

import pytest

from hpctrain.parallel.quiet import no_garbage_collection, without_modules

TRAINING = """
import sys
from hpctrain.parallel.quiet import import_tensorflow
import_tensorflow()
import hpctrain.training.loop, hpctrain.models.resnet, hpctrain.models.alexnet, hpctrain.optim.factory
"""


def run(code: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)


def loaded(code: str, names: set[str]) -> set[str]:
    """Return which of the modules are loaded once a new interpreter has run the code."""
    return set(run(f"{code}\nprint(*({names!r} & set(sys.modules)))").stdout.split())


def test_a_rank_loads_nothing_big_before_it_has_looked_at_its_configuration_and_data() -> None:
    code = "import sys, hpctrain.cli, hpctrain.config, hpctrain.parallel.world, hpctrain.training.dataset"
    heavy = {"tensorflow", "keras", "horovod", "mpi4py", "h5py", "rich", "matplotlib", "scipy", "PIL", "sklearn"}
    assert loaded(code, heavy) == set()


def test_a_rank_that_trains_loads_no_plots_no_tables_and_no_other_frameworks() -> None:
    needless = {"matplotlib", "sklearn", "scipy", "pandas", "narwhals", "tensorboard", "jax", "torch"}
    assert loaded(TRAINING, needless) == set()


def test_a_model_can_load_what_the_ranks_do_without() -> None:
    assert loaded(f"{TRAINING}\nimport matplotlib.pyplot", {"matplotlib.pyplot"}) == {"matplotlib.pyplot"}


def test_modules_are_away_inside_the_block_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "this", raising=False)
    with without_modules(["this", "json"]):
        import json  # was there before, and stays

        with pytest.raises(ImportError):
            importlib.import_module("this")
    assert json is sys.modules["json"]
    assert "this" not in sys.modules


def test_modules_come_back_after_an_error() -> None:
    with pytest.raises(KeyError), without_modules(["a_module_of_nobody"]):
        raise KeyError
    assert "a_module_of_nobody" not in sys.modules


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_afterwards_as_before(enabled: bool) -> None:
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with no_garbage_collection():
            assert not gc.isenabled()
        assert gc.isenabled() == enabled
    finally:
        gc.unfreeze()
        (gc.enable if before else gc.disable)()
