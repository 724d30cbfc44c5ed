"""A layer of a Llama-shaped model, and what lies between its products: norms, rotary positions, gates."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, c_float, c_int32, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grouprl.lm.attention import How
from grouprl.lm.native.compile import functions
from grouprl.lm.products import add_gradient


class _Rotary(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("tokens", "heads", "k_heads", "d", "low")), ("eps", c_float),
        *((name, c_void_p) for name in ("q_norm", "k_norm", "cos", "sin", "dq_norm", "dk_norm")),
    ]  # fmt: skip


@dataclass(frozen=True)
class Parts:
    """A decoder layer of :mod:`grouprl.lm.lean`'s shape, what it asks of attention, its norms' weights in float32."""

    module: Any
    how: How
    norms: dict[str, Tensor]

    @classmethod
    def of(cls, module: Any, how: How) -> Parts:
        """The parts of a layer."""
        norms = {"input": module.input_layernorm, "post": module.post_attention_layernorm}
        if hasattr(module.self_attn, "q_norm"):
            norms |= {"q": module.self_attn.q_norm, "k": module.self_attn.k_norm}
        return cls(module, how, {name: norm.weight.detach().float().contiguous() for name, norm in norms.items()})

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key heads, size of a head."""
        a = self.module.self_attn
        return a.q_proj.out_features // a.head_dim, a.k_proj.out_features // a.head_dim, a.head_dim

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``[S, (H + 2 K) D]`` -> views of queries ``[S, H, D]``, keys and values ``[S, K, D]``."""
        heads, k_heads, d = self.heads
        q, k, v = torch.split(x.view(len(x), -1, d), [heads, k_heads, k_heads], 1)
        return q, k, v

    def norm(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The norm of ``x [S, d]`` before attention."""
        return _norm(self.module.input_layernorm, self.norms["input"], x, dtype)

    def post_norm(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """``x + y``, and the norm of it before the MLP, in the dtype of ``y``."""
        to = torch.empty_like(x)
        return to, _norm(self.module.post_attention_layernorm, self.norms["post"], x, y.dtype, y, to)

    def norm_gradient(self, x: Tensor, dh: Tensor, g: Tensor, g_low: Tensor) -> Tensor:
        """Add to ``g`` what flows back through :meth:`norm` of ``x``, write it to ``g_low`` too; the norm again."""
        return _norm_gradient(self.module.input_layernorm, self.norms["input"], x, dh, g, g_low)

    def post_norm_gradient(self, x: Tensor, dh: Tensor, g: Tensor, g_low: Tensor) -> Tensor:
        """The same for the norm before the MLP."""
        return _norm_gradient(self.module.post_attention_layernorm, self.norms["post"], x, dh, g, g_low)

    def rotate(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``qkv [S, (H + 2 K) D]`` with queries and keys normed, where there are norms, and turned by position."""
        out = torch.empty_like(qkv)
        functions().grouprl_rotate(self._rotary(qkv, cos, sin), _at(qkv), _at(out))
        return out

    def rotate_gradient(self, qkv: Tensor, cos: Tensor, sin: Tensor, g: Tensor) -> Tensor:
        """The gradient of ``qkv``, from that of :meth:`rotate` in float32."""
        out = torch.empty_like(qkv)
        made = [torch.zeros_like(self.norms[name]) for name in ("q", "k") if name in self.norms]
        if functions().grouprl_rotate_gradient(self._rotary(qkv, cos, sin, *made), _at(qkv), _at(g), _at(out)):
            raise MemoryError("no memory for the gradient of a rotation")
        a = self.module.self_attn
        for norm, d in zip((a.q_norm, a.k_norm) if made else (), made, strict=True):
            if norm.weight.requires_grad:
                add_gradient(norm.weight, d)
        return out

    def _rotary(self, qkv: Tensor, cos: Tensor, sin: Tensor, *made: Tensor) -> Any:
        norm = getattr(self.module.self_attn, "q_norm", None)
        struct = _Rotary(
            len(qkv), *self.heads, is_low(qkv), 0.0 if norm is None else norm.variance_epsilon,
            *(_at(self.norms.get(name)) for name in ("q", "k")), _at(cos), _at(sin), *(_at(x) for x in made),
        )  # fmt: skip
        return ctypes.cast(ctypes.pointer(struct), POINTER(_Rotary))


def gate(gate_up: Tensor) -> Tensor:
    """silu(gate) * up ``[S, I]`` of ``gate_up [S, 2 I]``."""
    m = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
    functions().grouprl_gate(is_low(m), *m.shape, _at(gate_up), _at(m))
    return m


def gate_gradient(gate_up: Tensor, dm: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of ``gate_up`` from that of :func:`gate`, and the gate again."""
    out, m = torch.empty_like(gate_up), torch.empty_like(dm)
    functions().grouprl_gate_gradient(is_low(m), *m.shape, _at(gate_up), _at(dm), _at(out), _at(m))
    return out, m


def rotary(decoder: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of ``positions [S]``, each ``[S, D]`` float32."""
    cos, sin = decoder.rotary_emb(x.detach()[None], positions[None])
    return cos[0].float().contiguous(), sin[0].float().contiguous()


def is_low(x: Tensor) -> int:
    """Whether compiled code takes ``x`` for bfloat16."""
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
