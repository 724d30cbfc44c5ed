"""Compiled code is run from where nobody else can change it, and only if it is what was compiled."""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from grouprl.machine.compile import Kernels

if sys.platform != "linux" or not (shutil.which("cc") or shutil.which("gcc")):
    pytest.skip("there is no C compiler on this machine", allow_module_level=True)

SOMEBODY_ELSE = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a folder of another user")


def answer(source: Path, user: int | None = None) -> int:
    """What the compiled function says, 0 if there is none, in a process of its own: loaded libraries stay loaded."""
    child = os.fork()
    if child == 0:
        try:
            if user is not None:
                os.setgroups([])
                os.setresgid(user, user, user)
                os.setresuid(user, user, user)
            kernels = Kernels(source, ["answer.c"], variants=[("-DVALUE=26",)])
            os._exit(kernels.functions().answer() if kernels.available else 0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _open_to_all(path: Path) -> None:
    """Let other users reach `path` among the temporary files of the tests."""
    for folder in path.parents:
        if folder.stat().st_mode & 0o001 == 0:
            folder.chmod(0o711)


@pytest.fixture
def planted(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Path]:
    """Puts a library with another answer into a folder, under the right name and with a right checksum."""
    with monkeypatch.context() as at_first:
        at_first.setenv("XDG_CACHE_HOME", str(tmp_path / "first"))
        assert answer(source) == 42
    (kept,) = (tmp_path / "first" / "grouprl").iterdir()
    (tmp_path / "evil.c").write_text("int answer(void) { return 66; }\n")
    evil = tmp_path / "evil.so"
    subprocess.run(["gcc", "-shared", "-fPIC", str(tmp_path / "evil.c"), "-o", str(evil)], check=True)
    content = evil.read_bytes()

    def plant(folder: Path) -> Path:
        made = folder / kept.name
        made.write_bytes(content + hashlib.sha256(content).digest())
        return made

    return plant


def test_what_is_planted_would_run_in_a_folder_of_our_own(source, own_cache, planted) -> None:
    own_cache.mkdir(parents=True, mode=0o700)
    planted(own_cache)
    assert answer(source) == 66


def test_a_cache_folder_that_others_may_write_to(source, own_cache, planted, in_temporary) -> None:
    own_cache.mkdir(parents=True)
    own_cache.chmod(0o777)
    planted(own_cache)
    assert answer(source) == 42
    assert list(in_temporary.iterdir())  # kept, in a folder that is safe


def test_a_cache_folder_whose_parent_others_may_write_to(source, own_cache, planted) -> None:
    own_cache.mkdir(parents=True, mode=0o700)
    own_cache.parent.chmod(0o777)
    planted(own_cache)
    assert answer(source) == 42


def test_a_folder_of_ours_in_one_where_nobody_moves_what_is_anothers_will_do(source, own_cache) -> None:
    own_cache.parent.mkdir()
    own_cache.parent.chmod(0o1777)
    assert answer(source) == 42
    assert list(own_cache.iterdir())


@as_root
@pytest.mark.parametrize("mode", [0o777, 0o755, 0o700])
def test_a_cache_folder_of_another_user(mode: int, source, own_cache, planted) -> None:
    own_cache.mkdir(parents=True)
    own_cache.parent.chmod(0o1777)
    planted(own_cache)
    os.chown(own_cache, SOMEBODY_ELSE, SOMEBODY_ELSE)
    own_cache.chmod(mode)
    assert answer(source) == 42


@as_root
def test_a_library_of_another_user(source, own_cache, planted) -> None:
    own_cache.mkdir(parents=True, mode=0o700)
    os.chown(planted(own_cache), SOMEBODY_ELSE, SOMEBODY_ELSE)
    assert answer(source) == 42


@as_root
def test_root_with_the_home_of_another_user(source, tmp_path, planted, monkeypatch) -> None:
    home = tmp_path / "home"
    cache = home / ".cache" / "grouprl"
    cache.mkdir(parents=True)
    planted(cache)
    for path in (home, *home.rglob("*")):
        os.chown(path, SOMEBODY_ELSE, SOMEBODY_ELSE)
    os.chown(cache, 0, 0)  # even if the last folder is root's
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(home))
    assert answer(source) == 42


