"""What happened to a supervised run: a line of the log and a line of RUN_DIR/supervise.jsonl for each event."""

import json
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

FILE_NAME = "supervise.jsonl"


class Account:
    """Tells of events as they happen, and remembers which hosts were excluded and why."""

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir / FILE_NAME
        self.excluded: dict[str, str] = {}

    def tell(self, event: str, message: str, hosts: Sequence[str] = (), **facts: Any) -> None:
        """Print `message` and append {"time", "event", "message", "hosts", "excluded", **facts}.

        `time` is in ISO 8601, UTC. A full disk is no reason to end a run: then the log alone has it.
        """
        print(f"{time.strftime('%F %T')}  supervise: {message}", flush=True)
        record = {
            "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "event": event,
            "message": message,
            "hosts": list(hosts),
            "excluded": self.excluded,
            **facts,
        }
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            print(f"{time.strftime('%F %T')}  supervise: cannot write {self._path}: {error.strerror}", flush=True)

    def summary(self) -> str:
        """Return which hosts were excluded and why, as the end of a sentence."""
        if not self.excluded:
            return "no host was excluded"
        return "excluded: " + "; ".join(f"{host} ({reason})" for host, reason in self.excluded.items())
