"""Packs a virtual environment into one tar, which `stage_env` unpacks on the nodes."""

import hashlib
import io
import json
import os
import re
import stat
import tarfile
import urllib.parse
from pathlib import Path
from typing import IO, Any

from hpctrain.data.atomic import publish, temporary_path
from hpctrain.staging.stage_env import FORMAT, MARKER, MARKER_BYTES, EnvironmentProblem, identity, is_python

_VIRTUAL_ENV = re.compile(r"""^\s*VIRTUAL_ENV=["']?(/[^"'\n]*)""", re.MULTILINE)
_LEFT_OUT = re.compile(r"\.hpctrain-.*|hpctrain-install\.log")  # install.sh's notes about the place it installed to


def pack(prefix: Path, target: Path) -> dict[str, Any]:
    """Write the virtual environment `prefix` to the tar `target` and return its marker (`stage_env.read_marker`).

    The tar is not compressed. The same environment gives the same bytes: sorted names, no owners, times of files as
    they are. Packages that are installed as editable are packed themselves. Raises EnvironmentProblem.
    """
    prefix, target = _own_name(Path(os.path.abspath(prefix))), Path(os.path.abspath(target))
    base_python = _base_python(prefix)
    if target.is_relative_to(prefix):
        raise EnvironmentProblem(f"{target} lies inside the environment {prefix}; give another place")
    members = _with_editable_packages(prefix, dict(_files_below(prefix, prefix)))
    marker = {"format": FORMAT, "version": 1, "prefix": str(prefix), "base_python": base_python}
    temporary = temporary_path(target)
    try:
        with open(temporary, "xb") as out:
            packing = _Packing(out, prefix)
            packing.marker(marker)
            for name in sorted(members):
                packing.add(name, members[name])
            marker |= packing.finish()
            out.seek(tarfile.BLOCKSIZE)  # behind the header of the first member
            out.write(_padded(marker))
        publish(temporary, target)
    except OSError as error:
        raise EnvironmentProblem(f"cannot pack {prefix} into {target}: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return marker


class _Packing:
    """A tar that is being written, with the digest of its members."""

    def __init__(self, out: IO[bytes], prefix: Path) -> None:
        self._tar = tarfile.open(fileobj=out, mode="w", format=tarfile.GNU_FORMAT)  # noqa: SIM115 (closed by finish)
        self._prefix = prefix
        self._digest = hashlib.sha256()
        self._num_members = self._num_bytes = 0

    def marker(self, marker: dict[str, Any]) -> None:
        """Add a marker to be overwritten later."""
        info = tarfile.TarInfo(MARKER)
        info.size = MARKER_BYTES
        self._tar.addfile(info, io.BytesIO(_padded(marker)))

    def add(self, name: str, path: Path) -> None:
        """Add a folder, a file or a link; a link that leads out of the environment becomes the file it leads to."""
        status = path.lstat()
        info = tarfile.TarInfo(name)
        link = _link_target(path, self._prefix) if stat.S_ISLNK(status.st_mode) else None
        if link is not None:
            info.type, info.linkname, info.mode = tarfile.SYMTYPE, link, 0o777
        elif path.is_dir():
            info.type, info.mode = tarfile.DIRTYPE, stat.S_IMODE(status.st_mode)  # its time tells nothing
        elif path.is_file():
            status = path.stat()
            info.size, info.mode, info.mtime = status.st_size, stat.S_IMODE(status.st_mode), int(status.st_mtime)
        else:
            return  # a socket or the like
        self._digest.update(identity(info))
        self._num_members += 1
        self._num_bytes += info.size
        if not info.isreg():
            self._tar.addfile(info)
            return
        with open(path, "rb") as file:
            self._tar.addfile(info, _Hashing(file, self._digest))  # type: ignore[arg-type]

    def finish(self) -> dict[str, Any]:
        """End the tar; return what of the marker is known only now."""
        self._tar.close()
        return {"digest": self._digest.hexdigest(), "num_members": self._num_members, "num_bytes": self._num_bytes}


class _Hashing:
    """A file to read from whose bytes go into a digest as well."""

    def __init__(self, file: IO[bytes], digest: Any) -> None:
        self._file, self._digest = file, digest

    def read(self, size: int) -> bytes:
        part = self._file.read(size)
        self._digest.update(part)
        return part


def _padded(marker: dict[str, Any]) -> bytes:
    text = json.dumps(marker, sort_keys=True).encode()
    if len(text) > MARKER_BYTES:
        raise EnvironmentProblem(f"the path {marker['prefix']} is too long")
    return text.ljust(MARKER_BYTES)


def _own_name(prefix: Path) -> Path:
    """Return the path by which the environment's own programs know it; `prefix` may lead there through a link."""
    try:
        found = _VIRTUAL_ENV.search((prefix / "bin" / "activate").read_text(errors="replace"))
    except OSError:
        return prefix
    if found and os.path.isdir(found[1]) and os.path.samefile(found[1], prefix):
        return Path(found[1])
    return prefix


def _base_python(prefix: Path) -> str:
    """Return the folder of the Python that a virtual environment is built on."""
    try:
        lines = (prefix / "pyvenv.cfg").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition("=")
        if key.strip() == "home" and value.strip():
            return value.strip()
    raise EnvironmentProblem(f"{prefix} is no virtual environment: it has no pyvenv.cfg that names its Python")


def _files_below(top: Path, root: Path, compiled: bool = True) -> list[tuple[str, Path]]:
    """Return (path relative to root, path) of what lies below `top`, except install.sh's notes."""
    found = []
    for folder, folders, files in os.walk(top):
        if not compiled:
            folders[:] = [name for name in folders if name != "__pycache__"]
        for name in folders + files:
            path = Path(folder, name)
            if Path(folder) == root and _LEFT_OUT.fullmatch(name):
                continue
            found.append((str(path.relative_to(root)), path))
    return found


def _with_editable_packages(prefix: Path, members: dict[str, Path]) -> dict[str, Path]:
    """Replace what only points to packages elsewhere by the packages.

    Understands a plain path in a .pth file, which is how install.sh installs; other import hooks are refused.
    """
    for info in sorted(prefix.glob("lib/python*/site-packages/*.dist-info")):
        if not (info / "direct_url.json").is_file():
            continue
        origin = json.loads((info / "direct_url.json").read_text())
        if not origin.get("dir_info", {}).get("editable"):
            continue
        source = Path(urllib.parse.unquote(urllib.parse.urlparse(origin["url"]).path))
        site = info.parent
        pointers = [path for path in sorted(site.glob("*.pth")) if str(source) in path.read_text().splitlines()]
        if not pointers:
            raise EnvironmentProblem(
                f"{info.name.split('-')[0]} is installed as editable by an import hook, which cannot be packed; "
                "install it without --editable, or with --config-settings editable_mode=compat"
            )
        for path in (info / "direct_url.json", *pointers):
            members.pop(str(path.relative_to(prefix)), None)
        for package in (info / "top_level.txt").read_text().split():
            # Without compiled modules, which in a checkout may be of another Python or time.
            own = source / package
            files = [(f"{package}.py", source / f"{package}.py")] if not own.is_dir() else [(package, own)]
            files += _files_below(own, source, compiled=False)
            members |= {str((site / name).relative_to(prefix)): path for name, path in files}
    return members


def _link_target(path: Path, prefix: Path) -> str | None:
    """Return what a link is to say in the tar, or None where the file it leads to is to be packed in its place."""
    target = os.readlink(path)
    full = Path(os.path.normpath(path.parent / target))
    if full.is_relative_to(prefix):
        return os.path.relpath(full, path.parent)
    if path.parent == prefix / "bin" and is_python(path.name) and is_python(target):
        return str(full)  # the base Python, which has to be there on the nodes too
    if path.is_dir():
        raise EnvironmentProblem(f"{path} leads to the folder {full} outside of the environment")
    return None
