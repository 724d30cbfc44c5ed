"""Runs of agents: a preset that learns, its evaluation, and its episodes with a person watching."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

from grouprl import cli
from grouprl.cli import train_lm
from grouprl.errors import UsageError
from grouprl.lm.models.tiny import build_tiny
from grouprl.lm.run import recipe as recipes
from grouprl.lm.run import training
from grouprl.lm.run.watching import Watching, is_agent
from grouprl.lm.train.evaluation import HeldOut
from grouprl.runs import RunFolder


def small(**changes: Any) -> recipes.Recipe:
    """The preset for tests, on a game of three digits."""
    given = recipes.load("tiny-agent")
    options = {**given.environment_options, "env_kwargs": {"guesses": 3, "digits": 3, "terse": True}}
    return given.changed(
        {"environment_options": options, "n_eval": 24, "eval_every": 0, "max_steps": 40, "prompts_per_step": 8,
         "learning_rate": 5e-3, "save_strategy": "no"} | changes
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("agents") / "run"
    training.train(small(), out, seed=0, track=("none",), progress_bar=False)
    return out


def test_a_tiny_agent_learns_from_scratch_to_find_a_digit(run: Path) -> None:
    result = training.evaluate(run)
    before = next(iter(csv.DictReader((run / "metrics.csv").open(encoding="utf-8"))))
    assert result.accuracy >= float(before["eval_accuracy"]) + 0.4
    assert result.n == 24
    assert 1 <= result.numbers["episodes/mean_turns"] < float(before["eval_turns"]) == 3


def test_metrics_of_a_run_have_turns_success_and_ends(run: Path) -> None:
    last = list(csv.DictReader((run / "metrics.csv").open(encoding="utf-8")))[-2]
    assert {"episodes/mean_turns", "episodes/truncated", "episodes/terminated", "success", "reward"} <= last.keys()
    assert last["success"] == last["reward"]


def test_evaluation_says_the_share_solved_with_an_interval_turns_and_how_episodes_ended(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["grouprl", "evaluate", str(run), "--episodes", "8"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "95 % interval" in said
    assert said.startswith("solved ")
    assert "on 8 held-out starts" in said
    assert "accuracy" not in said
    assert "prompt" not in said
    assert "turns an episode on average" in said
    assert "episodes/truncated: 0.000" in said


def test_an_interval_is_that_of_wilson() -> None:
    low, high = HeldOut(0.73, 0.73, 256).interval
    assert (low, high) == pytest.approx((0.67251, 0.78069), abs=1e-5)
    assert HeldOut(0, 0.0, 10).interval == pytest.approx((0.0, 0.27754), abs=1e-5)


def test_a_person_watches_episodes_from_held_out_starts_or_from_a_seed(run: Path) -> None:
    assert is_agent(str(run))
    watching = Watching.open(str(run))
    assert "guess-number: Enter plays an episode" in watching.about
    first, second, again = (list(watching.play(line)) for line in ("", "", "1"))
    assert first == again  # the first held-out start has seed 1
    assert first[0] == "user: g"
    assert first[1].startswith("model: ")
    assert first[-1].split(", ")[0] in ("1 turns", "2 turns", "3 turns")
    assert ("  reward +1" in first) == first[-1].endswith("; the episode ended, solved")
    assert second[0] == "user: g"
    with pytest.raises(UsageError, match="'x' is no number of a start"):
        list(watching.play("x"))


def test_a_person_watches_on_the_command_line(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = iter(["", "nothing", "3", "q"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    monkeypatch.setattr("sys.argv", ["grouprl", "chat", str(run)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    said = capsys.readouterr()
    assert said.out.count("user: g") == 2
    assert "'nothing' is no number" in said.err


def test_a_run_of_answers_is_no_agent(tmp_path: Path) -> None:
    assert not is_agent(str(tmp_path))
    assert not is_agent("smollm2")


def test_a_run_in_an_environment_is_described_by_what_it_solved(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "solved, greedy, before" in page
    assert "Accuracy" not in page
    assert "held-out prompts" not in page
    folder = RunFolder.open(run)
    train_lm.report(training.RunResult(folder, 40, folder.read_summary(), []))
    assert "solved on held-out starts, greedy: " in capsys.readouterr().out


MY_TOOLS = """
def add(a: int, b: int) -> int:
    '''Add.

    Args:
        a: one
        b: two
    '''
    return a + b


def short(completions, **kwargs):
    return [-float(len(c)) for c in completions]
"""


@pytest.fixture
def run_with_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A step of training, on prompts of text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_tools.py").write_text(MY_TOOLS)
    model, tokenizer = build_tiny(0)
    model.config.max_position_embeddings = tokenizer.model_max_length = 512  # the description of a tool is long
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    (tmp_path / "sums.jsonl").write_text('{"prompt": "1 and 2"}\n' * 10)
    given = recipes.Recipe(
        "sums", str(tmp_path / "model"), "sums.jsonl", reward="my_tools:short", tools=["my_tools:add"], form="text",
        eval_every=0,
        config={"max_steps": 1, "num_generations": 2, "prompts_per_step": 2, "max_completion_length": 8},
    )  # fmt: skip
    training.train(given, tmp_path / "run", seed=0, track=("none",), progress_bar=False)
    return tmp_path / "run"


def test_a_run_with_tools_and_prompts_of_text_is_asked_in_text(run_with_tools: Path) -> None:
    watching = Watching.open(str(run_with_tools))
    assert "try: 1 and 2" in watching.about
    said = list(watching.play("2 and 2"))
    assert any("2 and 2" in line for line in said[:1])
    assert any(line.startswith("model: ") for line in said)
    assert "reward" not in "".join(said)
    assert said[-1].split(";")[0] == "1 turns"


def test_a_typed_question_is_judged_only_if_a_held_out_row_asks_it(run_with_tools: Path) -> None:
    watching = Watching.open(str(run_with_tools))
    of_rows = list(watching.play("1 and 2"))
    assert of_rows[-1].startswith("1 turns, return -")
    assert any(line.startswith("  reward -") for line in of_rows)
