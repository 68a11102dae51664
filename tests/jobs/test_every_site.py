"""One command for any number of nodes: `hpctrain submit --dry-run` on every site, from 1 node to 2,048."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from hpctrain.errors import UserError
from hpctrain.jobs import commands
from hpctrain.jobs.layout import layout
from hpctrain.jobs.site import load_site, site_names

COUNTS = [1, 2, 64, 2048]
# A batch of 32,768 is four images for each of the 8,192 ranks that 2,048 nodes of four have.
RECIPE = ["resnet50-32k", "data.synthetic=true", "train.micro_batch=4"]
# What is too large for the machine or its partitions, and what is said of it.
TOO_LARGE = {
    ("crux", 2048): "crux has 512 nodes, not 2,048; ask for fewer, or set nodes in a profile of your own",
    ("skylake-8160", 2048): (
        "skylake-8160 has 1,736 nodes, not 2,048; ask for fewer, or set nodes in a profile of your own"
    ),
    ("stampede2-knl-flat", 64): (
        "64 nodes for 1 h is beyond the limits that stampede2-knl-flat has: flat-quadrant takes 1 to 32 nodes"
    ),
    ("stampede2-knl-flat", 2048): (
        "stampede2-knl-flat has 504 nodes, not 2,048; ask for fewer, or set nodes in a profile of your own"
    ),
    ("xeon-max", 64): "64 nodes for 1 h is beyond the limits that xeon-max has: spr takes 1 to 32 nodes",
    ("xeon-max", 2048): "xeon-max has 560 nodes, not 2,048; ask for fewer, or set nodes in a profile of your own",
}
# The words that depend on the number of nodes (n) and ranks (r), and the lines that are a site's own.
SLURM = ["#SBATCH --nodes={n}", "#SBATCH --time=01:00:00"]
LINES = {
    "cori-knl": [
        *SLURM,
        "#SBATCH -C knl,quad,cache",
        "#SBATCH --cpus-per-task=272",
        "LAUNCH=${{LAUNCH-'srun --nodes={n} --ntasks={n} --ntasks-per-node=1 --cpus-per-task=272 --cpu-bind=cores'}}",
    ],
    "crux": [
        "#PBS -l select={n}:ncpus=128:mpiprocs=2:ompthreads=63:system=crux",
        "#PBS -l filesystems=home:eagle",
        "LAUNCH=${{LAUNCH-'mpiexec -n {r} --ppn 2 --depth=64 --cpu-bind depth'}}",
    ],
    "frontera": [*SLURM, "#SBATCH --ntasks-per-node=2", "LAUNCH=${{LAUNCH-ibrun}}"],
    "generic-pbs": [
        "#PBS -l select={n}:ncpus=1:mpiprocs=1:ompthreads=1",
        "#PBS -l place=scatter",
        "LAUNCH=${{LAUNCH-'mpirun -n {n} --map-by ppr:1:node --bind-to none'}}",
    ],
    "generic-slurm": [*SLURM, "#SBATCH --cpus-per-task=1"],
    "nurion-knl": ["#PBS -l select={n}:ncpus=68:mpiprocs=1:ompthreads=64", "#PBS -q normal", "#PBS -V"],
    "skylake-8160": [*SLURM, "#SBATCH --ntasks-per-node=2", "#SBATCH --cpus-per-task=48"],
    "slingshot-epyc": [*SLURM, "#SBATCH -C cpu", "#SBATCH --cpus-per-task=128"],
    "stampede2-knl": [*SLURM, "#SBATCH --cpus-per-task=272", "  OMP_NUM_THREADS=64"],
    "stampede2-knl-flat": [*SLURM, "LAUNCH=${{LAUNCH-'ibrun numactl --preferred=1'}}"],
    "theta-knl": [
        "#PBS -l select={n}:ncpus=64:mpiprocs=4:ompthreads=32",
        "LAUNCH=${{LAUNCH-'aprun -n {r} -N 4 -d 32 -j 2 -cc depth'}}",
    ],
    "xeon-max": [*SLURM, "#SBATCH --partition=spr", "#SBATCH --cpus-per-task=56"],
}
# Where a job of so many nodes goes; of those that are too large, where the most fit.
PARTITIONS = {"frontera": "large", "stampede2-knl": "large", "skylake-8160": "skx-large", "crux": "workq-route"}


def submit(site: str, nodes: int, *options: str) -> Result:
    arguments = [*RECIPE, "--site", site, "--nodes", str(nodes), *options]
    return CliRunner().invoke(commands.submit, arguments, catch_exceptions=False, standalone_mode=False)


@pytest.mark.parametrize("nodes", COUNTS)
@pytest.mark.parametrize("name", site_names())
def test_a_dry_run_prints_the_job(name: str, nodes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = submit(name, nodes, "--dry-run")
    assert result.return_value == 0
    warnings = [line for line in result.stderr.splitlines() if "--cores" not in line]
    too_large = TOO_LARGE.get((name, nodes))
    assert warnings == ([f"warning: submit will refuse this job: {too_large}"] if too_large else [])
    ranks = layout(load_site(name), nodes).ranks
    if name == "local":
        words = shlex.split(result.stdout)
        assert words[words.index("mpirun") :][:3] == ["mpirun", "-n", str(ranks)] and ":OVERSUBSCRIBE" in words
        return
    lines = result.stdout.splitlines()
    for line in LINES[name]:
        assert line.format(n=nodes, r=ranks) in lines
    if nodes == 2048 and name in PARTITIONS:
        assert {f"#SBATCH --partition={PARTITIONS[name]}", f"#PBS -q {PARTITIONS[name]}"} & set(lines)
    many = [line for line in lines if line.startswith("  FI_CXI_")]
    assert len(many) == (2 if name in ("crux", "slingshot-epyc") and nodes > 16 else 0)
    subprocess.run(["bash", "-n"], input=result.stdout, text=True, check=True)
    assert not any(tmp_path.iterdir())


def test_every_site_has_lines_here() -> None:
    assert sorted([*LINES, "local"]) == site_names()


@pytest.mark.parametrize(("name", "nodes"), TOO_LARGE)
def test_what_is_too_large_is_refused(name: str, nodes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")  # neither sbatch nor qsub is called
    with pytest.raises(UserError, match=f"^{re.escape(TOO_LARGE[name, nodes])}$"):
        submit(name, nodes)
    assert not any(tmp_path.iterdir())


def test_a_walltime_that_is_too_long_is_shown_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = submit("crux", 4, "--time", "73:00:00", "--dry-run")
    assert "submit will refuse this job: 4 nodes for 73 h is beyond the limits that crux has: " in result.stderr
    assert "#PBS -q preemptable" in result.stdout.splitlines()  # the longest
    with pytest.raises(UserError, match="beyond the limits"):
        submit("crux", 4, "--time", "73:00:00")


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_a_batch_that_does_not_divide_is_an_error_in_a_dry_run_too(options: list[str]) -> None:
    with pytest.raises(UserError, match="does not divide over 3 ranks"):
        submit("generic-slurm", 3, *options)


@pytest.mark.parametrize(
    ("cores", "nodes", "per_node", "threads"), [(8, 1, 1, 8), (8, 2, 1, 4), (8, 2, 2, 2), (2, 4, 1, 1), (2, 2, 4, 1)]
)
def test_the_nodes_of_this_machine_share_its_cores(cores: int, nodes: int, per_node: int, threads: int) -> None:
    result = submit("local", nodes, "--dry-run", "--cores", str(cores), "--ranks-per-node", str(per_node))
    words = shlex.split(result.stdout)
    assert words[words.index("-n") + 1] == str(nodes * per_node)
    assert f"OMP_NUM_THREADS={threads}" in words and f"train.threads={threads}" in words


@pytest.mark.mpi
def test_this_machine_starts_more_ranks_than_it_has_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very words of the dry run, with another program."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hpctrain").write_text("#!/bin/sh\necho rank $OMPI_COMM_WORLD_RANK\n")
    (tmp_path / "hpctrain").chmod(0o755)
    command = submit("local", 4, "--dry-run", "--cores", "2").stdout.replace(" hpctrain ", " ./hpctrain ")
    root = "OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 "
    output = subprocess.run(["bash", "-c", root + command], capture_output=True, text=True, check=True, timeout=60)
    assert sorted(output.stdout.split("\n"))[1:] == [f"rank {rank}" for rank in range(4)]
