"""Site profiles: what is known of a machine, one YAML file each. Every key is in docs/sites.md."""

import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from hpctrain.errors import UserError, nearest
from hpctrain.yaml_file import Section, explain, read_yaml

Scheduler = Literal["slurm", "pbs", "local"]
Launcher = Literal["srun", "mpirun", "mpiexec.hydra", "mpiexec-pals", "ibrun", "aprun"]
LAUNCHERS: dict[str, tuple[str, ...]] = {
    "slurm": ("srun", "mpirun", "mpiexec.hydra", "ibrun"),
    "pbs": ("mpirun", "mpiexec.hydra", "mpiexec-pals", "aprun"),
    "local": ("mpirun", "mpiexec.hydra"),
}


def _text(pattern: str, expected: str) -> BeforeValidator:
    """Return the validator of a string that matches all of `pattern`, which else tells what was `expected`."""

    def check(value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError(f"expected {expected}; put it in quotes")  # YAML reads 1, yes and 48:00:00 as no text
        if not re.fullmatch(pattern, value):
            raise ValueError(f"expected {expected}")
        return value

    return BeforeValidator(check)


# What follows is written into job scripts. Only lines, names and numbers can be: nothing that starts a new line.
_LINE = r"[^\x00-\x1f\x7f\x85\u2028\u2029]*"
_VARIABLE = r"\$(?:[A-Za-z_][A-Za-z0-9_]*|\{[A-Za-z_][A-Za-z0-9_]*(?::-/[A-Za-z0-9._/-]*)?\})"
Line = Annotated[str, _text(_LINE, "one line of text")]
Name = Annotated[str, _text(r"[A-Za-z0-9][A-Za-z0-9._-]*", "a name of letters, digits, dots, dashes, underscores")]
Variable = Annotated[str, _text(r"[A-Za-z_][A-Za-z0-9_]*", "the name of an environment variable")]
Directive = Annotated[
    str, _text(rf"--?[A-Za-z]{_LINE}", "one option such as -C knl, without #SBATCH or #PBS before it")
]
Walltime = Annotated[str, _text(r"[0-9]{1,3}:[0-5][0-9]:[0-5][0-9]", 'a time "HH:MM:SS"')]
Folder = Annotated[
    str,
    _text(
        rf"(?!.*(?:^|/)\.\.(?:/|$))(?:/|{_VARIABLE})(?:{_VARIABLE}|[A-Za-z0-9._/-])*",
        "an absolute folder of letters, digits, dots, dashes, underscores and variables such as $TMPDIR",
    ),
]
Select = Annotated[
    str,
    _text(
        r"[a-z0-9_]+=[A-Za-z0-9_.-]+(:[a-z0-9_]+=[A-Za-z0-9_.-]+)*", "resource=value, or several with colons between"
    ),
]
Word = Annotated[str, _text(r"[A-Za-z0-9=,:+.-]+", "an option of numactl such as --preferred=1")]


class _Part(Section):
    model_config = ConfigDict(frozen=True)


class Network(_Part):
    """The alpha-beta model of a network: a message of n bytes between two nodes takes latency + n * seconds a byte."""

    latency_seconds: float = Field(gt=0, description="alpha: time of an empty message")
    seconds_per_byte: float = Field(gt=0, description="beta: the inverse of a node's bandwidth")
    source: Line = Field(description="where the two numbers come from")
    fabric: Literal["omni-path", "aries", "slingshot", "infiniband", "ethernet"] | None = Field(
        None, description="what it is; slingshot gets settings of its own on many nodes"
    )


class FastMemory(_Part):
    """Memory on the processor's package: MCDRAM of a Xeon Phi, HBM of a Xeon Max."""

    kind: Line = Field(description="MCDRAM, HBM2e, ...")
    gb: float = Field(gt=0, description="gigabytes a node")
    mode: Literal["cache", "flat"] = Field(description="cache: in front of the DDR memory; flat: NUMA nodes of its own")


class Node(_Part):
    """One node's processors and memory."""

    sockets: int = Field(1, gt=0, description="processors")
    cores_per_socket: int = Field(1, gt=0, description="physical cores a processor")
    threads_per_core: int = Field(1, gt=0, description="hardware threads a core, as the scheduler counts them")
    memory_gb: float | None = Field(None, gt=0, description="gigabytes of main memory, without fast memory")
    fast_memory: FastMemory | None = Field(None, description="memory on the package, where there is some")
    nominal: bool = Field(False, description="the numbers are a guess, for a profile of no machine in particular")

    @model_validator(mode="after")
    def _says_its_cores(self) -> "Node":
        if not self.nominal and not {"sockets", "cores_per_socket"} <= self.model_fields_set:
            raise ValueError("give sockets and cores_per_socket, or nominal: true where they are not known")
        return self

    @property
    def cores(self) -> int:
        """Physical cores of the node."""
        return self.sockets * self.cores_per_socket


class Partition(_Part):
    """The limits of a partition (Slurm) or queue (PBS)."""

    min_nodes: int = Field(1, gt=0, description="nodes a job must have")
    max_nodes: int | None = Field(None, gt=0, description="nodes a job may have")
    max_walltime: Walltime | None = Field(None, description='time a job may take, "HH:MM:SS"')


class Site(_Part):
    """One machine, as the job layer sees it.

    A profile with the scheduler `local` needs no more than a name and what the planner uses; others say what a node is.
    """

    name: Name = Field(description="the profile's name")
    description: Line = Field(description="the machine in words")
    source: Line = Field(description="where the profile's facts come from")
    nodes: int = Field(gt=0, description="how many nodes it has")
    network: Network
    images_per_second: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="training rate of one node by model, as published"
    )
    micro_batch_seconds: dict[str, dict[int, Annotated[float, Field(gt=0)]]] = Field(
        default_factory=dict,
        description="forward and backward pass of a node by model and images, where that is known for several sizes",
    )
    scheduler: Scheduler = Field("local", description="slurm, pbs, or local: mpirun on this machine")
    launcher: Launcher = Field("mpirun", description="what starts the ranks")
    srun_mpi: Annotated[str, _text(r"[a-z0-9_]+", "a name that `srun --mpi=list` lists")] | None = Field(
        None, description="srun --mpi=..., such as pmix or pmi2; srun's default when unset"
    )
    node: Node = Field(Node(nominal=True), description="one node")
    ranks_per_node: int = Field(1, gt=0, description="ranks on a node when the user names no number")
    reserved_cores: int = Field(0, ge=0, description="cores of a node for the system and communication")
    threads_per_core_used: int = Field(1, gt=0, description="compute threads on a core")
    environment: dict[Variable, Annotated[str, _text(_LINE, "one line of text")]] = Field(
        default_factory=dict, description="variables to export, taken literally: no $VARIABLE is replaced"
    )
    setup: list[Line] = Field(
        default_factory=list, description="lines of shell, run as they stand before anything else: module load ..."
    )
    directives: list[Directive] = Field(default_factory=list, description="further options of the batch system")
    select: Select | None = Field(None, description="words for each chunk of PBS's select: system=crux")
    partitions: dict[Name, Partition] = Field(default_factory=dict, description="limits that are checked, by name")
    default_partition: Name | None = Field(None, description="partition or queue when the user names none")
    node_local: Folder | None = Field(None, description="folder on each node to copy data and programs to")
    numactl: list[Word] = Field(default_factory=list, description="options of a numactl before the program")

    @model_validator(mode="after")
    def _fits_together(self) -> "Site":
        if self.launcher not in LAUNCHERS[self.scheduler]:
            fitting = ", ".join(LAUNCHERS[self.scheduler])
            raise ValueError(f"launcher {self.launcher} does not go with scheduler {self.scheduler}; choose {fitting}")
        if self.srun_mpi is not None and self.launcher != "srun":
            raise ValueError(f"srun_mpi is {self.srun_mpi} but the launcher is {self.launcher}; leave srun_mpi out")
        if self.select is not None and self.scheduler != "pbs":
            raise ValueError("select is for the scheduler pbs; give Slurm's options as directives")
        if self.scheduler != "local" and "node" not in self.model_fields_set:
            raise ValueError("node is not set; give its sockets, cores_per_socket and threads_per_core")
        if self.threads_per_core_used > self.node.threads_per_core:
            raise ValueError(
                f"threads_per_core_used is {self.threads_per_core_used} but a core has {self.node.threads_per_core}"
            )
        if self.launcher == "mpiexec-pals" and self.threads_per_core_used > 1:
            raise ValueError("mpiexec-pals binds to one thread of a core here; leave threads_per_core_used at 1")
        if self.reserved_cores >= self.node.cores and not self.node.nominal:
            raise ValueError(f"reserved_cores is {self.reserved_cores} and leaves none of the {self.node.cores} cores")
        if self.partitions and self.default_partition is not None and self.default_partition not in self.partitions:
            raise ValueError(
                f"default_partition {self.default_partition} is not one of the partitions: {', '.join(self.partitions)}"
            )
        return self


