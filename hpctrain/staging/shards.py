"""`stage`: brings the shards that each node's ranks will read to the node's own storage, each read once in the job."""

import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hpctrain.data.atomic import publish, temporary_path, write_file
from hpctrain.data.manifest import Manifest, split_directories
from hpctrain.data.prepare.group import on_all
from hpctrain.data.processes import Progress
from hpctrain.data.shard import MANIFEST_NAME, DataError
from hpctrain.data.shard_file import open_shard
from hpctrain.errors import UserError
from hpctrain.parallel.world import World
from hpctrain.staging.check import shard_problem
from hpctrain.staging.local import make_folder_apart, make_ready, naming, refuse_full, refuse_shared, token_prefix
from hpctrain.staging.plan import Node, Transfer, evaluation_shards_of_node, nodes_of, shards_of_node, transfers
from hpctrain.staging.traffic import Say, Traffic, summarize
from hpctrain.staging.transfer import Route, blocks


def _say_nothing(line: str) -> None: ...


@dataclass
class _Split:
    """A split to be staged: where it is, where it goes, which shards each node needs and which it has."""

    manifest: Manifest
    text: bytes  # of dataset.json
    source: Path
    target: Path
    wanted: list[frozenset[int]]  # by node
    there: list[frozenset[int]]  # by node; also shards that it does not need

    @property
    def missing(self) -> list[frozenset[int]]:
        """By node, what it needs and has not."""
        return [wanted - there for wanted, there in zip(self.wanted, self.there, strict=True)]

    def will_be_whole(self, number: int) -> bool:
        """Whether node `number` holds every shard when it has what it needs."""
        return len(self.wanted[number] | self.there[number]) == len(self.manifest.shards)

    def bytes_of(self, shards: frozenset[int]) -> int:
        return sum(self.manifest.shards[shard].file_bytes for shard in shards)


@dataclass(frozen=True)
class _Here:
    """This rank's place in the job."""

    world: World
    nodes: tuple[Node, ...]
    number: int  # of this rank's node

    @property
    def node(self) -> Node:
        return self.nodes[self.number]

    @property
    def leads(self) -> bool:
        return self.world.rank == self.node.leader


def stage(
    data: str | Path,
    local: str | Path,
    world: World,
    *,
    splits: Sequence[str] = ("train", "val"),
    partitions: int = 1,
    val_micro_batch: int | None = None,
    verify_existing: bool = False,
    hosts: Sequence[str] | None = None,
    say: Say = _say_nothing,
) -> Traffic:
    """Bring the shards of the data set `data` that each node needs to `local`/SPLIT there; all ranks call it together.

    Of `train` a node gets the shards of the `partitions` that its ranks read when training runs on the same nodes in
    the same order, with the same share of the ranks each; of `val` all shards, or, with `val_micro_batch` (the
    evaluation's), those its ranks evaluate. A missing `val` is passed over unless it alone is asked for.

    Each shard is read once on the shared file system and broadcast to the other nodes that lack it. Every copy is
    checked, index and records, before it gets its name. Shards that are there already are kept when size and index
    are right (`verify_existing`: and every record). A node that holds a whole split gets its `dataset.json` too.

    `hosts` (by rank; by default where the ranks run) says which ranks share a node. Returns the whole job's traffic;
    `say` gets lines for the user on rank 0. Raises UserError on all ranks for what is found wrong before copying; an
    error while copying is raised on the rank that met it, whose program then has to end the others (`run_rank`).
    """
    names = list(hosts) if hosts is not None else [place.host for place in world.places]
    nodes = nodes_of(names)
    number = next(number for number, node in enumerate(nodes) if world.rank in node.ranks)
    here = _Here(world, nodes, number)
    plans, other_splits = _open_splits(here, Path(data), Path(local), splits, partitions, val_micro_batch)
    _make_ready(here, plans)
    for split in plans:
        split.there = _existing(here, split, verify_existing)
    needed = sum(split.bytes_of(split.missing[number]) for split in plans)
    on_all(world, lambda: refuse_full(plans[0].target, needed, here.node.host) if here.leads else None)
    if not world.is_root:
        say = _say_nothing
    for split in plans:
        say(_announcement(split))
    by_rank = world.allgather(_copy(here, plans, quiet=say is _say_nothing))  # also: every rank of every node is done
    on_all(world, lambda: _finish(here, plans))
    total = summarize(nodes, by_rank, say)
    whole = not other_splits and all(split.will_be_whole(node) for split in plans for node in range(len(nodes)))
    say(f"train with data.path={local}" if whole else f"train with data.path={data} data.staged={local}")
    return total


