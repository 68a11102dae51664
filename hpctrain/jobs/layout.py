"""From a site's node to ranks, threads and binding, and the words with which each launcher is told of them.

Everything here is arithmetic on a profile: no scheduler is asked and no environment is read. docs/sites.md works
through examples.
"""

from collections.abc import Callable
from dataclasses import dataclass

from hpctrain.errors import UserError
from hpctrain.jobs.site import Site

# ALCF's guides for its Slingshot machines: what jobs need to get through with many more messages in flight.
SLINGSHOT_MANY_NODES = 16
SLINGSHOT_VARIABLES = {"FI_CXI_DEFAULT_CQ_SIZE": "131072", "FI_CXI_OFLOW_BUF_SIZE": "8388608"}

# Intel's OpenMP on Xeon Phi, as in TACC's and ALCF's scripts: a thread that waits gives its core away at once, and
# neighboring threads sit on neighboring cores, one each before any core has two.
KNL_VARIABLES = {"KMP_BLOCKTIME": "0", "KMP_AFFINITY": "granularity=fine,compact,1,0"}


@dataclass(frozen=True)
class Layout:
    """How a job sits on its nodes. Cores are physical cores; all nodes are alike."""

    nodes: int
    ranks: int  # in all
    ranks_per_node: int
    cores_per_rank: int  # for compute
    bound_cores_per_rank: int  # that the launcher binds it to: those for compute, and its part of the reserved ones
    threads_per_rank: int  # compute threads: train.threads, OMP_NUM_THREADS
    cpus_per_task: int  # hardware threads, as the launcher counts them: --cpus-per-task, --depth
    reserved_cores: int  # cores a node without a compute thread: those asked for, and what divides no further


def layout(site: Site, nodes: int, ranks_per_node: int | None = None, cores: int | None = None) -> Layout:
    """Return how ranks and threads are laid out on `nodes` nodes of a site.

    `ranks_per_node` is the site's own when not given. `cores` is how many physical cores a node really has; a profile
    that does not know (`node.nominal`: `local`, the generic ones) stands for a core a rank without it.

    A node is cut into as many equal regions as it has sockets, or ranks if those are fewer; each region gives up its
    part of the reserved cores and deals out the rest. Ranks therefore never straddle sockets, unless there are fewer
    ranks than sockets, and then a rank has whole ones. A launcher that counts cores from the first one on comes to the
    same only when no core is left over between sockets, so a number of ranks that would leave some is refused.

    How many nodes there are is not asked here: that is a limit of the site like others, which site.partition_for knows.
    Raises UserError for more ranks than cores, and for ranks that do not divide over the sockets and their cores.
    """
    per_node = site.ranks_per_node if ranks_per_node is None else ranks_per_node
    if nodes < 1:
        raise UserError(f"nodes is {nodes}; expected 1 or more")
    if per_node < 1:
        raise UserError(f"ranks_per_node is {per_node}; expected 1 or more")
    if cores is not None and cores < 1:
        raise UserError(f"cores is {cores}; expected the number of physical cores of a node")

    if cores is None and site.node.nominal:
        cores = max(site.node.cores, site.reserved_cores + per_node)
    node_cores, sockets = site.node.cores, site.node.sockets
    if cores is not None:
        node_cores, sockets = cores, sockets if cores % sockets == 0 else 1
    compute, bound = _deal(node_cores, sockets, site.reserved_cores, per_node)
    if compute < 1:
        raise UserError(_refusal(site, node_cores, sockets, per_node))
    return Layout(
        nodes=nodes,
        ranks=nodes * per_node,
        ranks_per_node=per_node,
        cores_per_rank=compute,
        bound_cores_per_rank=bound,
        threads_per_rank=compute * site.threads_per_core_used,
        cpus_per_task=bound * _cpus_a_core(site),
        reserved_cores=node_cores - per_node * compute,
    )


def launch_arguments(site: Site, plan: Layout) -> list[str]:
    """Return the words before the program: the launcher with its options, then numactl where the site wants it.

    No word holds a space. The variables of `environment` have to be exported already. For srun export
    SRUN_CPUS_PER_TASK as well, in case it is called elsewhere without --cpus-per-task: since Slurm 22.05 it does not
    take that over from sbatch. Open MPI's mpirun hands ranks on other nodes only what it is told to (`-x NAME`,
    placed after the first word): that is left to the job script, which knows what it exports.
    """
    words = _LAUNCHERS[site.launcher](site, plan)
    return [*words, "numactl", *site.numactl] if site.numactl else words


