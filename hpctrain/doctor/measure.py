"""What each rank measures of itself and its node, and how each number is judged and shown."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpctrain.doctor.compute import GEMM_FLOPS, copy_bytes_per_second, gemm_seconds
from hpctrain.doctor.facts import Facts, cpu_megahertz
from hpctrain.doctor.files import probe_directory, read_bytes_per_second, within
from hpctrain.doctor.judge import FLOOR
from hpctrain.doctor.node import describe, free_memory_bytes

_FILES_HANG_SECONDS = 15.0
_BUSY = 1.5  # a copy depends on what the node's other ranks copy at the same moment
# File systems and free space differ more between nodes that are well than processors do.
_ROUGH = 2.0


@dataclass(frozen=True)
class Measure:
    """A number that ranks or nodes are compared by."""

    label: str
    unit: str
    scale: float  # what one unit is
    cure: str  # what to look at when one is odd
    floor: float = FLOOR  # how much worse than the median is odd at least
    larger_is_better: bool = True
    of_node: bool = True  # a property of the node, not of a rank

    def cost(self, value: float | None) -> float | None:
        """Return the value as something that is worse when larger."""
        if value is None or not self.larger_is_better:
            return value
        return 1 / value if value > 0 else float("inf")

    def text(self, value: float) -> str:
        """Return the value with its unit."""
        number = value / self.scale
        digits = 0 if number >= 100 else 1 if number >= 10 else 2
        return f"{number:,.{digits}f} {self.unit}"


_LOOK_AT_CPU = "look for other programs there, a lower clock rate and the binding"
_LOOK_AT_DISK = "look for a full or failing file system there"
MEASURES = {
    "compute": Measure("compute, float32 GEMM", "GFLOP/s", 1e9, _LOOK_AT_CPU, of_node=False),
    "memory": Measure("memory copy, one thread", "GB/s", 1e9, _LOOK_AT_CPU, _BUSY, of_node=False),
    "clock_rate": Measure("CPU clock rate", "MHz", 1, "look at the power limit, cooling and governor", of_node=False),
    "free_memory": Measure("free memory", "GB", 1e9, "look for what other programs left in memory or /dev/shm", _ROUGH),
    "shared_memory": Measure("free in /dev/shm", "GB", 1e9, "remove what earlier jobs left in /dev/shm", _ROUGH),
    "local_space": Measure("free in $TMPDIR", "GB", 1e9, "remove what earlier jobs left there", _ROUGH),
    "write": Measure("write to --dir", "MB/s", 1e6, _LOOK_AT_DISK, _ROUGH),
    "read": Measure("read from --dir", "MB/s", 1e6, _LOOK_AT_DISK, _ROUGH),
    "operations": Measure("file operations in --dir", "/s", 1, _LOOK_AT_DISK, _ROUGH),
    "local_write": Measure("write to $TMPDIR", "MB/s", 1e6, _LOOK_AT_DISK, _ROUGH),
    "local_read": Measure("read from $TMPDIR", "MB/s", 1e6, _LOOK_AT_DISK, _ROUGH),
    "local_operations": Measure("file operations in $TMPDIR", "/s", 1, _LOOK_AT_DISK, _ROUGH),
    "data_read": Measure("read shards", "MB/s", 1e6, "look at that node's link to the file system", _ROUGH),
    "import": Measure(
        *("import of TensorFlow, Horovod", "s", 1, "its Python comes slowly: pack it with --stage-env"),
        floor=_ROUGH,
        larger_is_better=False,
        of_node=False,
    ),
}


@dataclass
class Measured:
    """One rank's numbers, by the names of MEASURES in bytes, seconds and so on, and why others are missing."""

    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)  # "compute", "directory", "local", "data" -> reason

    def attempt(self, what: str, name: str, work: Callable[[], None]) -> None:
        """Do some work, `name` in a sentence; its failure is a result like others."""
        try:
            work()
        except Exception as error:
            self.errors[what] = f"cannot {name}: {describe(error)}"


def measure_compute(measured: Measured, cpus: tuple[int, ...]) -> None:
    """Measure this rank's computing and memory, in a second. All ranks do so at the same time, as in training."""

    def work() -> None:
        measured.values["compute"] = GEMM_FLOPS / gemm_seconds()
        rate = cpu_megahertz(cpus)  # right after work: an idle CPU clocks down
        if rate is not None:
            measured.values["clock_rate"] = rate
        measured.values["memory"] = copy_bytes_per_second()

    measured.attempt("compute", "multiply matrices", work)


def measure_node(measured: Measured, facts: Facts, directory: Path, shards: Sequence[Path], number: int) -> None:
    """Measure this node's file systems and space. `number` counts the nodes, and spreads them over the shards."""
    space = {
        "free_memory": free_memory_bytes(),
        "shared_memory": facts.shared_memory_free_bytes,
        "local_space": facts.local_free_bytes,
    }
    measured.values.update({name: float(value) for name, value in space.items() if value is not None})
    measured.attempt("directory", f"use {directory}", lambda: _measure_files(measured, directory, ""))
    local = Path(facts.local_directory)
    if local.absolute() != directory.absolute():
        measured.attempt("local", f"use {local} ($TMPDIR)", lambda: _measure_files(measured, local, "local_"))
    if shards:

        def read() -> None:
            rate = within(_FILES_HANG_SECONDS, lambda: read_bytes_per_second(shards, number))
            measured.values["data_read"] = rate

        measured.attempt("data", f"read {shards[number % len(shards)]}", read)


def _measure_files(measured: Measured, directory: Path, prefix: str) -> None:
    speeds = within(_FILES_HANG_SECONDS, lambda: probe_directory(directory))
    measured.values[f"{prefix}write"] = speeds.write_bytes_per_second
    measured.values[f"{prefix}read"] = speeds.read_bytes_per_second
    measured.values[f"{prefix}operations"] = speeds.operations_per_second