_PARTS: dict[str, type[_Part]] = {
    "network": Network,
    "node": Node,
    "node.fast_memory": FastMemory,
    "partitions.NAME": Partition,
}


def partition_for(site: Site, nodes: int, seconds: int, partition: str | None = None) -> tuple[str | None, str | None]:
    """Return the partition (queue) for a job, and what is wrong with it: a sentence where the job is beyond the limits.

    The partition is the one named, the site's default, or else the first whose limits fit. If none does it is the one
    that is least wrong: with the longest walltime of those that take so many nodes, else with the most nodes. A named
    one that the profile does not list is taken as it is. None means that the profile names none, and that the batch
    system's own default is right.
    """
    if partition is not None:
        wanted = [partition]
    else:
        wanted = list(dict.fromkeys([*([site.default_partition] if site.default_partition else []), *site.partitions]))
    limits = {name: site.partitions.get(name, Partition()) for name in wanted}
    most = {name: min(limit.max_nodes or site.nodes, site.nodes) for name, limit in limits.items()}
    longest = {name: _seconds(limit.max_walltime or "9999:00:00") for name, limit in limits.items()}
    wide_enough = [name for name in wanted if limits[name].min_nodes <= nodes <= most[name]]
    misfits = []
    for name in wanted:
        if name not in wide_enough:
            misfits.append(f"{name} takes {limits[name].min_nodes:,} to {most[name]:,} nodes")
        elif limits[name].max_walltime and seconds > longest[name]:
            misfits.append(f"{name} takes up to {limits[name].max_walltime}")
        else:
            return name, None
    room = longest if wide_enough else most
    best = max(wide_enough or wanted, key=lambda name: room[name], default=None)
    if nodes > site.nodes:
        has = "1 node" if site.nodes == 1 else f"{site.nodes:,} nodes"
        return best, f"{site.name} has {has}, not {nodes:,}; ask for fewer, or set nodes in a profile of your own"
    if misfits:
        job = f"{nodes:,} node{'s' * (nodes > 1)} for {seconds / 3600:.3g} h"
        return best, f"{job} is beyond the limits that {site.name} has: {'; '.join(misfits)}"
    return None, None


