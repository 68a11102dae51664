"""Threads, CPUs and settings of a launch, worked out for machines that are not here."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hpctrain.parallel.launch import (
    HOROVOD,
    TCP,
    TREE_ORDER,
    YIELD,
    Place,
    Plan,
    launcher_rank,
    launcher_size,
    plan_rank,
    set_environment,
    this_place,
    warnings_for,
)

INFINITE = float("inf")


def place(
    cpus: Sequence[int],
    launcher: Sequence[int] = (),
    *,
    host: str = "n1",
    cores: int = 1024,
    quota: float = INFINITE,
    by_mpirun: bool = False,
) -> Place:
    """A rank's place on a host with so many cores, where CPU c is a hardware thread of core c % cores."""
    everything = tuple(sorted({*cpus, *launcher}))
    return Place(host, tuple(cpus), everything, {cpu: cpu % cores for cpu in everything}, quota, by_mpirun)


def plans_of(places: Sequence[Place], threads: int | None = None) -> list[Plan]:
    return [plan_rank(places, rank, threads) for rank in range(len(places))]


def threads_of(places: Sequence[Place], threads: int | None = None) -> list[int]:
    return [plan.threads for plan in plans_of(places, threads)]


def cpus_of(places: Sequence[Place]) -> list[tuple[int, ...]]:
    return [plan.cpus for plan in plans_of(places)]


def test_two_ranks_with_a_core_each_of_a_small_machine() -> None:
    places = [place([i], range(2), by_mpirun=True) for i in range(2)]
    assert plans_of(places) == [Plan(1, (i,), "bound by the launcher") for i in range(2)]


def test_unbound_ranks_divide_the_host() -> None:
    places = [place(range(8))] * 2
    assert cpus_of(places) == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert threads_of(places) == [4, 4]


def test_more_ranks_than_cores() -> None:
    plans = plans_of([place(range(2))] * 4)
    assert {plan.threads for plan in plans} == {1}
    assert {plan.cpus for plan in plans} == {(0, 1)}
    assert "4 ranks share 2 cores" in plans[0].note


def test_open_mpi_binds_two_ranks_to_a_core_each_of_many() -> None:
    places = [place([i], range(64), by_mpirun=True) for i in range(2)]
    assert cpus_of(places) == [tuple(range(32)), tuple(range(32, 64))]
    assert threads_of(places) == [32, 32]


def test_open_mpi_binds_to_a_core_with_its_hardware_threads() -> None:
    places = [place([i, i + 8], range(16), cores=8, by_mpirun=True) for i in range(2)]
    assert cpus_of(places) == [(0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15)]
    assert threads_of(places) == [4, 4]


def test_one_core_on_purpose() -> None:
    """taskset and `srun --cpus-per-task=1` mean it, though the shell or daemon above has the whole host."""
    assert plans_of([place([3], range(64))]) == [Plan(1, (3,), "all CPUs allowed")]
    places = [place([i], range(64)) for i in (3, 4)]
    assert cpus_of(places) == [(3,), (4,)]


def test_a_lone_rank_has_all_it_is_allowed() -> None:
    assert plan_rank([place(range(2, 7))], 0).cpus == (2, 3, 4, 5, 6)
    assert threads_of([place([0], range(16), by_mpirun=True)]) == [16]


@pytest.mark.parametrize("order", [(0, 0, 1, 1), (0, 1, 0, 1), (1, 0, 0, 1)])
def test_ranks_bound_to_a_half_each_share_their_own_half(order: tuple[int, ...]) -> None:
    """As `mpirun --map-by numa --bind-to numa` does: nobody may be sent to the other socket's memory."""
    halves = (range(8), range(8, 16))
    plans = plans_of([place(halves[half], range(16)) for half in order])
    assert [plan.threads for plan in plans] == [4] * 4
    assert all(set(plan.cpus) <= set(halves[half]) for plan, half in zip(plans, order, strict=True))
    assert sorted(cpu for plan in plans for cpu in plan.cpus) == list(range(16))


def test_one_thread_for_a_core_and_its_hardware_threads_stay_together() -> None:
    places = [place(range(16), cores=8)] * 4
    assert threads_of(places) == [2] * 4
    assert cpus_of(places) == [(0, 1, 8, 9), (2, 3, 10, 11), (4, 5, 12, 13), (6, 7, 14, 15)]


