"""Which of many is unlike the rest: pure functions over what ranks or hosts reported."""

import math
import statistics
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence

_DEVIATIONS = 5.0  # noise of a normal distribution goes there once in millions
_MAD_TO_DEVIATION = 1.4826  # for a normal distribution
FLOOR = 1.25  # less than that is not worth a warning, however quiet the others are
_MANY = 8


def odd_ones(costs: Sequence[float | None], floor: float = FLOOR) -> list[int]:
    """Return the positions of the values that are much larger than the rest, the largest first.

    `costs` are seconds, or whatever is worse when larger; None and NaN were not measured and are left out. Of eight
    values and more one is odd when it is above `floor` times the median and also five standard deviations above it,
    the deviation taken from the median absolute deviation, so that the odd ones do not hide themselves in it. Fewer
    values do not tell what deviation is usual: there it takes twice as far above the (lower) median, which of two is
    the smaller one.
    """
    known = [cost for cost in costs if cost is not None and not math.isnan(cost)]
    if len(known) < 2:
        return []
    usual = statistics.median_low(known)
    if len(known) < _MANY:
        limit = (2 * floor - 1) * usual
    else:
        spread = statistics.median(abs(cost - usual) for cost in known)
        limit = max(floor * usual, usual + _DEVIATIONS * _MAD_TO_DEVIATION * spread)
    odd = [i for i, cost in enumerate(costs) if cost is not None and cost > limit]
    return sorted(odd, key=lambda i: -(costs[i] or 0.0))


def slow_in_pairs(
    seconds: Mapping[tuple[int, int], float], floor: float = FLOOR
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return who is slow, and which links between others are, from what pairs took.

    Each member stands for the median of its pairs: one that is slow in most of them is odd, while its partners are
    slow in one. Pairs that are slow although neither member is are links. Two members are not told apart.
    """
    own: dict[int, list[float]] = {}
    for pair, pair_seconds in seconds.items():
        for member in pair:
            own.setdefault(member, []).append(pair_seconds)
    members = sorted(own)
    costs = [statistics.median_low(own[member]) for member in members]
    slow = [members[i] for i in odd_ones(costs, floor)] if len(members) > 2 else []
    others = [pair for pair in seconds if not set(pair) & set(slow)]
    return slow, [others[i] for i in odd_ones([seconds[pair] for pair in others], floor)]


def unlike(values: Sequence[Hashable]) -> tuple[Hashable, dict[Hashable, list[int]]]:
    """Return what most have, and for every other value the positions that have it.

    Where no value is more frequent than the others, the first position's counts as what most have.
    """
    counts = Counter(values)
    most = max(counts.values())
    usual = values[0] if counts[values[0]] == most else next(value for value in values if counts[value] == most)
    others: dict[Hashable, list[int]] = {}
    for i, value in enumerate(values):
        if value != usual:
            others.setdefault(value, []).append(i)
    return usual, others


def rounds_of_pairs(members: int, most_rounds: int) -> list[list[tuple[int, int]]]:
    """Return rounds in which each of `members` has one partner (with an odd number, one has none), a new one each time.

    The rounds of a tournament by the circle method, `most_rounds` of them at most, spread over all it has: so a
    member meets near and far partners, and the number of rounds does not grow with the members.
    """
    if members < 2:
        return []
    size = members + members % 2
    turns = size - 1
    count = min(most_rounds, turns)
    rounds = []
    for turn in (turns * k // count for k in range(count)):
        circle = [0, *((i + turn) % turns + 1 for i in range(turns))]
        pairs = [(circle[i], circle[size - 1 - i]) for i in range(size // 2)]
        rounds.append([(min(pair), max(pair)) for pair in pairs if max(pair) < members])
    return rounds
