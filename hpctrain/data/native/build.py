"""`python -m hpctrain.data.native.build`: compiles the operations of this folder with $CXX, or g++, or c++.

Takes seconds and needs TensorFlow's header files, which come with it. install.sh calls this.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from hpctrain.data.atomic import publish, temporary_path
from hpctrain.data.native import LIBRARY
from hpctrain.errors import UserError

SOURCE = Path(__file__).with_name("crop_resize.cc")
# Without -march, as compute nodes need not be what the login node is; the source picks its vectors at run time.
_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared")


def build() -> Path:
    """Compile the library, put it in its place whole, and return its path. Raises UserError with what is missing."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if not compiler or not shutil.which(compiler):
        raise UserError(f"there is no C++ compiler {compiler or 'g++'}; install one, or name one in CXX")
    spec = importlib.util.find_spec("tensorflow")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("TensorFlow is not installed; its header files are needed")
    tensorflow = Path(next(iter(spec.submodule_search_locations)))
    temporary = temporary_path(LIBRARY)
    command = [compiler, *_FLAGS, f"-I{tensorflow / 'include'}", str(SOURCE), "-o", str(temporary)]
    command += [f"-L{tensorflow}", "-l:libtensorflow_framework.so.2"]
    try:
        outcome = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if outcome.returncode:
            raise UserError(f"{compiler} cannot compile {SOURCE}:\n{outcome.stderr.strip()}")
        publish(temporary, LIBRARY)
    finally:
        temporary.unlink(missing_ok=True)
    return LIBRARY


if __name__ == "__main__":
    try:
        print(f"compiled {build()}")
    except UserError as error:
        sys.exit(f"error: {error}")
