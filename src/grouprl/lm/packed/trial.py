"""What the trials of packed paths are made of: random tokens, positions, and the model's own forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from grouprl.lm.packed.packing import Group, Pack

_FAR_TOKENS = 3
"""The number of positions on each side of a border, and before the last position."""


def read_setting(config: Any, name: str) -> Any:
    """A setting of a configuration of transformers, or None if it is missing or varies from layer to layer."""
    try:
        return getattr(config, name, None)
    except (RuntimeError, AttributeError, KeyError):  # settings of single layers have errors of their own
        return None


def random_tokens(config: Any, n: int, generator: torch.Generator) -> list[int]:
    """``n`` random tokens of the vocabulary, without the special tokens that the configuration names.

    Special tokens may stand for an image or a sound, which a model then asks for.
    """
    text = config.get_text_config()
    special = set(_special_tokens(config)) | set(_special_tokens(text))
    vocabulary = int(read_setting(text, "vocab_size") or read_setting(config, "vocab_size"))
    ordinary = torch.tensor([i for i in range(vocabulary) if i not in special] or [0])
    found: list[int] = ordinary[torch.randint(len(ordinary), (n,), generator=generator)].tolist()
    return found


def _special_tokens(config: Any) -> Iterator[int]:
    for name, value in vars(config).items():
        if name.endswith(("_token_id", "_token_ids", "_token_index")):
            yield from (i for i in (value if isinstance(value, list | tuple) else [value]) if isinstance(i, int))


def far_positions(config: Any) -> list[int]:
    """Positions at the end of the model's context, and around the borders where attention may change with the position.

    Llama 4's and Ministral 3's attention scales queries by the position, and rotary positions of several kinds change
    at the length of pre-training. A trial at the first positions cannot show such effects.

    Returns:
        Positions in increasing order, or [] if the model has no largest position.
    """
    text = config.get_text_config()
    context = read_setting(text, "max_position_embeddings")
    if not isinstance(context, int) or context <= 0:
        return []
    borders = {n for n in _original_lengths(text) if 0 < n < context} | {context}
    around = {p for border in borders for p in range(border - _FAR_TOKENS, border + _FAR_TOKENS)}
    return sorted(p for p in around if 0 <= p < context)


def _original_lengths(text: Any) -> Iterator[int]:
    """All lengths of pre-training and floors of scaling that a configuration names, for any kind of layer."""
    rope = read_setting(text, "rope_parameters") or {}
    kinds = [text.__dict__, rope, *(kind for kind in rope.values() if isinstance(kind, Mapping))]
    for settings in kinds:
        for name, value in settings.items():
            if isinstance(value, int | float) and (
                "original_max_position" in name or name.endswith("_floor") or name == "floor_scale"
            ):
                yield int(value)


def trial_pack(config: Any, device: torch.device) -> Pack:
    """Random groups at the first positions, and one more at far positions if the model has any.

    Args:
        config: the configuration of the model.
        device: the device of the pack.
    """
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return random_tokens(config, n, generator)

    groups, far = [Group(tokens(5), [tokens(4), tokens(3)]), Group(tokens(3), [tokens(6)])], far_positions(config)
    if len(far) < 3:
        return Pack.of(groups, device)
    pack = Pack.of([*groups, Group(tokens(len(far) - 2), [tokens(3)])], device)
    prompt, (completion,) = pack.places[-1]
    pack.positions[[*prompt, *completion]] = torch.tensor(far, device=device)
    return pack


def own_log_probs(model: nn.Module, pack: Pack) -> Tensor:
    """Log-probabilities ``[m, V]`` of all tokens at the places of a pack's targets, by plain calls of the model.

    Each completion is a sequence of its own, with its prompt.
    """
    found = []
    for prompt, completions in pack.places:
        for completion in completions:
            where = torch.tensor([*prompt, *completion], device=pack.ids.device)
            positions = pack.positions[where]
            first = bool((positions == torch.arange(len(where), device=positions.device)).all())
            logits = plain_logits(model, pack.ids[where], None if first else positions)
            found.append(logits[len(prompt) - 1 :].log_softmax(-1))
    return torch.cat(found)


@torch.no_grad()
def plain_logits(model: nn.Module, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """Compute the logits ``[T, V]`` float32 of one sequence ``ids [T]`` by a plain call of the model.

    Args:
        model: a causal model.
        ids: ``[T]`` token ids.
        positions: ``[T]`` int64, or None for the positions that the model takes by itself.
    """
    given = {} if positions is None else {"position_ids": positions[None]}
    out = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], use_cache=False, **given)
    logits: Tensor = out.logits
    return logits[0].float()