def _open_splits(
    here: _Here, data: Path, local: Path, names: Sequence[str], partitions: int, micro_batch: int | None
) -> tuple[list[_Split], bool]:
    """Read the manifests on rank 0 and work out on every rank which shards each node needs.

    Also says whether the data set has splits that are not asked for.
    """

    def read() -> tuple[list[tuple[str, bytes, str]], bool]:
        folders: dict[str, Path] = {}
        for folder in split_directories(data):
            split = Manifest.load(folder).split
            if split not in folders or folder.name == split:  # train-old may say that it is train, too
                folders[split] = folder
        found = []
        for name in names:
            if name in folders:
                Manifest.load(folders[name], check_files=True)
                found.append((name, (folders[name] / MANIFEST_NAME).read_bytes(), str(folders[name])))
            elif name == "train" or len(names) == 1:
                raise UserError(
                    f"{data} has no {name} split; make one with `hpctrain data prepare IMAGES {data} --split {name}`"
                )
        return found, bool(folders.keys() - set(names))

    found, others = here.world.from_root(read)
    plans = []
    for name, text, folder in found:
        manifest = Manifest.from_json(text, str(Path(folder) / MANIFEST_NAME))
        wanted = [_wanted(manifest, name, partitions, micro_batch, node, here.world.size) for node in here.nodes]
        plans.append(_Split(manifest, text, Path(folder), local / name, wanted, []))
    return plans, others


def _wanted(
    manifest: Manifest, name: str, partitions: int, micro_batch: int | None, node: Node, ranks: int
) -> frozenset[int]:
    """The shards of a split that a node needs."""
    if name == "train":
        return frozenset(shards_of_node(manifest, partitions, node.ranks, ranks))
    if micro_batch is not None:
        return frozenset(evaluation_shards_of_node(manifest, micro_batch, node.ranks, ranks))
    return frozenset(range(len(manifest.shards)))


def _make_ready(here: _Here, plans: Sequence[_Split]) -> None:
    """Make the directories on every node, or raise on all ranks what stands against it."""
    host = here.node.host
    folder = plans[0].target
    run = here.world.broadcast(uuid.uuid4().hex)

    def make_folders() -> None:
        for split in plans:
            make_folder_apart(split.target, split.source, host)
        (folder / f"{token_prefix(run)}{here.number}").touch()

    def look_for_others() -> None:
        refuse_shared(folder, [node.host for node in here.nodes], here.number, run)

    def make_all_ready() -> None:
        for split in plans:
            make_ready(split.target, split.text, host)

    def on_node(step: Callable[[], None]) -> None:
        if here.leads:
            with naming(host, f"write to {folder}"):
                step()

    for step in (make_folders, look_for_others, make_all_ready):
        on_all(here.world, partial(on_node, step))


def _existing(here: _Here, split: _Split, verify: bool) -> list[frozenset[int]]:
    """Return by node the shards that are there already and good; remove those that are there and bad.

    Also those that the node does not need: training takes a staged file before the one on the shared file system.
    """
    position, ranks = here.node.ranks.index(here.world.rank), len(here.node.ranks)

    def check() -> list[int]:
        good = []
        with naming(here.node.host, f"look through {split.target}"):
            names = set(os.listdir(split.target))
            present = [n for n, shard in enumerate(split.manifest.shards) if shard.file in names]
            for shard in present[position::ranks]:
                path = split.target / split.manifest.shards[shard].file
                try:
                    problem = shard_problem(path, split.manifest, shard, records=verify)
                except DataError as error:  # a link or the like
                    problem = str(error)
                if problem is None:
                    good.append(shard)
                else:
                    path.unlink()
        return good

    by_rank = on_all(here.world, check)
    return [frozenset(shard for rank in node.ranks for shard in by_rank[rank]) for node in here.nodes]


