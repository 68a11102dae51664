"""The supervisor: choose hosts, launch, see how it ends, and launch again without what failed."""

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hpctrain.supervise import launchers
from hpctrain.supervise.account import Account
from hpctrain.supervise.child import Child, StopFlag, pause
from hpctrain.supervise.hosts import Allocation, cancel_steps, down_in_slurm
from hpctrain.supervise.probe import Answer, Prober, slownesses, unfit
from hpctrain.supervise.training import Training, last_sign_of_life, newest_checkpoint
from hpctrain.training.lock import FILE_NAME as LOCK
from hpctrain.training.stop import EXIT_PREEMPTED, job_end_time

EXIT_MISTAKE = 2
_KILLED = 137
_LOST = 1  # for a launcher that says 0 although its ranks did not finish
_LOOK_SECONDS = 0.2
_NAMES_SHOWN = 8
_END_SECONDS = 10.0  # for a launcher to end its ranks after a SIGTERM
_LONGEST_PAUSE_SECONDS = 60.0


@dataclass(frozen=True)
class Options:
    """What the user decides."""

    spare_nodes: int
    tries: int  # launches in all
    min_nodes: int  # fewer are not worth going on with
    go_on_with_fewer: bool
    slow_factor: float  # times the median at which a host is excluded
    probe_seconds: float  # that a host has to answer
    watch_seconds: float  # between two looks at what Slurm says of the hosts
    quiet_seconds: float  # without a metric or checkpoint after which the hosts are asked
    stall_seconds: float  # without either after which a run on hosts that answer is ended
    grace_seconds: float  # that a launcher has to end by itself after a host was lost
    pause_seconds: float  # before the second launch; doubled before each further one


@dataclass(frozen=True)
class Try:
    """How one launch ended."""

    code: int
    lost: bool  # whether a host was found unfit afterwards
    progressed: bool  # whether it left a newer checkpoint


def hopeless(tries: Sequence[Try]) -> bool:
    """Whether the program fails by itself: twice in a row on healthy hosts, the second time to no avail."""
    return len(tries) > 1 and not (tries[-1].lost or tries[-2].lost or tries[-1].progressed)


def _names(hosts: Sequence[str]) -> str:
    more = f" and {len(hosts) - _NAMES_SHOWN} more" if len(hosts) > _NAMES_SHOWN else ""
    return ", ".join(hosts[:_NAMES_SHOWN]) + more


