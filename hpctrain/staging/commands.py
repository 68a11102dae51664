"""`hpctrain data stage`, which is also data_prep/stage.py. Imports nothing heavy until it runs."""

from pathlib import Path

import click


@click.command("stage")
@click.argument("data", metavar="DATA", type=click.Path(path_type=Path))
@click.argument("local", metavar="LOCAL", type=click.Path(path_type=Path))
@click.option(
    "--split", type=click.Choice(["train", "val", "both"]), default="both", show_default=True, help="What to stage."
)
@click.option(
    "--partitions",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="The training's data.partitions: a node gets the train shards of those its ranks read.",
)
@click.option(
    "--val-micro-batch",
    type=click.IntRange(min=1),
    help="The evaluation's micro-batch: a node gets only the val shards its ranks evaluate; else all.",
)
@click.option("--verify-existing", is_flag=True, help="Read and check every record of shards that are there already.")
def stage_command(
    data: Path, local: Path, split: str, partitions: int, val_micro_batch: int | None, verify_existing: bool
) -> None:
    """Copy the shards of DATA that each node needs to LOCAL, a directory on its own disk or memory.

    Run it with several ranks (mpirun, srun) on the nodes that will train: every node gets the shards that its share of
    the ranks reads, each shard is read once on the shared file system. What is there already is kept.
    """

    def main() -> int:
        from hpctrain.parallel.launch import launcher_size
        from hpctrain.parallel.world import alone, start
        from hpctrain.staging.shards import stage

        stage(
            data,
            local,
            start() if launcher_size() > 1 else alone(),
            splits=("train", "val") if split == "both" else (split,),
            partitions=partitions,
            val_micro_batch=val_micro_batch,
            verify_existing=verify_existing,
            say=click.echo,
        )
        return 0

    from hpctrain.parallel.world import run_rank

    run_rank(main)
