"""`hpctrain bench ...`. Imports nothing heavy until a verb runs."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

_OUT = click.Path(path_type=Path, dir_okay=False)


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


@bench.command("step")
@click.argument("recipe")
@click.argument("overrides", nargs=-1, metavar="[KEY.SUB=VALUE]...")
@click.option("--steps", type=click.IntRange(min=1), default=10, show_default=True, help="Timed, after a warm-up.")
@click.option("--allreduce", "with_allreduce", is_flag=True, help="Measure the step with its allreduce too.")
@click.option("--no-layers", is_flag=True, help="Leave the profile of the layers out.")
@click.option(
    "--profile-seconds", type=click.FloatRange(min=0), default=20.0, show_default=True, help="For the layers."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--out", type=_OUT, metavar="FILE", help="Write the JSON to this file too.")
def step_command(
    recipe: str,
    overrides: tuple[str, ...],
    steps: int,
    with_allreduce: bool,
    no_layers: bool,
    profile_seconds: float,
    as_json: bool,
    out: Path | None,
) -> None:
    """Time a train step of RECIPE and its parts: images/s, share of peak, layers. Runs under mpirun and srun too.

    A step is one micro-batch of made-up images in memory, with the recipe's model, optimizer, precision and threads.
    """

    def main() -> int:
        from hpctrain.config import load_config
        from hpctrain.errors import UserError
        from hpctrain.parallel.quiet import import_tensorflow
        from hpctrain.parallel.world import start
        from hpctrain.training.dataset import open_data

        config = load_config(recipe, overrides)
        world = start(deterministic=config.train.deterministic, threads=config.train.threads)
        if with_allreduce and world.size == 1:
            raise UserError(
                "--allreduce needs two ranks or more and this is one alone; run `mpirun -n 2 hpctrain bench step ...`"
            )
        config.micro_batches_a_rank(world.size)
        note = ""
        path = config.data.path
        if config.data.synthetic or path is None or not world.from_root(lambda: Path(path).is_dir()):
            where = "data.synthetic=true" if config.data.synthetic else f"no data at data.path={path}"
            note = f"the input pipeline was not measured: {where}"
            config.data.synthetic = True
        data = open_data(config, world)
        _check_files(world, out)
        import_tensorflow()
        from hpctrain.bench.step import measure_step

        result = measure_step(
            config,
            world,
            data,
            steps=steps,
            with_allreduce=with_allreduce,
            profile_seconds=None if no_layers else profile_seconds,
        )
        if world.is_root:
            from hpctrain.bench.tables import print_step

            _give(result, out, as_json, lambda: print_step(result, note))
        return 0

    _run_rank(main)


@bench.command("allreduce")
@click.option(
    "--sizes", default="4K,64K,1M,16M,64M,256M", show_default=True, help="Bytes; K, M, G are powers of 1,024."
)
@click.option("--repeats", type=click.IntRange(min=1), default=10, show_default=True)
@click.option("--no-horovod", is_flag=True, help="Raw MPI only; loads no TensorFlow.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--plot", type=_OUT, metavar="FILE.png", help="Draw time and bus bandwidth.")
@click.option("--out", type=_OUT, metavar="FILE.json", help="Write the JSON to this file too.")
def allreduce_command(
    sizes: str, repeats: int, no_horovod: bool, as_json: bool, plot: Path | None, out: Path | None
) -> None:
    """Time sums over all ranks by message size, through Horovod and by raw MPI. Run it under mpirun or srun."""

    def main() -> int:
        from hpctrain.bench.allreduce import measure_allreduce, parse_sizes
        from hpctrain.parallel.world import start

        sizes_bytes = parse_sizes(sizes)
        world = start()
        _check_files(world, out, plot)
        result = measure_allreduce(world, sizes_bytes, repeats, horovod=not no_horovod)
        if world.is_root:
            from hpctrain.bench.tables import print_allreduce

            if plot is not None:
                from hpctrain.bench.allreduce_plot import plot_allreduce
                from hpctrain.data.atomic import write_file

                write_file(plot, plot_allreduce(result))
            _give(result, out, as_json, lambda: print_allreduce(result))
        return 0

    _run_rank(main)


def _run_rank(main: Callable[[], int]) -> None:
    from hpctrain.parallel.world import run_rank

    run_rank(main)


def _check_files(world: Any, *paths: Path | None) -> None:
    """Raise UserError on every rank, before anything is measured, when rank 0 cannot write one of the files."""
    from hpctrain.errors import UserError

    def check() -> None:
        for path in paths:
            if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
                raise UserError(f"{path} cannot be written: {path.parent} is no folder one can write to; make it first")

    world.from_root(check)


def _give(result: dict[str, Any], out: Path | None, as_json: bool, print_table: Callable[[], None]) -> None:
    """Write the result to its file, and print it as JSON or as a table."""
    from hpctrain.data.atomic import write_file

    text = json.dumps(result, indent=1)
    if out is not None:
        write_file(out, text.encode() + b"\n")
    if as_json:
        click.echo(text)
    else:
        print_table()
