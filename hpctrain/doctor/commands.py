"""The verb `hpctrain doctor`."""

from pathlib import Path

import click


@click.command()
@click.option(
    "--dir", "directory", type=click.Path(path_type=Path), help="Try this directory; default: the current one."
)
@click.option("--data", type=click.Path(path_type=Path), help="Also read shards of this data set.")
@click.option("--quick", is_flag=True, help="Compare versions, binding and settings only.")
@click.option("--json", "as_json", is_flag=True, help="Print everything that was found, as JSON.")
def doctor(directory: Path | None, data: Path | None, quick: bool, as_json: bool) -> None:
    """Check the installation, the launch and the nodes, and name the odd one out.

    Run it alone, or inside a job on all ranks: srun hpctrain doctor, mpirun -n N hpctrain doctor. Compares versions,
    binding, settings and clocks, measures computing, memory, file systems and MPI. Exit code 0: works, 1: does not.
    """
    from hpctrain.parallel.world import run_rank

    def main() -> int:
        from hpctrain.doctor.examine import examine

        return examine(as_json, directory, data, quick)

    run_rank(main)
