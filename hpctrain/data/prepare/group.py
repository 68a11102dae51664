"""The processes, if more than one, that prepare a data set together; the caller brings MPI, or nothing."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

Value = TypeVar("Value")


class Group(Protocol):
    """What `prepare` needs of several cooperating processes; every one of them makes the same calls."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value (any picklable object) on every rank."""

    def allgather(self, value: Any) -> list[Any]:
        """Return every rank's value, in rank order, on every rank."""


class Alone:
    """The group of one process."""

    rank = 0
    size = 1

    def broadcast(self, value: Any) -> Any:
        return value

    def allgather(self, value: Any) -> list[Any]:
        return [value]


def on_first(group: Group, work: Callable[[], Value]) -> Value:
    """Do `work` on rank 0 alone and return its result on every rank; an exception is raised on every rank too."""
    value: Any = None
    error: Exception | None = None
    if group.rank == 0:
        try:
            value = work()
        except Exception as caught:
            error = caught
    value, error = group.broadcast((value, error))
    if error is not None:
        raise error
    result: Value = value
    return result


def on_all(group: Group, work: Callable[[], Value]) -> list[Value]:
    """Do `work` on every rank and return all results on every rank; the first rank's exception is raised on all."""
    value: Any = None
    error: Exception | None = None
    try:
        value = work()
    except Exception as caught:
        error = caught
    gathered = group.allgather((value, error))
    for _, error in gathered:
        if error is not None:
            raise error
    return [value for value, _ in gathered]
