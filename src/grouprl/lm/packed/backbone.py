"""The parts of a Hugging Face causal model that the packed paths use, and a test whether they support the model."""

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
"""The largest allowed difference in nats between log-probabilities of the packed and the plain pass, by dtype."""
_LOW_PRECISION_TOLERANCE = 0.25
"""The largest allowed difference in nats for a model that runs in low precision alone."""


class Backbone:
    """The parts of a causal model that the packed paths run.

    Args:
        model: a causal model of transformers, or a PEFT model around one.

    Attributes:
        model: the model as given.
        core: the model of transformers, without PEFT around it.
        decoder: the part that turns tokens into hidden states.
        head: the linear layer that turns hidden states into logits.

    Raises:
        UnsupportedError: the model has no decoder with a linear head, its rotary positions depend on the longest
            sequence, or it changes its logits after the head.
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
        if any(rope_type in str(rope) for rope_type in ("'dynamic'", "'longrope'")):
            raise UnsupportedError(
                f"{type(self.core).__name__} rotates positions by the length of the longest sequence"
            )
        for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
            if getattr(text, name, None) not in (None, 1.0):
                raise UnsupportedError(f"{type(self.core).__name__} changes its logits behind the head ({name})")
        attention.register()

    @property
    def device(self) -> torch.device:
        """The device on which the model expects its input tokens."""
        weight: Tensor = self.core.get_input_embeddings().weight
        return weight.device

    def on_device(self) -> AbstractContextManager[Any]:
        """If the model is on a GPU, launch kernels on this GPU while the context is open."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def hidden(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Compute the last hidden states of a packed row. Call this within :meth:`following`.

        Args:
            ids: ``[S]`` int64 token ids.
            positions: ``[S]`` int64 positions of the tokens in their sequences.

        Returns:
            Hidden states ``[S, d]``.
        """
        # The model receives embeddings: with ids, some models look for padding, which makes the CPU wait for the GPU.
        embedded = self.core.get_input_embeddings()(ids[None])
        out = self.decoder(inputs_embeds=embedded, position_ids=positions[None], use_cache=False)
        hidden: Tensor = out.last_hidden_state
        return hidden[0]

    def one_dtype(self) -> AbstractContextManager[Any]:
        """Run the layers of a model with weights of several dtypes in float32, while the context is open.

        Such a model may not run by itself, such as one whose norms were kept in float32.
        """
        mixed = len({p.dtype for p in self.model.parameters()}) > 1
        return LowPrecision(self.model, torch.float32).exactly() if mixed else nullcontext()

    @cached_property
    def asked(self) -> dict[nn.Module, AttentionSpec]:
        """The attention settings of each attention layer."""
        pack = Pack.of([Group([0], ())], self.device)
        plan = PackedAttention(pack)
        with torch.no_grad(), self.following(plan), self.one_dtype():
            self.hidden(pack.ids, pack.positions)
        return plan.asked

    @contextmanager
    def following(self, plan: AttentionPlan) -> Iterator[None]:
        """Let the attention layers of the model follow ``plan`` while the context is open."""
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
    """Compute the logits ``[T, V]`` float32 of one sequence ``ids [T]`` by a plain call of the model."""
    out = model(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], use_cache=False)
    logits: Tensor = out.logits
    return logits[0].float()


def find_backbone(model: nn.Module) -> tuple[Backbone | None, str]:
    """Find out whether a packed pass of the model gives the same log-probabilities as plain passes.

    The function runs two short groups of random tokens both ways. The results differ for models that the packed paths
    do not support:

    - A token depends on its neighbours outside of attention, through convolutions or recurrent layers.
    - The model does not take positions from ``position_ids``, with ALiBi for example.
    - The model scales or caps its logits after the head.
    - Attention does not go through the attention interface of transformers.

    Both passes run in float32 if the layers of the model allow it, because rounding would hide differences.

    Args:
        model: a causal model of transformers, or a PEFT model around one.

    Returns:
        The :class:`Backbone` of the model and "", or None and the reason.
    """
    training = model.training
    model.eval()
    try:
        backbone = Backbone(model)
        difference, tolerance = _compared(backbone)
    except UnsupportedError as error:
        return None, str(error)
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
        # A model may raise any of these errors when it does not know the packed form of the call.
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    finally:
        model.train(training)
    if not difference < tolerance:
        return None, f"log-probabilities of a packed pass differ by {difference:.2g}"
    return backbone, ""


def _compared(backbone: Backbone) -> tuple[float, float]:
    """The largest difference in nats between packed and plain log-probabilities, and the largest allowed one."""
    dtype = backbone.head.weight.dtype
    if dtype in _TOLERANCE:
        return _difference(backbone), _TOLERANCE[dtype]
    try:
        with LowPrecision(backbone.model, torch.float32).exactly():
            return _difference(backbone), _TOLERANCE[torch.float32]
    except RuntimeError:  # some other layer accepts its own precision alone
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
