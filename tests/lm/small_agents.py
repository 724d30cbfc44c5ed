"""A model of two dozen tokens, some of them whole tool calls, so that it acts before it has learned anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grouprl.lm import GRPOConfig, GRPOTrainer

TEMPLATE = (
    "{% for m in messages %}{{ '<start> ' + m.role + ' ' + m.content + ' <end> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start> assistant ' }}{% endif %}"
)
CALLS = ["<tool_call>press('a')</tool_call>", "<tool_call>press('b')</tool_call>", "<tool_call>press(</tool_call>"]
WORDS = ["<end>", "<start>", "<unk>", "user", "assistant", "system", "go", "yes", "no", *CALLS]
ASKED = [{"role": "user", "content": "go"}]


def tokenizer() -> Any:
    """A word is a token, and so is a call."""
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made: Any = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unk>")
    made.chat_template = TEMPLATE
    return made


def model() -> Any:
    """Random weights, the same each time."""
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, eos_token_id=0, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


class Buttons:
    """A button is the right one, and pressing any ends the episode at the second time."""

    def reset(self, seed: int = 0, **row: Any) -> str:
        """Begin."""
        self.right, self.pressed, self.seed = row.get("right", "a"), [], seed
        return " go"

    def press(self, key: str) -> str:
        """Press a button.

        Args:
            key: Which one.
        """
        if self.is_done():
            raise ValueError("both buttons have been pressed")
        self.pressed.append(key)
        return "yes" if key == self.right else "no"

    def is_done(self) -> bool:
        """Whether two buttons have been pressed."""
        return len(self.pressed) == 2

    def get_reward(self) -> float:
        """The share of right ones."""
        return sum(key == self.right for key in self.pressed) / 2


def config(folder: Path, **settings: Any) -> GRPOConfig:
    """Two starts times four episodes of at most 24 tokens, in turns of at most 3."""
    return GRPOConfig(
        **{
            "output_dir": folder, "prompts_per_step": 2, "num_generations": 4, "max_completion_length": 60,
            "max_turn_length": 3, "max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1, "report_to": [],
            "save_strategy": "no", "disable_tqdm": True, "seed": 3, "bf16": False,
        }
        | settings
    )  # fmt: skip


def trainer(folder: Path, settings: dict[str, Any] | None = None, **given: Any) -> GRPOTrainer:
    """A trainer of the small model that acts in `Buttons`, unless something else is given."""
    if not {"tools", "environment_factory", "rollout_func"} & given.keys():
        given["environment_factory"] = Buttons
    return GRPOTrainer(model(), args=config(folder, **(settings or {})), processing_class=tokenizer(), **given)
