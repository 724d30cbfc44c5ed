"""Runs: what they leave, how they go on, and what they say when they fail."""

from __future__ import annotations

import csv
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grouprl.errors import TrainingError, UsageError
from grouprl.lm.run import training
from grouprl.lm.run.held_out import HeldOutEvaluation
from grouprl.lm.run.recipe import Recipe
from grouprl.lm.run.training import RunResult

TIMES = ("train_seconds", "step_time", "memory_gb", "cpu_wait")


def short(**changes: Any) -> Recipe:
    """The preset tiny, made to take moments."""
    config = {
        "prompts_per_step": 2, "num_generations": 4, "max_completion_length": 5, "max_steps": 6, "learning_rate": 1e-3,
        "save_steps": 3, "steps_per_generation": 2, "seed": 1,
    } | changes.pop("config", {})  # fmt: skip
    given: dict[str, Any] = {
        "model": "tiny", "task": "reverse", "task_options": {"length": 3}, "form": "text", "n_train": 24, "n_eval": 8,
        "eval_every": 2, "warm_start": {"steps": 10}, "config": config,
    } | changes  # fmt: skip
    return Recipe("short", **given)


def run(out: Path, **changes: Any) -> RunResult:
    track = changes.pop("track", ("none",))
    return training.train(short(**changes), out, track=track, progress_bar=False)


