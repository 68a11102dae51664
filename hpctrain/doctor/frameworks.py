"""Whether TensorFlow and Horovod load on every rank, and agree with MPI about who is who."""

import time
from dataclasses import dataclass

from hpctrain.doctor.meeting import Meeting, ended_after
from hpctrain.doctor.node import describe

_IMPORT_SECONDS = 300.0
_INIT_SECONDS = 60.0


@dataclass(frozen=True)
class Horovod:
    """What a rank's Horovod says of itself. Without `error` it works; the rest holds only if all ranks' do."""

    import_seconds: float
    error: str = ""
    rank: int = -1
    size: int = -1
    mpi_built: bool = False
    mpi_threads: bool = False


def try_horovod(meeting: Meeting) -> list[Horovod]:
    """Load and start Horovod on all ranks; return what each says, on rank 0, and nothing elsewhere.

    It is started only when it loads everywhere: a rank that stays away would keep the others waiting.
    """
    world = meeting.world
    start = time.perf_counter()
    error, part = "", "TensorFlow: "
    try:
        from hpctrain.parallel.quiet import import_tensorflow

        import_tensorflow()
        part = ""
        import horovod.tensorflow as hvd
    except Exception as reason:  # whatever keeps it from loading is the finding
        error = part + describe(reason)
    mine = Horovod(time.perf_counter() - start, error)
    everyone = meeting.gather(mine, "loading TensorFlow and Horovod", _IMPORT_SECONDS)
    if not world.broadcast(all(not one.error for one in everyone)):
        return everyone
    with ended_after(_INIT_SECONDS, "starting Horovod (hvd.init)", world.is_root):
        try:
            hvd.init()
            size, built, threads = hvd.size(), bool(hvd.mpi_built()), bool(hvd.mpi_threads_supported())
            mine = Horovod(mine.import_seconds, "", hvd.rank(), size, built, threads)
        except Exception as reason:
            mine = Horovod(mine.import_seconds, describe(reason))
        return meeting.gather(mine, "starting Horovod", _INIT_SECONDS)
