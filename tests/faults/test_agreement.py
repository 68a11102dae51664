"""A rank that is unlike the others is named before anything is built on it; a log is JSON whatever the loss is."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from hpctrain.config import load_config
from hpctrain.errors import UserError
from hpctrain.parallel.launch import Place
from hpctrain.parallel.world import World
from hpctrain.training.agreement import check_agreement
from hpctrain.training.run_dir import MetricsLog, read_metrics


class Ranks(World):
    """Three ranks of which the last says something else."""

    def __init__(self, change: dict[str, Any]) -> None:
        places = tuple(Place(host, (0,), (0,), {0: 0}) for host in ("a", "b", "c"))
        super().__init__(0, 3, "a", places, (), None, "No MPI 1.0")
        object.__setattr__(self, "change", change)

    def allgather(self, value: Any) -> list[Any]:
        if isinstance(value, bytes):
            return [value, value, b"other" if self.change else value]  # type: ignore[attr-defined]
        return [value, value, value | self.change]  # type: ignore[attr-defined]


def test_ranks_that_agree() -> None:
    check_agreement(Ranks({}), load_config("demo"))


@pytest.mark.parametrize("change", [{"train.seed": 5}, {"numpy": "0.1"}, {"hpctrain": "0.1"}, {"name": "other"}])
def test_the_one_that_differs_is_named(change: dict[str, Any]) -> None:
    with pytest.raises(UserError) as caught:
        check_agreement(Ranks(change), load_config("demo"))
    (key, value), text = next(iter(change.items())), str(caught.value)
    assert f"rank 2 on c has {key} {value} where rank 0 on a has" in text


def test_nodes_may_have_their_data_in_places_of_their_own() -> None:
    seen: list[Any] = []

    class Spy(Ranks):
        def allgather(self, value: Any) -> list[Any]:
            seen.append(value)
            return [value]

    for path in ("/a", "/b"):
        check_agreement(Spy({}), load_config("demo", [f"data.path={path}", f"data.staged={path}"]))
    assert seen[0] == seen[1]


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, from_step=0, tensorboard=False)
    log.write("train", 1, {"loss": math.nan, "top1": 0.5, "timing": {"input_seconds": math.inf, "hosts": [{"a": 1.0}]}})
    log.write("train", 2, {"loss": 1.5, "timing": {"hosts": [{"a": 1.0}]}})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    assert first["loss"] is None and first["top1"] == 0.5 and first["timing"]["input_seconds"] is None
    assert first["nonfinite"] == ["loss", "timing"] and "nonfinite" not in second
    assert [json.loads(line) for line in text.splitlines()] == [first, second]
