"""The allreduce between two emulated hosts with a link of a known rate, beside what TCP itself makes of that link."""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.emulated_hosts import EmulatedHosts, why_impossible
from benchmarks.peers.runner import ROOT, Failed, LeftOut, OutOfTime

# The kernel sends only while it has a processor, and here the ranks want both: with a small burst, what it could not
# send meanwhile is lost, which a network card would have sent. 1 MB is 8 ms at 1 Gbit/s.
_BURST = "1mb"


def measure_link(sizes: str, repeats: int, rate_mbit: int, until: float) -> dict[str, Any]:
    """Return what `hpctrain bench allreduce` and a transfer by TCP find, and `rate_mbit`.

    `until` is an end on time.monotonic's clock. Raises LeftOut where there can be no emulated hosts.
    """
    if why := why_impossible():
        raise LeftOut(why)
    python = ["env", f"PYTHONPATH={ROOT}", sys.executable, "-m"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "allreduce.json"
        options = ["--sizes", sizes, "--repeats", str(repeats), "--out", str(out)]
        try:
            with EmulatedHosts(2, rate_mbit, directory=Path(folder) / "hosts", burst=_BURST) as hosts:

                def run(*words: str | Path) -> str:
                    left = until - time.monotonic()
                    if left <= 0:
                        raise OutOfTime("the time was up")
                    return hosts.run([*python, *words], timeout_seconds=min(left, 600))

                printed = run("benchmarks.peers.link_probe")
                tcp = next(json.loads(line) for line in printed.splitlines() if line.startswith("{"))
                run("hpctrain", "bench", "allreduce", *options)
        except (OSError, RuntimeError) as error:
            if time.monotonic() >= until:
                raise OutOfTime("the time was up") from None
            raise Failed(str(error).strip().splitlines()[-1][:300]) from error
        return {"rate_mbit": rate_mbit, "tcp": tcp, "allreduce": json.loads(out.read_text())}
