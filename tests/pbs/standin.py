"""A stand-in for OpenPBS on this machine alone, to try the tests of this folder where there is none.

It does what the tests and job scripts rely on, as OpenPBS does it: a job starts in $HOME with a clean environment, its
script run by a login shell that reads the script's path; directives end at the first command; SIGTERM goes to every
process of the job's session at the end of the walltime and at qdel, SIGKILL ten seconds later; an array of one is
refused; a server keeps no history; jobs wait for others. Two nodes are this host and one that pbs_tmrsh makes up.
Nothing is scheduled: a job runs as soon as those it waits for have ended.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

KILL_DELAY_SECONDS = 10
NODES = [os.uname().nodename, "standin2"]
OPTIONS = list("ANWJSejklopqrv")
TMRSH = """#!/bin/bash
host=$1; shift; cd "$HOME"
exec env -i PATH=/usr/bin:/bin HOME="$HOME" PBS_JOBID="$PBS_JOBID" PBS_ENVIRONMENT=PBS_BATCH \\
  OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 \\
  unshare --uts /bin/sh -c 'hostname "$0"; exec "$@"' "$host" "$@"
"""


def install(folder: Path) -> Path:
    """Make a server in `folder` and return the folder of its programs."""
    tools = folder / "bin"
    tools.mkdir(parents=True)
    for name in ("qsub", "qstat", "qdel", "pbsnodes"):
        (tools / name).write_text(
            f"#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(__file__)} {shlex.quote(str(folder))} {name} "
            '"$@"\n'
        )
    (tools / "pbs_tmrsh").write_text(TMRSH)
    for tool in tools.iterdir():
        tool.chmod(0o755)
    return tools


class Server:
    """The jobs in a folder: NUMBER.json says what is known of one, NUMBER.SC is its script."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def qsub(self, words: list[str]) -> None:
        """Submit."""
        parser = argparse.ArgumentParser("qsub")
        parser.add_argument("-V", action="store_true")
        for option in OPTIONS:
            parser.add_argument(f"-{option}", action="append", default=[])
        given = parser.parse_args(words[:-1])
        script = Path(words[-1]).read_text()
        for line in script.splitlines():
            if line.startswith("#PBS "):
                # What was given before counts: the command line, then the first lines.
                extra = parser.parse_args(shlex.split(line.removeprefix("#PBS ")))
                for option in OPTIONS:
                    getattr(given, option).extend(getattr(extra, option))
            elif line.strip() and not line.startswith("#"):
                break
        name = (given.N or [Path(words[-1]).name])[0]
        if not re.fullmatch(r"[A-Za-z][!-~]{0,229}", name):
            refuse("illegal -N value")
        array = re.fullmatch(r"(\d+)-(\d+)", given.J[0]) if given.J else None
        if given.J and (array is None or int(array[1]) >= int(array[2])):
            refuse("illegal -J value")
        resources: dict[str, str] = {}
        for entry in given.l:
            key, _, value = entry.partition("=")
            resources.setdefault(key, value)
        depends = [entry.removeprefix("depend=").split(":") for entry in given.W if entry.startswith("depend=")]
        for _, job in depends:
            if self.read(job) is None:
                refuse(f"Unknown Job Id {job}")
        number = sum(1 for _ in self.folder.glob("*.SC")) + 1
        job = f"{number}{'[]' if array else ''}.standin"
        (self.folder / f"{number}.SC").write_text(script)
        (self.folder / f"{number}.SC").chmod(0o700)
        facts = {
            "job": job,
            "name": name,
            "state": "H" if depends else "Q",
            "resources": resources,
            "account": given.A[0] if given.A else None,
            "indices": list(range(int(array[1]), int(array[2]) + 1)) if array else [],
            "depends": depends,
            "variables": dict(entry.split("=", 1) for entry in ",".join(given.v).split(",") if entry),
            "folder": os.getcwd(),
            "exit": {},
        }
        self.write(facts)
        subprocess.Popen(
            [sys.executable, __file__, str(self.folder), "run", job],
            env={"PATH": "/usr/bin:/bin", "HOME": os.environ["HOME"]},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        print(job)

    def run(self, job: str) -> None:
        """Run a job, or all of an array, when its time has come."""
        facts = self.read(job)
        assert facts is not None
        for kind, other in facts["depends"]:
            while (ended := self.read(other)) is not None and ended["state"] != "F":
                if self.deleted(job):
                    break
                time.sleep(0.1)
            if ended is not None and kind == "afterok" and any(ended["exit"].values()):
                self.write(facts | {"state": "F"})
                return
        if not self.deleted(job):
            self.write(facts | {"state": "B" if facts["indices"] else "R", "start": time.time()})
            threads = [threading.Thread(target=self.start, args=(facts, index)) for index in facts["indices"] or [None]]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        self.write(facts | {"state": "F"})

    def start(self, facts: dict[str, Any], index: int | None) -> None:
        """Run one job."""
        number = facts["job"].split("[")[0].split(".")[0]
        job = facts["job"] if index is None else f"{number}[{index}].standin"
        count, _, chunk = facts["resources"]["select"].partition(":")
        ranks = int((re.findall(r"mpiprocs=(\d+)", chunk) or ["1"])[0])
        nodefile = self.folder / f"{number}.{index}.nodes"
        nodefile.write_text("".join(f"{node}\n" * ranks for node in NODES[: int(count)]))
        environ = {
            **{"HOME": os.environ["HOME"], "PATH": "/usr/bin:/bin", "SHELL": "/bin/bash"},
            **facts["variables"],
            **{"PBS_JOBID": job, "PBS_JOBNAME": facts["name"], "PBS_O_WORKDIR": facts["folder"]},
            **{"PBS_NODEFILE": str(nodefile), "PBS_ENVIRONMENT": "PBS_BATCH", "PBS_O_QUEUE": "workq"},
            **({} if index is None else {"PBS_ARRAY_INDEX": str(index)}),
            "PBS_CONF_FILE": str(self.folder / "pbs.conf"),
        }
        (self.folder / "pbs.conf").write_text(f"PBS_EXEC={self.folder}\n")
        with open(self.folder / f"{number}.{index}.spool", "wb") as spool:
            shell = subprocess.Popen(
                ["-bash"],
                executable="/bin/bash",
                stdin=subprocess.PIPE,
                stdout=spool,
                stderr=subprocess.STDOUT,
                env=environ,
                cwd=os.environ["HOME"],
                start_new_session=True,
            )
            assert shell.stdin is not None
            shell.stdin.write(f"{shlex.quote(str(self.folder / f'{number}.SC'))}\n".encode())
            shell.stdin.close()
            hours, minutes, seconds = map(int, facts["resources"]["walltime"].split(":"))
            end = time.monotonic() + 3600 * hours + 60 * minutes + seconds
            told: float | None = None
            while shell.poll() is None:
                if told is None and (time.monotonic() > end or self.deleted(facts["job"])):
                    signal_session(shell.pid, signal.SIGTERM)
                    told = time.monotonic()
                elif told is not None and time.monotonic() > told + KILL_DELAY_SECONDS:
                    signal_session(shell.pid, signal.SIGKILL)
                time.sleep(0.1)
            signal_session(shell.pid, signal.SIGKILL)
        facts["exit"][str(index)] = shell.returncode

    def qstat(self, words: list[str]) -> None:
        """Say what is known."""
        if words == ["-B"]:
            print("Server  Max   Tot   Que   Run   Hld   Wat   Trn   Ext Status")
            return
        if "-x" in words:
            refuse("job_history_enable is set to false", "qstat")
        code = 0
        for job in (word for word in words if not word.startswith("-")):
            facts = self.read(job)
            if facts is None or facts["state"] == "F":
                print(
                    f"qstat: Unknown Job Id {job}"
                    if facts is None
                    else f"qstat: {job} Job has finished, use -x or -H to obtain historical job information",
                    file=sys.stderr,
                )
                code = 153 if facts is None else 35
                continue
            print(f"Job Id: {job}\n    Job_Name = {facts['name']}")
            print(f"    job_state = {facts['state']}")
            if facts["account"]:
                print(f"    Account_Name = {facts['account']}")
            for key, value in facts["resources"].items():
                print(f"    Resource_List.{key} = {value}")
            if "start" in facts:
                used = int(time.time() - facts["start"])
                print(f"    resources_used.walltime = 00:{used // 60:02}:{used % 60:02}")
            print("    Variable_List = PBS_O_HOME=/,\n\tPBS_O_SYSTEM=Linux\n")
        sys.exit(code)

    def qdel(self, words: list[str]) -> None:
        """End jobs."""
        for job in words:
            if self.read(job) is None:
                refuse(f"Unknown Job Id {job}", "qdel")
            (self.folder / f"{number_of(job)}.deleted").touch()

    def pbsnodes(self, words: list[str]) -> None:
        """Say what nodes there are."""
        for node in NODES:
            print(f"{node}\n     state = free\n     resources_available.host = {node}\n")
            print("     resources_available.ncpus = 4\n")

    def deleted(self, job: str) -> bool:
        """Whether qdel has been called for it."""
        return (self.folder / f"{number_of(job)}.deleted").exists()

    def read(self, job: str) -> dict[str, Any] | None:
        """What is known of a job."""
        try:
            facts: dict[str, Any] = json.loads((self.folder / f"{number_of(job)}.json").read_text())
        except FileNotFoundError:
            return None
        return facts

    def write(self, facts: dict[str, Any]) -> None:
        """Keep what is known of a job."""
        path = self.folder / f"{number_of(facts['job'])}.json"
        path.with_suffix(".new").write_text(json.dumps(facts))
        path.with_suffix(".new").replace(path)


def number_of(job: str) -> str:
    """`12[3].server` is of the job with the number 12."""
    return re.split(r"[\[.]", job)[0]


def refuse(why: str, program: str = "qsub") -> NoReturn:
    """End as PBS's programs do."""
    print(f"{program}: {why}", file=sys.stderr)
    sys.exit(1)


def signal_session(session: int, number: int) -> None:
    """Send a signal to every process of a session."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError):
            if entry.name.isdigit() and (entry / "stat").read_text().rsplit(")", 1)[1].split()[3] == str(session):
                os.kill(int(entry.name), number)


if __name__ == "__main__":
    getattr(Server(Path(sys.argv[1])), sys.argv[2])(sys.argv[3] if sys.argv[2] == "run" else sys.argv[3:])