def test_a_processor_with_four_hardware_threads_a_core() -> None:
    """Knights Landing, 68 cores."""
    (plan,) = plans_of([place(range(272), cores=68)])
    assert (plan.threads, len(plan.cpus)) == (68, 272)
    assert threads_of([place(range(272), cores=68)] * 4) == [17] * 4


def test_cores_that_do_not_divide_are_left_over() -> None:
    """Equal threads a rank are worth more than the last cores: with them goes equality of bits."""
    assert threads_of([place(range(10))] * 4) == [2] * 4


def test_a_quota_limits_the_threads() -> None:
    assert threads_of([place(range(64), quota=6.0)]) == [6]
    assert threads_of([place(range(64), quota=6.0)] * 4) == [1] * 4
    assert threads_of([place(range(64), quota=0.5)]) == [1]
    assert threads_of([place(range(4), quota=100.0)]) == [4]


def test_hosts_do_not_mix() -> None:
    places = [place(range(4), host=host) for host in ("a", "b", "a", "b", "b")]
    assert cpus_of(places) == [(0, 1), (0,), (2, 3), (1,), (2,)]
    assert threads_of(places) == [2, 1, 2, 1, 1]


def test_threads_that_the_user_asks_for() -> None:
    for places in ([place(range(8))] * 2, [place(range(1))] * 2, [place([0], range(64), by_mpirun=True)]):
        assert threads_of(places, threads=3) == [3] * len(places)
        assert [plan.cpus for plan in plans_of(places, 3)] == cpus_of(places)


@st.composite
def hosts(draw: st.DrawFn) -> list[Place]:
    """Ranks on some hosts: on each bound to all of it, to a socket, or to parts that are their own."""
    places = []
    for name in "ab"[: draw(st.integers(1, 2))]:
        cores, siblings = draw(st.integers(1, 12)), draw(st.sampled_from([1, 2, 4]))
        cpus = range(cores * siblings)
        count = draw(st.integers(1, 9))
        by_mpirun = draw(st.booleans())
        groups = draw(st.integers(1, min(cores, 4)))
        for _ in range(count):
            group = draw(st.integers(0, groups - 1))
            mask = [cpu for cpu in cpus if cpu % cores % groups == group]
            places.append(place(mask, cpus, host=name, cores=cores, by_mpirun=by_mpirun))
    return places


@given(hosts())
def test_every_cpu_is_allowed_and_no_two_ranks_share_one(places: list[Place]) -> None:
    plans = plans_of(places)
    for i, (mine, plan) in enumerate(zip(places, plans, strict=True)):
        widened = plan.note == "an equal part of the launcher's CPUs"
        assert plan.cpus and set(plan.cpus) <= set(mine.launcher_cpus if widened else mine.cpus)
        assert 1 <= plan.threads <= len({mine.cores[cpu] for cpu in plan.cpus})
        if "oversubscribed" in plan.note:
            assert plan.threads == 1
            continue
        for other, its in zip(places[:i], plans[:i], strict=True):
            if other.host == mine.host:
                cores = {mine.cores[cpu] for cpu in plan.cpus} & {other.cores[cpu] for cpu in its.cpus}
                assert not cores, "two ranks compute on one core"
        if any(set(place.cpus) & set(mine.cpus) for place in places[:i] + places[i + 1 :] if place.host == mine.host):
            # Whole cores: a hardware thread is never left to somebody else.
            whole = [cpu for cpu in mine.launcher_cpus if mine.cores[cpu] in {mine.cores[c] for c in plan.cpus}]
            assert set(plan.cpus) == set(whole)


def test_masks_that_overlap_in_part_are_divided_as_one() -> None:
    assert cpus_of([place(range(0, 4)), place(range(2, 6)), place(range(8, 10))]) == [(0, 1, 2), (3, 4, 5), (8, 9)]


def test_where_this_process_is() -> None:
    here = this_place("here")
    assert here.host == "here" and set(here.cpus) == os.sched_getaffinity(0)
    assert set(here.cpus) <= set(here.launcher_cpus) == set(here.cores)
    assert here.quota_cores > 0
    assert 1 <= plan_rank([here], 0).threads <= len(here.launcher_cpus)


