"""The command line, as a person types it: each command once for real, and the mistakes people make."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import gymnasium
import pytest
import yaml

from command_line import call
from grouprl import GRPO, cli
from grouprl.machine import ranks
from grouprl.runs import time_limit

FAST = [
    "--set", "n_envs=4", "--set", "collect=segments", "--set", "n_steps=64", "--set", "epochs=1",
    "--set", "warmup_steps=0", "--set", "eval_episodes=2", "--set", "final_episodes=2", "--preset", "default",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    assert call("train", "CartPole-v1", "--seed", "1", "--steps", "1e3", "--out", out, *FAST) == 0
    return out


def test_train_says_where_the_run_is_and_what_to_type_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r"
    assert call("train", "CartPole-v1", "--steps", "500", "--out", out, "--no-video", *FAST) == 0
    text = capsys.readouterr()
    assert f"run folder: {out}" in text.out
    for command in ("play", "evaluate", "plot"):
        assert f"grouprl {command} {out}" in text.out  # by name, or by path where it is not on the PATH
    assert f"open {out / 'report.html'} in a browser" in text.out
    assert f"open {out / 'episodes.html'} in a browser" in text.out
    assert text.err == ""  # no progress bar where nobody watches
    assert not (out / "episode.mp4").exists()


def test_evaluate_prints_the_return(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("evaluate", run, "--episodes", "3") == 0
    assert "CartPole-v1: mean return" in capsys.readouterr().out


def test_evaluate_reads_a_model_file_too(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("evaluate", run / "model.safetensors", "--episodes", "2", "--sampled") == 0
    assert "2 sampled episodes" in capsys.readouterr().out


def test_play_without_a_screen_writes_a_video(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    assert call("play", run, "--episodes", "1") == 0
    assert (run / "play.mp4").stat().st_size > 1000


def test_play_fails_where_nothing_can_be_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    agent = GRPO(lambda: gymnasium.make("CartPole-v1"), n_envs=2)
    assert call("play", agent.save(tmp_path / "own")) == 2
    assert "which no file can hold" in capsys.readouterr().err


def test_a_run_of_the_other_arena_and_a_setting_of_the_other_arena_are_told_the_right_command(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("chat", run) == 2
    assert f"{run} is a run of an environment: " in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("arena: lm\n", encoding="utf-8")
    assert call("play", tmp_path) == 2
    assert f"grouprl chat {tmp_path}" in capsys.readouterr().err
    for arguments, said in (
        (("num_generations",), "language models alone: grouprl settings --lm num_generations"),
        (("--lm", "n_envs"), "environments alone: grouprl settings n_envs"),
        (("clip_range",), "it is epsilon here"),
    ):
        assert call("settings", *arguments) == 2
        assert said in capsys.readouterr().err


def test_plot_draws_several_runs(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert call("train", "CartPole-v1", "--seed", "2", "--steps", "1000", "--out", other, "--no-video", *FAST) == 0
    assert call("plot", run, other, "--out", tmp_path / "both.png") == 0
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_resume_refuses_a_finished_run_and_lengthens_one(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("resume", run) == 2
    assert "--steps" in capsys.readouterr().err
    assert call("resume", run, "--steps", "1500") == 0
    assert json.loads((run / "summary.json").read_text())["total_steps"] >= 1500


def test_a_config_file_starts_the_same_run_again(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    assert call("train", "--config", run / "config.yaml", "--steps", "500", "--out", out, "--set", "epochs=2") == 0
    mine, theirs = (yaml.safe_load((p / "config.yaml").read_text()) for p in (out, run))
    assert mine["config"] == theirs["config"] | {"epochs": 2}
    assert mine["run"]["total_timesteps"] == 500


def test_a_config_file_has_no_preset_beside_it_and_a_folder_is_named_by_the_seed_that_counts(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("train", "--config", run / "config.yaml", "--preset", "locomotion") == 2
    assert "--preset locomotion beside --config" in capsys.readouterr().err
    for text in ("[1, 2]", "just words", "own: abc"):
        (tmp_path / "no.yaml").write_text(text)
        assert call("train", "--config", tmp_path / "no.yaml") == 2
        assert "is not the config.yaml of a run" in capsys.readouterr().err
    again = ("train", "--config", run / "config.yaml", "--steps", "300", "--no-video")
    for given in ((), ("--set", "seed=3"), ("--set", "seed=3", "--seed", "4")):
        assert call(*again, *given) == 0
    names = sorted(path.name.split("-seed")[1][0] for path in (tmp_path / "runs").iterdir())
    seeds = sorted(str(yaml.safe_load(p.read_text())["seed"]) for p in (tmp_path / "runs").glob("*/config.yaml"))
    assert names == seeds == ["1", "3", "4"]


def test_presets_and_settings_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("presets") == 0
    assert "CartPole-v1" in capsys.readouterr().out
    assert call("presets", "script") == 0
    assert yaml.safe_load(capsys.readouterr().out)["config"]["advantage"] == "batch_returns"
    assert call("presets", "nth-words") == 2
    assert "did you mean nth-word?" in capsys.readouterr().err
    assert call("settings") == 0
    assert "learning_rate" in capsys.readouterr().out
    assert call("settings", "advantage") == 0
    assert "baseline, outcome, leave_one_out" in capsys.readouterr().out
    assert call("settings", "gamma") == 0
    assert "number at least 0 and at most 1: discount" in capsys.readouterr().out


def test_numbers_without_a_dot_in_scientific_notation_are_numbers(tmp_path: Path) -> None:
    out = tmp_path / "r"
    assert (
        call("train", "CartPole-v1", "--steps", "300", "--out", out, "--no-video", "--set", "learning_rate=1e-4", *FAST)
        == 0
    )
    assert yaml.safe_load((out / "config.yaml").read_text())["config"]["learning_rate"] == 1e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "say what to train on"),
        (["train", "CartPole-v9"], "CartPole-v9"),
        (["train", "CartPol-v1"], "CartPole-v1"),
        (["train", "nth-word"], "'nth-word' trains a language model: "),
        (["train", "nowhere:Env-v0"], "cannot import the module"),
        (["train", "CartPole-v1", "--preset", "CartPole"], "did you mean CartPole-v1"),
        (["train", "CartPole-v1", "--set", "learning_rat=1"], "did you mean 'learning_rate'"),
        (["train", "CartPole-v1", "--set", "learning_rate=-1"], "learning_rate=-1"),
        (["train", "CartPole-v1", "--set", "learning_rate=fast"], "learning_rate='fast'"),
        (["train", "CartPole-v1", "--set", "group_size=1"], "group_size=1"),
        (["train", "CartPole-v1", "--set", "advantage=outcome", "--set", "collect=segments"], "whole episodes"),
        (["train", "CartPole-v1", "--set", "n_envs"], "KEY=VALUE"),
        (["train", "CartPole-v1", "--env", "gravity=1"], "gravity"),
        (["train", "CartPole-v1", "--track", "sheet"], "tensorboard"),
        (["train", "CartPole-v1", "--steps", "0"], "steps=0"),
        (["train", "CartPole-v1", "--set", "env=3"], "unknown setting 'env'"),
        (
            ["train", "CartPole-v1", "--lr", "1e-3"],
            "there is no option --lr; a setting is given as --set learning_rate=",
        ),
        (["train", "CartPole-v1", "--clip-range=.2"], "settings are given by --set: it is epsilon here"),
        (["train", "--env", "CartPole-v1"], "comes first: grouprl train CartPole-v1"),
        (["train", "--env-id", "CartPole-v1"], "no option --env-id; the environment comes first"),
        (["sweep", "--env-id", "CartPole-v1"], "the environment comes first: grouprl sweep ENV"),
        (["sweep", "tiny", "--num-generations", "3"], "a setting is given as --set num_generations=VALUE"),
        (["sweep", "CartPole-v1", "--n-envs", "3"], "a setting is given as --set n_envs=VALUE"),
        (["train-lm", "tiny", "--max-steps", "3"], "a setting is given as --set max_steps="),
        (["sweep", "CartPole-v1", "--set", "gamma=0.9,1", "--seeds", "5"], "write 0-4 for 5 seeds"),
        (["evaluate", "nothing-here"], "nothing-here"),
        (["resume", "nothing-here"], "nothing-here"),
        (["plot", "nothing-here"], "nothing-here"),
    ],
)
def test_a_mistake_gets_one_clear_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command", ["play", "evaluate", "export", "plot", "doctor", "report", "resume", "table", "chat"]
)
def test_a_folder_of_runs_and_a_wrong_name_are_told_a_run_that_exists(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for age, name in enumerate(("new", "old")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text("env_id: CartPole-v1")
        os.utime(tmp_path / "runs" / name, (1e9 - age, 1e9 - age))
    for wrong in ("runs",) if command == "chat" else ("runs", "runs/neww", "elsewhere", "."):
        assert call(command, wrong) == 2
        assert f"runs holds 2 runs; the newest is {Path('runs') / 'new'}." in capsys.readouterr().err


def test_an_answer_to_a_wrong_option_names_no_other_that_the_command_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("sweep", "CartPole-v1", "--wandb") == 2
    assert "--track" not in capsys.readouterr().err
    assert call("train", "CartPole-v1", "--wandb") == 2
    assert "--track says where metrics go" in capsys.readouterr().err


def test_no_command_is_cut_short_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--help") == 0
    assert "..." not in capsys.readouterr().out.partition("Commands:")[2]


def test_help_is_quick_and_names_every_command() -> None:
    result = subprocess.run([sys.executable, "-m", "grouprl", "--help"], capture_output=True, text=True, check=True)
    for command in ("train", "resume", "evaluate", "play", "plot", "presets", "settings"):
        assert command in result.stdout
    probe = "import sys, grouprl.cli; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ImportError("libtorch_cpu.so: failed to map segment\nmore"),
            "cannot be loaded: libtorch_cpu.so: failed to map",
        ),
        (MemoryError(), "not enough memory"),
    ],
)
def test_a_machine_without_memory_gets_one_line(
    error: BaseException, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("grouprl.envs.presets.names", fail)
    assert call("presets") == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]


def test_an_import_of_ours_that_fails_is_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ImportError("cannot import name 'x'", name="grouprl.envs")

    monkeypatch.setattr("grouprl.envs.presets.names", fail)
    with pytest.raises(ImportError, match="cannot import name"):
        call("presets")


def test_a_run_without_compiled_code_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("grouprl.envs.recorder.kernels", SimpleNamespace(why_not="there is no C compiler"))
    assert call("train", "CartPole-v1", "--steps", "500", "--out", tmp_path / "r", "--no-video", *FAST) == 0
    assert "note: trained without compiled code, more slowly and with other digits: there is no C compiler" in (
        capsys.readouterr().out
    )


def test_a_command_called_in_a_thread_does_not_end_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that calls it there goes on, also if a call was given up before."""
    monkeypatch.setattr(time_limit, "gave_up", True)
    monkeypatch.setattr(os, "_exit", lambda status: ended.append(("at once", status)))
    monkeypatch.setattr(sys, "argv", ["grouprl", "doctor", "no such run"])
    ended: list[tuple[str, object]] = []

    def call() -> None:
        try:
            cli.main()
        except SystemExit as stop:
            ended.append(("raised", stop.code))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert ended == [("raised", 2)]


def test_commands_to_type_next_can_be_typed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "with space"
    assert call("train", "CartPole-v1", "--steps", "500", "--out", out, "--no-video", *FAST) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if " evaluate " in line)
    assert shlex.split(line)[-1] == str(out)
    assert call("chat", out) == 2
    assert shlex.split(capsys.readouterr().err)[-1] == str(out)


def test_an_evaluation_is_of_one_process(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ranks, "here", lambda: ranks.Place(1, 2, 1))
    assert call("evaluate", run) == 2
    assert "an evaluation runs in one process, and 2 were started" in capsys.readouterr().err
