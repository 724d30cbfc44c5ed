"""A mixture of experts trains without the loss that TRL adds for its router, and says so."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from small_runs import ROWS, trainer
from transformers import MixtralConfig, MixtralForCausalLM

from grouprl.lm.models.tiny import ALPHABET, tiny_tokenizer


@pytest.mark.parametrize("coefficient", [0.001, 0.0])
def test_a_mixture_of_experts_says_which_loss_it_lacks(
    coefficient: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = MixtralConfig(
        vocab_size=len(ALPHABET), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2, max_position_embeddings=64, router_aux_loss_coef=coefficient,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = MixtralForCausalLM(config).eval()
    with caplog.at_level(logging.WARNING, "grouprl"):
        made = trainer(tmp_path, model=(model, tiny_tokenizer()), rows=ROWS[:4], max_steps=1)
    assert ("router_aux_loss_coef=0.001: TRL adds this loss" in caplog.text) == (coefficient > 0)
    made.train()