@pytest.mark.parametrize("kind", ["symbolic link", "own, others may write"])
def test_the_folder_among_temporary_files(kind, source, tmp_path, planted, monkeypatch, in_temporary, caplog) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    place = in_temporary if kind != "symbolic link" else tmp_path / "elsewhere"
    place.mkdir()
    planted(place)
    if kind == "symbolic link":
        in_temporary.symlink_to(place)
    else:
        place.chmod(0o777)
    with caplog.at_level(logging.WARNING, "grouprl"):
        for _ in range(2):
            assert Kernels(source, ["answer.c"], variants=[("-DVALUE=26",)]).functions().answer() == 42
    (said,) = caplog.messages  # once, though two were compiled
    assert "could not be kept" in said
    assert str(in_temporary) in said
    assert [path.name for path in in_temporary.parent.iterdir()] == [in_temporary.name]


def test_a_symbolic_link_to_a_library(source, own_cache, planted, tmp_path) -> None:
    own_cache.mkdir(parents=True, mode=0o700)
    made = planted(own_cache)
    made.rename(tmp_path / "moved.so")
    made.symlink_to(tmp_path / "moved.so")
    assert answer(source) == 42
    assert not made.is_symlink()


@as_root
def test_a_link_of_another_user_on_the_way(source, own_cache, planted, tmp_path) -> None:
    real = tmp_path / "real" / "grouprl"
    real.mkdir(parents=True, mode=0o700)
    planted(real)
    own_cache.parent.symlink_to(real.parent)
    assert answer(source) == 66  # the user's own link is the user's choice
    os.lchown(own_cache.parent, SOMEBODY_ELSE, SOMEBODY_ELSE)
    assert answer(source) == 42


@as_root
def test_another_user_uses_what_root_has_kept_and_trusts_nobody_else(source, own_cache, planted, tmp_path) -> None:
    own_cache.mkdir(parents=True, mode=0o755)
    planted(own_cache)
    _open_to_all(own_cache)
    assert answer(source, SOMEBODY_ELSE) == 66
    (tmp_path / "temporary").chmod(0o1777)
    os.chown(own_cache, SOMEBODY_ELSE - 1, SOMEBODY_ELSE - 1)
    assert answer(source, SOMEBODY_ELSE) == 42


def damage_by_cutting(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


def damage_one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(content)


def damage_by_emptying(path: Path) -> None:
    path.write_bytes(b"")


def damage_by_a_folder(path: Path) -> None:
    path.unlink()
    (path / "inside").mkdir(parents=True)


def damage_by_a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def damage_by_rubbish(path: Path) -> None:
    path.write_bytes(b"\x7fELF" + bytes(range(256)) * 40)


@pytest.mark.parametrize(
    "damage",
    [damage_by_cutting, damage_one_bit, damage_by_emptying, damage_by_a_folder, damage_by_a_pipe, damage_by_rubbish],
)
def test_what_is_damaged_is_compiled_anew_and_kept(damage: Callable[[Path], None], source, own_cache) -> None:
    answer(source)
    (made,) = own_cache.iterdir()
    whole = made.read_bytes()
    damage(made)
    assert answer(source) == 42
    assert hashlib.sha256(made.read_bytes()[:-32]).digest() == made.read_bytes()[-32:]
    assert len(made.read_bytes()) == len(whole)


@as_root
def test_a_cache_that_cannot_be_written_to_is_read(source, own_cache, planted) -> None:
    own_cache.mkdir(parents=True)
    planted(own_cache)
    own_cache.chmod(0o555)
    _open_to_all(own_cache)
    assert answer(source, SOMEBODY_ELSE) == 66


@pytest.mark.parametrize("where", ["/proc/nowhere", "relative", ""])
def test_a_cache_folder_that_cannot_be(where: str, source, own_cache, monkeypatch, in_temporary, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", where)
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.chdir(tmp_path)
    assert answer(source) == 42
    assert list(in_temporary.iterdir())
    assert not Path("/nonexistent").exists()
    assert not Path("relative").exists()


def test_a_home_without_a_cache_folder(source, monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert answer(source) == 42
    assert list((tmp_path / ".cache" / "grouprl").iterdir())


def test_a_disk_that_is_full(source, own_cache) -> None:
    """The limit on the size of a file stands in for the disk: whatever is written is cut."""
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, usual[1]))
        assert answer(source) == 0
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(own_cache.iterdir()) == []
    assert answer(source) == 42


def test_the_loaded_library_is_the_one_that_was_checked(source, own_cache) -> None:
    first = Kernels(source, ["answer.c"], variants=[("-DVALUE=26",)]).functions()
    second = Kernels(source, ["answer.c"], variants=[("-DVALUE=27",)]).functions()
    assert (first.answer(), second.answer()) == (42, 43)
    assert isinstance(first, ctypes.CDLL)
