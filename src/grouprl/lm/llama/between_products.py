"""A layer of a Llama-shaped model, and what lies between its products: norms, rotary positions, attention, gates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grouprl.lm.packed import flash
from grouprl.lm.packed.attention import How
from grouprl.lm.packed.low_precision import add_gradient
from grouprl.lm.packed.packing import Pack

Triple = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Parts(ABC):
    """A decoder layer of the kind that block.py knows, what it asks of attention, and its norms' weights in float32."""

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

    def split(self, x: Tensor) -> Triple:
        """``[S, (H + 2 K) D]`` -> views of queries ``[S, H, D]``, keys and values ``[S, K, D]``."""
        heads, k_heads, d = self.heads
        q, k, v = torch.split(x.view(len(x), -1, d), [heads, k_heads, k_heads], 1)
        return q, k, v

    @staticmethod
    @abstractmethod
    def angles(decoder: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of ``positions [S]``, as :meth:`rotate` takes them."""

    @staticmethod
    @abstractmethod
    def seen(pack: Pack) -> Any:
        """Which tokens of a pack see which, as :meth:`attend` takes it."""

    @abstractmethod
    def norm(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The norm of ``x [S, d]`` before attention."""

    @abstractmethod
    def post_norm(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """``x + y``, and the norm of it before the MLP, in the dtype of ``y``."""

    @abstractmethod
    def norm_gradient(self, x: Tensor, dh: Tensor, g: Tensor, g_low: Tensor) -> Tensor:
        """Add to ``g`` what flows back through :meth:`norm` of ``x``, write it to ``g_low`` too; the norm again."""

    @abstractmethod
    def post_norm_gradient(self, x: Tensor, dh: Tensor, g: Tensor, g_low: Tensor) -> Tensor:
        """The same for the norm before the MLP."""

    @abstractmethod
    def rotate(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> Triple:
        """``qkv [S, (H + 2 K) D]`` split, queries and keys normed, where there are norms, and turned by position."""

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Any, place: Tensor | None) -> tuple[Tensor, ...]:
        """Attended values ``[S, H D]``, in ``place`` if there is one, and what :meth:`attention_gradient` needs."""

    @abstractmethod
    def attention_gradient(
        self, qkv: Tensor, turned: Triple, cos: Tensor, sin: Tensor, seen: Any, found: tuple[Tensor, ...], d: Tensor
    ) -> Tensor:
        """The gradient of ``qkv`` from ``d``, that of the attended values.

        Args:
            turned: what :meth:`rotate` made of ``qkv``. found: what :meth:`attend` gave.
        """

    @abstractmethod
    def gate(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up ``[S, I]`` of ``gate_up [S, 2 I]``."""

    @abstractmethod
    def gate_gradient(self, gate_up: Tensor, dm: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of ``gate_up`` from that of :meth:`gate`, and the gate again."""


def rotary(decoder: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of ``positions [S]``, each ``[S, D]`` float32."""
    cos, sin = decoder.rotary_emb(x.detach()[None], positions[None])
    return cos[0].float().contiguous(), sin[0].float().contiguous()


def by_halves(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``[S, D]`` each -> ``[S, 1, D]``, sines with the sign of their half: for ``x cos + other_half(x) sin``."""
    first, second = sin.chunk(2, -1)
    return cos[:, None], torch.cat([-first, second], -1)[:, None]


class TorchParts(Parts):
    """By torch, with FlashAttention: on a GPU, where each operation is a kernel and few of them are wanted."""

    @staticmethod
    def angles(decoder: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Parts.angles`: ``[S, 1, D]``, sines with the sign of the half they turn."""
        return by_halves(*rotary(decoder, x, positions))

    @staticmethod
    def seen(pack: Pack) -> flash.Layout:
        """See :meth:`Parts.seen`."""
        return flash.Layout.of(pack)

    def norm(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """See :meth:`Parts.norm`."""
        return self._norm("input", self.module.input_layernorm, x).to(dtype)

    def post_norm(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Parts.post_norm`."""
        x = x + y
        return x, self._norm("post", self.module.post_attention_layernorm, x).to(y.dtype)

    def norm_gradient(self, x: Tensor, dh: Tensor, g: Tensor, g_low: Tensor) -> Tensor:
        """See :meth:`Parts.norm_gradient`."""
        return self._through_norm("input", self.module.input_layernorm, x, dh, g, g_low)

    def post_norm_gradient(self, x: Tensor, dh: Tensor, g: Tensor, g_low: Tensor) -> Tensor:
        """See :meth:`Parts.post_norm_gradient`."""
        return self._through_norm("post", self.module.post_attention_layernorm, x, dh, g, g_low)

    def rotate(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> Triple:
        """See :meth:`Parts.rotate`."""
        q, k, v = self.split(qkv)
        if "q" in self.norms:
            a = self.module.self_attn
            qk = torch.cat([self._norm("q", a.q_norm, q.float()), self._norm("k", a.k_norm, k.float())], 1)
        else:
            qk = qkv.view(len(qkv), -1, q.shape[2])[:, : -v.shape[1]]
        turned = (qk * cos).addcmul_(other_half(qk), sin).to(qkv.dtype)
        return turned[:, : q.shape[1]], turned[:, q.shape[1] :], v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Any, place: Tensor | None) -> tuple[Tensor, ...]:
        """See :meth:`Parts.attend`."""
        out, *more = flash.attend(q, k, v, seen, self.how.scale)
        return out.flatten(1), *more

    def attention_gradient(
        self, qkv: Tensor, turned: Triple, cos: Tensor, sin: Tensor, seen: Any, found: tuple[Tensor, ...], d: Tensor
    ) -> Tensor:
        """See :meth:`Parts.attention_gradient`."""
        shape = turned[0].shape
        out, *more = found
        dq, dk, dv = flash.gradient(d.view(shape), *turned, out.view(shape), *more, layout=seen, scale=self.how.scale)
        return self._turned_back(qkv, cos, sin, (dq, dk, dv))

    def gate(self, gate_up: Tensor) -> Tensor:
        """See :meth:`Parts.gate`."""
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    def gate_gradient(self, gate_up: Tensor, dm: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Parts.gate_gradient`."""
        gate, up = gate_up.chunk(2, -1)
        made = torch.empty_like(gate_up)
        d_gate, d_up = made.chunk(2, -1)
        s = F.silu(gate)
        torch.mul(dm, s, out=d_up)
        torch.ops.aten.silu_backward.grad_input(dm * up, gate, grad_input=d_gate)
        return made, s.mul_(up)

    def _turned_back(self, qkv: Tensor, cos: Tensor, sin: Tensor, d: Triple) -> Tensor:
        """The gradient of ``qkv`` from those of what :meth:`rotate` made of it."""
        dqk = torch.cat(d[:2], 1)
        dqk = (dqk * cos).add_(other_half(dqk * sin))
        if "q" in self.norms:
            a, (q, k, _) = self.module.self_attn, self.split(qkv)
            parts = torch.split(dqk, [q.shape[1], k.shape[1]], 1)
            of_q = self._norm_gradient("q", a.q_norm, q.float(), parts[0])[1]
            dqk = torch.cat([of_q, self._norm_gradient("k", a.k_norm, k.float(), parts[1])[1]], 1)
        made = torch.empty_like(qkv)
        heads = made.view(len(qkv), -1, dqk.shape[2])
        heads[:, : dqk.shape[1]] = dqk
        heads[:, dqk.shape[1] :] = d[2]
        return made

    def _norm(self, name: str, norm: Any, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.norms[name], norm.variance_epsilon)

    def _through_norm(self, name: str, norm: Any, x: Tensor, dh: Tensor, g: Tensor, g_low: Tensor) -> Tensor:
        h, dx = self._norm_gradient(name, norm, x, dh.float())
        g += dx
        g_low.copy_(g)
        return h.to(dh.dtype)

    def _norm_gradient(self, name: str, norm: Any, x: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
        """The norm again, and the gradient of ``x`` from that of the norm; adds that of the norm's weight."""
        weight, eps, wanted = self.norms[name], norm.variance_epsilon, norm.weight.requires_grad
        if x.is_cuda and hasattr(torch.ops.aten, "_fused_rms_norm_backward"):
            h, r = torch.ops.aten._fused_rms_norm(x, x.shape[-1:], weight, eps)
            dx, dw = torch.ops.aten._fused_rms_norm_backward(dh, x, x.shape[-1:], r, weight, [True, wanted])
        else:
            r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
            n, dn = x * r, dh * weight
            h, dx = n * weight, r * (dn - n * (dn * n).mean(-1, keepdim=True))
            dw = (dh * n).flatten(0, -2).sum(0) if wanted else None
        if wanted:
            add_gradient(norm.weight, dw)
        return h, dx


def other_half(x: Tensor) -> Tensor:
    """``x [..., D]`` with its halves exchanged."""
    return x.view(*x.shape[:-1], 2, -1).flip(-2).flatten(-2)
