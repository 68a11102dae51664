"""From what thousands of ranks report to the one sentence that names the odd one."""

import dataclasses
import random
from pathlib import Path

import pytest

from hpctrain.doctor import findings
from hpctrain.doctor.examine import Examination
from hpctrain.doctor.facts import Facts, gather_facts
from hpctrain.doctor.frameworks import Horovod
from hpctrain.doctor.judge import rounds_of_pairs
from hpctrain.doctor.links import Allreduce, Pair
from hpctrain.doctor.measure import Measured
from hpctrain.doctor.report import print_json, print_text
from hpctrain.parallel.launch import Place, Plan
from hpctrain.parallel.world import World

RANKS_A_HOST = 4


def host(rank: int) -> str:
    return f"n{1 + rank // RANKS_A_HOST:04d}"


def make_facts(ranks: int) -> list[Facts]:
    mine = dataclasses.replace(
        gather_facts("here", "MPI 5"),
        fabric=(),
        open_files=4096,
        free_memory_bytes=10**11,
        shared_memory_free_bytes=10**10,
    )
    return [dataclasses.replace(mine, host=host(rank)) for rank in range(ranks)]


def make_measured(ranks: int) -> list[Measured]:
    noise = random.Random(ranks)
    found = []
    for rank in range(ranks):
        values = {"compute": 2e12 * noise.uniform(0.95, 1.05), "memory": 1e10 * noise.uniform(0.9, 1.1), "import": 5.0}
        if rank % RANKS_A_HOST == 0:
            values |= {"write": 2e8 * noise.uniform(0.7, 1.3), "free_memory": 1e11 * noise.uniform(0.9, 1.0)}
        found.append(Measured(values))
    return found


def change(facts: list[Facts], rank: int, **values: object) -> None:
    facts[rank] = dataclasses.replace(facts[rank], **values)  # type: ignore[arg-type]


@pytest.mark.parametrize(("version", "said"), [("0.28.1", True), ("0.28.1+hpctrain7", False), (None, False)])
def test_a_horovod_as_it_comes_is_told(version: str | None, said: bool) -> None:
    facts = make_facts(2)
    others = {name: v for name, v in facts[0].versions.items() if name != "horovod"}
    for rank in (0, 1):
        change(facts, rank, versions=others | ({"horovod": version} if version else {}))
    assert [line.startswith("Horovod 0.28.1 is without") for line in findings.horovod_warnings(facts)] == [True] * said


@pytest.mark.parametrize("ranks", [1, 2, 8, 2048])
def test_equal_ranks_give_no_sentence(ranks: int) -> None:
    facts, measured = make_facts(ranks), make_measured(ranks)
    assert findings.version_problems(facts) == []
    assert findings.node_warnings(facts) == []
    assert findings.slow_warnings(measured, facts) == []
    assert findings.clock_warnings(dict.fromkeys(range(ranks), 1e-5), facts) == []


@pytest.mark.parametrize("ranks", [2, 8, 2048])
def test_another_version_is_named_with_its_rank(ranks: int) -> None:
    facts = make_facts(ranks)
    odd = ranks - 1
    change(facts, odd, versions={**facts[odd].versions, "keras": "0.9"})
    (line,) = findings.version_problems(facts)
    assert line.startswith(f"rank {odd} on {host(odd)}: keras 0.9, ") and facts[0].versions["keras"] in line


def test_rank_0_is_named_when_it_is_the_odd_one() -> None:
    facts = make_facts(64)
    change(facts, 0, versions={name: v for name, v in facts[0].versions.items() if name != "h5py"}, mpi="MPI 4")
    lines = findings.version_problems(facts)
    assert len(lines) == 2 and all(line.startswith("rank 0 on n0001: ") for line in lines)
    assert any("h5py not installed" in line for line in lines)


def test_settings_and_limits_that_differ_are_warnings() -> None:
    facts = make_facts(64)
    change(facts, 9, settings={**facts[9].settings, "HOROVOD_FUSION_THRESHOLD": "1"})
    for rank in range(20, 24):
        change(facts, rank, kernel="4.18.0-old")
    change(facts, 40, open_files=256)
    lines = findings.node_warnings(facts)
    assert any(line.startswith("rank 9 on n0003: HOROVOD_FUSION_THRESHOLD 1, most have") for line in lines)
    assert any(line.startswith("ranks 20-23 on n0006: kernel 4.18.0-old, ") for line in lines)
    assert any("rank 40" in line and "ulimit -n" in line for line in lines)


def test_locked_memory_matters_where_there_is_a_fabric() -> None:
    facts = [dataclasses.replace(one, locked_memory_bytes=65536) for one in make_facts(2)]
    assert findings.node_warnings(facts) == []
    facts = [dataclasses.replace(one, fabric=("hfi1_0",)) for one in facts]
    (line,) = findings.node_warnings(facts)
    assert line.startswith("ranks 0-1 on n0001: ") and "ulimit -l" in line


def test_a_slow_rank_is_named_and_a_slow_node_is_named_once() -> None:
    facts, measured = make_facts(2048), make_measured(2048)
    measured[77].values["compute"] = 1e12
    for rank in range(400, 404):
        measured[rank].values["memory"] = 2e9
    measured[1000].values["write"] = 1e6
    compute, memory, write = findings.slow_warnings(measured, facts)
    assert compute.startswith("rank 77 on n0020 (1,000 GFLOP/s): compute")
    assert memory.startswith("n0101 (2.00 GB/s): memory copy")
    assert write.startswith("n0251 (1.00 MB/s): write to --dir")


