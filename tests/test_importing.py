"""Functions named `module:function`: where they are looked for, and what is said if there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from grouprl.errors import UsageError
from grouprl.importing import load_function, own_file


def test_a_function_is_found_in_the_current_directory_and_in_the_given_folder(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, module in ((here, "reward_here"), (there, "reward_there")):
        folder.mkdir()
        (folder / f"{module}.py").write_text("def short(completions, **kw):\n    return [1.0 for _ in completions]\n")
    monkeypatch.chdir(here)
    assert load_function("reward_here:short")(completions=["a"]) == [1.0]
    with pytest.raises(UsageError, match="there is no module 'reward_there'"):
        load_function("reward_there:short")
    assert load_function("reward_there:short", there)(completions=["a", "b"]) == [1.0, 1.0]
    assert load_function("grouprl.lm.rewards.builtin:completion_text")("a") == "a"


def test_a_folder_is_named_once_where_a_module_is_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in (None, tmp_path, "."):
        with pytest.raises(UsageError, match=f"looked for in {tmp_path} and among the installed packages"):
            load_function("reward_nowhere:f", folder)


def test_a_file_named_like_an_installed_package_does_not_hide_it(tmp_path, monkeypatch):
    (tmp_path / "colorsys.py").write_text("stolen = True\n")
    monkeypatch.chdir(tmp_path)
    assert load_function("colorsys:rgb_to_hsv")(0.0, 0.0, 0.0) == (0.0, 0.0, 0.0)


def test_what_is_wrong_with_the_name_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward_wrong.py").write_text("LIMIT = 3\ndef correct(): ...\ndef _hidden(): ...\n")
    for name in ("reward_wrong", "reward_wrong:", ":correct", "reward_wrong.py:correct()", "a b:c", "../x:y"):
        with pytest.raises(UsageError, match="module:function"):
            load_function(name)
    with pytest.raises(UsageError, match=r"'reward_wrong' \(.*reward_wrong.py\) has no 'corect'; it has: correct\."):
        load_function("reward_wrong:corect")
    with pytest.raises(UsageError, match="LIMIT is a int, not a function"):
        load_function("reward_wrong:LIMIT")
    with pytest.raises(UsageError, match="there is no module 'no_such_package'"):
        load_function("no_such_package.sub:f")


def test_what_the_module_itself_raises_is_passed_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward_importing.py").write_text("import no_such_library\n")
    (tmp_path / "reward_failing.py").write_text("1 / 0\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        load_function("reward_importing:f")
    with pytest.raises(ZeroDivisionError):
        load_function("reward_failing:f")


def test_a_package_of_the_users_own_is_so_whatever_its_name(tmp_path: Path) -> None:
    """In a process of its own, as modules of the same name may be there already."""
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").touch()
    (tmp_path / "benchmarks" / "mine.py").touch()
    program = "from grouprl.importing import own_file; print(own_file('benchmarks.mine'), own_file('grouprl.errors'))"
    said = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert said.stdout.split() == [str((tmp_path / "benchmarks" / "mine.py").resolve()), "None"]


def test_the_benchmarks_of_the_repository_are_not_the_users_own() -> None:
    assert own_file("benchmarks.pixels", Path(__file__).parents[1]) is None
