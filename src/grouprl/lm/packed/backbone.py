"""A Hugging Face causal model as the packed paths see it: tokens in, hidden states out, a head on top."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from grouprl.lm.packed import attention
from grouprl.lm.packed.attention import AttentionPlan, AttentionSpec, PackedAttention, UnsupportedError
from grouprl.lm.packed.low_precision import LowPrecision
from grouprl.lm.packed.packing import Group, Pack

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Largest difference of log-probabilities between the packed and the plain pass of a model they agree on, by dtype."""
_LOW_PRECISION_TOLERANCE = 0.25


class Backbone:
    """The parts of a causal model that the packed paths run.

    Args:
        model: a transformers causal model, or a PEFT model around one.

    Raises:
        UnsupportedError: it has no decoder or head of the usual shape.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.core: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.head: Any = self.core.get_output_embeddings()
        self.decoder: Any = self.core.get_decoder() if hasattr(self.core, "get_decoder") else None
        if self.decoder is None or self.decoder is self.core or type(self.head) is not nn.Linear:
            raise UnsupportedError(f"{type(self.core).__name__} has no decoder with a linear head on top")
        text = self.core.config.get_text_config()
        rope = getattr(text, "rope_parameters", None) or {}
        if any(kind in str(rope) for kind in ("'dynamic'", "'longrope'")):
            raise UnsupportedError(
                f"{type(self.core).__name__} rotates positions by the length of the longest sequence"
            )
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(text, name, None) not in (None, 1.0):
                raise UnsupportedError(f"{type(self.core).__name__} changes its logits behind the head ({name})")
        attention.register()

    @property
    def device(self) -> torch.device:
        """Where the tokens go."""
        weight: Tensor = self.core.get_input_embeddings().weight
        return weight.device

    def on_device(self) -> AbstractContextManager[Any]:
        """Within, its device is the one that kernels are launched on, where it is a GPU."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def hidden(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Last hidden states ``[S, d]`` of a row of tokens ``[S]``; call it within :meth:`following` a plan."""
        # given ids, a model may look whether some of them are padding, for which a GPU stops
        embedded = self.core.get_input_embeddings()(ids[None])
        out = self.decoder(inputs_embeds=embedded, position_ids=positions[None], use_cache=False)
        hidden: Tensor = out.last_hidden_state
        return hidden[0]

    @cached_property
    def asked(self) -> dict[nn.Module, AttentionSpec]:
        """What each layer asks of attention."""
        pack = Pack.of([Group([0], ())], self.device)
        plan = PackedAttention(pack)
        with torch.no_grad(), self.following(plan):
            self.hidden(pack.ids, pack.positions)
        return plan.asked

    @contextmanager
    def following(self, plan: AttentionPlan) -> Iterator[None]:
        """Within, the model's attention is ours and follows ``plan``."""
        configs = {id(m.config): m.config for m in self.core.modules() if hasattr(m, "config")}.values()
        before = [(config, config._attn_implementation) for config in configs]
        try:
            for config in configs:
                config._attn_implementation = attention.NAME
            with attention.using(plan):
                yield
        finally:
            for config, implementation in before:
                config._attn_implementation = implementation


@torch.no_grad()
def plain_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits ``[T, V]`` of one sequence ``[T]``, the way anybody would compute them."""
    out = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], use_cache=False)
    logits: Tensor = out.logits
    return logits[0].float()


def find_backbone(model: nn.Module) -> tuple[Backbone | None, str]:
    """The model's :class:`Backbone` if packed passes give what plain ones give, else None and why not.

    Two short groups of random tokens are run both ways. This finds whatever makes a token depend on its neighbours
    outside of attention (convolutions, recurrent layers), positions that are not taken from ``position_ids`` (ALiBi),
    logits that are scaled or capped behind the head, and attention that does not go through the library's interface.
    Both run in float32 where the model's layers allow it: in lower precision rounding would hide what is found.
    """
    training = model.training
    model.eval()
    try:
        backbone = Backbone(model)
        difference, tolerance = _compared(backbone)
    except UnsupportedError as error:
        return None, str(error)
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
        # Whatever a foreign model raises when it is called in a way it does not know, the plain way remains.
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        model.train(training)
    if not difference < tolerance:
        return None, f"log-probabilities of a packed pass differ by {difference:.2g}"
    return backbone, ""


def _compared(backbone: Backbone) -> tuple[float, float]:
    """The largest difference of log-probabilities, and how large it may be."""
    dtype = backbone.head.weight.dtype
    if dtype in _TOLERANCE:
        return _difference(backbone), _TOLERANCE[dtype]
    try:
        with LowPrecision(backbone.model, torch.float32).exactly():
            return _difference(backbone), _TOLERANCE[torch.float32]
    except RuntimeError:  # from a layer of another kind that takes no precision but its own
        return _difference(backbone), _LOW_PRECISION_TOLERANCE


@torch.no_grad()
def _difference(backbone: Backbone) -> float:
    generator = torch.Generator().manual_seed(0)
    vocabulary = backbone.head.weight.shape[0]

    def tokens(n: int) -> list[int]:
        return torch.randint(vocabulary, (n,), generator=generator).tolist()

    groups = [Group(tokens(5), [tokens(4), tokens(3)]), Group(tokens(3), [tokens(6)])]
    pack = Pack.of(groups, backbone.device)
    seen: set[nn.Module] = set()

    def once(module: nn.Module, *_: Tensor) -> None:
        if module in seen:
            raise UnsupportedError(f"{type(module).__name__} attends twice in one pass")
        seen.add(module)

    plan = PackedAttention(pack, keep=once)
    with backbone.following(plan):
        hidden = backbone.hidden(pack.ids, pack.positions)[pack.predictors]
    window = getattr(backbone.core.config.get_text_config(), "sliding_window", None)
    if window is not None and all(spec.window != window for spec in plan.asked.values()):
        raise UnsupportedError(f"{type(backbone.core).__name__} does not tell its attention of its sliding window")
    logp = backbone.head(hidden).float().log_softmax(-1)
    plain = []
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([*group.prompt, *completion], device=backbone.device)
            plain.append(plain_logits(backbone.model, ids)[len(group.prompt) - 1 : -1].log_softmax(-1))
    return float((logp - torch.cat(plain)).abs().max())
