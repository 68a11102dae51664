"""Looking at shards through the HDF5 library in a process of its own.

The library, written in C, trusts what a file says of itself more than a file from elsewhere deserves: such a file may
crash it, keep it busy for ever or let it ask for all memory. That then happens to the process here, not to the caller.
"""

import contextlib
import json
import os
import resource
import select
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from hpctrain.data.manifest import ShardEntry
from hpctrain.data.shard import DataError

_PATIENCE_SECONDS = 300.0
_MEMORY_BYTES = 4 << 30  # that a file may take; one with the largest index takes less than a gigabyte


class Inspector:
    """A process that inspects one shard after the other; it is started when first needed, and anew after a crash."""

    def __init__(self, patience_seconds: float = _PATIENCE_SECONDS) -> None:
        self._patience_seconds = patience_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Inspector":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()

    def inspect(self, path: Path) -> ShardEntry:
        """Return what the manifest should say about a shard file (`hdf5.inspect_shard`), or raise DataError."""
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "hpctrain.data.hdf5_apart"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        answer = b""
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(os.fspath(path)).encode() + b"\n")
            process.stdin.flush()
            if select.select([process.stdout], [], [], self._patience_seconds)[0]:
                answer = process.stdout.readline()
            else:
                self.close()
                raise DataError(f"{path} keeps the HDF5 library busy without an end: it is damaged; copy it again")
        if not answer.endswith(b"\n"):
            code = process.wait()
            self.close()
            raise DataError(f"{path} makes the HDF5 library crash (exit code {code}): it is damaged; copy it again")
        found = json.loads(answer)
        if isinstance(found, str):
            raise DataError(found)
        return ShardEntry(**found)


def _serve() -> None:
    from hpctrain.data.hdf5 import inspect_shard

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = _address_space_bytes() + _MEMORY_BYTES
    limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    for line in sys.stdin:
        path = Path(json.loads(line))
        try:
            answer: object = asdict(inspect_shard(path)[0])
        except DataError as error:
            answer = str(error)
        print(json.dumps(answer), flush=True)


def _address_space_bytes() -> int:
    """What this process has reserved already, of which NumPy's threads have gigabytes on large nodes."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


if __name__ == "__main__":
    _serve()
