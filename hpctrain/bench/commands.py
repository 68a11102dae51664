"""`hpctrain bench ...`. Imports nothing heavy until a verb runs."""

import json
from pathlib import Path
from typing import Any

import click


@click.group("bench", help="Measure parts of a training job on this machine.")
def bench() -> None: ...


@bench.command("input")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--augmentation", type=click.Choice(["none", "weak", "heavy"]), default="heavy", show_default=True)
@click.option("--image-size", type=click.IntRange(min=1), default=224, show_default=True, help="In pixels.")
@click.option("--micro-batch", type=click.IntRange(min=1), default=32, show_default=True)
@click.option("--threads", type=click.IntRange(min=1), help="Of TensorFlow; by default one a core.")
@click.option("--shuffle-block", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--partitions", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--seconds", type=click.FloatRange(min=0.1), default=5.0, show_default=True, help="A repeat takes.")
@click.option("--repeats", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--drop-cache", is_flag=True, help="Forget cached shards first, to measure the file system too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def input_command(directory: Path, threads: int | None, as_json: bool, **options: Any) -> None:
    """Read, crop and decode training images of the split in DIR as one rank does, and say how many a second."""
    from hpctrain.bench.input import measure_input
    from hpctrain.data.manifest import split_directories
    from hpctrain.data.processes import available_cores
    from hpctrain.parallel.quiet import import_tensorflow

    split = split_directories(directory)[0]  # of several, train
    import_tensorflow()
    rates = measure_input(split, threads=threads or available_cores(), **options)
    if as_json:
        click.echo(json.dumps(rates.to_dict(), indent=1))
        return
    low, high = min(rates.images_per_second), max(rates.images_per_second)
    click.echo(
        f"{rates.median:,.0f} images/s ({low:,.0f} to {high:,.0f}), {rates.megabytes_per_second:,.1f} MB/s: "
        f"{split}, {rates.encoding}, {rates.augmentation} augmentation to {rates.image_size} pixels, "
        f"{rates.threads} threads"
    )
