"""Attention over packed groups, for any Hugging Face model that calls the library's attention interface.

The model runs on one row of packed tokens ``[1, S]`` and is given no mask and no cache: everything in it except
attention treats tokens one by one. Attention itself asks the *plan* that is active which tokens see which:
:class:`PackedAttention` for learning (and for reading prompts), :class:`DecodeAttention` for sampling. Both let the
samples of a group share their prompt's keys and values. Where nothing better is at hand, both fold the query heads of
one key head into the rows of a plain batched product.
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
from grouprl.lm.packed.packing import Block, Group, Pack

_log = logging.getLogger("grouprl")

NAME = "grouprl"
_HIDDEN = -1e30  # finite: a row that sees nothing must not become NaN


class UnsupportedError(UsageError):
    """The model asks of attention something the packed path does not do; the plain path does."""


class AttentionPlan(Protocol):
    """Which tokens of the row see which."""

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        """``q [S, H, D]``, ``k, v [S, K, D]`` -> ``[S, H, D]``."""


class AttentionSpec:
    """What a layer asks of attention: scale of the scores, sliding window (tokens, or None), soft cap (or None)."""

    __slots__ = ("scale", "softcap", "window")

    def __init__(self, scale: float, window: int | None, softcap: float | None) -> None:
        self.scale, self.window, self.softcap = scale, window, softcap


# Global, not thread-local: CUDA's backward pass runs layers again in a thread of its own.
_active: AttentionPlan | None = None


@contextmanager
def using(plan: AttentionPlan) -> Iterator[None]:
    """Within, every attention layer of a model set to this implementation follows ``plan``."""
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
    """Hugging Face's attention interface: ``query [1, H, S, D]``, ``key, value [1, K, S, D]`` -> ``[1, S, H, D]``."""
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
    """Make the implementation known to transformers; no mask function is, so models build no masks for it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_function)


# --- learning and reading prompts -------------------------------------------------------------------------------------


class PackedAttention:
    """Each token sees its own prompt and what came before it in its own completion.

    By the first of three ways that can do what is asked for: compiled code (CPU), FlashAttention (GPU, half precision),
    plain products of padded rectangles.

    Args:
        pack: the row; may be exchanged between passes.
        dtype: what products run in, or None for the dtype of the values.
        keep: given each layer with its keys and values ``[S, K, D]``: what fills a sampler's cache.
        native: use compiled code where it can do it.
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
        """What each layer has asked for."""

    def attend(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec) -> Tensor:
        """See :class:`AttentionPlan`."""
        if self.pack is None:
            raise UnsupportedError("packed attention was called before it was given a pack")
        dtype = self.dtype or v.dtype
        self.asked[module] = spec
        if self.keep is not None:
            self.keep(module, k, v)
        if self.native and native.can_attend(q, dtype, spec.softcap) and available():
            found = native.attend(q, k, v, self.pack.stretches, spec.scale, spec.window, dtype)
            return found if self.dtype is not None else found.to(dtype)  # the model's own layers take no other
        if flash.can_attend(q, k, dtype, spec.softcap) and flash_works(q.device, dtype, q.shape[1], *k.shape[1:]):
            layout = self._layout()
            if spec.window is None or spec.window >= layout.span:
                given = (x.to(dtype) for x in (q, k, v))
                out: Tensor = flash.Flash.apply(*given, layout, spec.scale)  # type: ignore[no-untyped-call]
                return out
        out = _Packed.apply(q, k, v, self.pack, spec, dtype)  # type: ignore[no-untyped-call]
        return out

    def forget(self) -> None:
        """Let go of the pack."""
        self.pack = self._laid_out = None

    def _layout(self) -> flash.Layout:
        assert self.pack is not None
        if self._laid_out is None or self._laid_out[0] is not self.pack:
            self._laid_out = self.pack, flash.Layout.of(self.pack)
        return self._laid_out[1]


@cache
def flash_works(device: torch.device, dtype: torch.dtype, heads: int, k_heads: int, d: int) -> bool:
    """Whether FlashAttention gives what rectangles give here, forwards and backwards."""
    pack = Pack.of([Group([0] * 5, ([0] * 9, [0])), Group([0] * 20, ([0],)), Group([0], ([0] * 3,))], device)
    generator = torch.Generator().manual_seed(0)

    def random(n: int) -> Tensor:
        return torch.randn(len(pack.ids), n, d, generator=generator).to(device, dtype)

    given = [random(heads), random(k_heads), random(k_heads)]
    gradient, spec, found = random(heads), AttentionSpec(d**-0.5, None, None), []
    try:
        with torch.enable_grad():
            for function, more in ((_Packed, (pack, spec, dtype)), (flash.Flash, (flash.Layout.of(pack), spec.scale))):
                inputs = [x.clone().requires_grad_() for x in given]
                out = function.apply(*inputs, *more)  # type: ignore[no-untyped-call]
                found.append([out.detach(), *torch.autograd.grad(out, inputs, gradient)])
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        _log.warning("attention is slower than it could be: torch's FlashAttention cannot be used: %s", error)
        return False
    if all(float((b - a).float().norm()) < 0.02 * float(a.float().norm()) for a, b in zip(*found, strict=True)):
        return True
    _log.warning("attention is slower than it could be: torch's FlashAttention gives other numbers than its products")
    return False


