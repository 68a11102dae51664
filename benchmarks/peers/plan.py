"""Who runs against whom, and what is to be reached."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

PEAK_GFLOPS_A_CORE = {"float32": 256, "mixed_bfloat16": 512}  # AVX-512 and AMX as found on the machines this is for

Launch = Literal["one process", "mpirun", "processes"]


@dataclass(frozen=True)
class Contender:
    """One program, and how it is started: by itself, by mpirun, or as processes that find each other."""

    name: str
    program: tuple[str, ...]  # arguments of Python
    launch: Launch = "one process"
    processes: int = 1
    threads: int = 1  # of each process
    micro_batch: int = 0  # of each process
    quick: bool = False  # part of the quick run too
    rounds: int = 99  # no more than so many
    steps: int = 99  # timed, a turn; no more than so many
    environment: dict[str, str] = field(default_factory=dict)
    needs_torch: bool = False


@dataclass(frozen=True)
class Goal:
    """A ratio of two contenders of a group; `limit` is the least it is to be, or the most where that is said."""

    above: str
    below: str
    measure: Literal["images_per_second", "peak_rss_mb"] = "images_per_second"
    limit: float | None = None
    at_most: bool = False


@dataclass(frozen=True)
class Group:
    """Contenders that do the same work and take turns."""

    title: str
    model: str
    precision: str
    steps: int  # timed, a turn
    quick_steps: int
    contenders: Sequence[Contender]
    goals: Sequence[Goal]
    rounds: int = 99  # no more than so many
    warm_up: int = 2  # steps before those that are timed

    @property
    def name(self) -> str:
        """For the command line."""
        return f"{self.model}-{'bf16' if self.precision == 'mixed_bfloat16' else 'fp32'}"


# PyTorch's tuning guide takes another allocator, so that memory is kept and not given back to the kernel, which clears
# it, in each step; glibc's does the same with these.
TORCH_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(2**30),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
}
TORCH_LARGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}  # 2 % faster with threads; DDP was 10 % slower with it

OUR_ENVIRONMENT = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # large pages, as docs/cluster-guide.md advises
_YIELD = {"OMPI_MCA_mpi_yield_when_idle": "1"}
_OURS = ("-m", "benchmarks.peers.hpctrain_step")
_KERAS = ("-m", "benchmarks.peers.keras_loop")
_HOROVOD = (*_KERAS, "--horovod")
_WORKERS = ("-m", "benchmarks.peers.multi_worker")
_TORCH = ("-m", "benchmarks.peers.torch_loop")
_BARE = ("-m", "benchmarks.peers.bare_convolutions")

OURS, RANKS, APART = "hpctrain, 2 threads", "hpctrain, 2 ranks", "hpctrain, 2 independent processes"
KERAS, KERAS_CORE = "Keras loop, 2 threads", "Keras loop, 1 thread"
HOROVOD, HOROVOD_YIELD = "Horovod's ops, 2 ranks", "Horovod's ops, 2 ranks, MPI yields"
WORKERS = "MultiWorkerMirroredStrategy, 2 workers"
BARE = "bare convolutions, 2 independent processes"
BARE_TENSORFLOW = "bare convolutions by TensorFlow, 2 independent processes"
TORCH, TORCH_DDP = "PyTorch, 2 threads", "PyTorch DDP, 2 processes"


def _ours(batch: int, quick: Sequence[str]) -> list[Contender]:
    return [
        Contender(OURS, _OURS, threads=2, micro_batch=2 * batch, quick=OURS in quick, environment=OUR_ENVIRONMENT),
        Contender(RANKS, _OURS, "mpirun", 2, micro_batch=batch, quick=RANKS in quick, environment=OUR_ENVIRONMENT),
    ]


def _torch(batch: int, quick: Sequence[str]) -> list[Contender]:
    threads = {**TORCH_ENVIRONMENT, **TORCH_LARGE_PAGES}
    return [
        Contender(
            TORCH, _TORCH, threads=2, micro_batch=2 * batch, quick=TORCH in quick, environment=threads, needs_torch=True
        ),
        Contender(
            TORCH_DDP,
            _TORCH,
            "processes",
            2,
            micro_batch=batch,
            quick=TORCH_DDP in quick,
            environment=TORCH_ENVIRONMENT,
            needs_torch=True,
        ),
    ]


def _keras(batch: int, quick: bool = False, steps: int = 99) -> Contender:
    return Contender(KERAS, _KERAS, threads=2, micro_batch=2 * batch, quick=quick, rounds=2, steps=steps)


def _keras_core(batch: int, quick: bool = False, steps: int = 99) -> Contender:
    return Contender(KERAS_CORE, _KERAS, micro_batch=batch, quick=quick, rounds=1, steps=steps)


def _horovod(batch: int, steps: int = 99) -> Contender:
    return Contender(HOROVOD, _HOROVOD, "mpirun", 2, micro_batch=batch, rounds=1, steps=steps)


def _workers(batch: int, steps: int = 99) -> Contender:
    return Contender(WORKERS, _WORKERS, "processes", 2, micro_batch=batch, rounds=1, steps=steps)


def _bare(batch: int, quick: bool = False) -> Contender:
    return Contender(BARE, _BARE, "processes", 2, micro_batch=batch, quick=quick, rounds=1)


def _bare_tensorflow(batch: int) -> Contender:
    environment = {"BARE_CONVOLUTIONS": "TensorFlow"}
    return Contender(BARE_TENSORFLOW, _BARE, "processes", 2, micro_batch=batch, rounds=1, environment=environment)


# Images a step of one process with one thread; a process with two threads takes twice as many.
GROUPS = (
    Group(
        "ResNet-50, float32",
        "resnet50",
        "float32",
        6,
        3,
        [
            *_ours(8, [OURS, RANKS]),
            *_torch(8, [TORCH, TORCH_DDP]),
            _keras(8),
            _keras_core(8, quick=True),
            _horovod(8),
            Contender(HOROVOD_YIELD, _HOROVOD, "mpirun", 2, micro_batch=8, rounds=1, environment=_YIELD),
            _workers(8),
            _bare(8, quick=True),
            _bare_tensorflow(8),
        ],
        [
            Goal(OURS, TORCH, limit=1.25),
            Goal(RANKS, TORCH_DDP, limit=1.25),
            Goal(OURS, KERAS),
            Goal(RANKS, HOROVOD),
            Goal(RANKS, HOROVOD_YIELD),
            Goal(RANKS, WORKERS),
            Goal(RANKS, KERAS_CORE, "peak_rss_mb", 1.15, at_most=True),
            Goal(OURS, KERAS, "peak_rss_mb", 1.15, at_most=True),
        ],
    ),
    Group(
        "ResNet-50, bfloat16",
        "resnet50",
        "mixed_bfloat16",
        8,
        4,
        [*_ours(8, [OURS, RANKS]), *_torch(8, [TORCH, TORCH_DDP]), _keras(8), _bare(8)],
        [
            Goal(OURS, TORCH, limit=1.05),
            Goal(RANKS, TORCH_DDP, limit=1.05),
            Goal(OURS, KERAS),
            Goal(OURS, KERAS, "peak_rss_mb", 1.15, at_most=True),
        ],
    ),
    Group(
        "AlexNet-BN, float32",
        "alexnet_bn",
        "float32",
        6,
        3,
        [
            *_ours(32, [OURS, RANKS]),
            *_torch(32, [TORCH]),
            # Keras' grouped convolutions take 5 s a step and more.
            _keras(32, quick=True, steps=3),
            _keras_core(32, steps=3),
            _horovod(32, steps=3),
            _workers(32, steps=3),
            _bare(32),
            _bare_tensorflow(32),
        ],
        [
            Goal(OURS, KERAS, limit=4.0),
            Goal(OURS, TORCH),
            Goal(RANKS, TORCH_DDP),
            Goal(RANKS, HOROVOD),
            Goal(RANKS, WORKERS),
            Goal(RANKS, KERAS_CORE, "peak_rss_mb", 1.15, at_most=True),
            Goal(OURS, KERAS, "peak_rss_mb", 1.15, at_most=True),
        ],
    ),
    Group(
        "AlexNet-BN, bfloat16",
        "alexnet_bn",
        "mixed_bfloat16",
        8,
        4,
        [*_ours(32, [OURS]), *_torch(32, [TORCH]), _bare(32)],
        [Goal(OURS, TORCH), Goal(RANKS, TORCH_DDP)],
    ),
    Group(
        "ResNet-20, float32",
        "resnet20",
        "float32",
        30,
        15,
        [
            *_ours(32, [RANKS]),
            *_torch(32, []),
            _keras(32),
            _keras_core(32),
            _horovod(32),
            _workers(32),
            _bare(32),
            _bare_tensorflow(32),
        ],
        [
            Goal(OURS, TORCH),
            Goal(RANKS, TORCH_DDP),
            Goal(OURS, KERAS),
            Goal(RANKS, HOROVOD),
            Goal(RANKS, WORKERS),
            Goal(RANKS, KERAS_CORE, "peak_rss_mb", 1.15, at_most=True),
        ],
    ),
)

_EMULATED_STEPS = 2
_BFLOAT16 = {"avx512_bf16", "amx_bf16"}


def is_emulated(group: Group, instructions: Sequence[str]) -> bool:
    """Whether a processor with these instructions has none for the group's precision: a step takes seconds then."""
    return group.precision == "mixed_bfloat16" and not _BFLOAT16 & set(instructions)


