"""Which hosts answer, and which are much slower than the rest: each is asked to look at itself, all at once."""

import json
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from hpctrain.supervise.child import run_limited

# Each is a launcher on this host, which waits most of the time.
_AT_ONCE = 64
_OUTPUT_SHOWN = 160


@dataclass(frozen=True)
class Answer:
    """What a host said of itself; a measurement that it could not make is None."""

    failure: str  # why there is no answer; empty when there is one
    gemm_seconds: float | None = None
    memory_bytes_per_second: float | None = None
    error: str = ""  # what the host found wrong, such as a directory that it cannot write


class Prober:
    """Asks hosts through the launcher. `launch_on` gives the words that start one process on a host."""

    def __init__(
        self, launch_on: Callable[[str], list[str]], run_dir: Path, env: Mapping[str, str], seconds: float
    ) -> None:
        self._launch_on, self._env, self._seconds = launch_on, env, seconds
        self._look = [sys.executable, "-m", "hpctrain.doctor.node", "--json", "--dir", str(run_dir)]

    def examine(self, hosts: Sequence[str]) -> dict[str, Answer]:
        """Return each host's answer, or why there is none after the time for it."""
        return dict(zip(hosts, self._on_all(hosts, lambda host: self._ask(host, self._look)), strict=True))

    def silent(self, hosts: Sequence[str]) -> dict[str, str]:
        """Return the hosts on which not even `true` can be run, and why: cheap enough for hosts that are at work."""
        answers = self._on_all(hosts, lambda host: self._call(host, ["true"])[1])
        return {host: failure for host, failure in zip(hosts, answers, strict=True) if failure}

    def _on_all(self, hosts: Sequence[str], ask: Callable) -> list:
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            return list(pool.map(ask, hosts))

    def _ask(self, host: str, words: list[str]) -> Answer:
        output, failure = self._call(host, words)
        return Answer(failure) if failure else read_answer(output)

    def _call(self, host: str, words: list[str]) -> tuple[str, str]:
        """What a program prints on a host, and why it failed, if so."""
        with tempfile.TemporaryFile() as output:
            try:
                code = run_limited([*self._launch_on(host), *words], self._env, self._seconds, output)
            except OSError as error:
                return "", f"the probe could not be started: {error}"
            output.seek(0)
            text = output.read().decode(errors="replace")
        if code is None:
            return text, f"did not answer within {self._seconds:g} s"
        if code:
            return text, f"the probe failed with exit code {code}: {telling_line(text)}"
        return text, ""


def telling_line(output: str) -> str:
    """Return the first line that speaks of an error, else the first one with words; launchers print much around it."""
    lines = [line.strip() for line in output.splitlines() if re.search(r"[A-Za-z]{2}", line)]
    found = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "no message")
    return found[:_OUTPUT_SHOWN]


def read_answer(output: str) -> Answer:
    """Read what `python -m hpctrain.doctor.node --json` printed, between whatever a site's login files print."""
    for line in reversed(output.splitlines()):
        try:
            facts = json.loads(line)
        except ValueError:
            continue
        if isinstance(facts, dict) and "gemm_seconds" in facts:
            errors = facts.get("errors") or {}
            return Answer(
                "", facts["gemm_seconds"], facts.get("memory_bytes_per_second"), "; ".join(map(str, errors.values()))
            )
    return Answer("the probe printed no answer")


def unfit(answers: Mapping[str, Answer], slow_factor: float) -> dict[str, str]:
    """Return which hosts are not fit for the run, and why: a pure function.

    Those without an answer; those with an error that not all have (a directory that no host can write is not the
    hosts' fault); and those that take `slow_factor` times as long as the median of all for a matrix product or for
    copying memory. Of two hosts the faster one is the measure.
    """
    found = {host: answer.failure for host, answer in answers.items() if answer.failure}
    others = {host: answer for host, answer in answers.items() if not answer.failure}
    if not all(answer.error for answer in others.values()):
        found |= {host: answer.error for host, answer in others.items() if answer.error}
    for host, slowness in slownesses(others).items():
        if slowness[0] > slow_factor and host not in found:
            found[host] = f"{slowness[1]} takes {slowness[0]:.1f} times as long as on the other hosts"
    return found


def slownesses(answers: Mapping[str, Answer]) -> dict[str, tuple[float, str]]:
    """Return for each host how many times the median it takes, and for what, at the worse of the two measurements."""
    costs = {
        "a matrix product": {host: a.gemm_seconds for host, a in answers.items()},
        "copying memory": {
            host: 1 / a.memory_bytes_per_second if a.memory_bytes_per_second else None for host, a in answers.items()
        },
    }
    worst = dict.fromkeys(answers, (1.0, ""))
    for what, cost in costs.items():
        known = [value for value in cost.values() if value]
        usual = statistics.median_low(known) if known else 1.0
        for host, value in cost.items():
            if value is not None and value / usual > worst[host][0]:
                worst[host] = (value / usual, what)
    return worst
