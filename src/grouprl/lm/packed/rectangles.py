"""Attention over packed groups by batched matrix products of torch.

The groups of a block are padded to a rectangle. The query heads that share a key head become rows of one product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from grouprl.lm.packed.packing import Block, Pack
from grouprl.lm.packed.spec import AttentionSpec

_HIDDEN = -1e30  # a finite score, so that the softmax of a row without visible keys is not NaN


class RectangleAttention(torch.autograd.Function):
    """Attention by products of padded rectangles, as a function of (q, k, v, pack, spec, dtype).

    The shapes are ``q [S, H, D]``, ``k, v [S, K, D]`` and ``[S, H, D]`` for the result. Products run in ``dtype``, the
    softmax in float32. The backward pass computes the scores again, because stored scores would need more memory than
    anything else.
    """

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
    """Scale ``x [S, ...]`` and append a row of zeros: ``[S + 1, ...]``. Padded places of a rectangle read this row."""
    out = x.new_empty((x.shape[0] + 1, *x.shape[1:]), dtype=dtype)
    if scale == 1.0:
        out[:-1] = x.detach()
    else:
        out[:-1] = x.detach() * scale
    out[-1] = 0
    return out


def _places_to_row(parts: list[Tensor], back: Tensor) -> Tensor:
    """Gather the tokens of the row, ``[S, ...]``, from the padded places of all blocks."""
    return (torch.cat(parts) if len(parts) > 1 else parts[0]).index_select(0, back)


class _Rectangle:
    """The padded matrix products of one block.

    Prompt tokens attend to their prompt. Completion tokens attend to their prompt and their own completion with one
    softmax over both. ``q`` must be scaled already. The query heads of a key head are rows of one product.

    Shapes use these letters: P groups, R completions per group with r input tokens each, T prompt tokens, K key heads,
    g query heads per key head, heads of size D.
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
        """The outputs ``[places, H, D]`` of the prompts' padded places, and the outputs of the completions' places."""
        p, _ = self._prompt()
        out = [self._places(torch.bmm(p.to(self.vp.dtype), self.vp), self.block.prompt)]
        if self.block.completion is not None:
            p, _ = self._completion()
            p1, p2 = self._apart(p.to(self.vp.dtype))
            o = torch.bmm(p1, self.vp).view(-1, self.d) + torch.bmm(p2, self.vc).view(-1, self.d)
            out.append(self._places(o, self.block.completion))
        return out

    def backward(self, gradient: Tensor, delta: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """The gradients of the scaled q, of k and of v in padded places.

        Args:
            gradient: ``[S + 1, H, D]``, the gradient of the output.
            delta: ``[S + 1, H, 1]``, the dot product of the output and its gradient.
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
        """Probabilities ``[P K, g T, T]`` of the prompt tokens, and the derivative of the soft cap if there is one."""
        t = self.kp.shape[1]
        s, slope = self._capped(torch.bmm(self.qp, self.kp.transpose(1, 2)).float())
        s.view(-1, self.g, t, t).masked_fill_(self.block.hidden(self.spec.window)[0], _HIDDEN)
        return s.softmax(-1), slope

    def _completion(self) -> tuple[Tensor, Tensor | None]:
        """Probabilities ``[P K, R g r, T + r]`` of the completion tokens, and the derivative of the soft cap.

        The first T columns belong to the keys of the prompt, the last r columns to the keys of the own completion.
        """
        t, r = self.kp.shape[1], self.kc.shape[1]
        s = self.qc.new_empty((*self.qc.shape[:2], t + r), dtype=torch.float32)
        s[..., :t] = torch.bmm(self.qc, self.kp.transpose(1, 2))
        to_completion = torch.bmm(self.qc.reshape(self.kc.shape[0], -1, self.d), self.kc.transpose(1, 2))
        s[..., t:] = to_completion.view(*s.shape[:2], r)
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
        """Split ``x [P K, R g r, T + r]`` into the columns of the prompt and of the completion.

        The second part has the shape ``[P K R, g r, r]``.
        """
        t, r = self.kp.shape[1], self.kc.shape[1]
        return x[..., :t], x[..., t:].reshape(self.kc.shape[0], -1, r)

    # --- reordering the row into a rectangle and back -----------------------------------------------------------------

    def _rows(self, x: Tensor, index: Tensor) -> Tensor:
        """Gather queries: ``[S + 1, H, c]`` -> ``[P K, g T, c]`` for prompts, ``[P K, R g r, c]`` for completions."""
        c = x.shape[-1]
        x = x.index_select(0, index.reshape(-1)).view(self.groups, -1, index.shape[-1], self.k_heads, self.g, c)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(self.groups * self.k_heads, -1, c)

    def _keys(self, x: Tensor, index: Tensor) -> Tensor:
        """Gather keys: ``[S + 1, K, D]`` -> ``[P K, T, D]`` for prompts, ``[P K R, r, D]`` for completions."""
        r = index.shape[-1]
        x = x.index_select(0, index.reshape(-1)).view(self.groups, -1, r, self.k_heads, self.d)
        return x.permute(0, 3, 1, 2, 4).reshape(-1, r, self.d)

    def _places(self, x: Tensor, index: Tensor) -> Tensor:
        """Turn the result of :meth:`_rows` into padded places: ``[P T, H, D]`` or ``[P R r, H, D]``."""
        x = x.view(self.groups, self.k_heads, -1, self.g, index.shape[-1], self.d)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(-1, self.k_heads * self.g, self.d)

    def _key_places(self, x: Tensor, index: Tensor) -> Tensor:
        """Turn the result of :meth:`_keys` into padded places: ``[P T, K, D]`` or ``[P R r, K, D]``."""
        x = x.view(self.groups, self.k_heads, -1, index.shape[-1], self.d)
        return x.permute(0, 2, 3, 1, 4).reshape(-1, self.k_heads, self.d)
