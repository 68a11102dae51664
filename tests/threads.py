"""Results that may not depend on the number of threads TensorFlow has, which a process can set only once."""

import os
import subprocess
import sys

_START = """
import sys
import tensorflow as tf
tf.config.threading.set_intra_op_parallelism_threads(int(sys.argv[1]))
"""


def digests(program: str, *threads: int) -> set[str]:
    """Return the different last words that `program` prints in processes with so many threads each."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TF_NUM_INTRAOP_THREADS", "OMP_NUM_THREADS")}
    return {
        subprocess.run(
            [sys.executable, "-c", _START + program, str(count)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()[-1]
        for count in threads
    }
