"""Describes a data set: how many records of how many classes, how large, how they are stored."""

from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from hpctrain.data.manifest import Manifest, split_directories
from hpctrain.data.reader import ShardReader
from hpctrain.data.shard_file import printable


def describe(directory: str | PathLike[str]) -> dict[str, Any]:
    """Return {"directory", "splits": [one dictionary a split]}: counts, bytes and the spread of image sizes.

    Reads the manifests and every shard's index, not the records.
    """
    return {"directory": str(directory), "splits": [_describe_split(path) for path in split_directories(directory)]}


def _describe_split(folder: Path) -> dict[str, Any]:
    manifest = Manifest.load(folder)
    labels, heights, widths = [], [], []
    with ShardReader(manifest, folder) as reader:
        for shard in manifest.shards:
            records = np.arange(shard.first_record, shard.first_record + shard.num_records)
            labels.append(reader.labels(records))
            shard_heights, shard_widths = reader.sizes(records)
            heights.append(shard_heights)
            widths.append(shard_widths)
    per_class = np.bincount(np.concatenate(labels), minlength=manifest.num_classes)
    shard_sizes = [shard.num_bytes for shard in manifest.shards]
    return {
        "split": manifest.split,
        "directory": str(folder),
        "format_version": manifest.version,
        "encoding": manifest.encoding,
        "num_records": manifest.num_records,
        "num_classes": manifest.num_classes,
        "records_per_class": _spread(per_class),
        "num_shards": len(manifest.shards),
        "num_bytes": manifest.num_bytes,
        "mean_record_bytes": manifest.num_bytes / manifest.num_records,
        "shard_bytes": {"min": min(shard_sizes), "max": max(shard_sizes)},
        "heights": _spread(np.concatenate(heights)),
        "widths": _spread(np.concatenate(widths)),
        "class_names": list(manifest.class_names),
        "prepare": dict(manifest.prepare),
    }


def _spread(values: Any) -> dict[str, float]:
    return {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}


def format_description(description: dict[str, Any]) -> str:
    """Return the description as text for people."""
    lines = []
    for split in description["splits"]:
        per_class, heights, widths = split["records_per_class"], split["heights"], split["widths"]
        names = split["class_names"]
        shown = ", ".join(map(printable, names[:5])) + (", ..." if len(names) > 5 else "")
        lines += [
            f"{printable(split['split'])} ({split['directory']}, shard format {split['format_version']}, "
            f"{split['encoding']})",
            f"  records     {split['num_records']:,}; mean {split['mean_record_bytes']:,.0f} bytes, "
            f"all {split['num_bytes'] / 1e6:,.1f} MB",
            f"  classes     {split['num_classes']:,} ({shown}); "
            f"{per_class['min']:,} to {per_class['max']:,} records each, median {per_class['median']:,.0f}",
            f"  shards      {split['num_shards']:,} of {split['shard_bytes']['min'] / 1e6:,.1f} "
            f"to {split['shard_bytes']['max'] / 1e6:,.1f} MB",
            f"  image size  height {heights['min']} to {heights['max']}, median {heights['median']:g}; "
            f"width {widths['min']} to {widths['max']}, median {widths['median']:g} pixels",
        ]
        made = split["prepare"]
        names = [name for name in ("seed", "resize", "quality", "raw_size") if made.get(name) is not None]
        options = [printable(f"{name} {made[name]}") for name in names]
        if options:
            lines.append(f"  made by     {printable(str(made.get('program', 'unknown')))}: {', '.join(options)}")
    return "\n".join(lines)
