"""Packed environments and places to unpack to that somebody else has made: nothing is written outside of the place."""

import contextlib
import hashlib
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.errors import UserError
from hpctrain.staging.local import check_owner
from hpctrain.staging.stage_env import (
    FORMAT,
    MARKER,
    MARKER_BYTES,
    EnvironmentProblem,
    claimed,
    identity,
    read_marker,
    unpack,
)
from tests.security.conftest import bounded_memory, mutated_bytes

MARK = {"format": FORMAT, "version": 1, "digest": "0" * 64, "prefix": "/old", "base_python": "/usr/bin"}
MARK |= {"num_members": 3, "num_bytes": 1 << 20}


def member(
    name: str, kind: bytes = tarfile.REGTYPE, link: str = "", size: int = 0, mode: int = 0o644
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.mode = kind, link, size, mode
    return info


def folder(name: str) -> tarfile.TarInfo:
    return member(name, tarfile.DIRTYPE, mode=0o755)


def link(name: str, target: str) -> tarfile.TarInfo:
    return member(name, tarfile.SYMTYPE, target)


def packed(*members: tarfile.TarInfo, content: bytes = b"x") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        info = tarfile.TarInfo(MARKER)
        info.size = MARKER_BYTES
        tar.addfile(info, io.BytesIO(json.dumps(MARK).encode().ljust(MARKER_BYTES)))
        for info in members:
            data = (content * info.size)[: info.size]
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return buffer.getvalue()


@pytest.fixture
def local(tmp_path: Path) -> Path:
    (tmp_path / "node").mkdir()
    return tmp_path / "node" / "env"


def unpack_all(tar: bytes, local: Path) -> None:
    """Unpack with a marker whose digest is right: the tar was made so on purpose."""
    digest = hashlib.sha256()
    with contextlib.suppress(tarfile.TarError, ValueError, OSError), tarfile.open(fileobj=io.BytesIO(tar)) as members:
        for info in members:
            if info.name != MARKER:
                digest.update(identity(info))
                if info.isreg():
                    digest.update(tar[info.offset_data : info.offset_data + info.size])
    with claimed(str(local), wait=False):
        unpack(io.BytesIO(tar), {**MARK, "digest": digest.hexdigest()}, str(local))


def snapshot(root: Path) -> dict[str, object]:
    return {
        str(path.relative_to(root)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in root.rglob("*")
        if not path.name.endswith(".lock")
    }


@pytest.mark.parametrize(
    "members",
    [
        [member("/etc/x")],
        [member("../x")],
        [folder("a"), member("a/../../x")],
        [member("..")],
        [folder("a"), link("a/l", "../../x"), member("a/l/y")],
        [link("l", "/etc"), member("l/y")],
        [link("l", "victim"), member("l", size=3)],
        [member("h", tarfile.LNKTYPE, "/etc/passwd")],
        [member("h", tarfile.LNKTYPE, "../victim")],
        [member("d", tarfile.CHRTYPE)],
        [member("d", tarfile.BLKTYPE)],
        [member("p", tarfile.FIFOTYPE)],
        [folder("bin"), link("bin/x", "/bin/sh")],
        [folder("bin"), link("bin/python", "/bin/sh")],
        # Each link stays inside when its text is simplified, but not when it is followed.
        [folder("a"), folder("a/b"), folder("c"), link("a/b/l", "../../c"), link("lib", "a/b/l/../..")],
        [folder("c"), link("l", "c/.."), link("m", "l/../..")],
        # A bin or lib that is a link: what lies behind it would be rewritten.
        [folder("real"), link("bin", "real"), folder("lib")],
        [folder("bin")],
        [member("x", size=2 << 20)],
    ],
    ids=range(19),
)
def test_members_that_lead_elsewhere_or_are_too_large(members: list[tarfile.TarInfo], local: Path) -> None:
    victim = local.parent.parent / "victim"
    victim.write_text("#!/old/bin/python\n")
    before = snapshot(local.parent.parent)
    with pytest.raises(EnvironmentProblem):
        unpack_all(packed(*members), local)
    assert snapshot(local.parent.parent) == before


def test_a_name_as_long_as_memory_is_refused(local: Path, tmp_path: Path) -> None:
    header = member("././@LongLink", tarfile.GNUTYPE_LONGNAME, size=8 << 30).tobuf(tarfile.GNU_FORMAT)
    path = tmp_path / "sparse.tar"
    path.write_bytes(packed()[: 512 + MARKER_BYTES] + header)
    os.truncate(path, 9 << 30)
    with bounded_memory(), open(path, "rb") as file, pytest.raises(EnvironmentProblem, match="a name of"):
        unpack(file, MARK, str(local))


@given(data=st.data())
def test_mutated_tars(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("mutated")
    tar = packed(folder("bin"), member("bin/a", size=700), folder("lib"), link("bin/b", "a"))
    content = data.draw(mutated_bytes(tar))
    (place / "node").mkdir()
    with bounded_memory(), pytest.raises(EnvironmentProblem):  # at the latest because there is no Python in it
        unpack_all(content, place / "node" / "env")
    assert set(os.listdir(place)) == {"node"} and set(os.listdir(place / "node")) <= {".env.lock"}


@given(data=st.data())
def test_mutated_markers(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("marker") / "x.tar"
    path.write_bytes(data.draw(st.one_of(mutated_bytes(packed()), st.just(bytes(512) + b"[" * MARKER_BYTES))))
    try:
        marker = read_marker(str(path))
    except EnvironmentProblem:
        return
    assert isinstance(marker["prefix"], str) and marker["num_bytes"] >= 0


def test_places_of_other_users_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Anybody can make /tmp/hpctrain-1000-run before user 1000 does, and put programs there."""
    mine = os.geteuid()
    check_owner(tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1 if mine else 4711)
    owner = os.stat(tmp_path).st_uid
    if owner == 0:
        os.chown(tmp_path, 4712, -1)
    with pytest.raises(UserError, match="belongs to another user"):
        check_owner(tmp_path)
    with pytest.raises(EnvironmentProblem, match="belongs to another user"), claimed(str(tmp_path / "env"), False):
        pass
    tmp_path.chmod(0o1777)  # like /tmp
    check_owner(tmp_path)
    if owner == 0:
        os.chown(tmp_path, 0, -1)
