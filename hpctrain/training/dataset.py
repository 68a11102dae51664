"""The splits of a run, opened on all ranks. Imports no TensorFlow, so that a mistaken path is found at once."""

from dataclasses import dataclass
from pathlib import Path

from hpctrain.config import Config
from hpctrain.data.manifest import Manifest, split_directories
from hpctrain.data.reader import ShardReader
from hpctrain.data.shard import DataError
from hpctrain.errors import UserError
from hpctrain.parallel.world import World


@dataclass(frozen=True)
class DataSet:
    """The splits of a run, opened on every rank from manifests that rank 0 has read."""

    train: ShardReader | None  # None with synthetic data
    val: ShardReader | None  # None when there is no such split
    num_records: int
    num_classes: int

    @property
    def classes_checksum(self) -> str:
        """Of the names of the classes; empty for made-up images."""
        return self.train.manifest.classes_checksum if self.train is not None else ""


def open_split(
    directory: str | Path,
    split: str,
    world: World,
    *,
    required: bool = True,
    page_cache: str = "keep",
    staged: str | None = None,
) -> ShardReader | None:
    """Open DIR/split (or DIR itself when it is that split) on every rank; only rank 0 looks at the manifest's file.

    Shards that `staged`/split on a rank's node has (`hpctrain data stage`) are read there.
    """

    def read() -> tuple[str, str] | None:
        folder = Path(directory) / split
        if not folder.is_dir():
            own = Path(directory) / "dataset.json"
            if own.is_file() and Manifest.load(directory).split == split:
                folder = Path(directory)
            elif not required:
                return None
            else:
                split_directories(directory)  # says what is there, if it is no data set at all
                raise UserError(
                    f"{directory} has no {split} split; make one with `hpctrain data prepare IMAGES {directory} "
                    f"--split {split}`"
                )
        manifest = Manifest.load(folder)
        manifest.check_files(folder)
        return manifest.to_json(), str(folder)

    found = world.from_root(read)
    if found is None:
        return None
    folders: list[str | Path] = [found[1]]
    if staged is not None:
        local = Path(staged) / split
        if required and not local.is_dir():
            raise UserError(
                f"data.staged is {staged} but {world.host} has no {local}; run `hpctrain data stage {directory} "
                f"{staged}` on the job's nodes first, or leave it unset"
            )
        folders.insert(0, local)
    return ShardReader(Manifest.from_json(found[0]), folders, page_cache=page_cache)


def open_data(config: Config, world: World) -> DataSet:
    """Open the data of a configuration, or raise UserError on every rank."""
    if config.data.synthetic:
        return DataSet(None, None, config.data.synthetic_records, config.model.num_classes or 1000)
    if config.data.path is None:
        raise UserError("the recipe names no data; set data.path=DIR to prepared shards, or data.synthetic=true")
    cache, staged = config.data.page_cache, config.data.staged
    train = open_split(config.data.path, "train", world, page_cache=cache, staged=staged)
    val = open_split(config.data.path, "val", world, required=False, page_cache=cache, staged=staged)
    assert train is not None
    classes = config.model.num_classes or train.num_classes
    for reader in (train, val):
        if reader is not None and reader.num_classes > classes:
            raise UserError(
                f"the data in {config.data.path} has {reader.num_classes} classes but model.num_classes is {classes}; "
                "leave it unset to take the data set's"
            )
    if val is not None and val.class_names != train.class_names:
        raise UserError(
            f"train and val in {config.data.path} do not have the same classes, so the same number means another one "
            "there; prepare val again with --overwrite, which takes train's"
        )
    return DataSet(train, val, train.num_records, classes)


def skipped_records(reader: ShardReader | None, own: set[int], world: World) -> list[str]:
    """Return, on every rank, words for each record that any rank has skipped because it is damaged, by number."""
    records = sorted(set().union(*world.allgather(own)))
    if reader is None or not records:
        return []
    split = reader.manifest.split
    return world.from_root(lambda: [f"{split} record {record} ({_made_from(reader, record)})" for record in records])


def _made_from(reader: ShardReader, record: int) -> str:
    try:
        return reader.name(record)
    except DataError:
        return "source unknown"
