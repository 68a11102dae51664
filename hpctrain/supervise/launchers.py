"""Launch words for some of an allocation's hosts, and for one host's probe: pure functions of words."""

import re
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import PurePath

from hpctrain.errors import UserError

# The launcher's own words end where one of these begins, the program that it is to start.
_WRAPPERS = {"numactl", "taskset", "env", "nice", "hwloc-bind", "likwid-pin", "apptainer", "singularity", "shifter"}

# srun may end the other ranks as soon as one ends with a code other than 0. Ranks that stop as agreed end with 85, a
# few milliseconds apart: the rest would be killed, and the job's code 143 instead of 85. So that is off, also where the
# site's configuration has it on, and what outlives its ranks by two minutes is ended instead.
_SRUN_ENDING = ["--kill-on-bad-exit=0", "--wait=120"]


def family(words: Sequence[str], version: str = "") -> str | None:
    """Return which launcher the words start, or None where its hosts cannot be chosen (ibrun) or it is not known.

    `mpirun` and `mpiexec` are names that several have: `version` is what `mpirun --version` prints.
    """
    name, version = PurePath(words[0]).name, version.lower()
    if name in ("srun", "aprun"):
        return name
    if name in ("prterun", "orterun"):
        return "openmpi"
    if name == "mpiexec.hydra":
        return "hydra"
    if name in ("mpirun", "mpiexec"):
        if "open mpi" in version or "prrte" in version:
            return "openmpi"
        if "hydra" in version or "intel(r) mpi" in version:
            return "hydra"
        return "pals" if name == "mpiexec" else None
    return None


def version_of(program: str) -> str:
    """Return what `program --version` prints, where `family` needs it; nothing if it cannot be run."""
    if PurePath(program).name not in ("mpirun", "mpiexec"):
        return ""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr


def ranks_per_node(kind: str, words: Sequence[str], nodes: int, default: int | None = None) -> int:
    """Return how many ranks the launch words put on each of `nodes` hosts.

    That is what they say for a node, else their total divided by `nodes`, else `default`, else 1. Raises UserError
    for a total that does not divide.
    """
    own, _ = _split(words)
    for value in _take(kind, own, _PER_NODE[kind])[1]:
        match = re.fullmatch(r"(?:ppr:)?(\d+)(?::node.*)?", value)
        if match:
            return int(match[1])
    totals = _take(kind, own, _TOTAL[kind])[1]
    if totals and totals[-1].isdigit():
        total = int(totals[-1])
        if total % nodes or not total:
            raise UserError(f"the launch words start {total} ranks, which do not divide over {nodes} nodes")
        return total // nodes
    return default or 1


def on_hosts(kind: str, words: Sequence[str], hosts: Sequence[str], per_node: int) -> list[str]:
    """Return the launch words that start `per_node` ranks on each of `hosts`, whatever hosts and counts were there."""
    own, program = _split(words)
    own = _take(kind, own, [*_PER_NODE_ONLY[kind], *_TOTAL[kind], *_HOSTS[kind]])[0]
    own = [word for word in own if word.partition("=")[0] not in _FLAGS.get(kind, ())]
    return [own[0], *_PLACE[kind](hosts, per_node), *own[1:], *program]


def for_probe(kind: str, words: Sequence[str], host: str) -> list[str]:
    """Return the launch words for one process on one host that may use all of its cores."""
    own, program = _split(words)
    own = _take(kind, own, _BINDING[kind])[0]
    return on_hosts(kind, [own[0], *_FREE[kind], *own[1:], *program], [host], 1)


def variables(kind: str, hosts: Sequence[str]) -> dict[str, str]:
    """Return what to add to the environment of a launch on these hosts.

    Slurm's PMIx plugin (seen with 22.05) counts a step's nodes within SLURM_JOB_NODELIST, and mixes them up where the
    step leaves out the first of them: one start in ten then hangs in MPI_Init.
    """
    return {"SLURM_JOB_NODELIST": ",".join(hosts)} if kind == "srun" else {}


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The launcher's words, and those of a program such as numactl that follow them."""
    for i, word in enumerate(words):
        if i and PurePath(word).name in _WRAPPERS:
            return list(words[:i]), list(words[i:])
    return list(words), []


