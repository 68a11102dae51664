#!/usr/bin/env python3
"""Unpacks a packed virtual environment on a node so that it works there.

    python3 stage_env.py FILE.tar LOCAL_DIR

Uses nothing but Python's standard library and runs as this single file, under any Python from 3.6 on: it is what a
compute node runs before it has an environment. Hence no newer syntax, and no help from other modules.
`data_prep/stage.py env unpack` does the same on many nodes over MPI; `pack_env` makes the file.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from typing import Any

MARKER = ".hpctrain-env.json"  # first member of the tar, and kept in the unpacked environment
MARKER_BYTES = 4096  # always, so that it can be filled in when the rest of the tar is written
FORMAT = "hpctrain-env"
_SAFE_PATH = re.compile(r"/[A-Za-z0-9._+@=,/-]+")
_MARGIN = 1.05  # a file system needs more than the bytes of 40,000 small files
_KERNEL_READS = 127  # bytes of a program's first line
_MAX_NAME_BYTES = 1 << 16  # of a member, or of what its link leads to
_EXTENSIONS = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, b"x", b"X", b"g")


class EnvironmentProblem(Exception):
    """What keeps an environment from being packed or unpacked, in one sentence."""


def read_marker(path: str) -> "dict[str, Any]":
    """Return what a packed environment says about itself; reads the start of the file only.

    Keys: format, version, digest (sha256 of all members), prefix (where it was), base_python (the folder of the Python
    it is built on), num_members, num_bytes. Raises EnvironmentProblem.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(tarfile.BLOCKSIZE + MARKER_BYTES)
    except OSError as error:
        raise EnvironmentProblem(f"cannot read {path}: {error.strerror}") from None
    try:
        marker = json.loads(start[tarfile.BLOCKSIZE :].decode())
        good = marker["format"] == FORMAT and len(marker["digest"]) == 64
        good = good and all(isinstance(marker[key], str) for key in ("digest", "prefix", "base_python"))
        good = good and all(type(marker[key]) is int and marker[key] >= 0 for key in ("num_bytes", "version"))
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise EnvironmentProblem(f"{path} is no packed environment; make one with `stage.py env pack PREFIX FILE.tar`")
    if marker["version"] != 1:
        raise EnvironmentProblem(f"{path} was packed by a newer hpctrain; unpack it with that one")
    return dict(marker)


