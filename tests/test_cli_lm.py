"""train-lm and what follows it, as a person types it, and the mistakes people make."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from command_line import call

FAST = [
    "--quiet", "--set", "n_train=32", "--set", "n_eval=8", "--set", "prompts_per_step=2", "--set", "num_generations=4",
    "--set", "warm_start={steps: 3}",
]  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(out: Path, *arguments: str) -> int:
    return call("train-lm", "tiny", "--steps", "3", "--out", out, *FAST, *arguments)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("cli") / "run"
    assert tiny(out, "--seed", "1") == 0
    return out


def test_train_lm_says_what_came_of_it_and_what_to_type_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r"
    assert tiny(out, "--set", "task=sort", "--track", "none") == 0
    text = capsys.readouterr()
    assert f"training tiny on sort; the run folder is {out}" in text.out
    assert "accuracy on held-out prompts, greedy:" in text.out
    for command in ("chat", "evaluate", "plot"):
        assert f"grouprl {command} {out}" in text.out
    assert text.err == ""
    assert not (out / "tensorboard").exists()


def test_the_folder_is_named_after_recipe_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("train-lm", "tiny", "--steps", "1", *FAST, "--set", "seed=7") == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("tiny-seed7-")


def test_another_model_is_named_in_what_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = run / "model"
    assert call(
        "train-lm", "tiny", "--steps", "1", "--out", tmp_path / "r", *FAST[:-2], "--model", model,
        "--set", "warm_start=null",
    ) == 0  # fmt: skip
    assert f"training {model} on reverse" in capsys.readouterr().out


def test_evaluate_answers_the_held_out_prompts(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert call("evaluate", run) == 0
    out = capsys.readouterr().out
    assert f"accuracy {summary['accuracy_after']:.3f} (95 % interval 0.000 to 0.324)" in out
    assert f", mean reward {summary['reward_after']:.3f}, greedy" in out
    assert "on 8 held-out prompts" in out
    assert call("evaluate", run, "--episodes", "3", "--answers", run / "answers.jsonl") == 0
    answers = [json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines()]
    assert [set(a) >= {"prompt", "completion", "reward"} for a in answers] == [True] * 3
    assert call("evaluate", run, "--answers", run / "answers.jsonl") == 2
    assert call("evaluate", run, "--seed", "3") == 2
    assert call("evaluate", run, "--sampled") == 2
    assert call("evaluate", run, "--episodes", "0") == 2


def test_transcripts_of_a_trainer_in_python_become_a_page(run: Path, tmp_path: Path) -> None:
    shutil.copyfile(run / "transcripts.jsonl", tmp_path / "transcripts.jsonl")
    assert call("report", tmp_path) == 0
    assert "reverse" in (tmp_path / "transcripts.html").read_text().casefold()


def test_plot_draws_runs_of_two_seeds(run: Path, tmp_path: Path) -> None:
    assert tiny(tmp_path / "other", "--seed", "2") == 0
    assert call("plot", run, tmp_path / "other", "--out", tmp_path / "both.png") == 0
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert call("plot", run, "--y", "eval_accuracy", "--out", tmp_path / "accuracy.png") == 0


def test_chat_answers_each_line_until_an_empty_one(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"abcdef\n{'a' * 99}\nfedcba\n\nnever\n"))
    assert call("chat", run) == 0
    shown = capsys.readouterr()
    assert shown.out.count("> ") >= 4
    assert shown.err == "error: the question has 101 tokens, but the model reads 64; ask a shorter one\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("abcdef\n"))
    assert call("chat", run / "model", "--tokens", "3", "--sampled") == 0  # and the end of the input ends it too


def test_resume_refuses_a_finished_run_and_lengthens_one(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r"
    assert tiny(out) == 0
    assert call("resume", out) == 2
    assert "--steps" in capsys.readouterr().err
    assert call("resume", out, "--steps", "4", "--quiet") == 0
    assert json.loads((out / "summary.json").read_text())["total_steps"] == 4


def test_presets_and_settings_list_those_of_language_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("presets") == 0
    shown = capsys.readouterr().out
    assert "nth-word" in shown
    assert "tiny" in shown
    assert call("presets", "tiny") == 0
    assert "task: reverse" in capsys.readouterr().out
    assert call("settings", "--lm") == 0
    shown = capsys.readouterr().out
    assert "loss_type" in shown
    for field in ("task_options", "advantage_function", "surrogate_function", "eval_data", "form", "warm_start"):
        assert field in shown


# --- mistakes: one line, exit status 2 --------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path, status: int = 2) -> str:
    """The one line that is said."""
    assert call(*arguments) == status
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tinny"], "did you mean 'tiny'"),
        (["tiny", "--set", "learning_rate"], "write KEY=VALUE"),
        (["tiny", "--set", "learning_rate=fast"], "learning_rate='fast'"),
        (["tiny", "--set", "learning_rat=1"], "did you mean 'learning_rate'"),
        (["tiny", "--set", "zzz=1"], "unknown setting 'zzz'"),
        (["tiny", "--set", "loss_type=ppo"], "loss_type='ppo'"),
        (["tiny", "--set", "num_generations=1"], "num_generations=2 or more"),
        (["tiny", "--set", "prompts_per_step=null", "--set", "num_generations=3"], "not a multiple of num_generations"),
        (["tiny", "--set", "task=revrse"], "did you mean 'reverse'"),
        (["tiny", "--set", "task=5"], "task=5 of recipe tiny must be text"),
        (["tiny", "--set", "config=5"], "config describes a recipe and cannot be set"),
        (["tiny", "--set", "fp16=true"], "fp16=True"),
        (["tiny", "--set", "report_to=wandb", "--track", "none"], "report_to='wandb' and --track none both name"),
        (["tiny", "--set", "load_best_model_at_end=true"], "there are none; set eval_strategy='steps'"),
        (["tiny", "--set", "output_dir=zzz"], "--out names the folder"),
        (["tiny", "--set", "warm_start.steps=3"], "--set 'warm_start={steps: ...}'"),
        (["tiny", "--set", "reward=[a:b, c:d]"], "must be one function"),
        (["tiny", "--steps", "0"], "max_steps=0"),
        (["tiny", "--track", "mlflow"], "mlflow"),
        (["tiny", "--set", "max_completion_length=64"], "leaves no room for a prompt"),
        (["nth-word", "--model", "nobody/no-such-model"], "nobody/no-such-model"),
        (["nth-word", "--set", "warm_start={steps: 1}"], "warm_start is for model: tiny"),
        (["CartPole-v1"], "'CartPole-v1' is an environment: "),
        (["nowhere.yaml"], "no preset and no file 'nowhere.yaml'"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str],
    message: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    short = ["--set", "warm_start={steps: 1}"] if arguments[0] == "tiny" else []
    extra = ["--quiet", "--out", tmp_path / "r", *short]
    assert message in refused(capsys, "train-lm", *arguments, *extra)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ("return [1.0]", 1, "'score' returned 1 rewards for 8 completions"),
        ("return [float('nan')] * len(completions)", 1, "'score' returned nan"),
        ("return [None] * len(completions)", 2, "no reward function applies"),
        ("raise ValueError('no judge')", 1, "'score' raised ValueError: no judge"),
        ("return 'good'", 1, "of str"),
        ("return {c: 1 for c in completions}", 1, "of dict"),
    ],
)
def test_a_reward_at_fault_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], body: str, status: int,
    message: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"ab{c}"}) + "\n" for c in "cdefghij"))
    (tmp_path / "scores_of_mine.py").write_text(f"def score(completions, **kwargs):\n    {body}\n")
    sys.modules.pop("scores_of_mine", None)
    line = refused(
        capsys, "train-lm", "tiny", "--steps", "2", "--out", tmp_path / "r", *FAST[:-2],
        "--set", "warm_start=null", "--set", "task=prompts.jsonl", "--set", "reward=scores_of_mine:score",
        "--set", "eval_every=0", status=status,
    )  # fmt: skip
    sys.modules.pop("scores_of_mine", None)
    assert message in line
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("text", "reward", "message"),
    [
        ('{"question": "ab"}\n', "json:dumps", "line 1 has no prompt; it has: 'question'"),
        ('{"prompt": ""}\n', "json:dumps", "the prompt is empty"),
        ("prompt\n", "json:dumps", "line 1 is not JSON"),
        ('{"prompt": "ab"}\n' * 4, "json:dumps", "only 4 rows"),
        ('{"prompt": "ab"}\n' * 6, "json:dump_s", "has no 'dump_s'"),
        ('{"prompt": "ab"}\n' * 6, "no_such_module:f", "no module 'no_such_module'"),
        ('{"prompt": "ab"}\n' * 6, "dumps", "module:function"),
        ('{"prompt": [{"role": "user", "text": "ab"}]}\n' * 6, "json:dumps", "no role or no content"),
    ],
)
def test_a_dataset_at_fault_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, reward: str, message: str
) -> None:
    (tmp_path / "prompts.jsonl").write_text(text)
    line = refused(
        capsys, "train-lm", "tiny", "--steps", "2", "--out", tmp_path / "r", *FAST[:-2], "--set", "warm_start=null",
        "--set", f"task={tmp_path / 'prompts.jsonl'}", "--set", f"reward={reward}",
    )  # fmt: skip
    assert message in line
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("command", ["evaluate", "resume", "plot", "chat"])
def test_a_folder_that_holds_no_run_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for place in (tmp_path, tmp_path / "none"):
        assert str(place) in refused(capsys, command, place)
