"""Where the time of a step goes: the parts add up, and who came last is told, as computed by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hpctrain.training.timing import SlowHosts, breakdown

PARTS = ("input_seconds", "compute_seconds", "straggler_seconds", "exposed_seconds")


def test_two_ranks_by_hand() -> None:
    # Both begin together; rank 1 computes 0.3 s longer in the first step and 0.1 s shorter in the second, and each time
    # the data take another 0.2 s from the arrival of the later one on.
    times = np.array([[[0.1, 1.0, 0.5], [0.0, 1.0, 0.2]], [[0.1, 1.3, 0.2], [0.0, 0.9, 0.3]]])
    found = breakdown(times, ["alpha", "beta"])
    assert [found[part] for part in PARTS] == pytest.approx([0.05, 1.05, (0.3 + 0.1) / 4, 0.2])
    assert found["slowest_compute_seconds"] == pytest.approx((1.3 + 1.0) / 2)
    assert found["steps"] == 2 and found["mean_own_seconds"] == pytest.approx(1.1)
    assert found["usual_own_seconds"] == pytest.approx(1.05)
    assert found["hosts"] == [
        {"host": "beta", "own_seconds": 1.15, "last": 1},
        {"host": "alpha", "own_seconds": 1.05, "last": 1},
    ]


def test_the_slowest_hosts_come_first_and_only_five_are_named() -> None:
    times = np.zeros((8, 4, 3))
    times[:, :, 1] = np.linspace(1.0, 1.7, 8)[:, None]
    times[:, :, 2] = 2.0 - times[:, :, 1]
    hosts = breakdown(times, [f"n{rank // 1}" for rank in range(8)])["hosts"]
    assert [entry["host"] for entry in hosts] == ["n7", "n6", "n5", "n4", "n3"]
    assert [entry["last"] for entry in hosts] == [4, 0, 0, 0, 0]


def test_a_host_is_as_slow_as_its_slowest_rank() -> None:
    times = np.array([[[0, 1.0, 0.5]], [[0, 1.4, 0.1]], [[0, 1.2, 0.3]], [[0, 1.2, 0.3]]], float)
    hosts = breakdown(times, ["a", "a", "b", "b"])["hosts"]
    assert hosts == [{"host": "a", "own_seconds": 1.4, "last": 1}, {"host": "b", "own_seconds": 1.2, "last": 0}]


def test_one_rank_waits_for_nobody() -> None:
    found = breakdown(np.array([[[0.25, 0.75, 0.0]]]), ["here"])
    assert [found[part] for part in PARTS] == [0.25, 0.75, 0.0, 0.0]
    assert found["hosts"] == [{"host": "here", "own_seconds": 1.0, "last": 0}]


@given(arrays(np.float64, st.tuples(st.integers(1, 6), st.integers(1, 5), st.just(3)), elements=st.floats(0, 100)))
def test_the_parts_add_up_to_the_mean_step(times: np.ndarray) -> None:
    found = breakdown(times, [f"n{rank}" for rank in range(len(times))])
    assert sum(found[part] for part in PARTS) == pytest.approx(times.sum(2).mean(), abs=1e-6)
    assert all(found[part] >= 0 for part in PARTS)
    assert sum(entry["last"] for entry in found["hosts"]) <= times.shape[1]


def test_a_slow_host_is_told_of_once_until_it_has_recovered() -> None:
    def timing(*seconds: float) -> dict[str, object]:
        times = np.zeros((len(seconds), 1, 3))
        times[:, 0, 1] = seconds
        times[:, 0, 2] = 100.0 - times[:, 0, 1]
        return breakdown(times, [f"n{i}" for i in range(len(seconds))])

    slow_hosts = SlowHosts()
    assert slow_hosts.find(timing(1.0, 1.1, 1.4)) == []
    (told,) = slow_hosts.find(timing(1.0, 1.1, 11.0))
    assert told.startswith("n2 is slow: 11 s a step") and "usual are 1.1 s" in told
    assert slow_hosts.find(timing(1.0, 1.1, 11.0)) == []
    assert slow_hosts.find(timing(1.0, 1.1, 1.1)) == []
    assert len(slow_hosts.find(timing(1.0, 5.0, 11.0, 1.0, 1.0))) == 2