class _Packed(torch.autograd.Function):
    """Scores are computed again in the backward pass: kept, they would be the largest thing in memory."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, pack: Pack, spec: AttentionSpec, dtype: torch.dtype
    ) -> Tensor:
        rows = (_with_zero_row(q, dtype, spec.scale), _with_zero_row(k, dtype), _with_zero_row(v, dtype))
        blocks, back = pack.rectangles
        out = _places_to_row([part for block in blocks for part in _Rectangle(*rows, block, spec).forward()], back)
        ctx.save_for_backward(*rows, out)
        ctx.pack, ctx.spec, ctx.dtypes = pack, spec, (q.dtype, k.dtype, v.dtype)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        blocks, back = ctx.pack.rectangles
        gradient = _with_zero_row(gradient, q.dtype)
        delta = _with_zero_row((gradient[:-1].float() * out).sum(-1, keepdim=True), torch.float32)
        parts: tuple[list[Tensor], ...] = ([], [], [])
        for block in blocks:
            grads = _Rectangle(q, k, v, block, ctx.spec).backward(gradient, delta)
            for part, grad in zip(parts, grads, strict=True):
                part += grad
        dq, dk, dv = (_places_to_row(part, back) for part in parts)
        dq.mul_(ctx.spec.scale)
        return *(x.to(dtype) for x, dtype in zip((dq, dk, dv), ctx.dtypes, strict=True)), None, None, None


def _with_zero_row(x: Tensor, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """``[S, ...]`` -> ``[S + 1, ...]``, scaled: where the padded places of a rectangle read from."""
    out = x.new_empty((x.shape[0] + 1, *x.shape[1:]), dtype=dtype)
    if scale == 1.0:
        out[:-1] = x.detach()
    else:
        out[:-1] = x.detach() * scale
    out[-1] = 0
    return out


def _places_to_row(parts: list[Tensor], back: Tensor) -> Tensor:
    """Padded places of all blocks -> the row, ``[S, ...]``."""
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).index_select(0, back)


class _Rectangle:
    """The padded products of one block. Letters: P groups, R completions of r inputs, T prompt places, K key heads,
    g query heads per key head, D head size. Prompts attend to themselves; completions to prompt and own past at once.
    ``q`` comes scaled.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, block: Block, spec: AttentionSpec) -> None:
        self.block, self.spec = block, spec
        self.k_heads, self.d = k.shape[1:]
        self.g = q.shape[1] // self.k_heads
        self.groups = block.prompt.shape[0]
        self.qp = self._rows(q, block.prompt)
        self.kp, self.vp = self._keys(k, block.prompt), self._keys(v, block.prompt)
        if block.completion is not None:
            self.qc = self._rows(q, block.completion)
            self.kc, self.vc = self._keys(k, block.completion), self._keys(v, block.completion)

    def forward(self) -> list[Tensor]:
        """Outputs in padded places, ``[places, H, D]``: of the prompts, then of the completions."""
        p, _ = self._prompt()
        out = [self._places(torch.bmm(p.to(self.vp.dtype), self.vp), self.block.prompt)]
        if self.block.completion is not None:
            p, _ = self._completion()
            p1, p2 = self._apart(p.to(self.vp.dtype))
            o = torch.bmm(p1, self.vp).view(-1, self.d) + torch.bmm(p2, self.vc).view(-1, self.d)
            out.append(self._places(o, self.block.completion))
        return out

    def backward(self, gradient: Tensor, delta: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Gradients of (scaled) q, of k and of v in padded places, from those of the output ``[S + 1, H, D]``.

        ``delta [S + 1, H, 1]`` is the product of output and gradient.
        """
        p, slope = self._prompt()
        do, dl = self._rows(gradient, self.block.prompt), self._rows(delta, self.block.prompt)
        ds = self._scores_gradient(torch.bmm(do, self.vp.transpose(1, 2)), p, dl, slope)
        dq = [self._places(torch.bmm(ds, self.kp), self.block.prompt)]
        dkp, dvp = torch.bmm(ds.transpose(1, 2), self.qp), torch.bmm(p.to(do.dtype).transpose(1, 2), do)
        dk, dv = [], []
        if self.block.completion is not None:
            p, slope = self._completion()
            do, dl = self._rows(gradient, self.block.completion), self._rows(delta, self.block.completion)
            per_completion = (self.kc.shape[0], -1, self.d)
            do2, q2 = do.reshape(per_completion), self.qc.reshape(per_completion)
            dp = p.new_empty(p.shape, dtype=do.dtype)
            dp[..., : self.kp.shape[1]] = torch.bmm(do, self.vp.transpose(1, 2))
            dp[..., self.kp.shape[1] :] = torch.bmm(do2, self.vc.transpose(1, 2)).view(*p.shape[:2], -1)
            ds1, ds2 = self._apart(self._scores_gradient(dp, p, dl, slope))
            p1, p2 = self._apart(p.to(do.dtype))
            dqc = torch.bmm(ds1, self.kp).view(-1, self.d) + torch.bmm(ds2, self.kc).view(-1, self.d)
            dq.append(self._places(dqc, self.block.completion))
            dkp = dkp + torch.bmm(ds1.transpose(1, 2), self.qc)
            dvp = dvp + torch.bmm(p1.transpose(1, 2), do)
            dk.append(self._key_places(torch.bmm(ds2.transpose(1, 2), q2), self.block.completion))
            dv.append(self._key_places(torch.bmm(p2.transpose(1, 2), do2), self.block.completion))
        dk.insert(0, self._key_places(dkp, self.block.prompt))
        dv.insert(0, self._key_places(dvp, self.block.prompt))
        return dq, dk, dv

    # --- scores and probabilities, in float32 -------------------------------------------------------------------------

    def _prompt(self) -> tuple[Tensor, Tensor | None]:
        """Probabilities ``[P K, g T, T]`` and the slope of the soft cap."""
        t = self.kp.shape[1]
        s, slope = self._capped(torch.bmm(self.qp, self.kp.transpose(1, 2)).float())
        s.view(-1, self.g, t, t).masked_fill_(self.block.hidden(self.spec.window)[0], _HIDDEN)
        return s.softmax(-1), slope

    def _completion(self) -> tuple[Tensor, Tensor | None]:
        """Probabilities ``[P K, R g r, T + r]``, of the prompt and of the own past, and the slope of the soft cap."""
        t, r = self.kp.shape[1], self.kc.shape[1]
        s = self.qc.new_empty((*self.qc.shape[:2], t + r), dtype=torch.float32)
        s[..., :t] = torch.bmm(self.qc, self.kp.transpose(1, 2))
        own = torch.bmm(self.qc.reshape(self.kc.shape[0], -1, self.d), self.kc.transpose(1, 2))
        s[..., t:] = own.view(*s.shape[:2], r)
        s, slope = self._capped(s)
        hidden = self.block.hidden(self.spec.window)[1]
        assert hidden is not None
        s.view(self.groups, self.k_heads, -1, r, t + r).masked_fill_(hidden, _HIDDEN)
        return s.softmax(-1), slope

    def _capped(self, s: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.spec.softcap is None:
            return s, None
        bent = torch.tanh(s / self.spec.softcap)
        return bent * self.spec.softcap, 1 - bent.square()

    @staticmethod
    def _scores_gradient(dp: Tensor, p: Tensor, delta: Tensor, slope: Tensor | None) -> Tensor:
        ds = dp.float().sub_(delta).mul_(p)
        return (ds if slope is None else ds.mul_(slope)).to(dp.dtype)

    def _apart(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[P K, R g r, T + r]`` -> its part of the prompt, and its own part as ``[P K R, g r, r]``."""
        t, r = self.kp.shape[1], self.kc.shape[1]
        return x[..., :t], x[..., t:].reshape(self.kc.shape[0], -1, r)

    # --- between the row and the rectangle ----------------------------------------------------------------------------

    def _rows(self, x: Tensor, index: Tensor) -> Tensor:
        """``[S + 1, H, c]`` -> ``[P K, (R) g r, c]``: the query heads of a key head are rows of one product."""
        c = x.shape[-1]
        x = x.index_select(0, index.reshape(-1)).view(self.groups, -1, index.shape[-1], self.k_heads, self.g, c)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(self.groups * self.k_heads, -1, c)

    def _keys(self, x: Tensor, index: Tensor) -> Tensor:
        """``[S + 1, K, D]`` -> ``[P K (R), r, D]``."""
        r = index.shape[-1]
        x = x.index_select(0, index.reshape(-1)).view(self.groups, -1, r, self.k_heads, self.d)
        return x.permute(0, 3, 1, 2, 4).reshape(-1, r, self.d)

    def _places(self, x: Tensor, index: Tensor) -> Tensor:
        """The inverse of :meth:`_rows`, in padded places: ``[P (R) r, H, D]``."""
        x = x.view(self.groups, self.k_heads, -1, self.g, index.shape[-1], self.d)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, self.k_heads * self.g, self.d)

    def _key_places(self, x: Tensor, index: Tensor) -> Tensor:
        """The inverse of :meth:`_keys`: ``[P (R) r, K, D]``."""
        x = x.view(self.groups, self.k_heads, -1, index.shape[-1], self.d)
        return x.permute(0, 2, 3, 1, 4).reshape(-1, self.k_heads, self.d)
