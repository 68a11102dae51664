"""`python -m hpctrain.native.build`: compiles the operations of this folder with $CXX, or g++, or c++.

Takes half a minute and needs TensorFlow's header files, which come with it. install.sh calls this.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from hpctrain.data.atomic import publish, temporary_path
from hpctrain.errors import UserError
from hpctrain.native import FOLDER, OPERATIONS, compiled_file

# Without -march, as compute nodes need not be what the login node is; the sources pick their vectors at run time.
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared")


def build() -> list[Path]:
    """Compile all operations, put each in its place whole, and return where. Raises UserError with what is missing."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler or not shutil.which(compiler):
        raise UserError(f"there is no C++ compiler {compiler or 'g++'}; install one, or name one in CXX")
    if importlib.util.find_spec("tensorflow") is None:
        raise UserError("TensorFlow is not installed; its header files are needed")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf

    # Those that TensorFlow itself was compiled with, which decide how its classes lie in memory.
    flags = [flag for flag in tf.sysconfig.get_compile_flags() if "-std=" not in flag]
    flags += [f"-I{tf.sysconfig.get_include()}/external/libjpeg_turbo"]
    link_flags = [*tf.sysconfig.get_link_flags(), "-l:libtensorflow_cc.so.2"]  # the second has the decoder of JPEGs
    with ThreadPoolExecutor(min(len(OPERATIONS), len(os.sched_getaffinity(0)))) as compilers:
        return list(compilers.map(partial(_compile, compiler, flags, link_flags), OPERATIONS))


def _compile(compiler: str, flags: list[str], link_flags: list[str], operation: str) -> Path:
    source, finished = FOLDER / f"{operation}.cc", compiled_file(operation)
    temporary = temporary_path(finished)
    command = [compiler, *_FLAGS, *flags, str(source), "-o", str(temporary), *link_flags]
    try:
        outcome = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if outcome.returncode:
            raise UserError(f"{compiler} cannot compile {source}:\n{outcome.stderr.strip()}")
        publish(temporary, finished)
    finally:
        temporary.unlink(missing_ok=True)
    return finished


if __name__ == "__main__":
    try:
        for path in build():
            print(f"compiled {path}")
    except UserError as error:
        sys.exit(f"error: {error}")
