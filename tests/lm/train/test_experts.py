"""A mixture of experts trains with the loss that balances their load, logged under TRL's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import ROWS, logged, same, trainer, weights
from transformers import MixtralConfig, MixtralForCausalLM

from grouprl.lm.models.tiny import ALPHABET, tiny_tokenizer


def mixture(coefficient: float) -> tuple[Any, Any]:
    config = MixtralConfig(
        vocab_size=len(ALPHABET), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, max_position_embeddings=64, router_aux_loss_coef=coefficient,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MixtralForCausalLM(config).eval(), tiny_tokenizer()


def test_the_load_is_balanced_by_the_models_coefficient_unless_another_is_given(tmp_path: Path) -> None:
    def run(name: str, coefficient: float, **given: Any) -> Any:
        made = trainer(tmp_path / name, model=mixture(coefficient), rows=ROWS[:4], max_steps=3, **given)
        made.train()
        return made

    own, told, none = run("own", 0.5), run("told", 0.0, router_aux_loss_coef=0.5), run("none", 0.0)
    assert same(weights(own), weights(told))
    assert not same(weights(own), weights(none))
    assert "aux_loss" not in logged(none)[0]
    first = logged(own)[0]
    assert first["aux_loss"] >= 1.9  # 2, the number of experts of each token, where all is even
    assert first["loss"] == pytest.approx(0.5 * first["aux_loss"], abs=1e-4)  # advantages of a group sum to 0
