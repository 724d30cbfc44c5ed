"""A setting that another one leaves without effect is named, once; a recipe's own settings all have one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import trainer, warm

from grouprl.lm import GRPOConfig
from grouprl.lm.run import recipe, training
from grouprl.lm.settings.unread import RULES

NOTHING = dict.fromkeys(("episodes", "own_optimizer", "own_schedule", "own_advantage", "own_surrogate"), False)
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # without effect, and with one
    ({"kl_estimator": "k1"}, {"kl_estimator": "k1", "beta": 0.1}),
    ({"kl_in": "reward"}, {"kl_in": "reward", "beta": 0.1}),
    ({"ref_model_sync_steps": 3}, {"ref_model_sync_steps": 3, "sync_ref_model": True, "beta": 0.1}),
    ({"entropy_target": 0.3}, {"entropy_target": 0.3, "use_adaptive_entropy": True}),
    ({"dynamic_sampling_max_batches": 3}, {"dynamic_sampling_max_batches": 3, "dynamic_sampling": True}),
    ({"scale_rewards": "none", "advantage": "maxrl"}, {"scale_rewards": "none"}),
    ({"epsilon": 0.3, "loss_type": "sapo"}, {"epsilon": 0.3}),
    ({"gamma": 0.9}, {"gamma": 1.0}),
    ({"warmup_steps": 3, "lr_scheduler_type": "constant"}, {"warmup_steps": 3}),
    ({"num_train_epochs": 2.0, "max_steps": 3}, {"num_train_epochs": 2.0}),
    ({"data_seed": 3, "shuffle_dataset": False}, {"data_seed": 3}),
    ({"eval_steps": 3}, {"eval_steps": 3, "eval_strategy": "steps"}),
    ({"save_steps": 3, "save_strategy": "no"}, {"save_steps": 3}),
    ({"logging_steps": 3, "logging_strategy": "no"}, {"logging_steps": 3}),
    ({"num_completions_to_print": 3}, {"num_completions_to_print": 3, "log_completions": True}),
    (
        {"greater_is_better": True},
        {"greater_is_better": True, "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 500},
    ),
    ({"gradient_checkpointing_kwargs": {"use_reentrant": True}}, {"gradient_checkpointing": True}),
    (
        {"vllm_max_model_length": 9, "use_vllm": True, "vllm_mode": "server"},
        {"vllm_max_model_length": 9, "use_vllm": True},
    ),
    ({"project": "p"}, {"project": "p", "report_to": "trackio"}),
    ({"vllm_server_port": 3}, {"vllm_server_port": 3, "use_vllm": True, "vllm_mode": "server"}),
    ({"vllm_server_port": 3, "use_vllm": True}, {"use_vllm": True}),
    (
        {"vllm_importance_sampling_clip_max": 2.0, "use_vllm": True, "vllm_importance_sampling_correction": False},
        {"vllm_importance_sampling_clip_max": 2.0, "use_vllm": True},
    ),
]


@pytest.mark.parametrize(("without", "with_one"), CASES)
def test_a_setting_without_effect_is_told_from_one_with_an_effect(
    without: dict[str, Any], with_one: dict[str, Any]
) -> None:
    (said,) = GRPOConfig(**without).without_effect(NOTHING)
    assert said.startswith(f"{next(iter(without))}=")
    assert GRPOConfig(**with_one).without_effect(NOTHING) == []
    assert GRPOConfig(**without).with_chosen(()).replace(seed=1).without_effect(NOTHING) == []


def test_each_rule_has_a_case_and_speaks_of_no_default() -> None:
    everything = dict.fromkeys(NOTHING, True)
    assert GRPOConfig().without_effect(NOTHING) == GRPOConfig().without_effect(everything) == []
    configs = [GRPOConfig(**without) for without, _ in CASES]
    for rule in RULES:
        by_argument = rule.holds(GRPOConfig(), everything) != rule.holds(GRPOConfig(), NOTHING)
        by_setting = any(
            set(rule.names) & set(without) and rule.holds(config, NOTHING)
            for (without, _), config in zip(CASES, configs, strict=True)
        )
        assert by_argument or by_setting, rule


def test_arguments_of_the_trainer_decide_too() -> None:
    config = GRPOConfig(learning_rate=1e-3, max_turns=3, scale_rewards="none", epsilon=0.3, warmup_steps=2)
    assert [said.partition("=")[0] for said in config.without_effect(NOTHING)] == ["max_turns"]
    assert config.without_effect(NOTHING | {"episodes": True}) == []
    everything = dict.fromkeys(NOTHING, True)
    assert {said.partition("=")[0] for said in config.without_effect(everything)} == {
        "learning_rate", "scale_rewards", "epsilon", "warmup_steps",
    }  # fmt: skip


def test_an_estimator_of_the_users_own_may_ask_for_gamma_in_episodes() -> None:
    own = NOTHING | {"own_advantage": True}
    assert GRPOConfig(gamma=0.9).without_effect(own | {"episodes": True}) == []
    (said,) = GRPOConfig(gamma=0.9).without_effect(own)
    assert "a completion is one turn" in said


def test_an_estimator_that_counts_rewards_in_full_reads_no_gamma() -> None:
    episodes = NOTHING | {"episodes": True}
    (said,) = GRPOConfig(gamma=0.9).without_effect(episodes)
    assert "advantage names counts rewards in full" in said
    assert GRPOConfig(gamma=0.9, advantage="timestep").without_effect(episodes) == []


def test_a_trainer_says_it_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = warm()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer(tmp_path, model=(model, tokenizer), optimizers=(optimizer, None), kl_estimator="k1", learning_rate=0.5)
    said = [record.message for record in caplog.records if "has no effect" in record.message]
    assert [line.partition(":")[0] for line in said] == [
        "kl_estimator='k1' has no effect", "learning_rate=0.5 has no effect",
    ]  # fmt: skip


@pytest.mark.parametrize("name", recipe.names())
def test_no_setting_of_a_recipe_is_without_effect(name: str) -> None:
    shipped = recipe.load(name)
    acts = shipped.environment is not None or bool(shipped.tools)
    assert GRPOConfig(**shipped.config).without_effect(NOTHING | {"episodes": acts}) == []


def test_a_run_by_a_recipe_speaks_of_what_was_changed_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes = {"max_steps": 1, "n_train": 16, "n_eval": 2, "eval_every": 0, "warm_start": {"steps": 1}}
    changes |= {"lr_scheduler_type": "constant", "warmup_steps": 2, "prompts_per_step": 2, "num_generations": 2}
    training.train("tiny", tmp_path / "r", settings=changes, track=("none",), progress_bar=False)
    said = [record.message for record in caplog.records if "has no effect" in record.message]
    assert [line.partition(" has")[0] for line in said] == ["warmup_steps=2"]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "grouprl"):
        training.resume(tmp_path / "r", steps=2, progress_bar=False)
    assert "has no effect" not in caplog.text
