"""Attention over packed groups, for any Hugging Face model that calls the attention interface of transformers.

The model runs on one row of packed tokens ``[1, S]``, without a mask and without a cache. All its layers except
attention treat each token by itself. The attention layers call the active *plan*, and the plan decides which keys a
token may attend to ("see"). There are two plans:

- :class:`PackedAttention` is for learning and for reading prompts.
- :class:`DecodeAttention` is for decode steps.

In both plans, the completions of a group share the keys and values of their prompt.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from grouprl.errors import UsageError
from grouprl.lm.kernels import attention as native
from grouprl.lm.kernels.compile import available
from grouprl.lm.packed import flash
from grouprl.lm.packed.packing import Group, Pack
from grouprl.lm.packed.rectangles import RectangleAttention
from grouprl.lm.packed.spec import AttentionSpec as AttentionSpec

_log = logging.getLogger("grouprl")

NAME = "grouprl"


class UnsupportedError(UsageError):
    """The model needs an attention feature that the packed path does not have. The plain path supports it."""


class AttentionPlan(Protocol):
    """Computes attention and decides which tokens each token sees."""

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        """Compute the attention of one layer.

        Args:
            module: the attention layer that calls.
            q: ``[S, H, D]`` queries of S tokens, with H heads of size D.
            k: ``[S, K, D]`` keys, with K heads. H is a multiple of K.
            v: ``[S, K, D]`` values.
            spec: the settings of the layer.

        Returns:
            The attended values ``[S, H, D]``.
        """


# This is global and not thread-local, because gradient checkpointing runs layers again in the thread of CUDA's backward
# pass.
_active: AttentionPlan | None = None


@contextmanager
def using(plan: AttentionPlan) -> Iterator[None]:
    """Make ``plan`` the active plan while the context is open. Contexts can be nested."""
    global _active
    before, _active = _active, plan
    try:
        yield
    finally:
        _active = before


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **other: Any,
) -> tuple[Tensor, None]:
    """Compute attention with the active plan. The signature is the attention interface of transformers.

    Args:
        module: the attention layer.
        query: ``[1, H, S, D]``.
        key: ``[1, K, S, D]``.
        value: ``[1, K, S, D]``.
        attention_mask: must be None.
        scaling: the factor of the scores, by default ``D ** -0.5``.
        dropout: must be 0.
        sliding_window: the number of tokens that a token sees, itself included, or None.
        softcap: the soft cap of the scores, or None.
        other: other arguments of the interface. Sinks and position biases must be None.

    Returns:
        The attended values ``[1, S, H, D]``, and None in place of the attention weights.

    Raises:
        UnsupportedError: no plan is active, or the layer needs a feature that the packed path does not have.
    """
    if _active is None:
        raise UnsupportedError("packed attention was called outside of a packed pass")
    if attention_mask is not None or any(other.get(name) is not None for name in ("s_aux", "sinks", "position_bias")):
        raise UnsupportedError(f"{type(module).__name__} passes a mask, sinks or a bias to attention")
    if other.get("is_causal") is False or not getattr(module, "is_causal", True):
        raise UnsupportedError(f"{type(module).__name__} is not causal")
    if value.shape[-1] != query.shape[-1] or query.shape[0] != 1:
        raise UnsupportedError(f"{type(module).__name__} has values of another size than its keys")
    if dropout > 0.0:
        raise UnsupportedError("attention dropout is not done by packed attention; leave disable_dropout on")
    spec = AttentionSpec(query.shape[-1] ** -0.5 if scaling is None else scaling, sliding_window, softcap)
    out = _active.attend(module, query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), spec)
    return out[None], None


def register() -> None:
    """Register the attention function with transformers under the name ``grouprl``.

    No mask function is registered under this name, so models build no masks for it.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_function)


# --- learning and reading prompts -------------------------------------------------------------------------------------


