"""The trial of every path when a trainer is made: a few random sequences, and the model's own forward pass on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from grouprl.lm.models.context import read_setting, ropes
from grouprl.lm.packed.head import TokenTerms
from grouprl.lm.packed.low_precision import LowPrecision
from grouprl.lm.packed.packing import Group, Pack, Spans

_COMPLETION = 4
"""The number of tokens of each completion in a trial."""

_FAR_TOKENS = 3
"""The number of positions on each side of a border, and before the last position."""


_TOLERANCE = 1e-3
"""The largest allowed difference in float32, in nats or relatively."""

_LOW_TOLERANCE = 0.2
"""The difference that is allowed in low precision whatever the model."""

_TIMES_ITS_OWN = 4.0
"""How many times the error of the model's own forward pass in low precision a path may have."""


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
    borders = {n for n in _original_lengths(config) if 0 < n < context} | {context}
    around = {p for border in borders for p in range(border - _FAR_TOKENS, border + _FAR_TOKENS)}
    return sorted(p for p in around if 0 <= p < context)


def _original_lengths(config: Any) -> Iterator[int]:
    """All lengths of pre-training and floors of scaling that a configuration names, for any kind of layer."""
    for settings in (vars(config.get_text_config()), *ropes(config)):
        for name, value in settings.items():
            border = "original_max_position" in name or name.endswith("_floor") or name == "floor_scale"
            if border and isinstance(value, int | float):
                yield int(value)


@contextmanager
def own_pass(model: nn.Module, low: torch.dtype | None = None) -> Iterator[None]:
    """Let plain calls of the model run in float32, or with products in precision ``low``, while the context is open.

    The model is in evaluation mode and computes no gradients. float32 needs layers that take it.
    """
    weight, training = next(model.parameters()), model.training
    context: AbstractContextManager[Any] = nullcontext()
    if low is not None:
        context = torch.autocast(weight.device.type, low)
    elif any(p.dtype not in (torch.float32, torch.float64) for p in model.parameters()):
        context = LowPrecision(model, torch.float32).exactly()
    model.eval()
    try:
        with torch.no_grad(), context:
            yield
    finally:
        model.train(training)


def is_rounding(difference: float, dtype: torch.dtype, own: Callable[[], float]) -> bool:
    """Whether the difference of a path from the model's own forward pass in float32 is no more than rounding.

    Args:
        difference: of log-probabilities in nats, or of logits relatively.
        dtype: the dtype of the path's products.
        own: computes how much the model's own forward pass with products of this dtype differs. A path may differ by a
            few times as much. It is called for low precision and a large difference alone.
    """
    if dtype in (torch.float32, torch.float64):
        return difference <= _TOLERANCE
    return difference <= _LOW_TOLERANCE or difference <= _TIMES_ITS_OWN * own()


@torch.no_grad()
def plain_logits(model: nn.Module, ids: Tensor, positions: Tensor | None = None) -> Tensor:
    """Compute the logits ``[B, T, V]`` float32 of sequences ``ids [B, T]`` by a plain call of the model.

    Args:
        model: a causal model.
        ids: ``[B, T]`` token ids.
        positions: ``[B, T]`` int64, or None for the positions that the model takes by itself.
    """
    given = {} if positions is None else {"position_ids": positions}
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **given)
    logits: Tensor = out.logits
    return logits.float()


def own_terms(
    model: nn.Module,
    prompt: Sequence[int],
    completion: Sequence[int],
    temperature: float = 1.0,
    turns: Spans | None = None,
    by_entropy: bool = False,
) -> TokenTerms:
    """Compute log-probabilities and entropies of a completion by the model's own forward pass over one sequence.

    Args:
        model: a causal model.
        prompt: the token ids of the prompt.
        completion: the ``n`` token ids of the completion.
        temperature: a positive number that divides the logits.
        turns: the turns of the model in the completion, or None if all of it is the model's.
        by_entropy: whether entropies carry a gradient too.

    Returns:
        Log-probabilities and entropies of the ``m`` tokens of the model, each ``[m]`` float32 in nats.
    """
    ids = torch.tensor([[*prompt, *completion]], device=next(model.parameters()).device)
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    # From the end, because adapters with virtual tokens may have logits for these in front.
    logits, targets = logits[0, -len(completion) - 1 : -1], ids[0, -len(completion) :]
    if turns is not None:
        logits, targets = (torch.cat([x[start:stop] for start, stop in turns]) for x in (logits, targets))
    logp = (logits.float() / temperature).log_softmax(-1)
    of = logp if by_entropy else logp.detach()
    entropy = -(of.exp() * of.clamp(min=torch.finfo(of.dtype).min)).sum(-1)  # a token that is ruled out adds nothing
    return TokenTerms(logp.gather(1, targets[:, None])[:, 0], entropy)


class Trial:
    """A few random sequences, and what the model's own forward pass says of them. Every path is compared with it.

    There are two prompts of unequal lengths with two completions each, at the first positions, and one sequence more at
    far positions if the model has any.

    Args:
        model: a causal model of transformers, or a PEFT model around one.

    Attributes:
        groups: the prompts and completions at the first positions. All completions have the same length.
        pack: these groups, and the sequence at far positions.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device: torch.device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(0)

        def tokens(n: int) -> list[int]:
            return random_tokens(model.config, n, generator)

        self.groups = [Group(tokens(n), [tokens(_COMPLETION), tokens(_COMPLETION)]) for n in (5, 3)]
        far = far_positions(model.config)
        far = far if len(far) > 2 else []
        self.pack = Pack.of(self.groups + ([Group(tokens(len(far) - 2), [tokens(3)])] if far else []), self.device)
        self._far: Tensor | None = None
        if far:
            prompt, (completion,) = self.pack.places[-1]
            self._far = torch.tensor([*prompt, *completion], device=self.device)
            self.pack.positions[self._far] = torch.tensor(far, device=self.device)
        self._own: dict[torch.dtype | None, Tensor] = {}

    def own(self, low: torch.dtype | None = None) -> Tensor:
        """Log-probabilities ``[2, 2, n, V]`` float32 of all tokens: by group, by completion and by its n tokens.

        Args:
            low: the precision of products. By default they are computed in float32 where the layers allow it.
        """
        if low not in self._own:
            found = []
            with own_pass(self.model, low):
                for group in self.groups:
                    # The two completions have one length, so they need no padding.
                    ids = torch.tensor([[*group.prompt, *c] for c in group.completions], device=self.device)
                    logits = plain_logits(self.model, ids)[:, -_COMPLETION - 1 : -1]
                    found.append(logits.log_softmax(-1))
            self._own[low] = torch.stack(found)
        return self._own[low]

    def own_far(self) -> Tensor | None:
        """Log-probabilities ``[3, V]`` float32 of the last tokens at far positions, or None if there are none."""
        if self._far is None:
            return None
        with own_pass(self.model):
            logits = plain_logits(self.model, self.pack.ids[self._far][None], self.pack.positions[self._far][None])
        return logits[0, -3:].log_softmax(-1)
