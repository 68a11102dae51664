"""What staging moved, and how fast, in words."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hpctrain.staging.plan import Node

Say = Callable[[str], None]


@dataclass
class Traffic:
    """Shards and bytes that a rank, a node or a job brought to node-local storage."""

    shards_read: int = 0  # from the shared file system
    bytes_read: int = 0
    shards_received: int = 0  # from another node
    bytes_received: int = 0
    shards_reused: int = 0  # were there already
    bytes_reused: int = 0
    seconds: float = 0.0  # of copying

    @property
    def bytes_copied(self) -> int:
        return self.bytes_read + self.bytes_received

    def add(self, other: "Traffic") -> None:
        """Add what another rank or node did in the same time."""
        for name in ("shards_read", "bytes_read", "shards_received", "bytes_received", "shards_reused", "bytes_reused"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.seconds = max(self.seconds, other.seconds)


def summarize(nodes: Sequence[Node], by_rank: Sequence[Traffic], say: Say) -> Traffic:
    """Add up what all ranks did, say it, and return it."""
    total = Traffic()
    by_node = []
    for node in nodes:
        own = Traffic()
        for rank in node.ranks:
            own.add(by_rank[rank])
        by_node.append(own)
        total.add(own)
    say(
        f"read {total.shards_read:,} shards ({total.bytes_read / 1e6:,.1f} MB) from the shared file system, received "
        f"{total.shards_received:,} ({total.bytes_received / 1e6:,.1f} MB) from other nodes, kept "
        f"{total.shards_reused:,} ({total.bytes_reused / 1e6:,.1f} MB) that were there"
    )
    if total.bytes_copied:
        rates = [
            (own.bytes_copied / max(own.seconds, 1e-9), node.host) for own, node in zip(by_node, nodes, strict=True)
        ]
        slowest, host = min((rate, name) for rate, name in rates if rate > 0)
        say(
            f"staged in {total.seconds:.1f} s: {total.bytes_copied / total.seconds / 1e6:,.0f} MB/s in all, "
            f"{slowest / 1e6:,.0f} MB/s on the slowest node ({host})"
        )
    return total
