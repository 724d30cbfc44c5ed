"""A model that Transformers would read back otherwise than it was trained is refused."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from grouprl.errors import UsageError
from grouprl.lm.models.read_back import check_read_back


def model(kind: str = "youtu", *, tied: bool = True, padding: int | None = 3) -> Any:
    pytest.importorskip(f"transformers.models.{kind}")
    config = AutoConfig.for_model(
        kind, vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, q_lora_rank=4, kv_lora_rank=4, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4,
        tie_word_embeddings=tied, pad_token_id=padding, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    made = AutoModelForCausalLM.from_config(config)
    nn.init.ones_(made.get_input_embeddings().weight)
    return made


def row_as_read(one: Any, folder: Any) -> Any:
    one.save_pretrained(folder)
    return type(one).from_pretrained(folder).get_input_embeddings().weight[3]


def test_what_is_refused_is_what_from_pretrained_changes(tmp_path: Any) -> None:
    changed = model()
    assert not row_as_read(changed, tmp_path).any()
    with pytest.raises(UsageError, match=r"YoutuForCausalLM would .* \(3\) to zero .*pad_token_id = None"):
        check_read_back(changed)


def test_what_it_leaves_alone_is_not_refused(tmp_path: Any) -> None:
    llama = model("llama")
    check_read_back(llama)
    assert row_as_read(llama, tmp_path).all()
    check_read_back(model(tied=False))
    check_read_back(model(padding=None))
    frozen = model()
    frozen.get_input_embeddings().weight.requires_grad_(False)
    check_read_back(frozen)


def test_the_advice_helps(tmp_path: Any) -> None:
    changed = model()
    changed.config.pad_token_id = None
    check_read_back(changed)
    assert row_as_read(changed, tmp_path).all()