def peak_gflops(group: Group, instructions: Sequence[str]) -> float:
    """Return the GFLOP/s of a core's instructions for the group's precision; float32's if it has no others."""
    return PEAK_GFLOPS_A_CORE["float32" if is_emulated(group, instructions) else group.precision]


def groups_for(instructions: Sequence[str]) -> list[Group]:
    """Return the groups in the order in which they are measured.

    What the processor can only emulate comes last, when there is time for it: one round of two steps after one.
    """
    able = [group for group in GROUPS if not is_emulated(group, instructions)]
    short = {"steps": _EMULATED_STEPS, "quick_steps": _EMULATED_STEPS, "rounds": 1, "warm_up": 1}
    emulated = [replace(group, **short) for group in GROUPS if is_emulated(group, instructions)]  # type: ignore[arg-type]
    return [*able, *emulated]


ROUNDS, QUICK_ROUNDS = 3, 1  # the most; time decides
MINUTES, QUICK_MINUTES = 38.0, 7.5
ALLREDUCE_SIZES, QUICK_ALLREDUCE_SIZES = "1M,4M,16M,64M,256M", "1M,16M,256M"
ALLREDUCE_GOAL = 0.9  # of raw MPI in place
LINK_MBIT = 1000
LINK_SIZES, QUICK_LINK_SIZES = "1M,4M,16M,64M,256M", "1M,16M"
LINK_GOAL, LINK_REPEATS = 0.95, 5
START_RANKS, QUICK_START_RANKS = (1, 2, 8, 16, 32), (1, 2)
TFRECORD_GOAL = 1.0


def _profiled(batch: int) -> tuple[Contender, Contender]:
    program = ("-m", "benchmarks.peers.profile_step")
    return (
        Contender("independent processes", program, "processes", 2, micro_batch=batch),
        Contender("2 ranks", program, "mpirun", 2, micro_batch=batch),
    )


# The models whose float32 step is taken apart.
PROFILE = {"resnet50": _profiled(8), "alexnet_bn": _profiled(32)}


@dataclass(frozen=True)
class TwoRanks:
    """How two ranks of a model are measured beside two independent processes (two_ranks.py)."""

    title: str
    micro_batch: int  # of a process
    seconds: float  # of both together, after their start
    quick_seconds: float  # none if it is no part of the quick run
    limit: float | None = None  # the least that ranks are to reach of independent processes


TWO_RANKS = {
    "resnet50": TwoRanks("ResNet-50, float32", 8, 200, 32, 0.98),
    "alexnet_bn": TwoRanks("AlexNet-BN, float32", 32, 120, 0, 0.93),
    "resnet20": TwoRanks("ResNet-20, float32", 32, 40, 0),
}
SLICE_SECONDS = 0.5  # of a program, before the other one runs
TWO_RANKS_START_SECONDS = 60.0  # about, of all four processes