def _take(kind: str, words: Sequence[str], options: Collection[str]) -> tuple[list[str], list[str]]:
    """The words without these options, and the values that the options had: `--a=v`, `--a v`, for some also `-av`."""
    kept, values = [words[0]], []
    rest = iter(words[1:])
    for word in rest:
        name, equals, value = word.partition("=")
        short = next((o for o in options if len(o) == 2 and word.startswith(o) and word != o), None)
        if word in options:
            values.append(next(rest, ""))
        elif equals and name in options:
            values.append(value)
        elif short and kind in ("srun", "aprun") and not word.startswith("--"):
            values.append(word[2:])
        else:
            kept.append(word)
    return kept, values


def _srun(hosts: Sequence[str], per_node: int) -> list[str]:
    counts = [f"--nodes={len(hosts)}", f"--ntasks={len(hosts) * per_node}", f"--ntasks-per-node={per_node}"]
    return [*counts, f"--nodelist={','.join(hosts)}", *_SRUN_ENDING]


def _openmpi(hosts: Sequence[str], per_node: int) -> list[str]:
    return ["-n", str(len(hosts) * per_node), "--host", ",".join(f"{host}:{per_node}" for host in hosts)]


def _hydra(hosts: Sequence[str], per_node: int) -> list[str]:
    return ["-hosts", ",".join(hosts), "-n", str(len(hosts) * per_node), "-ppn", str(per_node)]


def _pals(hosts: Sequence[str], per_node: int) -> list[str]:
    return ["--hosts", ",".join(hosts), "-n", str(len(hosts) * per_node), "--ppn", str(per_node)]


def _aprun(hosts: Sequence[str], per_node: int) -> list[str]:
    # It knows nodes by number; as host names they are nid00042.
    numbers = [host.removeprefix("nid").lstrip("0") or "0" if re.fullmatch(r"nid\d+", host) else host for host in hosts]
    return ["-n", str(len(hosts) * per_node), "-N", str(per_node), "-L", ",".join(numbers)]


_PLACE: Mapping[str, Callable[[Sequence[str], int], list[str]]] = {
    "srun": _srun,
    "openmpi": _openmpi,
    "hydra": _hydra,
    "pals": _pals,
    "aprun": _aprun,
}
_TOTAL: Mapping[str, list[str]] = {
    "srun": ["-n", "--ntasks"],
    "openmpi": ["-n", "-np", "--np", "--n", "-c"],
    "hydra": ["-n", "-np"],
    "pals": ["-n", "--np", "-np"],
    "aprun": ["-n"],
}
# What gives the ranks of a node and nothing else.
_PER_NODE_ONLY: Mapping[str, list[str]] = {
    "srun": ["--ntasks-per-node", "-N", "--nodes"],
    "openmpi": ["-N", "--npernode", "-npernode"],
    "hydra": ["-ppn", "-perhost", "-rr"],
    "pals": ["--ppn", "-ppn"],
    "aprun": ["-N"],
}
_PER_NODE: Mapping[str, list[str]] = {
    **_PER_NODE_ONLY,
    "srun": ["--ntasks-per-node"],
    "openmpi": ["-N", "--npernode", "-npernode", "--map-by", "-map-by"],
}
_HOSTS: Mapping[str, list[str]] = {
    "srun": ["-w", "--nodelist", "-x", "--exclude", "-r", "--relative", "-W", "--wait"],
    "openmpi": ["-H", "-host", "--host", "-hostfile", "--hostfile", "-machinefile", "--machinefile"],
    "hydra": ["-host", "-hosts", "-f", "-hostfile", "-machinefile", "-machine"],
    "pals": ["--hosts", "--host", "--hostfile", "--rankfile"],
    "aprun": ["-L", "--node-list", "-l", "--node-list-file", "-E", "--exclude-node-list"],
}
# With --no-kill a step would outlive its nodes; that the allocation outlives them is `#SBATCH --no-kill`.
_FLAGS: Mapping[str, list[str]] = {"srun": ["-K", "--kill-on-bad-exit", "-k", "--no-kill"]}
_BINDING: Mapping[str, list[str]] = {
    "srun": ["--cpu-bind", "--cpu_bind", "--mpi", "-m", "--distribution"],
    "openmpi": ["--map-by", "-map-by", "--bind-to", "-bind-to", "--rank-by", "-rank-by"],
    "hydra": [],
    "pals": ["--cpu-bind", "-d", "--depth"],
    "aprun": ["-cc", "--cpu-binding"],
}
_FREE: Mapping[str, list[str]] = {
    "srun": ["--mpi=none", "--cpu-bind=none"],
    "openmpi": ["--bind-to", "none"],
    "hydra": ["-genv", "I_MPI_PIN", "0"],
    "pals": ["--cpu-bind", "none"],
    "aprun": ["-cc", "none"],
}
