"""Training over emulated hosts."""

from pathlib import Path

import pytest

from tests.emulated.conftest import MakeHosts
from tests.training.conftest import EXACT, HPCTRAIN, Launcher, assert_same_bits, launcher, read_run

__all__ = ["launcher"]  # the fixture of the training tests

pytestmark = pytest.mark.emulated

SETTINGS = [
    *EXACT,
    "data.synthetic=true",
    "data.path=null",
    "model.num_classes=6",
    "train.global_batch=32",
    "train.steps=4",
]


def test_two_hosts_give_the_bits_of_two_local_ranks(make_hosts: MakeHosts, launcher: Launcher, tmp_path: Path) -> None:
    hosts = make_hosts(2, rate_mbit=1000)
    command = [*HPCTRAIN, "train", "demo", *SETTINGS, "--run-dir", str(tmp_path / "emulated")]
    output = hosts.run(command)
    assert "2 ranks on 2 hosts" in output
    launcher.train(2, tmp_path / "local", *SETTINGS)
    assert_same_bits(read_run(tmp_path / "emulated"), read_run(tmp_path / "local"))