def environment(site: Site, plan: Layout) -> dict[str, str]:
    """Return the variables to export in a job, those of the profile last: what they name they decide."""
    # Machines preset OMP_NUM_THREADS to every hardware thread of the node (256 on Crux), so it is always set here.
    variables = {"OMP_NUM_THREADS": str(plan.threads_per_rank), "HDF5_USE_FILE_LOCKING": "FALSE"}
    if site.node.fast_memory is not None and site.node.fast_memory.kind == "MCDRAM":  # which only Xeon Phi has
        variables |= KNL_VARIABLES
    if site.network.fabric == "slingshot" and plan.nodes > SLINGSHOT_MANY_NODES:
        variables |= SLINGSHOT_VARIABLES
    return variables | site.environment


def _deal(cores: int, sockets: int, reserved: int, ranks: int) -> tuple[int, int]:
    """The cores for compute and the bound cores of one of a node's ranks; (0, 0) where it cannot be."""
    regions = min(ranks, sockets)
    if ranks % regions or sockets % regions:
        return 0, 0
    region_cores, region_ranks = cores // regions, ranks // regions
    if regions > 1 and region_cores % region_ranks:
        return 0, 0
    compute = (region_cores - -(-reserved // regions)) // region_ranks
    return max(0, compute), region_cores // region_ranks


def _refusal(site: Site, cores: int, sockets: int, ranks: int) -> str:
    possible = [n for n in range(1, cores + 1) if _deal(cores, sockets, site.reserved_cores, n)[0] > 0]
    node = f"a node of {site.name} has {cores} cores on {sockets} socket{'s' * (sockets > 1)}"
    kept = f", {site.reserved_cores} of them reserved" if site.reserved_cores else ""
    if not possible:
        return f"no rank fits: {node}{kept}; lower reserved_cores in a profile of your own"
    if sockets == 1:
        return f"{ranks} ranks a node are too many: {node}{kept}; choose at most {possible[-1]}"
    return f"{ranks} ranks a node do not divide evenly: {node}{kept}; choose {', '.join(map(str, possible))}"


def _cpus_a_core(site: Site) -> int:
    """How many of what the launcher counts make up a core."""
    if site.launcher == "mpiexec-pals":
        return 1  # `depth` takes CPU numbers in sequence, and those of every core's first thread come first
    if site.launcher == "aprun":
        return site.threads_per_core_used  # -j: it sees only that many threads of a core
    return site.node.threads_per_core


def _srun(site: Site, plan: Layout) -> list[str]:
    return [
        "srun",
        *([f"--mpi={site.srun_mpi}"] if site.srun_mpi else []),
        f"--nodes={plan.nodes}",
        f"--ntasks={plan.ranks}",
        f"--ntasks-per-node={plan.ranks_per_node}",
        f"--cpus-per-task={plan.cpus_per_task}",
        "--cpu-bind=cores",
    ]


def _mpirun(site: Site, plan: Layout) -> list[str]:
    words = ["mpirun", "-n", str(plan.ranks)]
    if site.node.nominal:
        # Which cores are ours is not known: bound from the first one on, two jobs on a node would share one core and
        # leave the others idle. `hpctrain train` shares out the cores it may use among the ranks of a host itself.
        # Locally all "nodes" are this machine, and may have more ranks than it has cores.
        place = ":OVERSUBSCRIBE" if site.scheduler == "local" else f"ppr:{plan.ranks_per_node}:node"
        return [*words, "--map-by", place, "--bind-to", "none"]
    cores = f"ppr:{plan.ranks_per_node}:node:PE={plan.bound_cores_per_rank}"
    return [*words, "--map-by", cores, "--bind-to", "core"]


def _hydra(site: Site, plan: Layout) -> list[str]:
    words = ["mpiexec.hydra", "-n", str(plan.ranks)]
    words += [] if site.scheduler == "local" else ["-ppn", str(plan.ranks_per_node)]
    if site.node.nominal:
        return [*words, "-genv", "I_MPI_PIN", "off"]  # as with mpirun
    # The size of a domain is in logical processors; compact makes them whole neighboring cores.
    return [*words, "-genv", "I_MPI_PIN_DOMAIN", f"{plan.cpus_per_task}:compact"]


def _pals(site: Site, plan: Layout) -> list[str]:
    words = ["mpiexec", "-n", str(plan.ranks), "--ppn", str(plan.ranks_per_node)]
    return [*words, f"--depth={plan.cpus_per_task}", "--cpu-bind", "depth"]


def _ibrun(site: Site, plan: Layout) -> list[str]:
    return ["ibrun"]  # takes nodes and ranks from the job, and gives each rank an equal part of the node


def _aprun(site: Site, plan: Layout) -> list[str]:
    words = ["aprun", "-n", str(plan.ranks), "-N", str(plan.ranks_per_node), "-d", str(plan.cpus_per_task)]
    return [*words, "-j", str(site.threads_per_core_used), "-cc", "depth"]


_LAUNCHERS: dict[str, Callable[[Site, Layout], list[str]]] = {
    "srun": _srun,
    "mpirun": _mpirun,
    "mpiexec.hydra": _hydra,
    "mpiexec-pals": _pals,
    "ibrun": _ibrun,
    "aprun": _aprun,
}