def rows(folder: Path) -> list[dict[str, str]]:
    """metrics.csv without the times."""
    with (folder / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def final_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def stopping(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Ctrl-C during the step after which it stops."""

    def at(step: int) -> None:
        original = HeldOutEvaluation.on_step_end

        def heard(self: HeldOutEvaluation, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                self.stop_requested = True
            original(self, args, state, control, **kwargs)

        monkeypatch.setattr(HeldOutEvaluation, "on_step_end", heard)

    yield at
    monkeypatch.undo()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("finished") / "run"
    result = run(out, track=("tensorboard",))
    assert result.summary is not None
    assert result.notes == []
    return out


def test_a_run_leaves_everything_that_is_promised(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {
        "config.yaml", "metrics.csv", "tensorboard", "model", "transcripts.jsonl", "transcripts.html", "summary.json",
        "curve.png", "report.html", "checkpoint-3", "checkpoint-6",
    } <= names  # fmt: skip
    assert (finished / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert list((finished / "tensorboard").iterdir())
    assert "<html" in (finished / "transcripts.html").read_text()
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert (config["arena"], config["task"], config["seed"]) == ("lm", "reverse", 1)
    assert config["config"]["loss_type"] == "dapo"  # defaults too, so that a later version repeats the run


def test_the_summary_says_what_was_reached_and_at_what_cost(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    for key in ("train_seconds", "tokens_per_second", "peak_memory_gb"):
        assert summary[key] > 0, key
    table = rows(finished)
    assert summary["total_steps"] == 6
    assert summary["accuracy_before"] == float(table[0]["eval_accuracy"])
    assert summary["accuracy_after"] == float(table[-1]["eval_accuracy"])
    assert 0 <= summary["accuracy_before"] <= 1
    assert summary["reward_after"] == float(table[-1]["eval_reward"])


def test_metrics_hold_a_row_for_every_step_and_the_evaluations(finished: Path) -> None:
    table = rows(finished)
    assert [row["step"] for row in table] == ["0", "1", "2", "3", "4", "5", "6", "6"]
    assert [row["step"] for row in table if row["eval_accuracy"]] == ["0", "2", "4", "6"]
    assert [row["step"] for row in table if row["reward"]] == ["1", "3", "5"]  # two steps share a generation
    tokens = [int(row["sampled_tokens"]) for row in table]
    assert tokens[0] == 0
    assert tokens[1] == tokens[2] < tokens[3] == tokens[4] < tokens[5] == tokens[6]


def test_the_model_is_an_ordinary_one(finished: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(finished / "model")
    state = load_file(finished / "checkpoint-6" / "model.safetensors")
    assert equal(final_weights(finished), state)
    again = AutoModelForCausalLM.from_pretrained(finished / "checkpoint-6")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, again(ids).logits)


def test_transcripts_hold_the_first_groups_of_each_generation(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "transcripts.jsonl").read_text().splitlines()]
    assert [(line["step"], line["group"]) for line in lines] == [
        (step, group) for step in (1, 3, 5) for group in range(4) for _ in range(4)
    ]
    assert all(line["rewards"]["reverse"] == line["reward"] for line in lines)


def test_a_finished_run_can_be_evaluated_again_with_the_same_result(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    held_out = training.evaluate(finished)
    assert held_out.n == 8
    assert (held_out.accuracy, held_out.reward) == (summary["accuracy_after"], summary["reward_after"])
    assert training.evaluate(finished, 12).n == 12
    with pytest.raises(UsageError, match="at least 1"):
        training.evaluate(finished, 0)


@pytest.mark.parametrize("step", [3, 4])
def test_an_interrupted_run_goes_on_to_the_same_end(finished: Path, tmp_path: Path, stopping: Any, step: int) -> None:
    stopping(step)  # 3 is in the middle of a generation
    out = tmp_path / "run"
    result = run(out, track=("tensorboard",))
    assert (result.summary, result.steps) == (None, step)
    assert not (out / "model").exists()
    stopping(-1)
    resumed = training.resume(out, progress_bar=False)
    assert resumed.summary is not None
    assert rows(out) == rows(finished)
    assert (out / "transcripts.jsonl").read_text() == (finished / "transcripts.jsonl").read_text()
    assert equal(final_weights(out), final_weights(finished))
    summary = json.loads((finished / "summary.json").read_text())
    for key in ("accuracy_before", "accuracy_after", "reward_before", "reward_after", "total_steps"):
        assert resumed.summary[key] == summary[key]


def test_a_run_that_was_killed_goes_on_from_its_last_checkpoint(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoint-6")  # what a kill between steps 4 and 6 would leave, and rows beyond step 3
    training.resume(out, progress_bar=False)
    assert rows(out) == rows(finished)
    assert (out / "transcripts.jsonl").read_text() == (finished / "transcripts.jsonl").read_text()
    assert equal(final_weights(out), final_weights(finished))


def test_a_finished_run_is_only_made_longer(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    with pytest.raises(UsageError, match="has done all of its 6 steps; give a larger total"):
        training.resume(out)
    result = training.resume(out, steps=8, progress_bar=False)
    assert result.summary is not None
    assert result.summary["total_steps"] == 8


@pytest.mark.parametrize(
    "place", ["training.HeldOutEvaluation.on_train_end", "training.leave_results", "report.write_html"]
)
def test_a_run_killed_after_its_last_step_is_finished_by_resume(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    out = tmp_path / "run"

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(f"grouprl.lm.run.{place}", killed)
        with pytest.raises(KeyboardInterrupt):
            run(out)
    assert not (out / "summary.json").exists()
    resumed = training.resume(out, progress_bar=False)
    assert rows(out) == rows(finished)
    assert (out / "transcripts.jsonl").read_text() == (finished / "transcripts.jsonl").read_text()
    assert equal(final_weights(out), final_weights(finished))
    summary = json.loads((finished / "summary.json").read_text())
    assert resumed.summary is not None
    for key in ("accuracy_before", "accuracy_after", "reward_after", "total_steps"):
        assert resumed.summary[key] == summary[key]
    assert (out / "transcripts.html").exists()
    with pytest.raises(UsageError, match="has done all of its 6 steps"):
        training.resume(out)


def test_a_finished_run_of_epochs_says_that_it_is_done(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out, n_train=4, config={"max_steps": -1, "num_train_epochs": 1, "save_steps": 1, "steps_per_generation": 1})
    with pytest.raises(UsageError, match="has done all of its 2 steps; give a larger total with --steps"):
        training.resume(out, progress_bar=False)
    assert (out / "summary.json").exists()
    result = training.resume(out, steps=3, progress_bar=False)
    assert result.steps == 3


@pytest.mark.parametrize("name", ["metrics.csv", "transcripts.jsonl"])
def test_files_that_are_deleted_under_a_run_are_not_lost(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    out, original = tmp_path / "run", HeldOutEvaluation.on_step_end

    def heard(self: HeldOutEvaluation, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            (out / name).unlink()
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(HeldOutEvaluation, "on_step_end", heard)
    run(out)
    assert rows(out) == rows(finished)
    assert (out / "transcripts.jsonl").read_text() == (finished / "transcripts.jsonl").read_text()
    assert f"{name} was deleted, moved or replaced while this run is writing it" in caplog.text


def test_a_run_folder_that_is_deleted_under_a_run_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, original = tmp_path / "run", HeldOutEvaluation.on_step_end

    def heard(self: HeldOutEvaluation, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            shutil.rmtree(out)
        original(self, args, state, control, **kwargs)

    monkeypatch.setattr(HeldOutEvaluation, "on_step_end", heard)
    with pytest.raises(TrainingError, match="was deleted, moved or replaced by another since this run began"):
        run(out)
    assert not out.exists()


def test_a_longer_run_that_is_killed_keeps_its_new_length(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)

    def killed(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("grouprl.lm.train.loop.optimizer_step", killed)
        with pytest.raises(KeyboardInterrupt):
            training.resume(out, steps=8, progress_bar=False)
    result = training.resume(out, progress_bar=False)
    assert result.summary is not None
    assert result.summary["total_steps"] == 8


def test_a_run_with_an_adapter_goes_on_exactly_and_can_be_evaluated(tmp_path: Path, stopping: Any) -> None:
    adapter = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    given = {"lora": adapter, "config": {"learning_rate": 1e-2}}
    whole = run(tmp_path / "a", **given)
    stopping(3)
    assert run(tmp_path / "b", **given).summary is None
    stopping(-1)
    training.resume(tmp_path / "b", progress_bar=False)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    a, b = (load_file(tmp_path / name / "model" / "adapter_model.safetensors") for name in "ab")
    assert equal(a, b)
    assert whole.summary is not None
    assert training.evaluate(tmp_path / "a").reward == whole.summary["reward_after"]


def test_a_folder_with_a_run_is_replaced_only_if_asked_to(tmp_path: Path) -> None:
    out = tmp_path / "run"
    small = {"config": {"max_steps": 1}, "eval_every": 0}
    run(out, **small)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="already holds a run"):
        run(out, **small)
    training.train(short(config={"max_steps": 2, "seed": 5}), out, track=("none",), progress_bar=False, overwrite=True)
    assert [row["step"] for row in rows(out)] == ["0", "1", "2", "2"]
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "checkpoint-1").exists()


# --- your own data, your own reward -----------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with prompts and rewards, as a person keeps them."""
    (tmp_path / "prompts.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"{a}{b}c", "letter": a}) for a in "abcd" for b in "efg")
    )
    (tmp_path / "rewards_of_mine.py").write_text(
        "calls = 0\n"
        "def good(completions, letter, **kwargs):\n"
        "    return [float(text.startswith(a)) for text, a in zip(completions, letter)]\n"
        "def late(completions, trainer_state, **kwargs):\n"
        "    if trainer_state.global_step >= 4: raise ValueError('the judge is down')\n"
        "    return [float(i % 2) for i in range(len(completions))]\n"
        "def never(completions, **kwargs): raise ValueError('no judge')\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("rewards_of_mine", None)


def of_own(own: Path, name: str, **changes: Any) -> dict[str, Any]:
    return {
        "task": str(own / "prompts.jsonl"), "task_options": {}, "warm_start": None,
        "reward": f"rewards_of_mine:{name}", **changes,
    }  # fmt: skip


def test_prompts_and_a_reward_of_ones_own_train_and_hold_the_last_rows_out(own: Path) -> None:
    result = run(own / "run", **of_own(own, "good", n_eval=4))
    assert result.summary is not None
    table = rows(own / "run")
    assert "rewards/good/mean" in table[0]
    assert training.evaluate(own / "run").n == 2  # at most a fifth of twelve rows
    lines = [json.loads(line) for line in (own / "run" / "transcripts.jsonl").read_text().splitlines()]
    assert {line["prompt"][:1] for line in lines} <= set("abcd")
    assert all(line["extra"]["letter"] == line["prompt"][0] for line in lines)


def test_a_reward_that_fails_leaves_the_last_checkpoint_and_says_where(own: Path) -> None:
    with pytest.raises(TrainingError, match=r"the judge is down.*after 4 steps.*checkpoint-3"):
        run(own / "run", **of_own(own, "late", eval_every=0))
    assert (own / "run" / "checkpoint-3").is_dir()
    (own / "rewards_of_mine.py").write_text("def late(completions, **kwargs): return [0.5] * len(completions)\n")
    sys.modules.pop("rewards_of_mine")
    shutil.rmtree(own / "__pycache__", ignore_errors=True)
    assert training.resume(own / "run", progress_bar=False).summary is not None


def test_a_run_that_fails_before_any_checkpoint_leaves_no_folder(own: Path) -> None:
    with pytest.raises(TrainingError, match=r"no judge.*no checkpoint"):
        run(own / "run", **of_own(own, "never"))
    assert not (own / "run").exists()


def test_a_run_that_fails_later_keeps_what_it_recorded_and_says_where(own: Path) -> None:
    with pytest.raises(TrainingError, match=r"after 4 steps; there is no checkpoint.*What it recorded is in .*run"):
        run(own / "run", **of_own(own, "late", eval_every=0, config={"save_steps": 50}))
    assert [row["step"] for row in rows(own / "run")] == list("01234")
    assert (own / "run" / "transcripts.jsonl").exists()


def test_a_run_is_overwritten_only_by_one_that_takes_a_step(own: Path) -> None:
    run(own / "run")
    before = final_weights(own / "run")
    with pytest.raises(TrainingError, match="no judge"):
        training.train(short(**of_own(own, "never")), own / "run", track=("none",), progress_bar=False, overwrite=True)
    assert equal(final_weights(own / "run"), before)
    training.train(short(), own / "run", seed=2, track=("none",), progress_bar=False, overwrite=True)
    assert not equal(final_weights(own / "run"), before)
    assert not (own / "run" / ".replaced").exists()


def test_a_run_on_a_file_can_be_used_from_anywhere(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own)
    run(Path("run"), **of_own(own, "good", task="prompts.jsonl"))
    (own / "elsewhere").mkdir()
    monkeypatch.chdir(own / "elsewhere")
    training.evaluate(own / "run")
    training.resume(own / "run", steps=7, progress_bar=False)


def test_a_folder_that_happens_to_be_called_like_a_model_or_a_task_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("tiny", "reverse"):
        (tmp_path / name).mkdir()
    run(Path("run"), config={"max_steps": 3})
    recipe = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["recipe"]
    assert (recipe["model"], recipe["task"]) == ("tiny", "reverse")
    training.evaluate(Path("run"))


def test_a_resumed_run_is_measured_to_the_same_reference(tmp_path: Path) -> None:
    settings = {"beta": 0.1, "save_steps": 3, "learning_rate": 1e-2}
    run(tmp_path / "a", config=settings)
    run(tmp_path / "b", config=settings)
    shutil.rmtree(tmp_path / "b" / "checkpoint-6")
    training.resume(tmp_path / "b", progress_bar=False)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    assert float(rows(tmp_path / "a")[-2]["kl"]) > 0


def test_damage_to_a_run_is_named_and_the_newest_good_checkpoint_is_used(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    weights = (out / "checkpoint-6" / "model.safetensors").read_bytes()
    middle = len(weights) // 2
    damaged = weights[:middle] + bytes([weights[middle] ^ 1]) + weights[middle + 1 :]
    (out / "checkpoint-6" / "model.safetensors").write_bytes(damaged)
    training.resume(out, progress_bar=False)
    assert "checkpoint-6/model.safetensors is damaged: it is not what was saved" in caplog.text
    assert rows(out) == rows(finished)
    assert equal(final_weights(out), final_weights(finished))

    (out / "model" / "model.safetensors").write_bytes(damaged)
    with pytest.raises(UsageError, match=r"model/model.safetensors is damaged.*newest good checkpoint .*checkpoint-6"):
        training.evaluate(out)
    (out / "metrics.csv").write_text("some,text\n1,other\n")
    with pytest.raises(UsageError, match=r"metrics\.csv has no column 'step'"):
        training.resume(out, steps=8, progress_bar=False)
    for path in out.glob("checkpoint-*/grouprl_state.safetensors"):
        path.unlink()
    with pytest.raises(UsageError, match="only checkpoint-3, checkpoint-6, which cannot be resumed from"):
        training.resume(out, steps=8, progress_bar=False)


@pytest.mark.parametrize("file", ["metrics.csv", "transcripts.jsonl"])
def test_a_file_that_grows_and_was_damaged_is_named(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, file: str
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    shutil.rmtree(out / "checkpoint-6")
    text = (out / file).read_text()
    (out / file).write_text(text.replace("3", "4", 1))
    training.resume(out, progress_bar=False)
    assert f"{file} is not what it was at the checkpoint of step 3" in caplog.text
    assert equal(final_weights(out), final_weights(finished))


def test_a_configuration_that_was_changed_is_named(
    finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    training.evaluate(out)
    assert caplog.messages == []
    config = out / "config.yaml"
    config.write_text(config.read_text().replace("n_eval: 8", "n_eval: 9"))
    training.evaluate(out)
    assert f"{config} is not as grouprl left it" in caplog.text


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "revrse"}, "no task 'revrse'; did you mean 'reverse'"),
        ({"task_options": {"size": 3}}, "no option 'size'"),
        ({"form": "speech"}, "form='speech' is neither"),
        ({"task": "rows.jsonl"}, "reward must name a function"),
        ({"warm_start": {"epochs": 3}}, "it takes steps, learning_rate and accuracy"),
        ({"model": "smollm2"}, "warm_start is for model: tiny"),
        ({"lora": {"rank": 3}}, "lora: .*rank.*peft.LoraConfig"),
        ({"lora": {"r": 0}}, "peft_config does not fit the model: .*positive"),
        ({"lora": {"target_modules": ["c_attn"]}}, "peft_config does not fit the model: .*c_attn"),
        ({"config": {"loss_type": "ppo"}}, "loss_type='ppo'"),
        ({"model": "no/such-model-anywhere", "warm_start": None}, "no/such-model-anywhere"),
    ],
)
def test_a_mistake_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match=message):
        run(tmp_path / "run", **changes)
    assert os.listdir(tmp_path) == []


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run folder"):
        training.resume(tmp_path / "none")
    (tmp_path / "config.yaml").write_text("arena: lm\n")
    with pytest.raises(UsageError, match="not the configuration of a language-model run"):
        training.resume(tmp_path)