class Supervisor:
    """Runs one training command on hosts of one allocation to its end."""

    def __init__(
        self,
        allocation: Allocation,
        kind: str,
        words: Sequence[str],
        ranks_per_node: int,
        training: Training,
        options: Options,
        account: Account,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._allocation, self._kind, self._words, self._per_node = allocation, kind, list(words), ranks_per_node
        self._training, self._options, self._account = training, options, account
        self._wanted = len(allocation.hosts) - options.spare_nodes
        # What is left of a step on a dead node must not hold up the next; a step must not outlive its nodes.
        self._env = {name: value for name, value in environ.items() if name != "SLURM_NO_KILL"} | {"SLURM_OVERLAP": "1"}
        self._job = environ.get("SLURM_JOB_ID", "") if allocation.scheduler == "slurm" else ""
        self._end_time = job_end_time(environ)
        self._prober = Prober(
            lambda host: launchers.for_probe(kind, self._words, host),
            training.run_dir,
            self._env,
            options.probe_seconds,
        )
        self._answers: dict[str, Answer] = {}
        self._last: list[str] = []  # hosts of the last launch
        self._stop = StopFlag()

    def run(self) -> int:
        """Return the run's exit code: 0 finished, 85 to go on later, 2 a user's mistake, else that of a failure."""
        try:
            code = self._run()
        finally:
            self._stop.close()
        words = {0: "finished", EXIT_PREEMPTED: "stopped, to go on later", EXIT_MISTAKE: "a mistake to be mended"}
        message = f"{words.get(code, 'failed')} (exit code {code}); {self._account.summary()}"
        self._account.tell("end", message, self._last, exit_code=code)
        return code

    def _run(self) -> int:
        options, say = self._options, self._account.tell
        say(
            "start",
            f"{len(self._allocation.hosts)} hosts, {options.spare_nodes} of them spare; {self._per_node} ranks a host",
            self._allocation.hosts,
        )
        self._exclude_unfit()
        tries: list[Try] = []
        newest = newest_checkpoint(self._training.run_dir)
        while not self._stop.requested:
            hosts = self._choose()
            if not hosts or self._stop.requested:
                return EXIT_PREEMPTED
            code = self._launch(hosts, len(tries) + 1)
            if code == 0 and not self._training.finished():
                say("unfinished", "the launcher ended with exit code 0, but the run is not finished", hosts)
                code = _LOST
            step = newest_checkpoint(self._training.run_dir)
            facts = {"exit_code": code, "try": len(tries) + 1, "checkpoint": step}
            kept = f"step {step}" if step else "none"
            say("ended", f"try {len(tries) + 1} ended with exit code {code}; newest checkpoint: {kept}", hosts, **facts)
            if code in (0, EXIT_PREEMPTED, EXIT_MISTAKE):
                return code
            if self._stop.requested:  # there may be little time: no more than whether it was a host
                return EXIT_PREEMPTED if self._prober.silent(hosts) else code
            lost = self._exclude_unfit() | (self._account.excluded.keys() & set(hosts))
            tries.append(Try(code, bool(lost), step > newest))
            newest = step
            if self._stop.requested:
                return EXIT_PREEMPTED
            if hopeless(tries):
                say("give up", "two tries failed on healthy hosts, the second without a new checkpoint", hosts)
                return code
            if len(tries) >= options.tries:
                say("give up", f"{len(tries)} tries failed", hosts)
                return EXIT_PREEMPTED if lost else code
            if self._end_time is not None and self._end_time - time.time() < self._training.stop_margin_seconds:
                say("too late", "the walltime is nearly over: not launched again", hosts)
                return EXIT_PREEMPTED
            seconds = min(options.pause_seconds * 2 ** (len(tries) - 1), _LONGEST_PAUSE_SECONDS)
            say("pause", f"launching again in {seconds:g} s, from the last checkpoint")
            pause(seconds, self._stop)
        return EXIT_PREEMPTED

    # Hosts

    def _exclude_unfit(self) -> set[str]:
        """Ask all hosts that are not excluded yet; return those that are now."""
        hosts = [host for host in self._allocation.hosts if host not in self._account.excluded]
        started = time.monotonic()
        answers = self._prober.examine(hosts)
        found = unfit(answers, self._options.slow_factor)
        doubtful = [host for host in found if not answers[host].failure and not answers[host].error]
        if len(found) == len(hosts):  # more likely a batch system that was busy
            doubtful = hosts
        if doubtful:  # once more: what a run left behind may still have been ending there
            answers |= self._prober.examine(doubtful)
            found = unfit(answers, self._options.slow_factor)
        self._answers = answers
        self._account.excluded |= found
        seconds = time.monotonic() - started
        self._account.tell("probe", f"{len(hosts) - len(found)} of {len(hosts)} hosts are fit ({seconds:.1f} s)", hosts)
        for host, reason in found.items():
            self._account.tell("exclude", f"{host} is excluded: {reason}", [host])
        return set(found)

    def _choose(self) -> list[str]:
        """Return the hosts for the next launch, none if they are too few: those of the last launch first, slow last."""
        left = [host for host in self._allocation.hosts if host not in self._account.excluded]
        factors = slownesses({host: self._answers[host] for host in left})
        noticeable = math.sqrt(self._options.slow_factor)  # halfway to being excluded; less is noise
        left.sort(key=lambda host: (factors[host][0] > noticeable, bool(self._last) and host not in self._last))
        count: int | None = self._wanted
        if len(left) < self._wanted:
            fewer = self._options.go_on_with_fewer
            least = self._options.min_nodes
            count = self._training.largest_count(len(left), least, self._per_node, self._wanted) if fewer else None
            what = f"{len(left)} of {self._wanted} nodes are left"
            if count is None:
                self._account.tell("too few", f"{what}: not enough to go on; the job has to be queued again", left)
                return []
            self._account.tell("fewer", f"{what}: going on with {count}", left)
        chosen = left[:count]
        return [host for host in self._allocation.hosts if host in chosen]

    # One launch

    def _launch(self, hosts: list[str], number: int) -> int:
        """Start the run on these hosts and return its exit code; a run that lost a host and hangs is ended."""
        self._last = hosts
        words = launchers.on_hosts(self._kind, self._words, hosts, self._per_node)
        command = [*words, *(self._training.command if number == 1 else self._training.again())]
        message = f"try {number} of at most {self._options.tries} on {_names(hosts)}"
        self._account.tell("launch", message, hosts, **{"try": number, "command": command})
        try:
            if number > 1:  # who held the run directory has ended, and need not be waited for
                (self._training.run_dir / LOCK).unlink(missing_ok=True)
            child = Child(command, self._env | launchers.variables(self._kind, hosts))
        except OSError as error:
            self._account.tell("launch failed", f"{command[0]} cannot be started: {error.strerror}", hosts)
            return EXIT_MISTAKE
        self._stop.child = child
        try:
            if self._stop.requested:  # the signal came in between
                child.send(self._stop.NUMBER)
            code = self._watch(child, hosts)
        finally:
            self._stop.child = None
            child.end(_END_SECONDS)
            if self._job:
                cancel_steps(self._job)
        # A program that was told to stop before it could listen dies of SIGUSR1: that is no crash.
        return EXIT_PREEMPTED if self._stop.requested and code == 128 + self._stop.NUMBER else code

    def _watch(self, child: Child, hosts: list[str]) -> int:
        """Wait for the launcher's end. One that a lost host keeps waiting for ever is given up after a while."""
        options = self._options
        next_look = time.monotonic() + options.watch_seconds
        started = asked = time.time()  # asked: when the hosts were last known to answer
        give_up: float | None = None
        while (code := child.wait(_LOOK_SECONDS)) is None:
            now = time.monotonic()
            if give_up is not None:
                if now >= give_up:
                    self._account.tell("kill", "the launcher did not end by itself and is killed", hosts)
                    return _KILLED
                continue
            lost: dict[str, str] = {}
            if self._job and now >= next_look:
                next_look = now + options.watch_seconds
                lost = dict.fromkeys(sorted(down_in_slurm(hosts) & set(hosts)), "Slurm says that it is down")
            alive = max(started, last_sign_of_life(self._training.run_dir))
            if time.time() - alive > options.stall_seconds:
                self._account.tell("stall", f"no sign of life for {options.stall_seconds:g} s: the run is ended", hosts)
                return _KILLED
            if time.time() - max(asked, alive) > options.quiet_seconds:
                lost |= self._prober.silent(hosts)
                asked = time.time()
                if not lost:
                    self._account.tell(
                        "quiet", f"no sign of life for {options.quiet_seconds:g} s; all hosts answer", hosts
                    )
            if lost:
                self._account.excluded |= lost
                for host, reason in lost.items():
                    self._account.tell("exclude", f"{host} is lost: {reason}", [host])
                give_up = time.monotonic() + options.grace_seconds
        return code
