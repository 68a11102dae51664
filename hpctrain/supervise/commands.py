"""`hpctrain supervise`. Imports nothing heavy: no MPI, no TensorFlow."""

from pathlib import Path

import click

_SECONDS = click.FloatRange(min=0, min_open=True)


@click.command("supervise")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- hpctrain train RECIPE ...")
@click.option("--launch", required=True, metavar='"WORDS"', help="What starts the ranks, such as `srun --mpi=pmix`.")
@click.option("--spare-nodes", type=click.IntRange(min=0), default=0, show_default=True, help="Nodes kept in reserve.")
@click.option("--tries", type=click.IntRange(min=1), default=5, show_default=True, help="Launches in all.")
@click.option("--min-nodes", type=click.IntRange(min=1), help="Fewer are not worth it; default: half of those wanted.")
@click.option(
    "--on-too-few",
    type=click.Choice(["continue", "requeue"]),
    default="continue",
    show_default=True,
    help="With fewer nodes than wanted: go on with as many as the batch divides over, or exit with 85.",
)
@click.option("--hosts", metavar="A,B,...", help="Instead of those of the Slurm or PBS job.")
@click.option("--hostfile", type=click.Path(path_type=Path), help="The same from a file, a host a line.")
@click.option("--ranks-per-node", type=click.IntRange(min=1), help="Default: what the launch words or the job say.")
@click.option(
    "--slow-factor",
    type=click.FloatRange(min=1, min_open=True),
    default=2.0,
    show_default=True,
    help="A host that takes so many times as long as the median is excluded.",
)
@click.option("--probe-seconds", type=_SECONDS, default=60.0, show_default=True, help="Time for a host to answer.")
@click.option("--watch-seconds", type=_SECONDS, default=30.0, show_default=True, help="Between two looks at Slurm's.")
@click.option(
    "--quiet-seconds", type=_SECONDS, default=180.0, show_default=True, help="Without a step, before hosts are asked."
)
@click.option(
    "--stall-seconds", type=_SECONDS, default=1800.0, show_default=True, help="Without a step, before the run is ended."
)
@click.option(
    "--grace-seconds", type=_SECONDS, default=30.0, show_default=True, help="For the launcher to end without a host."
)
@click.option(
    "--pause-seconds", type=_SECONDS, default=5.0, show_default=True, help="Before the second launch; then doubled."
)
def supervise(
    command: tuple[str, ...],
    launch: str,
    spare_nodes: int,
    tries: int,
    min_nodes: int | None,
    on_too_few: str,
    hosts: str | None,
    hostfile: Path | None,
    ranks_per_node: int | None,
    slow_factor: float,
    probe_seconds: float,
    watch_seconds: float,
    quiet_seconds: float,
    stall_seconds: float,
    grace_seconds: float,
    pause_seconds: float,
) -> int:
    """Run a training command on the healthy nodes of a job, and go on without those that fail.

    Run by job scripts on the job's first node. Exit codes: 0 finished, 85 stopped and to go on later, 2 a mistake to be
    mended, else the failed command's. RUN_DIR/supervise.jsonl has an account.
    """
    import os
    import shlex

    from hpctrain.data.atomic import make_folder
    from hpctrain.errors import UserError, cannot_start
    from hpctrain.supervise import launchers
    from hpctrain.supervise.account import Account
    from hpctrain.supervise.hosts import find_allocation
    from hpctrain.supervise.supervisor import Options, Supervisor
    from hpctrain.supervise.training import read_command

    try:
        words = shlex.split(launch)
    except ValueError as error:
        raise UserError(f"--launch {launch!r} is no line of shell words: {error}") from None
    if not words:
        raise UserError("--launch is empty; give the words that start the ranks, such as 'srun --mpi=pmix'")
    training = read_command(command)
    make_folder(training.run_dir)
    account = Account(training.run_dir)
    kind = launchers.family(words, launchers.version_of(words[0]))
    if kind is None:
        reason = f"{words[0]} cannot be told which hosts to use: running without recovery"
        account.tell("start", reason)
        try:
            os.execvp(words[0], [*words, *command])
        except OSError as error:
            raise cannot_start(words[0], error) from None
    allocation = find_allocation(hosts, hostfile, os.environ)
    wanted = len(allocation.hosts) - spare_nodes
    if wanted < 1:
        raise UserError(f"--spare-nodes {spare_nodes} leaves none of {len(allocation.hosts)} hosts to run on")
    per_node = ranks_per_node or launchers.ranks_per_node(kind, words, wanted, allocation.ranks_per_host)
    if training.config is not None:
        training.config.micro_batches_a_rank(wanted * per_node)
    options = Options(
        spare_nodes=spare_nodes,
        tries=tries,
        min_nodes=(wanted + 1) // 2 if min_nodes is None else min_nodes,
        go_on_with_fewer=on_too_few == "continue",
        slow_factor=slow_factor,
        probe_seconds=probe_seconds,
        watch_seconds=watch_seconds,
        quiet_seconds=quiet_seconds,
        stall_seconds=stall_seconds,
        grace_seconds=grace_seconds,
        pause_seconds=pause_seconds,
    )
    return Supervisor(allocation, kind, words, per_node, training, options, account).run()
