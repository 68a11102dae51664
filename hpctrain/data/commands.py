"""`hpctrain data ...`: prepare, info, verify and extract. Imports nothing heavy until a verb runs."""

import sys
from pathlib import Path
from typing import Any

import click

from hpctrain.errors import UserError
from hpctrain.staging.commands import stage_command


@click.group("data", help="Make, look at and check data sets of HDF5 shards.")
def data() -> None: ...


data.add_command(stage_command)


@data.command("prepare")
@click.argument("input_path", metavar="INPUT", type=click.Path(path_type=Path))
@click.argument("output", metavar="OUTPUT", type=click.Path(path_type=Path))
@click.option("--split", type=click.Choice(["train", "val"]), required=True, help="The shards go to OUTPUT/SPLIT.")
@click.option(
    "--labels", type=click.Path(path_type=Path), help="Classes of images without folders: the devkit or a list."
)
@click.option("--shards", type=int, help="Number of files; by default 8 or more of at most 128 MiB.")
@click.option("--shard-mb", type=float, metavar="MB", help="Size of a file at most, about; instead of --shards.")
@click.option("--resize", type=int, metavar="PIXELS", help="Scale images down to this shorter side; else keep JPEGs.")
@click.option("--quality", type=int, default=90, show_default=True, help="JPEG quality of scaled images.")
@click.option("--raw", type=int, metavar="PIXELS", help="Store decoded images of PIXELS x PIXELS instead of JPEGs.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the global shuffle.")
@click.option("--workers", type=int, help="Processes; by default one a core, or one a rank under MPI.")
@click.option("--classes", type=click.Path(path_type=Path), help="File of class names (WNIDs) in label order.")
@click.option("--decode", is_flag=True, help="Decode JPEGs that are kept, too, as a check (else header and end).")
@click.option("--skip-bad", is_flag=True, help="Leave out images that cannot be decoded.")
@click.option("--overwrite", is_flag=True, help="Replace a data set that OUTPUT/SPLIT already holds.")
@click.pass_context
def prepare_command(context: click.Context, input_path: Path, output: Path, **options: Any) -> None:
    """Turn INPUT into the shards OUTPUT/train or OUTPUT/val.

    INPUT is what ImageNet comes as: a folder with one folder of images per class; ILSVRC2012_img_train.tar;
    ILSVRC2012_img_val.tar, with --labels ILSVRC2012_devkit_t12.tar.gz; a folder of one tar per class; or a folder of
    TFRecords. Nothing is unpacked.

    \b
    --labels also takes the unpacked devkit, synset_labels.txt (a WNID a line, in
    the order of the images), or a CSV file of file names and WNIDs.

    Alone it works with several processes; `mpirun -n N` shares the work over nodes. The shards are the same whatever
    the number. Interrupted, it goes on where it stopped when run again.
    """
    from hpctrain.data.prepare import prepare

    make_group = (context.obj or {}).get("make_group")  # under MPI the main program provides the ranks
    prepare(input_path, output, group=make_group() if make_group else None, **options)


@data.command("info")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info_command(directory: Path, as_json: bool) -> None:
    """Describe the data set in DIR, which holds train/ and val/ or is one of them."""
    import json

    from hpctrain.data.info import describe, format_description

    description = describe(directory)
    click.echo(json.dumps(description, indent=1) if as_json else format_description(description))


@data.command("verify")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option("--workers", type=click.IntRange(min=1), help="Processes; by default one a core.")
@click.option("--decode", is_flag=True, help="Decode every image as well.")
def verify_command(directory: Path, workers: int | None, decode: bool) -> None:
    """Check every byte of the data set in DIR against its checksums, and name every damaged record."""
    from hpctrain.data.verify import verify

    report = verify(directory, workers, decode, quiet=False)
    for problem in (*report.bad_shards, *report.bad_records):
        click.echo(str(problem))
    if not report.ok:
        raise UserError(
            f"{directory} is damaged: {len(report.bad_shards)} shards cannot be read as written and "
            f"{len(report.bad_records)} records are bad; copy "
            "those shards again, or remove them and prepare the data again"
        )
    click.echo(
        f"{directory} is as it was written: {report.num_records:,} records, {report.num_bytes / 1e6:,.1f} MB, "
        f"{report.num_shards:,} shards"
    )


@data.command("extract")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("record", metavar="ID", type=int)
@click.argument("output", metavar="OUT", type=click.Path(path_type=Path))
def extract_command(directory: Path, record: int, output: Path) -> None:
    """Write the image of record ID of the split in DIR to the file OUT."""
    from hpctrain.data.atomic import write_file
    from hpctrain.data.reader import ShardReader
    from hpctrain.data.shard_file import printable

    if output.is_dir():
        raise UserError(f"{output} is a folder; name the file to write, such as {output / 'image.jpg'}")
    reader = ShardReader(directory)
    if not 0 <= record < reader.num_records:
        raise UserError(f"record {record} is not in {directory}; expected 0 to {reader.num_records - 1}")
    blob = reader.read([record])[0]
    if reader.encoding == "raw":
        import numpy as np

        from hpctrain.data.images import encode_jpeg

        blob = encode_jpeg(np.frombuffer(blob, np.uint8).reshape(reader.image_shape))
    try:
        write_file(output, blob)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error
    label = int(reader.labels([record])[0])
    class_name = reader.class_names[label]
    made_from = printable(reader.name(record))
    click.echo(f"{output}: {len(blob):,} bytes, class {label} ({printable(class_name)}), made from {made_from}")


def run_standalone(command: click.Command) -> None:
    """Run one of the commands as a program of its own; a UserError ends it with its sentence and exit code 2."""
    try:
        command.main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
