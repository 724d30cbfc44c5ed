"""A model that Transformers would read back otherwise than it was trained is refused."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, initialization

from grouprl.errors import UsageError
from grouprl.lm.models.read_back import check_read_back


class Clears(LlamaModel):
    """As Youtu's classes do: the row loses the mark that it was read from a file."""

    def _init_weights(self, module: Any) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            initialization.zeros_(module.weight.data[module.padding_idx])


class ClearsItsPadding(LlamaForCausalLM):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.model = Clears(config)
        self.post_init()


def model(kind: type[LlamaForCausalLM] = ClearsItsPadding, *, tied: bool = True, padding: int | None = 3) -> Any:
    return kind(
        LlamaConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            tie_word_embeddings=tied, pad_token_id=padding, bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip


def test_what_is_refused_is_what_from_pretrained_changes(tmp_path: Any) -> None:
    changed = model()
    nn.init.ones_(changed.get_input_embeddings().weight)
    changed.save_pretrained(tmp_path)
    assert not ClearsItsPadding.from_pretrained(tmp_path).get_input_embeddings().weight[3].any()
    with pytest.raises(UsageError, match=r"ClearsItsPadding would .* \(3\) to zero .* pad_token_id = None"):
        check_read_back(changed)


def test_what_it_leaves_alone_is_not_refused() -> None:
    check_read_back(model(LlamaForCausalLM))
    check_read_back(model(tied=False))
    check_read_back(model(padding=None))
    frozen = model()
    frozen.get_input_embeddings().weight.requires_grad_(False)
    check_read_back(frozen)


def test_the_advice_helps(tmp_path: Any) -> None:
    changed = model()
    changed.config.pad_token_id = None
    check_read_back(changed)
    nn.init.ones_(changed.get_input_embeddings().weight)
    changed.save_pretrained(tmp_path)
    assert ClearsItsPadding.from_pretrained(tmp_path).get_input_embeddings().weight[3].all()
