"""Compiling at first use: once, by whichever compiler there is, and a clear word where there is none."""

from __future__ import annotations

import ctypes
import shutil
import sys
from pathlib import Path

import pytest

from grouprl.machine.compile import Kernels, UnavailableError

if sys.platform != "linux" or not (shutil.which("cc") or shutil.which("gcc")):
    pytest.skip("there is no C compiler on this machine", allow_module_level=True)


def test_functions_are_compiled_and_called(source: Path) -> None:
    assert Kernels(source, ["answer.c"], variants=[("-DVALUE=26",)]).functions().answer() == 42


def test_it_is_compiled_once_and_nothing_else_is_left(source: Path, own_cache: Path) -> None:
    given = (source, ["answer.c"], (), [("-DVALUE=1",)])
    Kernels(*given).functions()
    (made,) = own_cache.iterdir()
    when = made.stat().st_mtime_ns
    Kernels(*given).functions()
    assert [made] == list(own_cache.iterdir())
    assert made.stat().st_mtime_ns == when


def test_a_source_or_header_that_changes_is_compiled_again(source: Path, own_cache: Path) -> None:
    (source / "value.h").write_text("#define VALUE 1\n")
    (source / "answer.c").write_text('#include "value.h"\nint answer(void) { return VALUE; }\n')
    assert Kernels(source, ["answer.c"], ["value.h"]).functions().answer() == 1
    (source / "value.h").write_text("#define VALUE 2\n")
    assert Kernels(source, ["answer.c"], ["value.h"]).functions().answer() == 2
    assert len(list(own_cache.iterdir())) == 2


def test_the_first_variant_that_is_accepted_is_taken(source: Path) -> None:
    asked = []

    def accept(loaded: ctypes.CDLL) -> bool:
        asked.append(loaded.answer())
        return loaded.answer() == 18

    kernels = Kernels(source, ["answer.c"], variants=[("-DVALUE=1",), ("-DVALUE=2",), ("-DVALUE=3",)], accept=accept)
    assert kernels.functions().answer() == 18
    assert 19 not in asked


def test_a_processor_that_accepts_nothing_is_said_to(source: Path) -> None:
    kernels = Kernels(source, ["answer.c"], variants=[("-DVALUE=1",)], accept=lambda _: False)
    assert not kernels.available
    with pytest.raises(UnavailableError, match="does not grant"):
        kernels.functions()


@pytest.mark.parametrize(
    ("compiler", "message"), [("/no/such/compiler", "No such file"), ("false", "--version failed")]
)
def test_a_compiler_that_fails_is_named(
    compiler: str, message: str, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(UnavailableError, match=message) as caught:
        Kernels(source, ["answer.c"], variants=[("-DVALUE=1",)]).functions()
    assert compiler in str(caught.value)


def test_without_a_home_folder_the_result_is_kept_among_temporary_files(
    source: Path, monkeypatch: pytest.MonkeyPatch, in_temporary: Path
) -> None:
    def nobody_knows(_: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", classmethod(nobody_knows))
    assert Kernels(source, ["answer.c"], variants=[("-DVALUE=26",)]).functions().answer() == 42
    assert list(in_temporary.glob("kernels-*.so"))


def test_sources_that_are_missing_and_commands_that_are_none_are_said_to_be(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnavailableError, match=r"nowhere\.c"):
        Kernels(source, ["nowhere.c"]).functions()
    monkeypatch.setenv("CC", "  ")
    with pytest.raises(UnavailableError, match="no command"):
        Kernels(source, ["answer.c"]).functions()
    monkeypatch.setenv("CC", "cc 'unfinished")
    with pytest.raises(UnavailableError, match="No closing quotation"):
        Kernels(source, ["answer.c"]).functions()


def test_what_the_compiler_says_of_a_mistake_is_passed_on(source: Path, own_cache: Path) -> None:
    with pytest.raises(UnavailableError, match="answer"):
        Kernels(source, ["answer.c"]).functions()
    assert list(own_cache.iterdir()) == []