def test_settings_are_only_defaults() -> None:
    mine = {"OMPI_MCA_mpi_yield_when_idle": "0", "HOROVOD_STALL_CHECK_TIME_SECONDS": "7", "UNRELATED": "x"}
    environ = dict(mine)
    set_environment(True, environ)
    assert {name: environ[name] for name in mine} == mine
    assert (YIELD | TCP | HOROVOD | TREE_ORDER | mine).items() <= environ.items()


def test_the_order_of_sums_is_only_asked_for_where_it_matters() -> None:
    environ: dict[str, str] = {}
    set_environment(False, environ)
    assert not set(TREE_ORDER) & set(environ)
    assert environ["OMPI_MCA_mpi_yield_when_idle"] == "1"


@pytest.mark.parametrize("embedded", [True, False])
def test_a_centre_s_own_mpi_keeps_its_transports(
    embedded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    if embedded:
        (tmp_path / "bin" / "prterun").touch()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    environ: dict[str, str] = {}
    set_environment(False, environ)
    assert environ.get("OMPI_MCA_btl") == ("^ofi" if embedded else None)


OPEN_MPI = {"OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "PMIX_RANK": "3"}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "8"}
SLURM_BATCH = {"SLURM_JOB_ID": "99", "SLURM_PROCID": "0", "SLURM_NTASKS": "64", "SLURM_NPROCS": "64"}
SRUN = SLURM_BATCH | {"SLURM_PROCID": "3", "SLURM_STEP_ID": "0", "SLURM_STEPID": "0", "SLURM_STEP_NUM_TASKS": "8"}


@pytest.mark.parametrize(
    ("environ", "rank", "size"),
    [
        (OPEN_MPI, 3, 8),
        (HYDRA, 3, 8),
        (HYDRA | {"PALS_RANKID": "3"}, 3, 8),
        ({"PALS_RANKID": "3"}, 3, 1),  # how many there are is not said
        (SRUN, 3, 8),
        (SRUN | {"PMIX_RANK": "3"}, 3, 8),
        (SLURM_BATCH, 0, 1),  # the batch script itself: the job has 64 tasks but this is none of them
        (SLURM_BATCH | OPEN_MPI, 3, 8),  # mpirun in a batch script
        (SLURM_BATCH | HYDRA, 3, 8),
        ({}, 0, 1),
        ({"PMI_RANK": "", "OMPI_COMM_WORLD_SIZE": "no"}, 0, 1),
    ],
)
def test_what_the_launcher_says(environ: dict[str, str], rank: int, size: int) -> None:
    assert launcher_rank(environ) == rank
    assert launcher_size(environ) == size


def warnings_of(places: Sequence[Place], environ: dict[str, str] | None = None, threads: int | None = None) -> str:
    return " ".join(warnings_for(places, plans_of(places, threads), environ or {}))


def test_a_good_launch_needs_no_warning() -> None:
    for places in (
        [place(range(8))] * 2,
        [place(range(16), cores=8)],
        [place([i], range(64), by_mpirun=True) for i in range(2)],
        [place(range(4), host=host) for host in "aabb"],
    ):
        assert warnings_of(places, {"OMP_NUM_THREADS": "1"}) == ""


def test_warnings_name_the_host_and_the_cure() -> None:
    assert "n1 has 2 cores for 4 ranks with 4 compute threads" in warnings_of([place(range(2))] * 4)
    assert "train.threads" in warnings_of([place(range(4))], threads=9)
    text = warnings_of([place(range(64), host="good"), *(place([i], range(64), host="bad") for i in range(2))])
    assert "bad uses 2 of 64 cores" in text and "--cpus-per-task" in text and "good" not in text
    # Hardware threads are not cores.
    assert "4 cores" in warnings_of([place(range(8), cores=4)], threads=8)


def test_warnings_about_the_environment() -> None:
    places = [place(range(4))]
    assert "OMPI_MCA_mpi_yield_when_idle" in warnings_of(places, {"OMPI_MCA_mpi_yield_when_idle": "0"})
    assert warnings_of(places, {"OMPI_MCA_mpi_yield_when_idle": "1"}) == ""
    assert "OMP_NUM_THREADS is 64" in warnings_of(places, {"OMP_NUM_THREADS": "64"})
