"""What install.sh does when something is missing: it says so in a sentence, makes nothing, and exits with 2."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [ROOT / "install.sh", ROOT / ".ci" / "run", ROOT / ".ci" / "test"]

# What the installer calls, apart from compilers, make and Python.
TOOLS = """awk basename bash cat cut date df dirname env find flock grep head ls mkdir mktemp rm rmdir sed sha256sum
sort tail tr uname xargs"""


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A PATH folder of the ordinary tools and this Python, with no compiler and no MPI."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in TOOLS.split():
        found = shutil.which(name)
        assert found, f"{name} is missing on this machine"
        (folder / name).symlink_to(found)
    write_program(folder / "python3", f'exec "{sys.executable}" "$@"')
    return folder


def write_program(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def add_compiler(folder: Path, version: str = "12") -> None:
    write_program(folder / "g++", f"echo {version}")
    write_program(folder / "make", "exit 0")


def install(tmp_path: Path, path: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    prefix = tmp_path / "an environment"
    return subprocess.run(
        ["bash", str(ROOT / "install.sh"), "--prefix", str(prefix), "--wheels", str(tmp_path / "wheels"), *options],
        env={"PATH": str(path), "HOME": str(tmp_path), "TMPDIR": str(tmp_path), **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )


def refused(result: subprocess.CompletedProcess[str], tmp_path: Path) -> str:
    """The sentence on stderr, after checking that the installer refused and left nothing behind."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert not (tmp_path / "an environment").exists()
    assert not list(tmp_path.glob("hpctrain-install.*"))
    (sentence,) = result.stderr.splitlines()
    return sentence


def test_help_lists_every_option(tmp_path: Path) -> None:
    result = install(tmp_path, Path(os.environ["PATH"].split(os.pathsep)[-1]), "--help", PATH=os.environ["PATH"])
    assert result.returncode == 0
    for option in ("--prefix", "--mpi", "--python", "--extras", "--wheels", "--editable", "--no-editable"):
        assert option in result.stdout


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--prefx", "x"], "--prefx"),
        (["--extras", "tets"], "tets"),
        (["--mpi"], "--mpi"),
        (["--mpi", "intel"], "intel"),
        (["--mpi", "/nowhere/bin/mpicc"], "/nowhere/bin/mpicc"),
    ],
)
def test_a_wrong_option_is_named(tmp_path: Path, tools: Path, options: list[str], named: str) -> None:
    assert named in refused(install(tmp_path, tools, *options), tmp_path)


def test_a_missing_compiler_is_named(tmp_path: Path, tools: Path) -> None:
    assert "g++" in refused(install(tmp_path, tools), tmp_path)


def test_an_old_compiler_is_refused(tmp_path: Path, tools: Path) -> None:
    add_compiler(tools, version="8")
    assert "g++ 9 or newer" in refused(install(tmp_path, tools), tmp_path)


def test_an_unsuitable_python_is_refused(tmp_path: Path, tools: Path) -> None:
    add_compiler(tools)
    write_program(tools / "python3", "echo bad /usr/bin/python3")
    assert "3.10 to 3.13" in refused(install(tmp_path, tools), tmp_path)


def test_system_mpi_without_mpicc_says_what_to_load(tmp_path: Path, tools: Path) -> None:
    add_compiler(tools)
    sentence = refused(install(tmp_path, tools, "--mpi", "system"), tmp_path)
    assert "mpicc" in sentence and "module load" in sentence


def test_an_mpicc_alone_is_not_enough(tmp_path: Path, tools: Path) -> None:
    add_compiler(tools)
    write_program(tools / "mpicc", "exit 0")
    assert "mpicxx" in refused(install(tmp_path, tools, "--mpi", "system"), tmp_path)


def test_an_mpicc_that_cannot_compile_is_reported_with_its_own_words(tmp_path: Path, tools: Path) -> None:
    add_compiler(tools)
    write_program(tools / "mpicc", "echo 'fatal error: mpi.h: No such file or directory' >&2; exit 1")
    write_program(tools / "mpicxx", "exit 0")
    assert "mpi.h" in refused(install(tmp_path, tools, "--mpi", "system"), tmp_path)


def test_a_full_disk_is_noticed_first(tmp_path: Path, tools: Path) -> None:
    add_compiler(tools)
    sentence = refused(install(tmp_path, tools, HPCTRAIN_MIN_FREE_GB="1000000000"), tmp_path)
    assert "1000000000 GB" in sentence and "--prefix" in sentence


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, tools: Path) -> None:
    add_compiler(tools)
    (tmp_path / "an environment").mkdir()
    precious = tmp_path / "an environment" / "thesis.tex"
    precious.write_text("forty pages")
    result = install(tmp_path, tools, HPCTRAIN_MIN_FREE_GB="0")
    assert result.returncode == 2 and "neither empty" in result.stderr
    assert list((tmp_path / "an environment").iterdir()) == [precious]


def test_an_unreachable_index_is_explained(tmp_path: Path, tools: Path) -> None:
    add_compiler(tools)
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_CONFIG_FILE": os.devnull}
    result = install(tmp_path, tools, HPCTRAIN_MIN_FREE_GB="0", **nowhere)
    assert result.returncode == 2 and "PyPI" in result.stderr and "PIP_INDEX_URL" in result.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    result = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
