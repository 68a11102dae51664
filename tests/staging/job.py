"""A staging job whose ranks take themselves for parts of several nodes: `mpirun -n 4 python job.py OPTIONS`.

OPTIONS is JSON: `hosts` (by rank), `data`, `local` (of each node: LOCAL/HOST), `log` (a folder for the files that ranks
open), further arguments of `stage`, and what is to go wrong.
"""

import json
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any

from hpctrain.data.atomic import publish
from hpctrain.parallel.world import World, run_rank, start
from hpctrain.staging import environment, shards, transfer


def record_opens(log: Path, rank: int) -> None:
    """Write down which files this rank opens on the shared file system."""
    enter = transfer.Source.__enter__

    def logged(self: transfer.Source) -> transfer.Source:
        with open(log / f"opened-{rank}", "a") as file:
            file.write(f"{self.path.name}\n")
        return enter(self)

    transfer.Source.__enter__ = logged  # type: ignore[method-assign]


def kill_before_publishing(count: int) -> None:
    """End this rank as `kill -9` does when it is about to give its count-th copy its name."""
    seen = []

    def counted(temporary: Path, path: Path) -> None:
        seen.append(path)
        if len(seen) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        publish(temporary, path)

    shards.publish = counted  # type: ignore[attr-defined]


def work(world: World, options: dict[str, Any]) -> None:
    hosts = options["hosts"]
    local = Path(options["local"]) / hosts[world.rank]
    record_opens(Path(options["log"]), world.rank)
    transfer.BLOCK_BYTES = options.get("block_bytes", transfer.BLOCK_BYTES)
    if world.rank == options.get("rank_that_dies"):
        kill_before_publishing(options["dies_at"])
    if world.rank == options.get("rank_with_full_disk"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
    if "environment" in options:
        line = environment.unpack_environment(Path(options["environment"]), str(local / "env"), world, hosts)
        if world.is_root:
            print(line)
        return
    if "same_directory" in options:
        local = Path(options["local"]) / "same"
    total = shards.stage(options["data"], local, world, hosts=hosts, say=print, **options.get("stage", {}))
    if world.is_root:
        print(json.dumps(vars(total)))


def main() -> int:
    work(start(), json.loads(sys.argv[1]))
    return 0


if __name__ == "__main__":
    run_rank(main)
