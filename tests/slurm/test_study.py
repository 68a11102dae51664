"""`hpctrain study` against a real Slurm: jobs in a chain, and counts side by side in one job."""

import csv
import json
import re
import sys
from pathlib import Path

import pytest

from tests.slurm.cluster import VirtualCluster
from tests.slurm.conftest import END_SECONDS, EXACT

pytestmark = pytest.mark.slurm

HPCTRAIN = [sys.executable, "-m", "hpctrain"]
RECIPE = [
    "demo",
    *[word for word in EXACT if not word.startswith(("train.steps", "train.epochs", "evaluate."))],
    "train.epochs=9",
]
STUDY = ["--nodes", "1,2", "--mode", "strong", "--site", "generic-slurm", "--steps", "10", "--warm-up", "10"]
STUDY += ["--time", "00:20:00"]


def study(cluster: VirtualCluster, shards: Path, out: Path, *words: str) -> list[str]:
    """Begin a study, and return the numbers of its jobs."""
    said = cluster.command(*HPCTRAIN, "study", *RECIPE, f"data.path={shards}", *STUDY, "--out", out, *words)
    return re.findall(r"job (\d+)$", said, re.M)


def rows(out: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((out / "report.csv").read_text().splitlines()))


def test_a_chain_over_one_and_two_nodes(cluster: VirtualCluster, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "my study"
    first, second = study(cluster, shards, out, "--chain")
    said = cluster.command(*HPCTRAIN, "study", "report", out)
    assert "2 nodes: waiting" in said and "(Dependency)" in said
    assert study(cluster, shards, out, "--chain") == []  # nothing is submitted twice
    for job in (first, second):
        assert cluster.wait(job, END_SECONDS).name == "COMPLETED", cluster.output(job)
    said = cluster.command(*HPCTRAIN, "study", "report", out)
    assert "waiting" not in said.split("written:")[-1] and [row["runs_done"] for row in rows(out)] == ["1", "1"]
    assert [row["ranks"] for row in rows(out)] == ["1", "2"]
    lines = [json.loads(line) for line in (out / "nodes-2/metrics.jsonl").read_text().splitlines()]
    assert not any(line["kind"] == "eval" for line in lines)
    named = {entry["host"] for line in lines if "timing" in line for entry in line["timing"]["hosts"]}
    assert len(named) == 2 and all(host.startswith("node") for host in named)
    assert "## Slowest hosts" in (out / "report.md").read_text()


def test_counts_side_by_side_in_one_job(cluster: VirtualCluster, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "study"
    (job,) = study(cluster, shards, out, "--together")
    assert cluster.wait(job, END_SECONDS).name == "COMPLETED", cluster.output(job)
    assert "efficiency" in cluster.output(job)  # the job ends with the report
    assert [(row["nodes"], row["runs_done"]) for row in rows(out)] == [("1", "1"), ("2", "1")]
    hosts = [json.loads((out / f"nodes-{n}/manifest.json").read_text())["hosts"] for n in (1, 2)]
    one, two = ({entry["host"] for entry in each} for each in hosts)
    assert (len(one), len(two)) == (1, 2) and not one & two
