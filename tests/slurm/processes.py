"""Processes of this machine, whichever node of a VirtualCluster they are on."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path


def poll(condition: Callable[[], bool], what: str, timeout_seconds: float) -> None:
    """Wait until a condition holds; TimeoutError says what was waited for."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {timeout_seconds:.0f} s still waiting for {what}")
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may wait a while for its parent to take note."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def tree(root: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            parent = int(Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(entry))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def environments() -> Iterator[tuple[int, dict[str, str]]]:
    """All processes that may be looked at, with their environment."""
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            raw = Path(f"/proc/{entry}/environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        yield int(entry), dict(v.split("=", 1) for v in raw.split("\0") if "=" in v)


def send(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to each of these processes that is still there."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def is_pending(pid: int, number: signal.Signals) -> bool:
    """Whether a signal has been sent to a process and waits for it to go on."""
    status = Path(f"/proc/{pid}/status").read_text()
    return any(int(mask, 16) >> (number - 1) & 1 for mask in re.findall(r"^(?:SigPnd|ShdPnd):\s*(\w+)", status, re.M))
