"""Compiling the operations: in one piece or not at all, and what is not compiled is told and done without."""

from pathlib import Path

import pytest

from hpctrain import native
from hpctrain.errors import UserError


def test_every_operation_is_compiled() -> None:
    assert native.missing() == [], "run `python -m hpctrain.native.build`"
    assert sorted(native.OPERATIONS) == sorted(path.stem for path in native.FOLDER.glob("*.cc"))


def test_what_is_not_compiled_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    native._load.cache_clear()
    try:
        assert native.missing() == list(native.OPERATIONS)
        assert native.crop_resize() is None
        assert native.batch_norm() is None
    finally:
        native._load.cache_clear()


def test_a_library_that_cannot_be_loaded_names_its_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("tensorflow")
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    (tmp_path / "_batch_norm.so").write_bytes(b"not a library")
    native._load.cache_clear()
    try:
        with pytest.raises(UserError, match="compile it again"):
            native.batch_norm()
    finally:
        native._load.cache_clear()


def test_a_missing_or_failing_compiler_leaves_what_was_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("tensorflow")
    from hpctrain.native.build import build as compile_them

    before = [native.compiled_file(operation).read_bytes() for operation in native.OPERATIONS]
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="no-such-compiler"):
        compile_them()
    failing = tmp_path / "failing compiler"
    failing.write_text("#!/bin/sh\necho 'this machine is out of space' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("CXX", str(failing))
    with pytest.raises(UserError, match="out of space"):
        compile_them()
    assert [native.compiled_file(operation).read_bytes() for operation in native.OPERATIONS] == before
    assert [path.name for path in native.FOLDER.glob(".*tmp*")] == []
