"""A small model that vLLM can run on a CPU, whose attention knows no heads below 32."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grouprl.lm.models.tiny import ALPHABET, MAX_LENGTH, tiny_tokenizer


def build(seed: int = 0) -> tuple[Any, Any]:
    """The model with random weights, and its tokenizer."""
    tokenizer: Any = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(ALPHABET), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=MAX_LENGTH, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval(), tokenizer
