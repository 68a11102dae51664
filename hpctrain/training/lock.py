"""One job at a time writes a run directory: a lock file that works on any shared file system.

`run.lock` is created with O_EXCL, which is atomic on NFS and Lustre where fcntl locks may be switched off. Its holder
touches it every few seconds. A job that finds it asks: does the process that holds it still live? On the same
machine that is certain; of another one only a lock that nobody has touched for a while is taken to be left over. Its
age is the difference of two times that the file server gave, so that the clocks of two hosts are never compared.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from hpctrain.data.atomic import temporary_path
from hpctrain.errors import UserError

FILE_NAME = "run.lock"
_BEAT_SECONDS = 10.0
_SILENT_SECONDS = 60.0  # six beats missed
_SETTLE_SECONDS = 0.5  # in which another one that takes over at the same moment has done so
_LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Holder:
    """Who holds a run directory: what is written in its lock."""

    host: str
    pid: int
    boot: str  # identity of the running kernel
    namespace: str  # in which the process number is meant
    started: str  # when the process began, in ticks since the boot
    job: str  # of the batch system, empty outside of one
    since: str  # for people
    token: str

    def describe(self) -> str:
        """Say who that is."""
        job = f", job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.since}"


class RunLock:
    """Held by rank 0 of a job for as long as it trains."""

    def __init__(
        self, run_dir: Path, *, beat_seconds: float = _BEAT_SECONDS, silent_seconds: float = _SILENT_SECONDS
    ) -> None:
        self._run_dir, self._path = run_dir, run_dir / FILE_NAME
        self._beat_seconds, self._silent_seconds = beat_seconds, silent_seconds
        self._mine = _this_process()
        self._made_directory = False
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()

    def acquire(self, say: Callable[[str], None], on_lost: Callable[[str], None]) -> None:
        """Take the run directory, which is made if need be, or raise UserError that says who has it.

        `say` tells of a wait. `on_lost` is called from a thread when another job has taken the directory over.
        """
        try:
            self._made_directory = not self._run_dir.exists()
            self._run_dir.mkdir(parents=True, exist_ok=True)
            while not self._create():
                holder = _read(self._path)
                if self._may_be_taken(holder, say) and self._replace(holder):
                    break
        except OSError as error:
            raise UserError(
                f"the run directory {self._run_dir} cannot be written ({error.strerror or error}); "
                "choose another --run-dir"
            ) from None
        self._thread = threading.Thread(target=self._beat, args=(on_lost,), name="run-lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Give the run directory free, if it is still ours."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(_LOOK_SECONDS)  # on a file system that hangs, not longer
        holder = _read(self._path)
        if holder is not None and holder.token == self._mine.token:
            self._path.unlink(missing_ok=True)
            if self._made_directory:  # a run that was refused leaves nothing behind
                with contextlib.suppress(OSError):
                    self._run_dir.rmdir()

    def _create(self) -> bool:
        try:
            descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return False
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(self._mine), file)
        return True

    def _may_be_taken(self, holder: Holder | None, say: Callable[[str], None]) -> bool:
        """Whether the lock is left over from a job that has ended; raise UserError when its holder lives."""
        alive = None if holder is None else _is_alive(holder, self._mine)
        if alive is None:
            who = holder.describe() if holder else "a job that did not say its name"
            alive = not self._is_silent(who, say)
        if not alive:
            return True
        who = holder.describe() if holder else "another job"
        raise UserError(
            f"the run directory {self._run_dir} is in use by {who}; wait until that has ended, or choose another "
            "--run-dir"
        )

    def _is_silent(self, who: str, say: Callable[[str], None]) -> bool:
        """Whether nobody touches the lock for as long as that takes to tell."""
        before = self._signature()
        if before is None:
            return True
        left = self._silent_seconds - (self._server_time() - before[0] / 1e9)
        if left > 0:
            say(f"{self._run_dir} was held by {who}; waiting up to {left:.0f} s to see whether that still runs")
        end = time.monotonic() + left
        while time.monotonic() < end:
            time.sleep(min(_LOOK_SECONDS, self._beat_seconds))
            now = self._signature()
            if now is None or now != before:
                return now is None
        return True

    def _replace(self, seen: Holder | None) -> bool:
        """Put our name in the place of `seen`; False when somebody else was faster."""
        if _read(self._path) != seen:
            return False
        temporary = temporary_path(self._path)
        try:
            temporary.write_text(json.dumps(asdict(self._mine)), encoding="utf-8")
            os.replace(temporary, self._path)
        finally:
            temporary.unlink(missing_ok=True)
        time.sleep(_SETTLE_SECONDS)
        return _read(self._path) == self._mine

    def _signature(self) -> tuple[int, bytes] | None:
        """Time of the last touch and content, None without a lock. Opened, since NFS then asks its server."""
        try:
            with open(self._path, "rb") as file:
                return os.fstat(file.fileno()).st_mtime_ns, file.read()
        except FileNotFoundError:
            return None

    def _server_time(self) -> float:
        """What the file server's clock says, in seconds since the epoch."""
        probe = temporary_path(self._path)
        try:
            probe.write_bytes(b"")
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _beat(self, on_lost: Callable[[str], None]) -> None:
        while not self._ended.wait(self._beat_seconds):
            # A file system that is away for a while is no reason to end a run.
            with contextlib.suppress(OSError):
                holder = _read(self._path)
                if holder is None and not self._path.exists():
                    self._create()  # removed by hand
                elif holder is not None and holder.token != self._mine.token:
                    on_lost(f"the run directory {self._run_dir} was taken over by {holder.describe()}")
                    return
                else:
                    os.utime(self._path)


def _read(path: Path) -> Holder | None:
    """Who holds a lock; None without one, or when it is just being written."""
    try:
        return Holder(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _this_process() -> Holder:
    boot = namespace = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    job = os.environ.get("SLURM_JOB_ID") or os.environ.get("PBS_JOBID") or ""
    since = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    pid = os.getpid()
    return Holder(socket.gethostname(), pid, boot, namespace, _start_of(pid), job, since, uuid.uuid4().hex)


def _is_alive(holder: Holder, here: Holder) -> bool | None:
    """Whether the holder's process lives, None if that cannot be told from here."""
    if not holder.boot or not here.boot:
        return None
    if holder.boot != here.boot:
        return False if holder.host == here.host else None  # this host was started anew since
    if holder.namespace != here.namespace:
        return None
    return _start_of(holder.pid) == holder.started != ""


def _start_of(pid: int) -> str:
    """When a process began, in ticks since the boot; empty if there is no such process or it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (OSError, IndexError):
        return ""
    return "" if fields[0] in "ZX" else fields[19]
