"""Ranks, threads and binding: worked examples, properties for any node, and the words each launcher is given."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hpctrain.errors import UserError
from hpctrain.jobs.layout import Layout, environment, launch_arguments, layout
from hpctrain.jobs.site import LAUNCHERS, Site, load_site, site_names

GUIDE = Path(__file__).parents[2] / "docs" / "sites.md"
NETWORK = {"latency_seconds": 1e-6, "seconds_per_byte": 1e-10, "source": "a test"}
SKYLAKE = {"sockets": 2, "cores_per_socket": 24, "threads_per_core": 2}
KNL = {"sockets": 1, "cores_per_socket": 68, "threads_per_core": 4}
EPYC = {"sockets": 2, "cores_per_socket": 64, "threads_per_core": 2}


def site(scheduler: str = "slurm", launcher: str = "srun", node: Any = None, **keys: Any) -> Site:
    """A site of 4,000 Skylake nodes, or of what is given."""
    base = {"name": "test", "description": "", "source": "", "nodes": 4000, "network": NETWORK}
    return Site.model_validate({**base, "scheduler": scheduler, "launcher": launcher, "node": node or SKYLAKE, **keys})


@pytest.mark.parametrize(
    ("node", "reserved", "ranks", "compute", "bound", "left"),
    [
        (KNL, 4, 1, 64, 68, 4),  # the paper's: 64 of 68, the rest for the system and Omni-Path
        (KNL, 2, 1, 66, 68, 2),  # Cori's
        (KNL, 4, 4, 16, 17, 4),
        (KNL, 4, 3, 21, 22, 5),  # 64 cores do not divide by 3: one more is left
        (KNL, 4, 64, 1, 1, 4),
        (SKYLAKE, 0, 2, 24, 24, 0),
        (SKYLAKE, 2, 2, 23, 24, 2),  # one of each socket
        (SKYLAKE, 3, 2, 22, 24, 4),  # two of each: both ranks are to be alike
        (SKYLAKE, 2, 1, 46, 48, 2),  # one rank over both sockets
        (SKYLAKE, 2, 8, 5, 6, 8),
        (EPYC, 0, 2, 64, 64, 0),
        (EPYC, 2, 2, 63, 64, 2),
        (EPYC, 0, 16, 8, 8, 0),
    ],
)
def test_worked_examples(node: Any, reserved: int, ranks: int, compute: int, bound: int, left: int) -> None:
    plan = layout(site(node=node, reserved_cores=reserved), 2, ranks)
    assert (plan.cores_per_rank, plan.bound_cores_per_rank, plan.reserved_cores) == (compute, bound, left)
    assert (plan.ranks, plan.ranks_per_node, plan.threads_per_rank) == (2 * ranks, ranks, compute)
    assert plan.cpus_per_task == bound * node["threads_per_core"]


def test_threads_of_one_core_each_get_a_compute_thread_when_asked_for() -> None:
    theta = load_site("theta-knl")  # published: -N 4 -d 32 -j 2, OMP_NUM_THREADS=32
    assert layout(theta, 128) == Layout(128, 512, 4, 16, 16, 32, 32, 0)


@pytest.mark.parametrize("name", site_names())
@pytest.mark.parametrize("nodes", [1, 2, 64, 2048])
def test_every_profile_lays_out(name: str, nodes: int) -> None:
    profile = load_site(name)
    plan = layout(profile, nodes)  # whether or not there are so many
    assert plan.nodes == nodes and plan.ranks == nodes * profile.ranks_per_node
    words = [*launch_arguments(profile, plan), *environment(profile, plan), *environment(profile, plan).values()]
    assert all(word == shlex.quote(word) for word in words)  # nothing in them means anything to a shell
    assert environment(profile, plan)["OMP_NUM_THREADS"] == str(plan.threads_per_rank)


@st.composite
def sites(draw: st.DrawFn) -> Site:
    node = {
        "sockets": draw(st.integers(1, 4)),
        "cores_per_socket": draw(st.integers(1, 72)),
        "threads_per_core": draw(st.integers(1, 4)),
    }
    scheduler = draw(st.sampled_from(["slurm", "pbs"]))
    launcher = draw(st.sampled_from(LAUNCHERS[scheduler]))
    used = 1 if launcher == "mpiexec-pals" else draw(st.integers(1, node["threads_per_core"]))
    reserved = draw(st.integers(0, min(8, node["sockets"] * node["cores_per_socket"] - 1)))
    return site(scheduler, launcher, node, reserved_cores=reserved, threads_per_core_used=used)


def possible(any_site: Site) -> list[int]:
    """All numbers of ranks a node that are laid out, by trying."""
    found = []
    for ranks in range(1, any_site.node.cores + 2):
        with suppress(UserError):
            layout(any_site, 1, ranks)
            found.append(ranks)
    return found


@given(sites(), st.integers(1, 4000), st.data())
def test_no_core_is_used_twice(any_site: Site, nodes: int, data: st.DataObject) -> None:
    node, numbers = any_site.node, possible(any_site)
    assume(numbers)
    ranks = data.draw(st.sampled_from(numbers), "ranks a node")
    plan = layout(any_site, nodes, ranks)
    assert 1 <= plan.cores_per_rank <= plan.bound_cores_per_rank
    assert ranks * plan.bound_cores_per_rank <= node.cores
    assert ranks * plan.cores_per_rank + plan.reserved_cores == node.cores
    assert plan.reserved_cores >= any_site.reserved_cores
    assert ranks * plan.threads_per_rank <= (node.cores - any_site.reserved_cores) * any_site.threads_per_core_used
    assert plan.threads_per_rank <= plan.bound_cores_per_rank * node.threads_per_core
    assert ranks * plan.cpus_per_task <= node.cores * node.threads_per_core
    assert plan.ranks == nodes * ranks
    # Launchers deal out cores from the first one on.
    for rank in range(ranks):
        first, last = rank * plan.bound_cores_per_rank, (rank + 1) * plan.bound_cores_per_rank - 1
        if ranks % node.sockets == 0:
            assert first // node.cores_per_socket == last // node.cores_per_socket
        else:  # fewer ranks than sockets: whole ones
            assert (last + 1) % node.cores_per_socket == 0 or node.sockets == 1


@given(sites(), st.integers(1, 300))
def test_a_refusal_names_what_would_do(any_site: Site, ranks: int) -> None:
    numbers = possible(any_site)
    if any_site.node.sockets == 1:
        assert numbers == list(range(1, any_site.node.cores - any_site.reserved_cores + 1))
    assume(ranks not in numbers)
    with pytest.raises(UserError) as caught:
        layout(any_site, 1, ranks)
    named = [int(number) for number in re.findall(r"\d+", str(caught.value).partition("choose")[2])]
    assert named == (numbers[-1:] if any_site.node.sockets == 1 else numbers)


@given(st.integers(1, 512), st.integers(1, 64))
def test_the_cores_of_this_machine_are_shared_out(cores: int, ranks: int) -> None:
    local = load_site("local")
    if ranks > cores:
        with pytest.raises(UserError, match=f"at most {cores}"):
            layout(local, 1, ranks, cores=cores)
    else:
        assert layout(local, 1, ranks, cores=cores).threads_per_rank == cores // ranks


def test_a_node_that_is_not_known_has_a_core_for_each_rank() -> None:
    generic = load_site("generic-slurm")
    assert layout(generic, 2).cpus_per_task == 1
    assert layout(generic, 2, 3) == Layout(2, 6, 3, 1, 1, 1, 1, 0)
    assert layout(generic, 2, 3, cores=12).cores_per_rank == 4


def test_cores_that_were_found_replace_those_of_the_profile() -> None:
    skylake = site(reserved_cores=2)
    assert layout(skylake, 1, 2, cores=40).cores_per_rank == 19  # still two sockets
    assert layout(skylake, 1, 1, cores=7).cores_per_rank == 5  # an odd number: taken for one socket


@pytest.mark.parametrize(
    ("keys", "arguments", "sentence"),
    [
        ({}, (0,), "nodes is 0; expected 1 or more"),
        ({}, (1, 0), "ranks_per_node is 0; expected 1 or more"),
        ({}, (1, 1, 0), "cores is 0; expected the number of physical cores of a node"),
        (
            {"node": KNL, "reserved_cores": 4},
            (1, 65),
            "65 ranks a node are too many: a node of test has 68 cores on 1 socket, 4 of them reserved; "
            "choose at most 64",
        ),
        (
            {"reserved_cores": 2},
            (1, 3),
            "3 ranks a node do not divide evenly: a node of test has 48 cores on 2 sockets, 2 of them reserved; "
            "choose 1, 2, 4, 6, 8, 12, 16, 24",
        ),
        (
            {"reserved_cores": 4},
            (1, 1, 4),
            "no rank fits: a node of test has 4 cores on 2 sockets, 4 of them reserved; lower reserved_cores in a "
            "profile of your own",
        ),
    ],
)
def test_what_does_not_fit_is_said_in_a_sentence(keys: Any, arguments: Any, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        layout(site(**keys), *arguments)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(
    ("scheduler", "launcher", "keys", "words"),
    [
        (
            "slurm",
            "srun",
            {"srun_mpi": "pmix"},
            "srun --mpi=pmix --nodes=3 --ntasks=6 --ntasks-per-node=2 --cpus-per-task=48 --cpu-bind=cores",
        ),
        ("slurm", "srun", {}, "srun --nodes=3 --ntasks=6 --ntasks-per-node=2 --cpus-per-task=48 --cpu-bind=cores"),
        ("slurm", "mpirun", {}, "mpirun -n 6 --map-by ppr:2:node:PE=24 --bind-to core"),
        ("pbs", "mpirun", {"node": {"nominal": True}}, "mpirun -n 6 --map-by ppr:2:node --bind-to none"),
        ("local", "mpirun", {"node": {"nominal": True}}, "mpirun -n 6 --map-by :OVERSUBSCRIBE --bind-to none"),
        ("local", "mpiexec.hydra", {"node": {"nominal": True}}, "mpiexec.hydra -n 6 -genv I_MPI_PIN off"),
        ("pbs", "mpiexec.hydra", {"node": {"nominal": True}}, "mpiexec.hydra -n 6 -ppn 2 -genv I_MPI_PIN off"),
        ("pbs", "mpiexec.hydra", {}, "mpiexec.hydra -n 6 -ppn 2 -genv I_MPI_PIN_DOMAIN 48:compact"),
        ("pbs", "mpiexec-pals", {}, "mpiexec -n 6 --ppn 2 --depth=24 --cpu-bind depth"),
        ("slurm", "ibrun", {}, "ibrun"),
        ("slurm", "ibrun", {"numactl": ["--preferred=1"]}, "ibrun numactl --preferred=1"),
        ("pbs", "aprun", {}, "aprun -n 6 -N 2 -d 24 -j 1 -cc depth"),
        ("pbs", "aprun", {"threads_per_core_used": 2}, "aprun -n 6 -N 2 -d 48 -j 2 -cc depth"),
    ],
)
def test_the_words_of_each_launcher(scheduler: str, launcher: str, keys: Any, words: str) -> None:
    machine = site(scheduler, launcher, **keys)
    assert launch_arguments(machine, layout(machine, 3, 2)) == words.split()


@pytest.mark.parametrize("nodes", [1, 16, 17, 512])
def test_slingshot_gets_longer_queues_above_16_nodes(nodes: int) -> None:
    crux = load_site("crux")
    variables = environment(crux, layout(crux, nodes))
    expected = {"FI_CXI_DEFAULT_CQ_SIZE": "131072", "FI_CXI_OFLOW_BUF_SIZE": "8388608"} if nodes > 16 else {}
    assert {name: value for name, value in variables.items() if name.startswith("FI_")} == expected
    assert variables["OMP_NUM_THREADS"] == "63" and variables["HDF5_USE_FILE_LOCKING"] == "FALSE"


def test_intels_openmp_is_set_on_xeon_phi_only_and_the_profile_has_the_last_word() -> None:
    phi = {**KNL, "fast_memory": {"kind": "MCDRAM", "gb": 16, "mode": "cache"}}
    machine = site(node=phi, environment={"KMP_BLOCKTIME": "1", "MINE": "two words"})
    assert environment(machine, layout(machine, 1)) == {
        "OMP_NUM_THREADS": "68",
        "HDF5_USE_FILE_LOCKING": "FALSE",
        "KMP_BLOCKTIME": "1",
        "KMP_AFFINITY": "granularity=fine,compact,1,0",
        "MINE": "two words",
    }
    assert not [name for name in environment(site(), layout(site(), 1)) if name.startswith("KMP")]


@pytest.mark.mpi
def test_open_mpi_binds_as_laid_out() -> None:
    cores = len(os.sched_getaffinity(0))
    if shutil.which("mpirun") is None or cores < 2:
        pytest.skip("needs mpirun and two cores")
    machine = site("pbs", "mpirun", {"sockets": 1, "cores_per_socket": 2})
    code = "import os; print(*sorted(os.sched_getaffinity(0)))"
    for ranks, each in ((2, 1), (1, 2)):
        command = [*launch_arguments(machine, layout(machine, 1, ranks)), sys.executable, "-c", code]
        output = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
        bound = [set(line.split()) for line in output.splitlines()]
        assert len(bound) == ranks and len(set().union(*bound)) >= ranks * each
        assert sum(map(len, bound)) == len(set().union(*bound))


def rows(first: str) -> list[list[str]]:
    """The cells of the table in docs/sites.md whose head begins with `first`, without those of its head."""
    table = GUIDE.read_text().partition(f"\n| {first} |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_the_guides_examples_are_what_is_computed() -> None:
    for node, *numbers in rows("node"):
        sockets, cores = (int(number) for number in re.findall(r"(\d+) x (\d+)", node)[0])
        reserved, ranks, regions, bound, compute, left = (int(number) for number in numbers)
        machine = site(node={"sockets": sockets, "cores_per_socket": cores}, reserved_cores=reserved)
        plan = layout(machine, 1, ranks)
        assert (plan.bound_cores_per_rank, plan.cores_per_rank, plan.reserved_cores) == (bound, compute, left), node
        assert regions == min(ranks, sockets)


def test_the_guides_launch_lines_are_what_is_built() -> None:
    for keys, words in rows("launcher"):
        launcher, *srun_mpi = re.findall(r"`([^`]+)`", keys)
        scheduler = "slurm" if launcher in LAUNCHERS["slurm"] else "pbs"
        mpi = {"srun_mpi": srun_mpi[0].removeprefix("srun_mpi: ")} if srun_mpi else {}
        machine = site(scheduler, launcher, **mpi)
        assert launch_arguments(machine, layout(machine, 3, 2)) == words.strip("`").split()


def test_the_guide_tells_the_ranks_of_each_profile() -> None:
    found = 0
    for name, _, _, told in rows("profile"):
        profile = load_site(name.strip("`"))
        if match := re.match(r"(\d+) x (\d+) (?:of|on) (\d+) cores", told):
            plan = layout(profile, 1)
            assert [int(n) for n in match.groups()] == [plan.ranks_per_node, plan.threads_per_rank, profile.node.cores]
            found += 1
        else:
            assert profile.node.nominal
    assert found == 10


def test_nothing_heavy_is_imported() -> None:
    heavy = {"tensorflow", "keras", "mpi4py", "numpy", "h5py"}
    code = f"import sys, hpctrain.jobs.layout; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
