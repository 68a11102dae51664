"""`stage.py env`: packs the Python environment once, and unpacks it on many nodes with one reader and an MPI broadcast.

`pack_env` and `stage_env` do the work on one machine; this adds the ranks. `unpack` runs on a thousand nodes before
they have an environment of their own, so it imports nothing but the standard library and mpi4py.
"""

import argparse
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from hpctrain.data.prepare.group import on_all
from hpctrain.errors import UserError
from hpctrain.parallel.world import World, run_rank
from hpctrain.staging import stage_env
from hpctrain.staging.stage_env import EnvironmentProblem, claimed, is_unpacked, read_marker, unpack
from hpctrain.staging.transfer import Route, blocks


class BlockStream:
    """Blocks of bytes as a file to read from."""

    def __init__(self, source: Iterator[memoryview]) -> None:
        self._source = source
        self._rest = memoryview(b"")

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer only at the end."""
        parts = []
        while size > 0:
            if not self._rest:
                self._rest = next(self._source, memoryview(b""))
                if not self._rest:
                    break
            part = self._rest[:size]
            parts.append(bytes(part))
            self._rest = self._rest[len(part) :]
            size -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def drain(self) -> None:
        """Take what is left: the other ranks wait until all have taken every block."""
        for _ in self._source:
            pass


def unpack_environment(file: Path, local: str, world: World, hosts: Sequence[str] | None = None) -> str:
    """Unpack the packed environment `file` to `local` on every node; all ranks call it together.

    One rank of each node that lacks it takes part, and the first of these reads the file. `hosts` is by rank, where
    the ranks run by default. Returns a line for the user. Raises UserError on all ranks for what is found before, and
    on the rank that meets it for what goes wrong while unpacking, whose program then has to end the others.
    """
    names = list(hosts) if hosts is not None else [place.host for place in world.places]
    host, leads = names[world.rank], names.index(names[world.rank]) == world.rank
    started = time.monotonic()

    def look() -> tuple[dict[str, Any], int]:
        with _as_mistake(""):
            return read_marker(str(file)), file.stat().st_size

    def lacks() -> bool:
        if not leads:
            return False
        with _as_mistake(f"{host}: "):
            claim.enter_context(claimed(local, wait=False))  # jobs that wait for each other's nodes would never end
            return not is_unpacked(marker, local)

    marker, size = world.from_root(look)
    with ExitStack() as claim:
        ranks = tuple(rank for rank, lacking in enumerate(on_all(world, lacks)) if lacking)
        if world.rank in ranks:
            stream = BlockStream(blocks(file, size, Route(world.comm, world.rank, ranks[0], ranks)))
            with _as_mistake(f"{host}: "):
                unpack(stream, marker, local)
            stream.drain()
    world.barrier()
    seconds = time.monotonic() - started
    others = len(set(names)) - len(ranks)
    return (
        f"environment of {size / 1e6:,.1f} MB in {local}: unpacked on {len(ranks):,} nodes, there already on {others:,}"
        f" ({seconds:.1f} s, {size * len(ranks) / seconds / 1e6:,.0f} MB/s in all)"
    )


class _as_mistake:
    """Turns an EnvironmentProblem into a UserError with some words before it."""

    def __init__(self, before: str) -> None:
        self._before = before

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, EnvironmentProblem):
            raise UserError(f"{self._before}{error}") from None


def main(arguments: Sequence[str]) -> None:
    """Run `stage.py env pack PREFIX FILE.tar` or `stage.py env unpack FILE.tar LOCAL_DIR`, and end the program."""
    command = argparse.ArgumentParser(
        prog="stage.py env", description="Pack a virtual environment into one file; unpack it on compute nodes."
    )
    verbs = command.add_subparsers(dest="verb", metavar="pack|unpack", required=True)
    packing = verbs.add_parser(
        "pack", help="on a login node, once: put the environment PREFIX into FILE.tar, and stage_env.py beside it"
    )
    packing.add_argument("prefix", metavar="PREFIX", type=Path, help="a virtual environment, such as .venv")
    packing.add_argument("file", metavar="FILE.tar", type=Path)
    unpacking = verbs.add_parser("unpack", help="on many ranks: make FILE.tar an environment in LOCAL_DIR of each node")
    unpacking.add_argument("file", metavar="FILE.tar", type=Path)
    unpacking.add_argument("local", metavar="LOCAL_DIR", help="such as /tmp/hpctrain-env")
    options = command.parse_args(arguments)
    run_rank(lambda: _pack(options.prefix, options.file) if options.verb == "pack" else _unpack(options))


def _pack(prefix: Path, file: Path) -> int:
    from hpctrain.data.atomic import write_file
    from hpctrain.staging.pack_env import pack

    started = time.monotonic()
    with _as_mistake(""):
        marker = pack(prefix, file)
    # The program that unpacks it without this package, as a companion of the same version.
    write_file(file.parent / Path(stage_env.__file__).name, Path(stage_env.__file__).read_bytes())
    print(
        f"packed {prefix} into {file}: {marker['num_members']:,} files, {os.path.getsize(file) / 1e6:,.1f} MB, "
        f"{time.monotonic() - started:.1f} s; it needs the Python in {marker['base_python']} on every node"
    )
    return 0


def _unpack(options: argparse.Namespace) -> int:
    from hpctrain.parallel.launch import launcher_size
    from hpctrain.parallel.world import alone, start

    world = start() if launcher_size() > 1 else alone()
    line = unpack_environment(options.file, options.local, world)
    if world.is_root:
        print(line)
    return 0
