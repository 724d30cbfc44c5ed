"""A setting that another one leaves without effect is named, once; a recipe's own settings all have one."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig
from small_runs import ROWS, trainer, warm

from grouprl.errors import UsageError
from grouprl.lm import GRPOConfig
from grouprl.lm.run import recipe, training
from grouprl.lm.settings.unread import RULES

NOTHING = dict.fromkeys(
    (
        "episodes", "own_optimizer", "own_schedule", "own_advantage", "own_surrogate", "streamed", "other_dtype",
    ), False,
)  # fmt: skip
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
    (
        {"lr_scheduler_kwargs": {"num_cycles": 2}, "lr_scheduler_type": "constant_with_warmup"},
        {"lr_scheduler_kwargs": {"num_cycles": 2}, "lr_scheduler_type": "cosine"},
    ),
    ({"num_train_epochs": 2.0, "max_steps": 3}, {"num_train_epochs": 2.0}),
    ({"data_seed": 3, "shuffle_dataset": False}, {"data_seed": 3}),
    ({"eval_steps": 3}, {"eval_steps": 3, "eval_strategy": "steps"}),
    ({"save_steps": 3, "save_strategy": "no"}, {"save_steps": 3}),
    ({"logging_steps": 3, "logging_strategy": "no"}, {"logging_steps": 3}),
    ({"num_completions_to_print": 3}, {"num_completions_to_print": 3, "log_completions": True}),
    ({"transcripts": 3}, {"transcripts": 3, "log_completions": True}),
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
    config = GRPOConfig(
        learning_rate=1e-3, max_turns=3, max_turn_length=2, scale_rewards="none", epsilon=0.3, warmup_steps=2,
        data_seed=3, master_dtype="bfloat16",
    )  # fmt: skip
    assert [said.partition("=")[0] for said in config.without_effect(NOTHING)] == ["max_turns", "max_turn_length"]
    assert config.without_effect(NOTHING | {"episodes": True}) == []
    everything = dict.fromkeys(NOTHING, True)
    assert {said.partition("=")[0] for said in config.without_effect(everything)} == {
        "learning_rate", "scale_rewards", "epsilon", "warmup_steps", "data_seed", "master_dtype",
    }  # fmt: skip


def test_an_estimator_of_the_users_own_takes_the_place_of_the_one_that_is_chosen() -> None:
    own = NOTHING | {"own_advantage": True}
    (said,) = GRPOConfig(advantage="leave_one_out").without_effect(own)
    assert said.startswith("advantage='leave_one_out' has no effect: advantage_function")
    (said,) = GRPOConfig(multi_objective_aggregation="normalize_then_sum").without_effect(own)
    assert said.startswith("multi_objective_aggregation=")
    alone = {"num_generations": 1, "per_device_train_batch_size": 4}
    with pytest.raises(UsageError, match="nothing to compare with"):
        GRPOConfig(**alone)
    assert GRPOConfig(advantage="reinforce_pp", **alone).without_effect(own) == []


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


def _told(caplog: pytest.LogCaptureFixture) -> list[str]:
    said = [record.message for record in caplog.records if "has no effect" in record.message]
    caplog.clear()
    return said


def test_a_type_of_weights_is_told_of_where_no_weight_has_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer = warm()
    trainer(tmp_path, model=(model, tokenizer), master_dtype="bfloat16")
    (said,) = _told(caplog)
    assert said.startswith("master_dtype='bfloat16' has no effect: no weight of the given model has that type")
    trainer(tmp_path, model=(copy.deepcopy(model).bfloat16(), tokenizer), master_dtype="bfloat16")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "model")
    trainer(tmp_path, model=(str(tmp_path / "model"), None), master_dtype="bfloat16")
    trainer(tmp_path, model=(model, tokenizer), master_dtype="bfloat16", beta=0.1, ref_model=str(tmp_path / "model"))
    assert _told(caplog) == []


def test_a_seed_of_the_order_of_a_stream_is_told_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, rows=datasets.Dataset.from_list(list(ROWS)).to_iterable_dataset(), data_seed=3)
    assert [said.partition(";")[0] for said in _told(caplog)] == [
        "data_seed=3 has no effect: the rows of a stream come in its own order"
    ]


def test_dropout_of_an_adapter_is_told_of_where_training_has_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for rate, disabled in ((0.5, True), (0.5, False), (0.0, True)):
        lora = LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=rate)
        trainer(tmp_path, peft_config=lora, disable_dropout=disabled)
    assert [said.partition(";")[0] for said in _told(caplog)] == [
        "peft_config: lora_dropout=0.5 has no effect: disable_dropout trains without dropout"
    ]


@pytest.mark.parametrize("name", recipe.names())
def test_no_setting_of_a_recipe_is_without_effect(name: str) -> None:
    shipped = recipe.load(name)
    acts = shipped.environment is not None or bool(shipped.tools)
    assert GRPOConfig(**shipped.config).without_effect(NOTHING | {"episodes": acts}) == []


def test_a_run_by_a_recipe_speaks_of_what_was_changed_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    changes = {"max_steps": 1, "n_train": 16, "n_eval": 2, "eval_every": 0, "warm_start": {"steps": 1}}
    changes |= {"lr_scheduler_type": "constant", "warmup_steps": 2, "prompts_per_step": 2, "num_generations": 2}
    changes |= {"transcripts": 4}
    training.train("tiny", tmp_path / "r", settings=changes, track=("none",), progress_bar=False)
    said = [record.message for record in caplog.records if "has no effect" in record.message]
    assert [line.partition(" has")[0] for line in said] == ["warmup_steps=2"]
    caplog.clear()
    with caplog.at_level(logging.WARNING, "grouprl"):
        training.resume(tmp_path / "r", steps=2, progress_bar=False)
    assert "has no effect" not in caplog.text