def _copy(here: _Here, plans: Sequence[_Split], quiet: bool) -> Traffic:
    """Bring all that is missing, this rank its part of it; return what this rank did, and found."""
    traffic = Traffic()
    started = time.monotonic()
    rank = here.world.rank
    for split in plans:
        own = [transfer for transfer in transfers(split.missing, here.nodes) if rank in transfer.ranks]
        records = [split.manifest.shards[transfer.shard].num_records for transfer in own]
        title = f"stage {split.manifest.split}" + (" (share of rank 0)" if here.world.size > 1 else "")
        before = traffic.bytes_copied
        with Progress(title, sum(records), quiet=quiet or not own) as progress:
            for done, transfer in enumerate(own, 1):
                _bring(here, split, transfer, traffic)
                progress.show(sum(records[:done]), traffic.bytes_copied - before, 0)
        if here.leads:
            reused = split.wanted[here.number] & split.there[here.number]
            traffic.shards_reused += len(reused)
            traffic.bytes_reused += split.bytes_of(reused)
    traffic.seconds = time.monotonic() - started
    return traffic


def _bring(here: _Here, split: _Split, transfer: Transfer, traffic: Traffic) -> None:
    """Copy one shard to this node, together with the other ranks of the transfer; a UserError names host and cause."""
    entry = split.manifest.shards[transfer.shard]
    source, target = split.source / entry.file, split.target / entry.file
    temporary = temporary_path(target)
    host = here.node.host
    route = Route(here.world.comm, here.world.rank, transfer.reader, transfer.ranks)
    try:
        with naming(host, f"write {target}"), open(temporary, "xb", buffering=0) as out:
            for view in blocks(source, entry.file_bytes, route, open_shard):
                _write(out.fileno(), view)
        with naming(host, f"read {temporary} again"):
            problem = shard_problem(temporary, split.manifest, transfer.shard, records=True)
        source_is_bad = route.flag(problem is not None)
        if route.reads and problem is not None:
            raise UserError(
                f"shard {source} is damaged: {problem}; it was not staged: copy it again or prepare the data again"
            )
        if source_is_bad:
            return  # every node has a bad copy then, and the reader's sentence about it is enough
        if problem is not None:
            raise UserError(
                f"{host}: the copy of {source} is not what was read elsewhere: {problem}; run it again, and leave this "
                "node out if that does not help"
            )
        with naming(host, f"write {target}"):
            publish(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    if route.reads:
        traffic.shards_read += 1
        traffic.bytes_read += entry.file_bytes
    else:
        traffic.shards_received += 1
        traffic.bytes_received += entry.file_bytes


def _write(descriptor: int, view: memoryview) -> None:
    while len(view):
        view = view[os.write(descriptor, view) :]


def _finish(here: _Here, plans: Sequence[_Split]) -> None:
    """Let a node that holds a whole split have its manifest, which makes it a data set of its own."""
    if not here.leads:
        return
    for split in plans:
        path = split.target / MANIFEST_NAME
        with naming(here.node.host, f"write {path}"):
            if split.will_be_whole(here.number):
                write_file(path, split.text)
            else:
                path.unlink(missing_ok=True)


def _announcement(split: _Split) -> str:
    once: frozenset[int] = frozenset().union(*split.missing)
    copies = sum(map(len, split.missing))
    return (
        f"{split.manifest.split}: {len(split.manifest.shards):,} shards; {len(once):,} of them "
        f"({split.bytes_of(once) / 1e6:,.1f} MB) are to be read, for {copies:,} copies on {len(split.missing):,} nodes"
    )
