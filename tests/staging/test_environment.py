"""A packed environment is the same bytes each time, and works where it is unpacked, without the place it came from."""

import ast
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
from collections.abc import Callable
from pathlib import Path

import pytest

from hpctrain.staging import stage_env
from hpctrain.staging.environment import BlockStream
from hpctrain.staging.pack_env import pack
from hpctrain.staging.stage_env import EnvironmentProblem, claimed, is_unpacked, read_marker, unpack
from tests.staging.conftest import ROOT, Outcome

STANDALONE = ROOT / "hpctrain" / "staging" / "stage_env.py"
PROGRAM = ROOT / "data_prep" / "stage.py"


def site_packages(prefix: Path) -> Path:
    return next(prefix.glob("lib/python*/site-packages"))


def add_program(prefix: Path, name: str, text: str) -> None:
    path = prefix / "bin" / name
    path.write_text(f"#!{prefix}/bin/python\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    """A virtual environment with an installed module, an editable package and programs that import them."""
    prefix = tmp_path / "the prefix" / "env"
    venv.create(prefix, symlinks=True, with_pip=False)
    site = site_packages(prefix)
    (site / "plain.py").write_text("WORD = 'plain'\n")
    os.utime(site / "plain.py", (1e9, 1e9))
    subprocess.run([prefix / "bin" / "python", "-m", "compileall", "-q", site / "plain.py"], check=True)
    checkout = tmp_path / "a checkout"
    (checkout / "tool" / "data").mkdir(parents=True)
    (checkout / "tool" / "__init__.py").write_text("WORD = 'editable'\n")
    (checkout / "tool" / "data" / "recipe.yaml").write_text("a: 1\n")
    (site / "__editable__.tool-1.pth").write_text(f"{checkout}\n")
    info = site / "tool-1.dist-info"
    info.mkdir()
    (info / "top_level.txt").write_text("tool\n")
    (info / "direct_url.json").write_text(
        json.dumps({"url": checkout.as_uri(), "dir_info": {"editable": True}}),
    )
    (prefix / ".hpctrain-stamp").write_text("a note of install.sh")
    (site / "link.py").symlink_to("plain.py")
    (prefix / "share").mkdir(exist_ok=True)
    (prefix / "share" / "from-outside").symlink_to(checkout / "tool" / "data" / "recipe.yaml")
    (prefix / "share" / "from-inside").symlink_to(site / "plain.py")
    (prefix / "bin" / "tool").write_text(  # as pip writes it for a prefix with a space
        f"#!/bin/sh\n'''exec' \"{prefix}/bin/python\" \"$0\" \"$@\"\n' '''\n"
        "import sys, plain, tool\nprint(sys.prefix, plain.WORD, tool.WORD, tool.__file__, *sys.argv[1:])\n"
    )
    (prefix / "bin" / "tool").chmod(0o755)
    return prefix


@pytest.fixture
def packed(prefix: Path, tmp_path: Path) -> Path:
    pack(prefix, tmp_path / "env.tar")
    return tmp_path / "env.tar"


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return tmp_path / "node" / "env"


def unpack_file(file: Path, local: Path) -> None:
    marker = read_marker(str(file))
    with claimed(str(local), wait=False), open(file, "rb") as source:
        assert not is_unpacked(marker, str(local))
        unpack(source, marker, str(local))


def names_beside(local: Path) -> list[str]:
    """What is in the parent folder, except for the lock."""
    return sorted(path.name for path in local.parent.iterdir() if path.name != f".{local.name}.lock")


def assert_works(local: Path) -> None:
    done = subprocess.run([local / "bin" / "tool", "a b"], capture_output=True, text=True)
    tool = site_packages(local) / "tool" / "__init__.py"
    assert done.stdout.strip() == f"{local} plain editable {tool} a b", done.stderr
    activated = subprocess.run(
        ["bash", "-c", f"source {local}/bin/activate; echo $VIRTUAL_ENV; command -v python"], capture_output=True
    )
    assert activated.stdout.decode().split() == [str(local), f"{local}/bin/python"]


def test_it_works_elsewhere_when_all_it_came_from_is_gone(
    packed: Path, prefix: Path, local: Path, tmp_path: Path
) -> None:
    prefix.parent.rename(tmp_path / "hidden")
    (tmp_path / "a checkout").rename(tmp_path / "hidden checkout")
    unpack_file(packed, local)
    assert_works(local)
    texts = [
        path for path in local.rglob("*") if path.is_file() and path.suffix != ".pyc" and path.name != stage_env.MARKER
    ]
    assert not [path for path in texts if os.fsencode(prefix) in path.read_bytes()]
    site = site_packages(local)
    assert not list(site.glob("__editable__*")) and not list(site.rglob("direct_url.json"))
    assert (site / "tool" / "data" / "recipe.yaml").read_text() == "a: 1\n"
    assert os.readlink(site / "link.py") == "plain.py"
    assert (local / "share" / "from-inside").read_text() == "WORD = 'plain'\n"
    assert (local / "share" / "from-outside").read_text() == "a: 1\n" and not (
        local / "share" / "from-outside"
    ).is_symlink()
    assert not (local / ".hpctrain-stamp").exists()


def test_compiled_modules_stay_valid(packed: Path, local: Path) -> None:
    unpack_file(packed, local)
    done = subprocess.run(
        [local / "bin" / "python", "-v", "-c", "import plain"], capture_output=True, text=True, check=True
    )
    assert "plain.cpython" in done.stderr and "wrote" not in done.stderr
    assert any("matches" in line and "plain" in line for line in done.stderr.splitlines())


def test_the_same_environment_packs_to_the_same_bytes(prefix: Path, packed: Path, tmp_path: Path) -> None:
    pack(prefix, tmp_path / "again.tar")
    assert (tmp_path / "again.tar").read_bytes() == packed.read_bytes()
    with tarfile.open(packed) as tar:
        names = tar.getnames()
    assert names[0] == stage_env.MARKER and names[1:] == sorted(names[1:])
    (site_packages(prefix) / "plain.py").write_text("WORD = 'other'\n")
    pack(prefix, tmp_path / "changed.tar")
    assert read_marker(str(tmp_path / "changed.tar"))["digest"] != read_marker(str(packed))["digest"]


def test_a_way_through_a_link_leads_to_the_same_bytes(prefix: Path, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(prefix.parent)
    marker = pack(tmp_path / "link" / "env", tmp_path / "again.tar")
    assert marker["prefix"] == str(prefix)
    assert (tmp_path / "again.tar").read_bytes() == packed.read_bytes()


def test_standalone_program_keeps_what_is_there_and_replaces_what_is_not_the_same(
    packed: Path, prefix: Path, local: Path, tmp_path: Path
) -> None:
    """With the machine's own Python, away from the package, isolated from everything but the standard library."""
    shutil.copy(STANDALONE, tmp_path / "stage_env.py")

    def run(file: Path) -> str:
        python = "/usr/bin/python3" if Path("/usr/bin/python3").exists() else sys.executable
        program = [python, "-I", "-S", tmp_path / "stage_env.py", "unpack", file, local]
        return subprocess.run(program, capture_output=True, text=True, check=True).stdout

    half = local.parent / f".{local.name}.tmp-node-1"
    half.mkdir(parents=True)
    assert "unpacked to" in run(packed) and not half.exists()
    assert_works(local)
    inode = local.stat().st_ino
    assert "is there already" in run(packed) and local.stat().st_ino == inode
    (site_packages(prefix) / "plain.py").write_text("WORD = 'plain'  # but newer\n")
    pack(prefix, tmp_path / "new.tar")
    assert "unpacked to" in run(tmp_path / "new.tar")
    assert_works(local)
    assert "newer" in (site_packages(local) / "plain.py").read_text()
    assert names_beside(local) == [local.name]


def test_two_at_once(packed: Path, local: Path) -> None:
    """As where a launcher starts one on each slot of a node: the second waits and finds it done."""
    programs = [
        subprocess.Popen([sys.executable, STANDALONE, packed, local], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    lines = [program.communicate(timeout=60)[0] for program in programs]
    assert [program.returncode for program in programs] == [0, 0, 0]
    assert sorted("is there already" in line for line in lines) == [False, True, True]
    assert_works(local)
    with (
        claimed(str(local), wait=False),
        pytest.raises(EnvironmentProblem, match="another job is unpacking"),
        claimed(str(local), wait=False),
    ):
        pass


def test_standalone_program_is_old_python() -> None:
    ast.parse(STANDALONE.read_text(), feature_version=(3, 6))


def test_damage_is_found(packed: Path, local: Path) -> None:
    content = bytearray(packed.read_bytes())
    place = content.index(b"WORD = 'plain'") + 8
    content[place] ^= 1
    packed.write_bytes(content)
    with pytest.raises(EnvironmentProblem, match="damaged on its way"):
        unpack_file(packed, local)
    packed.write_bytes(content[: len(content) // 2])
    with pytest.raises(EnvironmentProblem):
        unpack_file(packed, local)
    assert names_beside(local) == []


def member(name: str, type: bytes = tarfile.REGTYPE, linkname: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type, linkname
    return info


@pytest.mark.parametrize(
    "bad",
    [
        [member("../evil")],
        [member("/tmp/evil")],
        [member("a/evil")],
        [member("a", tarfile.SYMTYPE, "."), member("a/evil")],
        [member("a", tarfile.SYMTYPE, "..")],
        [member("a", tarfile.SYMTYPE, "/etc/passwd")],
        [member("bin", tarfile.DIRTYPE), member("bin/python3", tarfile.SYMTYPE, "/etc/passwd")],
        [member("bin", tarfile.DIRTYPE), member("bin/a", tarfile.SYMTYPE, "../../evil")],
        [member("a", tarfile.LNKTYPE, "/etc/passwd")],
        [member("a", tarfile.FIFOTYPE)],
    ],
)
def test_members_that_lead_elsewhere_are_refused(bad: list[tarfile.TarInfo], packed: Path, local: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for info in bad:
            tar.addfile(info)
    local.parent.mkdir()
    with pytest.raises(EnvironmentProblem, match="the packed environment has a"):
        unpack(io.BytesIO(buffer.getvalue()), read_marker(str(packed)), str(local))
    assert names_beside(local) == []


def test_long_paths_still_start_programs(prefix: Path, tmp_path: Path) -> None:
    short = tmp_path / "p"
    venv.create(short, symlinks=True, with_pip=False)
    add_program(short, "tool", "import sys\nprint(sys.prefix)")
    pack(short, tmp_path / "env.tar")
    local = tmp_path / ("long" * 30) / "env"
    unpack_file(tmp_path / "env.tar", local)
    assert subprocess.check_output([local / "bin" / "tool"], text=True).strip() == str(local)


def test_mistakes_are_named(prefix: Path, packed: Path, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem, match="is no virtual environment"):
        pack(tmp_path, tmp_path / "x.tar")
    with pytest.raises(EnvironmentProblem, match="lies inside the environment"):
        pack(prefix, prefix / "x.tar")
    (site_packages(prefix) / "__editable__.tool-1.pth").write_text("import hook\n")
    with pytest.raises(EnvironmentProblem, match="tool is installed as editable by an import hook"):
        pack(prefix, tmp_path / "x.tar")
    marker = read_marker(str(packed))
    for place, message in [
        ("relative", "absolute path"),
        ("/tmp/a b", "absolute path"),
        (str(tmp_path), "give another"),
    ]:
        with pytest.raises(EnvironmentProblem, match=message), claimed(place, wait=False):
            is_unpacked(marker, place)
    (tmp_path / "text").write_text("not a tar")
    for place, message in [("text", "is no packed environment"), ("none", "cannot read")]:
        with pytest.raises(EnvironmentProblem, match=message):
            read_marker(str(tmp_path / place))
    marker["base_python"], gone = "/no/python/bin", tmp_path / "gone.tar"
    (prefix / "bin" / "python3").unlink()
    (prefix / "bin" / "python").unlink()
    (prefix / "bin" / "python").symlink_to("/no/python/bin/python3")
    (site_packages(prefix) / "__editable__.tool-1.pth").write_text(f"{tmp_path / 'a checkout'}\n")
    pack(prefix, gone)
    with pytest.raises(EnvironmentProblem, match="which is not on this node"):
        unpack_file(gone, tmp_path / "node" / "env")


def test_block_stream() -> None:
    blocks = [b"abc", b"defgh", b"i"]
    stream = BlockStream(memoryview(block) for block in blocks)
    assert [stream.read(2), stream.read(4), stream.read(10), stream.read(1)] == [b"ab", b"cdef", b"ghi", b""]


def test_the_program(prefix: Path, local: Path, tmp_path: Path) -> None:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = [sys.executable, str(PROGRAM), "env"]
    done = subprocess.run([*program, "pack", prefix, tmp_path / "e.tar"], capture_output=True, text=True, env=environ)
    assert done.returncode == 0 and "it needs the Python in" in done.stdout, done.stderr
    assert (tmp_path / "stage_env.py").read_bytes() == STANDALONE.read_bytes()
    done = subprocess.run([*program, "unpack", tmp_path / "e.tar", local], capture_output=True, text=True, env=environ)
    assert done.returncode == 0 and "unpacked on 1 nodes" in done.stdout, done.stderr
    assert_works(local)
    done = subprocess.run([*program, "pack", tmp_path, tmp_path / "e.tar"], capture_output=True, text=True, env=environ)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "is no virtual environment" in done.stderr


def test_unpacking_imports_little() -> None:
    """A thousand nodes start it from the shared file system."""
    code = "import sys, hpctrain.staging.environment; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).split()
    assert not {"numpy", "h5py", "tensorflow", "click", "pydantic", "yaml"} & set(modules)


@pytest.mark.mpi
def test_two_nodes(run_job: Callable[..., Outcome], packed: Path, tmp_path: Path) -> None:
    outcome = run_job(["a", "a", "b"], environment=str(packed), block_bytes=10_000)
    assert outcome.code == 0 and "unpacked on 2 nodes" in outcome.stdout, outcome.stderr
    assert outcome.opened == ["env.tar"], "one reader"
    for node in ("a", "b"):
        assert_works(tmp_path / "local" / node / "env")
    shutil.rmtree(tmp_path / "local" / "a" / "env")
    outcome = run_job(["a", "a", "b"], environment=str(packed))
    assert outcome.code == 0 and "unpacked on 1 nodes, there already on 1" in outcome.stdout
    assert_works(tmp_path / "local" / "a" / "env")
