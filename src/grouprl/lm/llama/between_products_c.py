"""The operations of :mod:`grouprl.lm.llama.between_products` in C, for CPUs."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_void_p
from typing import Any

import torch
from torch import Tensor

from grouprl.lm.kernels.attention import Stretches, attention
from grouprl.lm.kernels.compile import functions
from grouprl.lm.llama.between_products import BetweenProducts, Triple, rotary
from grouprl.lm.packed.low_precision import add_gradient
from grouprl.lm.packed.packing import Pack


class _Rotary(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("tokens", "heads", "k_heads", "d", "low")), ("eps", c_float),
        *((name, c_void_p) for name in ("q_norm", "k_norm", "cos", "sin", "dq_norm", "dk_norm")),
    ]  # fmt: skip


class BetweenProductsC(BetweenProducts):
    """In C, on a CPU. Raises MemoryError where compiled code finds no memory for a gradient."""

    @staticmethod
    def angles(decoder: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`BetweenProducts.angles`: each ``[S, D]``."""
        return rotary(decoder, x, positions)

    @staticmethod
    def seen(pack: Pack) -> Stretches:
        """See :meth:`BetweenProducts.seen`."""
        return pack.stretches

    def norm(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """See :meth:`BetweenProducts.norm`."""
        return _norm(self.module.input_layernorm, self.norms["input"], x, dtype)

    def post_norm(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`BetweenProducts.post_norm`."""
        to = torch.empty_like(x)
        return to, _norm(self.module.post_attention_layernorm, self.norms["post"], x, y.dtype, y, to)

    def norm_gradient(self, x: Tensor, dh: Tensor, g: Tensor, g_low: Tensor) -> Tensor:
        """See :meth:`BetweenProducts.norm_gradient`."""
        return _norm_gradient(self.module.input_layernorm, self.norms["input"], x, dh, g, g_low)

    def post_norm_gradient(self, x: Tensor, dh: Tensor, g: Tensor, g_low: Tensor) -> Tensor:
        """See :meth:`BetweenProducts.post_norm_gradient`."""
        return _norm_gradient(self.module.post_attention_layernorm, self.norms["post"], x, dh, g, g_low)

    def rotate(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> Triple:
        """See :meth:`BetweenProducts.rotate`."""
        out = torch.empty_like(qkv)
        functions().grouprl_rotate(self._rotary(qkv, cos, sin), _at(qkv), _at(out))
        return self.split(out)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Any, place: Tensor | None) -> tuple[Tensor, ...]:
        """See :meth:`BetweenProducts.attend`; no further tensors are needed."""
        out = torch.empty(q.shape, dtype=q.dtype) if place is None else place.view(q.shape)
        attention(q, k, v, seen, self.spec.scale, self.spec.window, {"out": out})
        return (out.flatten(1),)

    def attention_gradient(
        self,
        qkv: Tensor,
        rotated: Triple,
        cos: Tensor,
        sin: Tensor,
        seen: Any,
        attended: tuple[Tensor, ...],
        d_attended: Tensor,
    ) -> Tensor:
        """See :meth:`BetweenProducts.attention_gradient`."""
        d_rotated = torch.empty(qkv.shape, dtype=torch.float32)
        outputs = dict(zip(("dq", "dk", "dv"), self.split(d_rotated), strict=True))
        attention(*rotated, seen, self.spec.scale, self.spec.window, outputs, d_attended.view(rotated[0].shape))
        return self._rotate_gradient(qkv, cos, sin, d_rotated)

    def gate(self, gate_up: Tensor) -> Tensor:
        """See :meth:`BetweenProducts.gate`."""
        m = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        functions().grouprl_gate(is_low(m), *m.shape, _at(gate_up), _at(m))
        return m

    def gate_gradient(self, gate_up: Tensor, dm: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`BetweenProducts.gate_gradient`."""
        out, m = torch.empty_like(gate_up), torch.empty_like(dm)
        functions().grouprl_gate_gradient(is_low(m), *m.shape, _at(gate_up), _at(dm), _at(out), _at(m))
        return out, m

    def _rotate_gradient(self, qkv: Tensor, cos: Tensor, sin: Tensor, g: Tensor) -> Tensor:
        """The backward pass of :meth:`rotate`: the gradient of ``qkv``, from ``g`` ``[S, (H + 2 K) D]`` float32."""
        out = torch.empty_like(qkv)
        d_norms = [torch.zeros_like(self.norms[name]) for name in ("q", "k") if name in self.norms]
        if functions().grouprl_rotate_gradient(self._rotary(qkv, cos, sin, *d_norms), _at(qkv), _at(g), _at(out)):
            raise MemoryError("no memory for the gradient of a rotation")
        a = self.module.self_attn
        for norm, d in zip((a.q_norm, a.k_norm) if d_norms else (), d_norms, strict=True):
            if norm.weight.requires_grad:
                add_gradient(norm.weight, d)
        return out

    def _rotary(self, qkv: Tensor, cos: Tensor, sin: Tensor, *d_norms: Tensor) -> Any:
        norm = getattr(self.module.self_attn, "q_norm", None)
        struct = _Rotary(
            len(qkv), *self.heads, is_low(qkv), 0.0 if norm is None else norm.variance_epsilon,
            *(_at(self.norms.get(name)) for name in ("q", "k")), _at(cos), _at(sin), *(_at(x) for x in d_norms),
        )  # fmt: skip
        return ctypes.cast(ctypes.pointer(struct), POINTER(_Rotary))


def is_low(x: Tensor) -> int:
    """1 if ``x`` is in bfloat16, else 0: how compiled functions are told the type of a tensor."""
    return int(x.dtype == torch.bfloat16)


def _at(x: Tensor | None) -> c_void_p:
    return c_void_p(None if x is None else x.data_ptr())


def _norm(
    norm: Any, weight: Tensor, x: Tensor, dtype: torch.dtype, y: Tensor | None = None, to: Tensor | None = None
) -> Tensor:
    h, eps = torch.empty(x.shape, dtype=dtype), c_float(norm.variance_epsilon)
    functions().grouprl_norm(is_low(h), *x.shape, _at(x), _at(y), _at(weight), eps, _at(to), _at(h))
    return h


def _norm_gradient(norm: Any, weight: Tensor, x: Tensor, dh: Tensor, g: Tensor, g_low: Tensor) -> Tensor:
    h, dweight, eps = torch.empty_like(dh), torch.zeros_like(weight), c_float(norm.variance_epsilon)
    pointers = (_at(x), _at(weight), eps, _at(dh), _at(g), _at(g_low), _at(h), _at(dweight))
    if functions().grouprl_norm_gradient(is_low(h), *x.shape, *pointers):
        raise MemoryError("no memory for the gradient of a norm")
    if norm.weight.requires_grad:
        add_gradient(norm.weight, dweight)
    return h
