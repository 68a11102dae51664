"""Short words for many ranks or hosts."""

import re
from collections.abc import Sequence

_LAST_NUMBER = re.compile(r"^(.*?)(\d+)(\D*)$")


def fold_numbers(numbers: Sequence[int]) -> str:
    """Return numbers as ranges: 0-3,7."""
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in _runs(sorted(set(numbers))))


def fold_hosts(hosts: Sequence[str]) -> str:
    """Return host names with runs of their last number folded, as Slurm writes them: login, node[001-004,007]."""
    words: list[str] = []
    groups: dict[tuple[str, int, str], list[int]] = {}
    for host in sorted(set(hosts)):
        match = _LAST_NUMBER.match(host)
        if match:
            before, digits, after = match.groups()
            groups.setdefault((before, len(digits), after), []).append(int(digits))
        else:
            words.append(host)
    for (before, width, after), numbers in groups.items():
        runs = [f"{low:0{width}d}" + (f"-{high:0{width}d}" if high > low else "") for low, high in _runs(numbers)]
        words.append(f"{before}{runs[0]}{after}" if len(numbers) == 1 else f"{before}[{','.join(runs)}]{after}")
    return ", ".join(words)


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """The first and last of each run of consecutive numbers."""
    runs: list[tuple[int, int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return runs
