"""Reads a whole data set and names every shard and record that is not as it was written."""

from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpctrain.data.hdf5_apart import Inspector
from hpctrain.data.images import ImageError, check_decodes, jpeg_header
from hpctrain.data.manifest import Manifest, ShardEntry, split_directories
from hpctrain.data.processes import Count, Progress, available_cores, run_tasks
from hpctrain.data.reader import ShardReader
from hpctrain.data.shard import DataError
from hpctrain.data.shard_file import printable

_CHUNK_BYTES = 16 << 20
_inspector = Inspector()  # of this process, for all shards that it verifies


@dataclass(frozen=True)
class BadRecord:
    """A record that is damaged."""

    split: str
    shard: str
    record: int
    name: str
    problem: str

    def __str__(self) -> str:
        return f"{self.split}: record {self.record} in {self.shard} (made from {printable(self.name)}): {self.problem}"


@dataclass
class VerifyReport:
    """What was read and what is wrong with it."""

    num_records: int = 0  # that could be read
    num_bytes: int = 0
    num_shards: int = 0
    bad_records: list[BadRecord] = field(default_factory=list)
    bad_shards: list[str] = field(default_factory=list)  # sentences; their records are not in bad_records

    @property
    def ok(self) -> bool:
        return not self.bad_records and not self.bad_shards

    def add(self, other: "VerifyReport") -> None:
        """Add another report to this one."""
        for item in fields(self):
            setattr(self, item.name, getattr(self, item.name) + getattr(other, item.name))


def verify(
    directory: str | PathLike[str], workers: int | None = None, decode: bool = False, quiet: bool = True
) -> VerifyReport:
    """Check a data set: every record's checksum, every shard's index, labels and HDF5 structure, every JPEG's header.

    `directory` is a split or holds splits. With `decode` every image is decoded as well, which takes much longer.
    `workers` processes (by default one a core) share the shards. Damage is reported, not raised; only a directory
    without a readable manifest raises a UserError.
    """
    report = VerifyReport()
    try:
        for folder in split_directories(directory):
            manifest = Manifest.load(folder)
            with Progress(f"verify {manifest.split}", manifest.num_records, quiet=quiet) as progress:
                for part in run_tasks(
                    _verify_shard,
                    (folder, manifest, decode),
                    range(len(manifest.shards)),
                    workers or available_cores(),
                    progress,
                ):
                    report.add(part)
    finally:
        _inspector.close()
    return report


def _verify_shard(context: tuple[Path, Manifest, bool], number: int, count: Count) -> VerifyReport:
    folder, manifest, decode = context
    entry = manifest.shards[number]
    report = VerifyReport(num_shards=1)
    reader = ShardReader(manifest, folder, verify=False)
    try:
        lengths = reader.record_bytes(np.arange(entry.first_record, entry.first_record + entry.num_records))
        found = _inspector.inspect(folder / entry.file)
        if found != entry:
            names = [item.name for item in fields(ShardEntry)]
            wrong = ", ".join(name for name in names if getattr(found, name) != getattr(entry, name))
            report.bad_shards.append(f"shard {folder / entry.file} and dataset.json do not agree in {wrong}")
        first = 0
        for last in _chunk_ends(lengths):
            records = entry.first_record + np.arange(first, last)
            _verify_records(reader, manifest.split, entry.file, records, decode, report)
            count(last - first, int(lengths[first:last].sum()))
            first = last
    except DataError as error:
        report.bad_shards.append(str(error))
    return report


def _chunk_ends(lengths: NDArray[np.int64]) -> list[int]:
    """Cut records of the given lengths into runs of about _CHUNK_BYTES; return where each run ends."""
    chunk = np.cumsum(lengths) // _CHUNK_BYTES
    return [*(np.flatnonzero(np.diff(chunk)) + 1).tolist(), len(lengths)]


def _verify_records(
    reader: ShardReader, split: str, shard: str, records: NDArray[np.int64], decode: bool, report: VerifyReport
) -> None:
    blobs = reader.read(records)
    intact = reader.checksums_ok(records, blobs)
    heights, widths = reader.sizes(records)
    for i, blob in enumerate(blobs):
        problem = ""
        if not intact[i]:
            problem = "its bytes do not match their checksum"
        elif reader.encoding == "jpeg":
            problem = _image_problem(blob, int(heights[i]), int(widths[i]), decode)
        if problem:
            record = int(records[i])
            report.bad_records.append(BadRecord(split, shard, record, reader.name(record), problem))
    report.num_records += len(blobs)
    report.num_bytes += sum(map(len, blobs))


def _image_problem(blob: bytes, height: int, width: int, decode: bool) -> str:
    try:
        header = jpeg_header(blob)
        if decode:
            check_decodes(blob)
    except ImageError as error:
        return str(error)
    if (header.height, header.width) != (height, width):
        return f"it is {header.width} x {header.height} pixels, the index says {width} x {height}"
    return ""
