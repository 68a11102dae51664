"""What is written about the environment holds no secret, and files have the permissions that the user's umask says."""

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.config import load_config
from hpctrain.data.atomic import write_file
from hpctrain.doctor.facts import gather_facts
from hpctrain.environment import shown_environment, without_secrets
from hpctrain.parallel.world import World
from hpctrain.training.run_dir import prepare_run_dir

LEAKS = {
    "HPCTRAIN_PROXY": "http://user:hunter2secret@proxy:3128",
    "HPCTRAIN_DATA": "s3://bucket/x?X-Amz-Signature=hunter2secret&part=1",
    "OMPI_MCA_plm_rsh_agent": "ssh -o PasswordFile=x --password hunter2secret",
    "OMPI_MCA_opal_base": "api_key=hunter2secret",
    "HPCTRAIN_API_TOKEN": "hunter2secret",
    "I_MPI_HYDRA_BOOTSTRAP_EXEC_EXTRA_ARGS": "Authorization: Bearer hunter2secret",
    "TF_CONFIG": '{"cluster": {}, "credential": "hunter2secret"}',
    "FI_LOG": "ghp_hunter2secret0123456789abcdefgh",
    "OMP_TOOL": "hunter2secret0123456789ABCDEFGHIJKLMNOP",
    "AWS_SECRET_ACCESS_KEY": "hunter2secret",
    "HOME": "/home/hunter2secret",
}
KEPT = {
    "OMPI_MCA_coll": "^han,acoll",
    "HOROVOD_FUSION_THRESHOLD": "2097152",
    "KMP_AFFINITY": "granularity=fine,compact,1,0",
    "I_MPI_PIN_DOMAIN": "64:compact",
    "HPCTRAIN_END_TIME": "1790000000",
    "FI_PROVIDER": "cxi;ofi_rxm",
}
PREFIXES = ("OMPI_MCA_", "I_MPI_", "FI_", "HOROVOD_", "OMP_", "KMP_", "TF_", "HPCTRAIN_")


def test_secrets_are_left_out_and_settings_are_kept() -> None:
    shown = shown_environment({**LEAKS, **KEPT}, PREFIXES)
    assert "hunter2" not in json.dumps(shown)
    assert {name: shown[name] for name in KEPT} == KEPT
    assert shown["HPCTRAIN_PROXY"] == "http://***@proxy:3128"
    assert "HPCTRAIN_API_TOKEN" not in shown and "HOME" not in shown


@given(
    st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=6, max_size=40),
    st.sampled_from(
        [
            "https://me:{}@host/x",
            "https://{}@host",
            "password={}",
            "a=1&access_token={}&b=2",
            "--api-key {} -v",
            '{{"secret": "{}"}}',
            "Bearer {}",
        ]
    ),
)
def test_a_secret_of_any_form_is_hidden(secret: str, form: str) -> None:
    secret = f"Zq9{secret}"  # in none of the forms
    assert secret not in without_secrets(form.format(secret))


def test_manifest_and_configuration_of_a_run(
    tmp_path: Path, lone_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**LEAKS, **KEPT}.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "run"
    prepare_run_dir(path, load_config("demo"), lone_world, {})
    for name in ("manifest.json", "config.yaml"):
        assert "hunter2" not in (path / name).read_text()
    environment = json.loads((path / "manifest.json").read_text())["environment"]
    assert {name: environment[name] for name in KEPT} == KEPT


def test_doctor(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LEAKS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LD_PRELOAD", "/x.so https://me:hunter2secret@host/")
    assert "hunter2" not in json.dumps(gather_facts("host", "mpi").settings)


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_and_folders_follow_the_umask(
    mask: int, umask: Callable[[int], int], tmp_path: Path, lone_world: World
) -> None:
    umask(mask)
    path = tmp_path / "run"
    prepare_run_dir(path, load_config("demo"), lone_world, {})
    write_file(path / "checkpoints" / "file", b"x")
    for place in (path, *path.rglob("*")):
        most = (0o777 if place.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(place.stat().st_mode) & ~most == 0, place
