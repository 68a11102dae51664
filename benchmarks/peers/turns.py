"""Who runs when: contenders of a group take turns, round by round, while time is left.

A round after the first is begun when all of it fits into the time that is left, by what its contenders took before. In
the first, a contender is begun when one like the slowest of its group so far would fit; it is ended when time is up.
"""

import time
from collections.abc import Callable, Sequence

from benchmarks.peers.budget import Budget
from benchmarks.peers.plan import Contender, Group
from benchmarks.peers.runner import Failed, OutOfTime, Run

Say = Callable[[str], None]


class Turns:
    """The rounds of one group, and what came out of them: `results` have `group`, `contender` and `round`, from 1.

    Odd rounds go forward and even ones backward, so that nobody always comes right after the same one. A contender
    that fails once is out; its result has `error` instead of figures. `left_out` says who did not run for lack of time.
    """

    def __init__(
        self,
        group: Group,
        quick: bool,
        run: Callable[[Group, Contender], Run],
        say: Say,
        budget: Budget,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.group = group
        self.results: list[Run] = []
        self.left_out: list[str] = []
        self._contenders = [contender for contender in group.contenders if contender.quick or not quick]
        self._run, self._say, self._budget, self._clock = run, say, budget, clock
        self._rounds = 0
        self._out: set[str] = set()
        self._seconds: dict[str, float] = {}  # what each took last

    @property
    def next_seconds(self) -> float:
        """What the next round will take, going by those before; nothing if nobody would run."""
        return sum(self._seconds.get(contender.name, 0.0) for contender in self._next())

    def take_round(self) -> None:
        """Run each contender once more."""
        contenders = self._next()
        self._rounds += 1
        for contender in contenders:
            longest = max(self._seconds.values(), default=0.0)
            if not self._budget.fits(self._seconds.get(contender.name, longest)):
                self._leave_out(contender)
                continue
            result: Run = {"group": self.group.name, "contender": contender.name, "round": self._rounds}
            started = self._clock()
            try:
                result |= self._run(self.group, contender)
                text = f"round {self._rounds}: {result['images_per_second']:.1f} images/s"
                self._say(f"{self.group.title}: {contender.name}, {text}")
            except OutOfTime:
                self._leave_out(contender)
                continue
            except Failed as error:
                self._out.add(contender.name)
                result["error"] = str(error)
                self._say(f"{self.group.title}: {contender.name} failed: {error}")
            result["seconds"] = self._seconds[contender.name] = self._clock() - started
            self.results.append(result)

    def _next(self) -> list[Contender]:
        number = self._rounds + 1
        able = [one for one in self._contenders if number <= one.rounds and one.name not in self._out]
        if number > self.group.rounds:
            return []
        return able if number % 2 else able[::-1]

    def _leave_out(self, contender: Contender) -> None:
        self.left_out.append(f"{self.group.title}: {contender.name}, round {self._rounds}: the time was up")
        self._say(self.left_out[-1])


def more_rounds(all_turns: Sequence[Turns], rounds: int, budget: Budget, done: Callable[[Turns], None]) -> None:
    """After a first round of all groups, give each in turn another one, up to `rounds`, as long as it fits."""
    for _ in range(1, rounds):
        for turns in all_turns:
            if (seconds := turns.next_seconds) > 0 and budget.fits(seconds):
                turns.take_round()
                done(turns)