@contextlib.contextmanager
def claimed(local: str, wait: bool) -> "Iterator[None]":
    """Keep other programs from unpacking to `local` meanwhile; where one is at it, wait for it or raise.

    Raises EnvironmentProblem, also for a path that cannot hold an environment.
    """
    if _SAFE_PATH.fullmatch(local) is None or os.path.normpath(local) != local:
        raise EnvironmentProblem(
            f"{local!r} cannot hold an environment: give an absolute path of letters, digits and ._+@=,- since it "
            "goes into the first lines of programs"
        )
    parent, name = os.path.split(local)
    try:
        os.makedirs(parent, exist_ok=True)
        for folder in (parent, local):
            _check_owner(folder)
        descriptor = os.open(os.path.join(parent, f".{name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise EnvironmentProblem(f"cannot use {local}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise EnvironmentProblem(f"another job is unpacking to {local}; give another directory or wait") from None
        except OSError:
            pass  # a file system without locks is taken on trust
        yield
    finally:
        os.close(descriptor)


def _check_owner(folder: str) -> None:
    """Raise EnvironmentProblem for a folder in which somebody else may have put programs for this user to run.

    On nodes that several users share, anybody can make a folder of the expected name in /tmp first.
    """
    try:
        status = os.lstat(folder)
    except FileNotFoundError:
        return
    if stat.S_ISLNK(status.st_mode):
        status = os.stat(folder)
        if os.lstat(folder).st_uid not in (0, os.geteuid()):
            raise EnvironmentProblem(f"{folder} is a link that another user has made; give another directory")
    if status.st_uid in (0, os.geteuid()) or status.st_mode & stat.S_ISVTX:
        return
    raise EnvironmentProblem(f"{folder} belongs to another user; give another directory")


def is_unpacked(marker: "dict[str, Any]", local: str) -> bool:
    """Whether `local`, which is `claimed`, holds this very environment, whole.

    Leftovers of runs that were killed while unpacking are removed. Raises EnvironmentProblem where something else is.
    """
    parent, name = os.path.split(local)
    try:
        for other in sorted(os.listdir(parent)):
            if other.startswith(f".{name}.tmp-"):
                shutil.rmtree(os.path.join(parent, other), ignore_errors=True)
        found = os.listdir(local) if os.path.lexists(local) else []
    except OSError as error:
        raise EnvironmentProblem(f"cannot use {local}: {error.strerror}") from None
    if not found:
        return False
    try:
        with open(os.path.join(local, MARKER)) as file:
            there = json.load(file)
        return bool(there["digest"] == marker["digest"] and there["unpacked_to"] == local)
    except (OSError, ValueError, KeyError, TypeError):
        raise EnvironmentProblem(
            f"{local} holds something that is no unpacked environment; give another path"
        ) from None


def unpack(source: Any, marker: "dict[str, Any]", local: str) -> None:
    """Unpack the tar that `source.read(size)` gives, from its first byte on, so that the environment works in `local`.

    `local` is `claimed`, and what it holds, if anything, is an older environment. Everything
    is checked against the digest and made to fit its new place in a folder beside `local`, which then takes that name.
    Raises EnvironmentProblem.
    """
    parent, name = os.path.split(local)
    place = os.path.join(parent, f".{name}.tmp-{socket.gethostname()}-{os.getpid()}")
    old = place + "-old"
    try:
        status = os.statvfs(parent)
        free, needed = status.f_bavail * status.f_frsize, int(marker["num_bytes"] * _MARGIN)
        if free < needed:
            raise EnvironmentProblem(
                f"the environment needs {needed:,} bytes in {parent}, where {free:,} are free; give another directory"
            )
        os.mkdir(place, 0o755)
        if _extract(source, place, marker["num_bytes"]) != marker["digest"]:
            raise EnvironmentProblem("the packed environment was damaged on its way here; copy it or pack it again")
        _relocate(place, marker["prefix"], local)
        _try_out(place, marker["base_python"])
        with open(os.path.join(place, MARKER), "w") as file:
            json.dump(dict(marker, unpacked_to=local), file)
        if os.path.lexists(local):
            os.rename(local, old)
        os.rename(place, local)
    except (OSError, tarfile.TarError, ValueError, OverflowError) as error:  # the last two: times that are none
        raise EnvironmentProblem(f"cannot unpack to {local}: {error}") from None
    finally:
        shutil.rmtree(place, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def identity(info: tarfile.TarInfo) -> bytes:
    """Return what goes into the digest for a member of the tar, before its content."""
    kind = "link" if info.issym() else "folder" if info.isdir() else "file"
    return json.dumps([info.name, kind, info.mode, info.size, info.mtime, info.linkname]).encode() + b"\n"


def is_python(path: str) -> bool:
    """Whether a file is called as a Python is: python, python3, python3.11."""
    return re.fullmatch(r"python[0-9.]*", os.path.basename(path)) is not None


class _Member(tarfile.TarInfo):
    """A member of a tar whose name is not as long as memory."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> "_Member":
        info = super().frombuf(buf, encoding, errors)
        if info.type in _EXTENSIONS and not 0 <= info.size <= _MAX_NAME_BYTES:
            raise EnvironmentProblem(f"the packed environment has a member with a name of {info.size:,} bytes")
        return info


def _extract(source: Any, place: str, num_bytes: int) -> str:
    """Write all members below `place`, none anywhere else and not more than `num_bytes`, and return their digest."""
    digest = hashlib.sha256()
    folders = {""}
    with tarfile.open(fileobj=source, mode="r|", bufsize=1 << 16, tarinfo=_Member) as tar:
        for info in tar:
            if info.name == MARKER:
                continue
            parent, name = os.path.split(info.name)
            # Only into folders made here, never through a link: nothing can lead out of `place`.
            if parent not in folders or name in ("", ".", ".."):
                raise EnvironmentProblem(f"the packed environment has a member {info.name!r} that leads elsewhere")
            digest.update(identity(info))
            num_bytes -= info.size
            if info.size < 0 or num_bytes < 0:
                raise EnvironmentProblem("the packed environment has more bytes than it says; pack it again")
            path = os.path.join(place, info.name)
            if info.isdir():
                os.mkdir(path, 0o700 | info.mode & 0o777)
                folders.add(info.name)
            elif info.issym():
                _check_link(info)
                os.symlink(info.linkname, path)
            elif info.isreg():
                _write_file(tar.extractfile(info), path, info, digest)
            else:
                raise EnvironmentProblem(f"the packed environment has a member {info.name!r} of a strange kind")
    return digest.hexdigest()


def _check_link(info: tarfile.TarInfo) -> None:
    """Links lead to places inside the environment, and from bin/python3 to the base Python."""
    folder = os.path.dirname(info.name)
    parts = info.linkname.split("/")
    ups = next((i for i, part in enumerate(parts) if part != ".."), len(parts))
    if os.path.isabs(info.linkname):
        good = folder == "bin" and is_python(info.name) and is_python(info.linkname)
    else:
        # Its folder is a real one, so the first ".." lead where they seem to; behind a link they would not.
        depth = folder.count("/") + 1 if folder else 0
        good = ups <= depth and ".." not in parts[ups:]
    if not good:
        raise EnvironmentProblem(f"the packed environment has a link {info.name!r} to {info.linkname!r} outside of it")


def _write_file(content: Any, path: str, info: tarfile.TarInfo, digest: Any) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 | info.mode & 0o777)
    with os.fdopen(descriptor, "wb") as file:
        while True:
            part = content.read(1 << 20)
            if not part:
                break
            digest.update(part)
            file.write(part)
    os.utime(path, (info.mtime, info.mtime))  # Python recognizes its compiled modules by the time of the source


def _relocate(place: str, old: str, new: str) -> None:
    """Replace the old prefix by the new one in the texts that hold it: pyvenv.cfg, programs, activate scripts, .pth."""
    texts = [os.path.join(place, "pyvenv.cfg")]
    programs, libraries = os.path.join(place, "bin"), os.path.join(place, "lib")
    for folder in (programs, libraries):
        if os.path.islink(folder) or not os.path.isdir(folder):
            raise EnvironmentProblem(f"the packed environment has no folder {os.path.basename(folder)}")
    texts += [os.path.join(programs, name) for name in sorted(os.listdir(programs))]
    for version in sorted(os.listdir(libraries)):
        site = os.path.join(libraries, version, "site-packages")
        if version.startswith("python") and os.path.isdir(site):
            texts += [os.path.join(site, name) for name in sorted(os.listdir(site)) if name.endswith(".pth")]
    for path in texts:
        if os.path.islink(path) or not os.path.isfile(path) or os.path.getsize(path) > 1 << 20:
            continue
        with open(path, "rb") as file:
            content = file.read()
        changed = content if b"\0" in content else _moved(content, os.fsencode(old), os.fsencode(new))
        if changed != content:
            with open(path, "wb") as file:
                file.write(changed)


def _moved(content: bytes, old: bytes, new: bytes) -> bytes:
    """Return a text with the new prefix, and with a first line that the kernel takes even if the new prefix is long."""
    changed = re.sub(re.escape(old) + rb"(?![A-Za-z0-9._-])", lambda _: new, content)
    first, _, rest = changed.partition(b"\n")
    if content.startswith(b"#!" + old) and len(first) > _KERNEL_READS:
        return b"#!/bin/sh\n'''exec' " + first[2:] + b' "$0" "$@"\n' + b"' '''\n" + rest
    return changed


def _try_out(place: str, base_python: str) -> None:
    """Start the environment's Python and let it say where it is."""
    program = os.path.join(place, "bin", "python")
    if not os.path.exists(program):
        raise EnvironmentProblem(
            f"the environment is built on the Python in {base_python}, which is not on this node; build it on one that "
            "all nodes have (install.sh --python)"
        )
    try:
        output = subprocess.check_output([program, "-I", "-c", "import sys; print(sys.prefix)"])
    except (OSError, subprocess.CalledProcessError) as error:
        raise EnvironmentProblem(f"the environment's Python does not start: {error}") from None
    if os.path.realpath(os.fsdecode(output).strip()) != os.path.realpath(place):
        raise EnvironmentProblem(f"the environment's Python takes {os.fsdecode(output).strip()} for its place")


def main() -> int:
    """Unpack on this node alone, from a file that `sbcast`, `cp` or the like has put there."""
    command = argparse.ArgumentParser(prog="stage_env.py", description="Unpack an environment on this node.")
    command.add_argument("verb", nargs="?", choices=["unpack"], default="unpack", help=argparse.SUPPRESS)
    command.add_argument("file", metavar="FILE.tar", help="made by `stage.py env pack PREFIX FILE.tar`")
    command.add_argument("local", metavar="LOCAL_DIR", help="for example /tmp/hpctrain-env")
    options = command.parse_args()
    host, started = socket.gethostname(), time.time()
    try:
        marker = read_marker(options.file)
        with claimed(options.local, wait=True):
            if is_unpacked(marker, options.local):
                print(f"{host}: {options.local} is there already")
                return 0
            with open(options.file, "rb") as file:
                unpack(file, marker, options.local)
    except EnvironmentProblem as problem:
        print(f"error: {host}: {problem}", file=sys.stderr)
        return 2
    print(f"{host}: unpacked to {options.local} in {time.time() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
