"""Blocks reach every rank of a route, from one reader, whatever the number of ranks; passing errors are tried again."""

import errno
import os
import queue
import threading
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from hpctrain.errors import UserError
from hpctrain.staging import transfer
from hpctrain.staging.transfer import Route, Source, blocks


class Channels:
    """Messages between threads that are ranks, in order between each two of them."""

    def __init__(self) -> None:
        self._queues: dict[tuple[int, int], queue.Queue[bytes]] = defaultdict(queue.Queue)
        self.sent_by: dict[int, int] = defaultdict(int)

    def of(self, rank: int) -> Any:
        channels = self

        class Comm:
            """What `Route` uses of a communicator. Sends take their bytes when they are waited for."""

            def Isend(self, view: memoryview, other: int, tag: int) -> Any:
                class Request:
                    def Wait(self) -> None:
                        channels.sent_by[rank] += len(view)
                        channels._queues[rank, other].put(bytes(view))

                return Request()

            def Iprobe(self, other: int, tag: int) -> bool:
                return not channels._queues[other, rank].empty()

            def Recv(self, view: memoryview, other: int, tag: int) -> None:
                content = channels._queues[other, rank].get(timeout=20)
                assert len(content) == len(view)
                view[:] = content

        return Comm()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8, 13])
def test_every_rank_gets_every_byte(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "BLOCK_BYTES", 100)
    content = os.urandom(1234)
    (tmp_path / "file").write_bytes(content)
    ranks = [3 * number + 5 for number in range(size)]
    for reader in {ranks[0], ranks[size // 2], ranks[-1]}:
        channels, received = Channels(), {}
        routes = {rank: Route(channels.of(rank), rank, reader, ranks) for rank in ranks}

        def take(rank: int, routes: dict[int, Route] = routes, received: dict[int, Any] = received) -> None:
            parts = [bytes(view) for view in blocks(tmp_path / "file", len(content), routes[rank])]
            received[rank] = (b"".join(parts), routes[rank].flag(routes[rank].reads))

        threads = [threading.Thread(target=take, args=(rank,)) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert received == dict.fromkeys(ranks, (content, True)), "the flag is the reader's, True"
        assert sum(channels.sent_by.values()) == (size - 1) * (len(content) + 1)
        assert max(channels.sent_by.values(), default=0) <= 2 * (len(content) + 1), "nobody sends more than twice"


def test_passing_errors_are_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    preadv, failures = os.preadv, [errno.EIO, errno.ESTALE]

    def failing(*arguments: Any) -> int:
        if failures:
            raise OSError(failures.pop(), "passing")
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", failing)
    monkeypatch.setattr(transfer, "_FIRST_WAIT_SECONDS", 0.0)
    buffer = bytearray(6)
    with Source(tmp_path / "file", 10) as source:
        source.read_into(memoryview(buffer), 3)
    assert bytes(buffer) == b"345678"
    failures[:] = [errno.EIO] * 3
    with (
        Source(tmp_path / "file", 10) as source,
        pytest.raises(UserError, match=r"cannot read .*file at byte 4: passing \(errno 5, 3 tries\)"),
    ):
        source.read_into(memoryview(buffer), 4)
    failures.clear()
    with Source(tmp_path / "file", 12) as source, pytest.raises(UserError, match="ends at byte 10, expected 12 bytes"):
        source.read_into(memoryview(buffer), 6)
    with pytest.raises(UserError, match=r"cannot read .*none .* \(errno 2, 1 tries\)"):
        Source(tmp_path / "none", 12).__enter__()
