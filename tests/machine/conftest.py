"""A C file to compile, and a cache folder of its own for every test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from grouprl.machine import compile as compiling


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    (tmp_path / "temporary").mkdir(mode=0o700)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr(compiling, "_said", set())
    monkeypatch.setattr(compiling, "_hanging", {})
    return tmp_path / "cache" / "grouprl"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "answer.c").write_text("#include <vector.h>\nint answer(void) { return 16 + VALUE; }\n")
    return tmp_path


@pytest.fixture
def in_temporary(tmp_path: Path) -> Path:
    """The folder for temporary files that is used where the cache folder will not do."""
    return tmp_path / "temporary" / f"grouprl-{os.geteuid()}"