def test_a_hundred_slow_nodes_are_still_one_line() -> None:
    facts, measured = make_facts(2048), make_measured(2048)
    for rank in range(0, 400):
        measured[rank].values["compute"] = 5e11
    (line,) = findings.slow_warnings(measured, facts)
    assert " and 92 more: " in line and len(line) < 600


def test_ranks_of_one_node_are_not_compared_by_what_they_share() -> None:
    facts, measured = make_facts(RANKS_A_HOST), make_measured(RANKS_A_HOST)
    for rank, one in enumerate(measured):
        one.values["write"] = 10.0 ** (5 + rank)
    assert findings.slow_warnings(measured, facts) == []


def test_a_node_slow_on_the_network_is_named() -> None:
    facts = make_facts(256)
    ranks = list(range(0, 256, RANKS_A_HOST))
    numbers = [pair for pairs in rounds_of_pairs(len(ranks), 8) for pair in pairs]
    pairs = [Pair((ranks[a], ranks[b]), 2e-6, 1e-3 if 13 in (a, b) else 1e-4) for a, b in numbers]
    (line,) = findings.link_warnings(pairs, facts)
    assert line.startswith("n0014 (1.00 ms): slow with most partners, MPI 1 MiB one way, 0.10 ms between others")


def test_clocks_are_compared_with_what_most_have() -> None:
    facts = make_facts(40)
    (line,) = findings.clock_warnings({0: 0.0, 4: 0.0004, 8: -7.5, 12: 0.9}, facts)
    assert line.startswith("rank 8 on n0003: its clock is 7.5 s behind")
    (line,) = findings.clock_warnings({0: 0.0, 4: 60.0, 8: 60.0, 12: 60.0}, facts)
    assert line.startswith("rank 0 on n0001: its clock is 60.0 s behind"), "rank 0 may be the odd one"


def test_horovod_that_does_not_load_is_one_line_for_all_ranks() -> None:
    facts = make_facts(64)
    fine = [Horovod(5.0, "", rank, 64, True, True) for rank in range(64)]
    assert findings.horovod_problems(fine, facts) == []
    (line,) = findings.horovod_problems([Horovod(5.0, "no libmpi")] * 64, facts)
    assert line.startswith("ranks 0-63 on n[0001-0016]: Horovod does not load (no libmpi)")
    alone = [Horovod(5.0, "", 0, 1, True, True) for _ in range(64)]
    (line,) = findings.horovod_problems(alone, facts)
    assert "Horovod sees 1 ranks, MPI 64" in line


def test_launch_warnings_of_many_hosts_are_one_line() -> None:
    places = [Place(host(rank), tuple(range(64)), tuple(range(64)), {c: c for c in range(64)}) for rank in range(2048)]
    plans = [Plan(1, (0,), "bound by the launcher")] * 2048
    (line,) = findings.launch_warnings(places, plans, {})
    assert line.startswith("n[0001-0512] uses 4 of 64 cores")


def make_examination(ranks: int) -> Examination:
    places = tuple(Place(host(rank), (0,), (0,), {0: 0}) for rank in range(ranks))
    world = World(0, ranks, host(0), places, (Plan(1, (0,), "bound by the launcher"),) * ranks, None, "MPI 5")
    found = Examination(world, make_facts(ranks), Path("/scratch"), False, make_measured(ranks))
    found.clocks = dict.fromkeys(range(0, ranks, RANKS_A_HOST), 0.0)
    found.pairs = [Pair((0, 4), 1e-6, 1e-4)]
    found.allreduce = Allreduce(2**25, 0.01, 6.6e9)
    found.horovod = [Horovod(5.0, "", rank, ranks, True, True) for rank in range(ranks)]
    return found


def test_the_page_does_not_grow_with_the_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    lengths = []
    for ranks in (64, 2048):
        print_text(make_examination(ranks))
        page = capsys.readouterr().out
        assert page.endswith("all is well\n")
        assert f"ranks 0-{ranks - 1} on n[0001-{ranks // 4:04d}]: 4 a host, 1 thread" in page
        lengths.append(len(page.splitlines()))
    assert lengths[0] == lengths[1] < 40


def test_few_ranks_have_a_line_each_and_odd_nodes_a_line_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    found = make_examination(8)
    for rank in range(4, 8):
        change(found.facts, rank, kernel="4.18.0-old")
    found.problems, found.warnings = ["rank 3 is broken"], ["rank 4 is slow"]
    print_text(found)
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("rank ") for line in lines) == 8
    assert [line.split(":")[0] for line in lines if line.startswith("nodes ")] == [
        "nodes      n0001",
        "nodes      n0002",
    ]
    assert lines[-2:] == ["PROBLEM    rank 3 is broken", "warning    rank 4 is slow"]


def test_json_has_every_rank(capsys: pytest.CaptureFixture[str]) -> None:
    import json

    print_json(make_examination(100))
    report = json.loads(capsys.readouterr().out)
    assert [rank["rank"] for rank in report["ranks"]] == list(range(100))
    assert report["ranks"][99]["facts"]["host"] == host(99) and report["ranks"][99]["measured"]["values"]["compute"] > 0
    assert report["allreduce"]["bytes"] == 2**25 and report["problems"] == report["warnings"] == []