class PackedAttention:
    """The plan for learning and for reading prompts.

    A prompt token sees itself and the earlier tokens of its prompt. A completion token sees its whole prompt, itself
    and the earlier tokens of its completion.

    There are three implementations. The plan uses the first one that supports the layer:

    1. compiled C code, on a CPU,
    2. FlashAttention, on a GPU in half precision,
    3. batched matrix products of torch over groups that are padded to rectangles.

    Args:
        pack: the packed row, or None to set it later. The caller may replace it between passes.
        dtype: the dtype of matrix products, or None for the dtype of the values.
        keep: a function that receives each layer with its keys and values ``[S, K, D]``, or None. A sampler fills its
            cache with it.
        native: whether to use compiled code where it supports the layer.

    Attributes:
        asked: the attention settings of each layer that called the plan.
    """

    def __init__(
        self,
        pack: Pack | None,
        dtype: torch.dtype | None = None,
        keep: Callable[[nn.Module, Tensor, Tensor], None] | None = None,
        native: bool = True,
    ) -> None:
        self.pack, self.dtype, self.keep = pack, dtype, keep
        self.native = native
        self._laid_out: tuple[Pack, flash.Layout] | None = None
        self.asked: dict[nn.Module, AttentionSpec] = {}

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        """Compute the attention of one layer. :meth:`AttentionPlan.attend` describes the arguments and the result.

        Raises:
            UnsupportedError: the plan has no pack.
        """
        if self.pack is None:
            raise UnsupportedError("packed attention was called before it was given a pack")
        dtype = self.dtype or v.dtype
        self.asked[module] = spec
        if self.keep is not None:
            self.keep(module, k, v)
        if self.native and native.can_attend(q, dtype, spec.softcap) and available():
            attended = native.attend(q, k, v, self.pack.stretches, spec.scale, spec.window, dtype)
            # Without a dtype of the plan, the modules of the model follow, and they accept their own dtype alone.
            return attended if self.dtype is not None else attended.to(dtype)
        if flash.can_attend(q, k, dtype, spec.softcap) and flash_works(q.device, dtype, q.shape[1], *k.shape[1:]):
            layout = self._layout()
            if spec.window is None or spec.window >= layout.span:
                low = (x.to(dtype) for x in (q, k, v))
                out: Tensor = flash.Flash.apply(*low, layout, spec.scale)  # type: ignore[no-untyped-call]
                return out
        out = RectangleAttention.apply(q, k, v, self.pack, spec, dtype)  # type: ignore[no-untyped-call]
        return out

    def forget(self) -> None:
        """Release the pack and its memory."""
        self.pack = self._laid_out = None

    def _layout(self) -> flash.Layout:
        assert self.pack is not None
        if self._laid_out is None or self._laid_out[0] is not self.pack:
            self._laid_out = self.pack, flash.Layout.of(self.pack)
        return self._laid_out[1]


@cache
def flash_works(device: torch.device, dtype: torch.dtype, heads: int, k_heads: int, d: int) -> bool:
    """Whether FlashAttention works on ``device`` and agrees with the products of padded rectangles.

    The function compares outputs and gradients on a small pack of random numbers. It logs a warning if FlashAttention
    fails or gives other numbers.

    Args:
        device: a GPU.
        dtype: float16 or bfloat16.
        heads: the number of query heads.
        k_heads: the number of key heads.
        d: the size of a head.
    """
    pack = Pack.of([Group([0] * 5, ([0] * 9, [0])), Group([0] * 20, ([0],)), Group([0], ([0] * 3,))], device)
    generator = torch.Generator().manual_seed(0)

    def random(n: int) -> Tensor:
        return torch.randn(len(pack.ids), n, d, generator=generator).to(device, dtype)

    qkv = [random(heads), random(k_heads), random(k_heads)]
    gradient, spec, results = random(heads), AttentionSpec(d**-0.5, None, None), []
    try:
        with torch.enable_grad():
            for function, more in (
                (RectangleAttention, (pack, spec, dtype)),
                (flash.Flash, (flash.Layout.of(pack), spec.scale)),
            ):
                inputs = [x.clone().requires_grad_() for x in qkv]
                out = function.apply(*inputs, *more)  # type: ignore[no-untyped-call]
                results.append([out.detach(), *torch.autograd.grad(out, inputs, gradient)])
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        _log.warning("attention is slower than it could be: torch's FlashAttention cannot be used: %s", error)
        return False
    if all(float((b - a).float().norm()) < 0.02 * float(a.float().norm()) for a, b in zip(*results, strict=True)):
        return True
    _log.warning("attention is slower than it could be: torch's FlashAttention gives other numbers than its products")
    return False
