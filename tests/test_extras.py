"""Packages that are not installed: who needs them, and how to install them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from grouprl.extras import explain_missing, how_to_install

WITHOUT = """
import sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformers", "peft", "gguf", "datasets", "accelerate"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITHOUT) + textwrap.dedent(code), *arguments],
        capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1", "GROUPRL_TRACEBACK": ""},
    )  # fmt: skip


@pytest.mark.parametrize("command", [("train-lm", "tiny"), ("chat", "smollm2")])
def test_a_command_for_language_models_without_their_packages_is_one_line(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("from grouprl.cli import main; main()", *command)
    assert done.returncode == 2
    assert done.stderr.startswith("error: language models need ")
    assert done.stderr.endswith("[lm]'\n") or done.stderr.endswith("[lm]\n")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("command", [("presets",), ("settings", "--lm"), ("settings", "learning_rate"), ("--version",)])
def test_lists_need_no_packages_for_language_models(command: tuple[str, ...]) -> None:
    done = run("from grouprl.cli import main; main()", *command)
    assert done.returncode == 0, done.stderr


def test_importing_the_trainer_without_its_packages_says_how_to_install_them() -> None:
    done = run("from grouprl.lm import GRPOTrainer")
    assert "ModuleNotFoundError: language models need " in done.stderr
    assert how_to_install("lm") in done.stderr


def test_a_package_of_no_extra_is_not_explained() -> None:
    assert explain_missing(ModuleNotFoundError("no", name="my_own_module")) is None
    assert explain_missing(ModuleNotFoundError("no")) is None


def test_the_command_names_this_python_and_where_grouprl_came_from() -> None:
    command = how_to_install("lm")
    assert command.startswith(sys.executable)
    assert "pip install" in command
    assert "[lm]" in command
