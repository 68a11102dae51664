"""What ranks do together outside of training, by real MPI: right, and asleep while they wait."""

import os
import subprocess
import sys

import pytest

from hpctrain.parallel.world import sleep_until

LATE_SECONDS = 2.0
PROGRAM = f"""
import time
import numpy as np
from hpctrain.errors import UserError
from hpctrain.parallel.world import run_rank, start

def late(value):
    time.sleep({LATE_SECONDS})
    return value

def refuse():
    raise UserError("not so")

def main():
    world = start()
    world.barrier()
    began = time.process_time()
    assert world.from_root(lambda: late("settled")) == "settled"
    taken = time.process_time() - began
    assert world.rank == 0 or taken < {LATE_SECONDS / 4}, f"it took {{taken}} s of a core to wait"
    assert world.allgather(world.rank ** 2) == [rank ** 2 for rank in range(world.size)]
    assert world.broadcast(world.rank + 5) == 5
    array = np.full(1000, world.rank, np.float64)
    world.copy_from_root(array)
    assert not array.any()
    try:
        world.from_root(refuse)
    except UserError as error:
        assert str(error) == "not so"
    else:
        raise AssertionError("nothing was raised")
    print("all is right", flush=True)
    return 0

run_rank(main)
"""


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 3])
def test_ranks_agree_and_sleep_while_they_wait(ranks: int) -> None:
    environ = {**os.environ, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = ["mpirun", "--oversubscribe", "-n", str(ranks), sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("all is right") == ranks


def test_sleeping_ends_when_what_is_waited_for_is_there() -> None:
    answers = iter([False] * 20 + [True])
    sleep_until(lambda: next(answers))
    assert next(answers, "used up") == "used up"
