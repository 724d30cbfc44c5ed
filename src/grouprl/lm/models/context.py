"""How long a sequence a model can read, from its configuration and its parts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

_BY_LENGTH = ("dynamic", "longrope")
"""The kinds of rotary positions that depend on the length of the whole sequence beyond a border."""


def read_setting(config: Any, name: str) -> Any:
    """A setting of a configuration of transformers, or None if it is missing or varies from layer to layer."""
    try:
        return getattr(config, name, None)
    except (RuntimeError, AttributeError, KeyError):  # settings of single layers have errors of their own
        return None


def ropes(config: Any) -> list[Mapping[str, Any]]:
    """The parameters of rotary positions that a configuration names, one mapping for each kind of layer."""
    rope = read_setting(config.get_text_config(), "rope_parameters") or {}
    kinds = [kind for kind in rope.values() if isinstance(kind, Mapping)]
    return kinds or [rope]


def rotates_by_length(config: Any) -> bool:
    """Whether rotary positions depend on the length of the whole sequence beyond a border."""
    return any(kind.get("rope_type") in _BY_LENGTH for kind in ropes(config))


def context_length(model: Any) -> int | None:
    """The most tokens of a prompt and its completion, or None if the model sets no limit.

    It is the largest position of the model, with these exceptions:

    - Where rotary positions depend on the length of the whole sequence (dynamic scaling, LongRoPE), it is the length
      up to which they do not. Beyond it, the log-probability of a token would change with the tokens after it.
    - Learned positions may begin behind the index of the padding token, as in RoBERTa.
    - Adapters with virtual tokens put these before the prompt.

    Args:
        model: a causal model of transformers, or a PEFT model around one.
    """
    text = model.config.get_text_config()
    limits = [read_setting(text, "max_position_embeddings"), *_learned_positions(model)]
    if rotates_by_length(model.config):
        limits += [kind.get("original_max_position_embeddings") for kind in ropes(model.config)]
        limits.append(read_setting(text, "original_max_position_embeddings"))
    known = [int(n) for n in limits if isinstance(n, int | float) and n > 0]
    return min(known) - _virtual_tokens(model) if known else None


def _learned_positions(model: Any) -> Iterator[int]:
    """The numbers of positions of embeddings whose first positions are left out for the padding token."""
    for name, module in model.named_modules():
        learned = isinstance(module, nn.Embedding) and name.endswith(("position_embeddings", "embed_positions"))
        if learned and module.padding_idx is not None:
            yield module.num_embeddings - module.padding_idx - 1


def _virtual_tokens(model: Any) -> int:
    """The number of tokens that a PEFT adapter puts before each prompt."""
    active = getattr(model, "active_peft_config", None)
    return int(getattr(active, "num_virtual_tokens", None) or 0) if getattr(active, "is_prompt_learning", False) else 0