def _seconds(walltime: str) -> int:
    hours, minutes, seconds = (int(part) for part in walltime.split(":"))
    return 3600 * hours + 60 * minutes + seconds


def own_folder() -> Path:
    """Return the folder of a user's own profiles."""
    return Path.home() / ".config" / "hpctrain" / "sites"


def site_names() -> list[str]:
    """Return the names of all profiles, the package's and the user's own, sorted."""
    folders = (resources.files("hpctrain.jobs") / "sites", own_folder())
    return sorted({e.name.removesuffix(".yaml") for f in folders if f.is_dir() for e in f.iterdir() if _is_yaml(e)})


def _is_yaml(entry: object) -> bool:
    return str(getattr(entry, "name", "")).endswith(".yaml")


def find_site(site: str) -> Path:
    """Return the YAML file of a profile's name or path; a user's own goes before the package's. Raises UserError."""
    if site.endswith((".yaml", ".yml")) or "/" in site:
        if not Path(site).is_file():
            raise UserError(f"there is no file {site}; give a YAML file or one of the names in `hpctrain sites`")
        return Path(site)
    for folder in (own_folder(), Path(str(resources.files("hpctrain.jobs") / "sites"))):
        if (folder / f"{site}.yaml").is_file():
            return folder / f"{site}.yaml"
    raise UserError(f"there is no site named {site!r}; {nearest(site, site_names())}")


def load_site(site: str) -> Site:
    """Return the profile of a name or YAML file, or raise UserError in one sentence."""
    path = find_site(site)
    try:
        return Site.model_validate(read_yaml(path))
    except ValidationError as error:
        known = [*Site.model_fields]
        for part, model in _PARTS.items():
            known += [f"{part}.{key}" for key in model.model_fields]
        sentence = explain(error, str(path), known)
        raise UserError(sentence if str(path) in sentence else f"{path}: {sentence}") from None
