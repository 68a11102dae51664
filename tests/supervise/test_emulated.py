"""Real training over emulated hosts with networks of their own, one of which dies or is cut off."""

import json
import os
import shlex
import subprocess
import time
from pathlib import Path

import pytest

from tests.emulated.conftest import MakeHosts, make_hosts, possible
from tests.training.conftest import EXACT, HPCTRAIN, Launcher, assert_same_bits, launcher, metrics_of, read_run

__all__ = ["launcher", "make_hosts", "possible"]

# slow: a new mpirun at times hangs beside what Open MPI left of the one that lost a host, until supervise ends it
pytestmark = [pytest.mark.emulated, pytest.mark.slow]

SETTINGS = [*EXACT, "data.synthetic=true", "data.path=null", "model.num_classes=6", "train.steps=12"]
SETTINGS += ["checkpoint.every_steps=2"]
OPTIONS = ["--slow-factor=50", "--quiet-seconds=20", "--probe-seconds=30", "--grace-seconds=5", "--pause-seconds=1"]
PATIENCE_SECONDS = 400


@pytest.mark.parametrize("how", ["kill", "cut off"])
def test_a_run_goes_on_with_the_spare_host(how: str, make_hosts: MakeHosts, launcher: Launcher, tmp_path: Path) -> None:
    hosts = make_hosts(3)
    words = hosts.mpirun_words()
    at = words.index("mpirun")
    run_dir = tmp_path / "emulated"
    command = [*words[:at], *HPCTRAIN, "supervise", "--hosts", ",".join(hosts.names), "--spare-nodes", "1", *OPTIONS]
    command += ["--launch", shlex.join(words[at:-2]), "--", *HPCTRAIN, "train", "demo", *SETTINGS]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(
            [*command, "--run-dir", str(run_dir)], stdout=log, stderr=log, start_new_session=True, env={**os.environ}
        )
    end = time.monotonic() + PATIENCE_SECONDS
    try:
        while not any(line["kind"] == "train" and line["step"] >= 5 for line in metrics_of(run_dir)):
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "log").read_text()
            time.sleep(0.1)
        {"kill": hosts.kill_host, "cut off": hosts.cut_link}[how](1)
        code = process.wait(PATIENCE_SECONDS)
    finally:
        process.kill()
        process.wait()
    output = (tmp_path / "log").read_text()
    assert code == 0, output
    events = [json.loads(line) for line in (run_dir / "supervise.jsonl").read_text().splitlines()]
    launches = [event["hosts"] for event in events if event["event"] == "launch"]
    assert launches == [["node0", "node1"], ["node0", "node2"]]
    assert list(events[-1]["excluded"]) == ["node1"] and "excluded: node1 (" in output.splitlines()[-1]
    launcher.train(2, tmp_path / "local", *SETTINGS)
    assert_same_bits(read_run(run_dir), read_run(tmp_path / "local"))
