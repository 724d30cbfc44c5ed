"""Settings of logging, evaluation and trackers do in a run by a recipe what they do in a script."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers.integrations import integration_utils

from grouprl.errors import UsageError
from grouprl.lm.run import training
from grouprl.lm.run.chat import Chat
from grouprl.lm.run.recipe import Recipe
from grouprl.lm.run.training import RunResult

TIMES = (
    "train_seconds", "step_time", "memory_gb", "cpu_wait", "eval_sampled_runtime", "eval_sampled_samples_per_second",
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def short(**config: Any) -> Recipe:
    """Six steps, two to a generation, checkpoints after 2, 4 and 6, greedy evaluation after 0, 3 and 6."""
    settings = {
        "prompts_per_step": 2, "num_generations": 4, "max_completion_length": 5, "max_steps": 6, "learning_rate": 1e-3,
        "save_steps": 2, "steps_per_generation": 2, "seed": 1,
    } | config  # fmt: skip
    return Recipe(
        "short", "tiny", "reverse", task_options={"length": 3}, form="text", n_train=24, n_eval=8, eval_every=3,
        warm_start={"steps": 10}, config=settings,
    )  # fmt: skip


def run(out: Path, *, track: Any = ("none",), progress_bar: bool | None = False, **config: Any) -> RunResult:
    return training.train(short(**config), out, track=track, progress_bar=progress_bar)


def rows(out: Path) -> list[dict[str, str]]:
    """metrics.csv without the times."""
    with (out / "metrics.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def steps_with(out: Path, column: str) -> list[str]:
    return [row["step"] for row in rows(out) if row.get(column)]


def history(out: Path, step: int) -> list[dict[str, Any]]:
    return list(json.loads((out / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"])


def scalars(out: Path) -> dict[str, list[int]]:
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


# --- logs and trackers ------------------------------------------------------------------------------------------------


def test_by_default_every_step_is_logged_to_trackers_and_none_in_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "r", track=None, progress_bar=None)
    shown = scalars(tmp_path / "r")
    assert shown["train/loss"] == [1, 2, 3, 4, 5, 6]
    assert shown["train/train_seconds"][:6] == [1, 2, 3, 4, 5, 6]
    assert shown["eval/accuracy"] == [0, 3, 6]
    assert capsys.readouterr().err == ""


def test_logging_steps_are_those_of_trackers_history_and_lines_but_not_of_the_metrics_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "r", track=None, progress_bar=None, logging_steps=2, logging_first_step=True)
    assert scalars(tmp_path / "r")["train/loss"] == [1, 2, 4, 6]
    assert [entry["step"] for entry in history(tmp_path / "r", 6)] == [1, 2, 4, 6]
    lines = [line for line in capsys.readouterr().err.splitlines() if "loss" in line]
    assert [line.split(":")[0] for line in lines] == [f"step {n}/6" for n in (1, 2, 4, 6, 6)]
    assert [row["step"] for row in rows(tmp_path / "r")] == list("01234566")


def test_without_a_logging_strategy_the_metrics_file_still_has_every_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "r", progress_bar=None, logging_strategy="no")
    assert history(tmp_path / "r", 6) == []
    assert capsys.readouterr().err == ""
    assert [row["step"] for row in rows(tmp_path / "r")] == list("01234566")


def test_an_epoch_ends_with_a_log_and_an_evaluation_where_the_strategies_say_so(tmp_path: Path) -> None:
    # 24 prompts, four to a generation of two steps: an epoch of twelve steps
    run(tmp_path / "r", logging_strategy="epoch", eval_strategy="epoch", max_steps=13, save_steps=13)
    assert [(e["step"], "eval_reward" in e) for e in history(tmp_path / "r", 13)] == [(12, False), (12, True)]
    assert steps_with(tmp_path / "r", "eval_sampled_reward") == ["12", "13"]


def test_report_to_names_the_trackers_unless_track_does(tmp_path: Path) -> None:
    run(tmp_path / "none", track=None, report_to="none")
    assert not (tmp_path / "none" / "tensorboard").exists()
    run(tmp_path / "track", track=("none",), report_to="tensorboard")  # a recipe's; the command line is above it
    assert not (tmp_path / "track" / "tensorboard").exists()
    with pytest.raises(UsageError, match="report_to='tensorboard' and --track none both name the trackers; give one"):
        training.train(short(), tmp_path / "both", settings={"report_to": "tensorboard"}, track=("none",))
    assert not (tmp_path / "both").exists()


def test_run_name_is_the_name_that_trackers_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(
        "grouprl.lm.train.sinks.make_trackers", lambda names, **given: seen.append({"names": names, **given}) or []
    )
    run(tmp_path / "r", track=("tensorboard",), run_name="mine")
    run(tmp_path / "s", track=None)
    assert [(call["names"], call["name"]) for call in seen] == [(("tensorboard",), "mine"), (("tensorboard",), "s")]
    assert seen[0]["config"]["recipe"]["task"] == "reverse"


def test_disable_tqdm_and_quiet_leave_the_bar_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool | None] = []

    class Bar:
        def __init__(self, total: int, enabled: bool | None, done: int) -> None:
            asked.append(enabled)

        def update(self, *_: Any, **__: Any) -> None: ...
        def close(self) -> None: ...

    monkeypatch.setattr("grouprl.lm.train.sinks.Progress", Bar)
    for bar, disabled in ((None, None), (None, True), (None, False), (False, False)):
        given = {} if disabled is None else {"disable_tqdm": disabled}
        training.train(short(max_steps=2, **given), tmp_path / "r", track=("none",), progress_bar=bar, overwrite=True)
    assert asked == [None, False, True, False]


def test_log_completions_prints_beside_the_transcripts_of_each_generation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path / "r", log_completions=True, num_completions_to_print=3, logging_steps=3)
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("---", "reward"))]
    assert [line for line in shown if line[0] == "-"] == [f"--- completions of step {n}" for n in (3, 6)]
    assert len(shown) == 2 * (1 + 3)
    lines = [json.loads(line) for line in (tmp_path / "r" / "transcripts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1] * 16 + [3] * 16 + [5] * 16


def test_a_run_without_transcripts_says_so_and_leaves_everything_else(tmp_path: Path) -> None:
    result = run(tmp_path / "r", transcripts=0)
    assert result.summary is not None
    assert len(result.notes) == 1
    assert result.notes[0].startswith("no page of transcripts: ")
    assert (tmp_path / "r" / "curve.png").exists()


# --- evaluation -------------------------------------------------------------------------------------------------------


def test_sampled_evaluations_stand_beside_the_greedy_ones(tmp_path: Path) -> None:
    run(tmp_path / "r", track=None, eval_strategy="steps", eval_steps=2, eval_on_start=True)
    assert steps_with(tmp_path / "r", "eval_accuracy") == ["0", "3", "6"]
    assert steps_with(tmp_path / "r", "eval_sampled_reward") == ["0", "2", "4", "6"]
    assert [row["step"] for row in rows(tmp_path / "r")] == ["0", "0", "1", "2", "3", "4", "5", "6", "6"]
    assert "eval_sampled_rewards/reverse/mean" in rows(tmp_path / "r")[0]
    assert scalars(tmp_path / "r")["eval/sampled_reward"] == [0, 2, 4, 6]
    assert [e["step"] for e in history(tmp_path / "r", 6) if "eval_reward" in e] == [0, 2, 4, 6]


def test_sampled_evaluations_come_with_the_greedy_ones_unless_eval_steps_says(tmp_path: Path) -> None:
    run(tmp_path / "r", eval_strategy="steps")
    assert steps_with(tmp_path / "r", "eval_sampled_reward") == ["3", "6"]  # eval_every, and the last step


def test_evaluating_by_sampling_changes_nothing_in_training(tmp_path: Path) -> None:
    run(tmp_path / "a")
    run(tmp_path / "b", eval_strategy="steps", eval_steps=1, eval_on_start=True)
    a, b = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in "ab")
    assert a == b


@pytest.mark.parametrize(
    ("settings", "sizes"),
    [
        ({}, [8, 32, 8]),
        ({"num_generations_eval": 2}, [8, 16, 8]),
        ({"num_generations_eval": 2, "per_device_eval_batch_size": 5}, [5, 3, *[4] * 4, 5, 3]),
    ],
)
def test_sizes_of_an_evaluation_are_those_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, int], sizes: list[int]
) -> None:
    from grouprl.lm.rewards.call import RewardCaller

    asked: list[int] = []
    original = RewardCaller.__call__

    def counted(self: RewardCaller, rows: Any, *others: Any) -> Any:
        asked.append(len(rows))
        return original(self, rows, *others)

    monkeypatch.setattr(RewardCaller, "__call__", counted)
    run(tmp_path / "r", max_steps=2, eval_strategy="steps", eval_steps=2, **settings)
    assert asked[0] == sizes[0]
    training_size = 16  # two steps of two prompts with four completions
    assert [n for n in asked if n != training_size] == [n for n in sizes if n != training_size]


def test_a_run_ends_with_its_best_model_if_that_is_asked_for(tmp_path: Path) -> None:
    result = run(
        tmp_path / "r", eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="completions/mean_length", greater_is_better=False, learning_rate=1e-2,
    )  # fmt: skip
    lengths = {e["step"]: e["eval_completions/mean_length"] for e in history(tmp_path / "r", 6) if "eval_reward" in e}
    best = min(lengths, key=lambda step: lengths[step])
    state = json.loads((tmp_path / "r" / "checkpoint-6" / "trainer_state.json").read_text())
    assert (state["best_global_step"], state["best_metric"]) == (best, lengths[best])
    model = (tmp_path / "r" / "model" / "model.safetensors").read_bytes()
    assert model == (tmp_path / "r" / f"checkpoint-{best}" / "model.safetensors").read_bytes()
    held_out = training.evaluate(tmp_path / "r")
    assert result.summary is not None
    assert (held_out.accuracy, held_out.reward) == (result.summary["accuracy_after"], result.summary["reward_after"])


def test_settings_for_scripts_are_accepted_and_change_nothing(tmp_path: Path) -> None:
    run(tmp_path / "a", max_steps=2)
    run(tmp_path / "b", max_steps=2, do_train=True, do_eval=True, do_predict=True)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_a_run_with_sampled_evaluations_and_logs_goes_on_exactly(tmp_path: Path) -> None:
    settings = {
        "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 4, "save_steps": 3, "log_completions": True,
    }  # fmt: skip
    run(tmp_path / "a", **settings)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoint-6")  # step 3 is within a generation and between two logs
    training.resume(tmp_path / "b", progress_bar=False)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    for name in ("transcripts.jsonl", "model/model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


# --- counters are in the checkpoint -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kept", "missing"), [([], "0 to 4"), ([0, 1, 3, 4, 5, 6, 7], "1"), ([0, 1, 2, 4], "2, 4"), (None, "0 to 4")]
)
def test_a_resumed_run_that_lost_rows_knows_what_it_did_and_names_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kept: list[int] | None, missing: str
) -> None:
    run(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b" / "checkpoint-6")
    lines = (tmp_path / "b" / "metrics.csv").read_text().splitlines(keepends=True)
    (tmp_path / "b" / "metrics.csv").unlink()
    if kept is not None:
        (tmp_path / "b" / "metrics.csv").write_text("".join(lines[i] for i in kept))
    with caplog.at_level(logging.WARNING, "grouprl"):
        result = training.resume(tmp_path / "b", progress_bar=False)
    told = [record.getMessage() for record in caplog.records if "has lost the rows" in record.getMessage()]
    assert len(told) == 1
    assert f"has lost the rows of step {missing}. " in told[0]
    straight, resumed = (json.loads((tmp_path / name / "summary.json").read_text()) for name in "ab")
    for key in ("accuracy_before", "reward_before", "accuracy_after", "reward_after", "total_steps"):
        assert straight[key] == resumed[key]
    assert rows(tmp_path / "a")[-1]["sampled_tokens"] == rows(tmp_path / "b")[-1]["sampled_tokens"]
    before = float(csv_seconds(tmp_path / "a", 4))
    assert result.summary is not None
    assert result.summary["train_seconds"] > before
    pages = [(tmp_path / name / "transcripts.html").read_text() for name in "ab"]
    curves = [json.loads(page.split('id="data"')[1].split(">", 1)[1].split("</script>")[0])["curve"] for page in pages]
    assert curves[0] == curves[1]
    assert [step for step, _ in curves[1]] == [1, 3, 5]


def csv_seconds(out: Path, step: int) -> str:
    with (out / "metrics.csv").open() as file:
        return next(row["train_seconds"] for row in csv.DictReader(file) if row["step"] == str(step))


def test_the_configuration_of_a_run_repeats_it_with_its_trackers(tmp_path: Path) -> None:
    run(tmp_path / "a", max_steps=2)
    saved = yaml.safe_load((tmp_path / "a" / "config.yaml").read_text())
    assert saved["recipe"]["config"]["report_to"] == ["none"]
    training.train(tmp_path / "a" / "config.yaml", tmp_path / "b", progress_bar=False)
    assert not (tmp_path / "b" / "tensorboard").exists()
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_a_damaged_configuration_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    from grouprl.lm.run.saved import settings_of
    from grouprl.runs import RunFolder

    run(tmp_path / "run", max_steps=2)
    folder = RunFolder.open(tmp_path / "run")
    text = folder.config_path.read_text()
    folder.config_path.write_text(text.replace("delta:", "deltc:").replace("ddp_timeout:", "ddr_timeout:"))
    for call in (lambda: training.resume(folder.path), lambda: settings_of(folder)):
        with pytest.raises(UsageError, match=r"config\.yaml: .*'deltc'; did you mean.*'ddr_timeout'") as found:
            call()
        assert "\n" not in str(found.value)
    folder.config_path.write_text("arena: lm\nrecipe: {}\n")
    with pytest.raises(UsageError, match="not the configuration of a language-model run"):
        settings_of(folder)


def test_a_model_is_used_without_what_only_its_training_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run(tmp_path / "run", max_steps=2)
    file = tmp_path / "run" / "config.yaml"
    saved = yaml.safe_load(file.read_text())
    saved["config"] |= {
        "use_vllm": True, "vllm_mode": "server", "vllm_server_timeout": 0.1, "vllm_server_port": 9, "fsdp": True,
        "fsdp_config": {"activation_checkpointing": True}, "report_to": ["clearml"],
    }  # fmt: skip
    file.write_text(yaml.safe_dump(saved))
    monkeypatch.setattr(integration_utils, "is_clearml_available", lambda: False)
    assert training.evaluate(tmp_path / "run").n == 8
    assert Chat.open(str(tmp_path / "run")).config.use_vllm is False
    assert "fsdp" not in caplog.text
