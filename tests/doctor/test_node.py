"""The look at one node, and what it does to a directory."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hpctrain.doctor.files import probe_directory, read_bytes_per_second, within
from hpctrain.doctor.node import probe_node


def test_the_program_prints_one_line_of_json(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "hpctrain.doctor.node", "--json", "--dir", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    (line,) = done.stdout.splitlines()
    facts = json.loads(line)
    assert facts["errors"] == {} and facts["host"] == os.uname().nodename
    for name in ("gemm_seconds", "memory_bytes_per_second", "write_bytes_per_second", "read_bytes_per_second"):
        assert facts[name] > 0
    assert facts["operations_per_second"] > 0 and facts["free_memory_bytes"] > 0
    assert abs(facts["clock_seconds"] - time.time()) < 60
    assert list(tmp_path.iterdir()) == []


def test_it_needs_neither_mpi_nor_tensorflow() -> None:
    code = (
        "import sys; from hpctrain.doctor.node import probe_node; probe_node('.');"
        "print([name for name in ('tensorflow', 'mpi4py', 'keras', 'horovod', 'h5py') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_a_directory_that_cannot_be_used_is_a_result(tmp_path: Path) -> None:
    facts = probe_node(tmp_path / "absent")
    assert facts.write_bytes_per_second is None and facts.gemm_seconds is not None
    assert facts.errors == {"files": f"{tmp_path / 'absent'}: No such file or directory"}


def test_nothing_is_left_in_a_directory(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    speeds = probe_directory(tmp_path, 0.2)
    assert min(speeds.write_bytes_per_second, speeds.read_bytes_per_second, speeds.operations_per_second) > 0
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_readers_are_spread_over_files(tmp_path: Path) -> None:
    full, empty = tmp_path / "a.h5", tmp_path / "b.h5"
    full.write_bytes(bytes(100_000))
    empty.touch()
    assert read_bytes_per_second([full, empty], 0) > 0
    assert read_bytes_per_second([full, empty], 2) > 0, "one after the other: the third reads the first again"
    with pytest.raises(OSError, match="is empty"):
        read_bytes_per_second([full, empty], 1)


def test_a_file_system_that_does_not_answer_is_an_error() -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
        within(0.05, lambda: time.sleep(3))
    assert time.monotonic() - start < 2
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0)
