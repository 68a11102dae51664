"""Tables and numbers of the page."""

from collections.abc import Iterable, Sequence

from benchmarks.peers.figures import Spread


def numbers(spread: Spread) -> list[str]:
    """Return median, least and most with two digits."""
    return [f"{value:.2f}" for value in (spread.median, spread.least, spread.most)]


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int]) -> str:
    """Return a table in Markdown; `right` are the columns of numbers."""
    aligned = set(right)
    lines = [header, ["---:" if i in aligned else "---" for i in range(len(header))], *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)
