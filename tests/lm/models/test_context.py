"""How long a sequence a model can read."""

from __future__ import annotations

import pytest
import torch
from architectures import build, make
from transformers import RobertaConfig, RobertaForCausalLM

from grouprl.lm.models.context import context_length


def test_it_is_the_largest_position_or_nothing() -> None:
    assert context_length(build("llama")) == 64
    assert context_length(build("mamba")) is None


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16},
        {
            "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16,
            "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0,
        },
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_rotations_that_depend_on_the_length_end_it_where_they_begin(rope: dict) -> None:
    assert context_length(build("llama", rope_parameters=rope)) == 16


def test_static_scaling_does_not() -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 16}
    assert context_length(build("llama", rope_parameters=rope)) == 64


def test_learned_positions_behind_the_padding_token_are_counted() -> None:
    config = RobertaConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=20, pad_token_id=3, is_decoder=True,
    )  # fmt: skip
    model = RobertaForCausalLM(config).eval()
    assert context_length(model) == 16
    ids = torch.randint(5, 97, (1, 17))
    model(input_ids=ids[:, :16])
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=ids)


def test_virtual_tokens_take_their_room() -> None:
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    assert context_length(get_peft_model(build("llama"), config)) == 60


def test_a_limit_below_0_is_none() -> None:
    from transformers import XLNetConfig

    assert (
        context_length(make(XLNetConfig(vocab_size=97, d_model=32, n_layer=1, n_head=4, d_inner=48), loud=False))
        is None
    )
