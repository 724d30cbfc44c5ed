"""Everything in a Llama-shaped layer except its matrix products: norms, rotary positions, attention, gates.

:class:`BetweenProducts` is the interface. Three implementations compute the same: in C on a CPU, in torch and in Triton
on a GPU. Letters: S tokens, d the size of a hidden state, H query heads and K key heads of size D, I the inner size of
the MLP. A hidden state is float32; inputs and outputs of products are in the products' dtype.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from grouprl.lm.packed import flash
from grouprl.lm.packed.attention import AttentionSpec
from grouprl.lm.packed.low_precision import add_gradient
from grouprl.lm.packed.packing import Pack

Triple = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class BetweenProducts(ABC):
    """One layer's operations between its matrix products, forwards and backwards.

    Gradients of the norms' weights are added to their ``.grad`` on the way.

    Attributes:
        module: the decoder layer, of the kind that :mod:`grouprl.lm.llama.block` describes.
        spec: the scale and the window of its attention.
        norms: weights in float32: "input" and "post" ``[d]``, and "q" and "k" ``[D]`` where queries and keys are
            normed.
    """

    module: Any
    spec: AttentionSpec
    norms: dict[str, Tensor]

    @classmethod
    def of(cls, module: Any, spec: AttentionSpec) -> BetweenProducts:
        """The operations of the layer ``module``, with its norms' weights as they are now."""
        norms = {"input": module.input_layernorm, "post": module.post_attention_layernorm}
        if hasattr(module.self_attn, "q_norm"):
            norms |= {"q": module.self_attn.q_norm, "k": module.self_attn.k_norm}
        return cls(module, spec, {name: norm.weight.detach().float().contiguous() for name, norm in norms.items()})

    @property
    def heads(self) -> tuple[int, int, int]:
        """H query heads, K key heads, size D of a head."""
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
        """Cosines and sines of the rotary angles at ``positions [S]``, in the layout that :meth:`rotate` takes.

        Args:
            x: any tensor on the device and in the dtype to compute them in.
        """

    @staticmethod
    @abstractmethod
    def seen(pack: Pack) -> Any:
        """The attention pattern of a pack (which tokens see which), in the form that :meth:`attend` takes."""

    @abstractmethod
    def norm(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """RMSNorm of the layer's input ``x [S, d]``: the input ``[S, d]`` of the query, key and value products."""

    @abstractmethod
    def post_norm(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Add the attention output ``y [S, d]`` to the residual ``x [S, d]``, and norm the sum for the MLP.

        Returns the sum in float32 and its RMSNorm in the dtype of ``y``, both ``[S, d]``.
        """

    @abstractmethod
    def norm_gradient(self, x: Tensor, dh: Tensor, g: Tensor, g_low: Tensor) -> Tensor:
        """The backward pass of :meth:`norm`.

        Args:
            x: ``[S, d]`` float32, the input of the norm.
            dh: ``[S, d]`` the gradient of its output.
            g: ``[S, d]`` float32, the gradient of the residual; the gradient of ``x`` is added to it in place.
            g_low: ``[S, d]``, overwritten with the new ``g`` in the products' dtype.

        Returns the norm's output again, ``[S, d]`` in the dtype of ``dh``: the weight gradient of the product behind it
        needs it, and the forward pass did not keep it.
        """

    @abstractmethod
    def post_norm_gradient(self, x: Tensor, dh: Tensor, g: Tensor, g_low: Tensor) -> Tensor:
        """The backward pass of the norm in :meth:`post_norm`; arguments and result as in :meth:`norm_gradient`.

        Args:
            x: the first tensor that :meth:`post_norm` returned.
        """

    @abstractmethod
    def rotate(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> Triple:
        """Split ``qkv [S, (H + 2 K) D]`` into heads; norm queries and keys if the layer does; rotate them by position.

        Args:
            cos, sin: from :meth:`angles`.

        Returns queries ``[S, H, D]``, keys and values ``[S, K, D]``, in the dtype of ``qkv``.
        """

    @abstractmethod
    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Any, place: Tensor | None) -> tuple[Tensor, ...]:
        """Attention of the rotated heads.

        Args:
            q: ``[S, H, D]``. k, v: ``[S, K, D]``. seen: from :meth:`seen`.
            place: ``[S, H D]`` where to write the result, or None to allocate it.

        Returns the attended values ``[S, H D]`` and any further tensors that :meth:`attention_gradient` needs.
        """

    @abstractmethod
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
        """The backward pass of :meth:`attend` and :meth:`rotate`: the gradient ``[S, (H + 2 K) D]`` of ``qkv``.

        Args:
            qkv: the input of :meth:`rotate`. rotated: its output. cos, sin: from :meth:`angles`.
            seen: from :meth:`seen`. attended: the output of :meth:`attend`.
            d_attended: ``[S, H D]`` the gradient of the attended values.
        """

    @abstractmethod
    def gate(self, gate_up: Tensor) -> Tensor:
        """``silu(gate) * up``, ``[S, I]``, for ``gate_up [S, 2 I]`` with the gate in the first half of the columns."""

    @abstractmethod
    def gate_gradient(self, gate_up: Tensor, dm: Tensor) -> tuple[Tensor, Tensor]:
        """The backward pass of :meth:`gate`.

        Args:
            dm: ``[S, I]`` the gradient of its output.

        Returns the gradient ``[S, 2 I]`` of ``gate_up``, and the output ``[S, I]`` again: the weight gradient of the
        next product needs it, and the forward pass did not keep it.
        """


def rotary(decoder: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The model's own cosines and sines at ``positions [S]``, each ``[S, D]`` float32, on the device of ``x``."""
    cos, sin = decoder.rotary_emb(x.detach()[None], positions[None])
    return cos[0].float().contiguous(), sin[0].float().contiguous()


def by_halves(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``[S, D]`` as ``[S, 1, D]``, the sines of the first half negated.

    With these, ``x * cos + other_half(x) * sin`` rotates heads ``x [S, n, D]``.
    """
    first, second = sin.chunk(2, -1)
    return cos[:, None], torch.cat([-first, second], -1)[:, None]


class BetweenProductsTorch(BetweenProducts):
    """In torch operations with FlashAttention, for GPUs; written for few kernel launches."""

    @staticmethod
    def angles(decoder: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`BetweenProducts.angles`: each ``[S, 1, D]``, in the layout of :func:`by_halves`."""
        return by_halves(*rotary(decoder, x, positions))

    @staticmethod
    def seen(pack: Pack) -> flash.Layout:
        """See :meth:`BetweenProducts.seen`."""
        return flash.Layout.of(pack)

    def norm(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """See :meth:`BetweenProducts.norm`."""
        return self._norm("input", self.module.input_layernorm, x).to(dtype)

    def post_norm(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`BetweenProducts.post_norm`."""
        x = x + y
        return x, self._norm("post", self.module.post_attention_layernorm, x).to(y.dtype)

    def norm_gradient(self, x: Tensor, dh: Tensor, g: Tensor, g_low: Tensor) -> Tensor:
        """See :meth:`BetweenProducts.norm_gradient`."""
        return self._through_norm("input", self.module.input_layernorm, x, dh, g, g_low)

    def post_norm_gradient(self, x: Tensor, dh: Tensor, g: Tensor, g_low: Tensor) -> Tensor:
        """See :meth:`BetweenProducts.post_norm_gradient`."""
        return self._through_norm("post", self.module.post_attention_layernorm, x, dh, g, g_low)

    def rotate(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> Triple:
        """See :meth:`BetweenProducts.rotate`."""
        q, k, v = self.split(qkv)
        if "q" in self.norms:
            a = self.module.self_attn
            qk = torch.cat([self._norm("q", a.q_norm, q.float()), self._norm("k", a.k_norm, k.float())], 1)
        else:
            qk = qkv.view(len(qkv), -1, q.shape[2])[:, : -v.shape[1]]
        rotated = (qk * cos).addcmul_(other_half(qk), sin).to(qkv.dtype)
        return rotated[:, : q.shape[1]], rotated[:, q.shape[1] :], v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, seen: Any, place: Tensor | None) -> tuple[Tensor, ...]:
        """See :meth:`BetweenProducts.attend`."""
        out, *more = flash.attend(q, k, v, seen, self.spec.scale)
        return out.flatten(1), *more

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
        shape = rotated[0].shape
        out, *more = attended
        dq, dk, dv = flash.gradient(
            d_attended.view(shape), *rotated, out.view(shape), *more, layout=seen, scale=self.spec.scale
        )
        return self._rotate_gradient(qkv, cos, sin, (dq, dk, dv))

    def gate(self, gate_up: Tensor) -> Tensor:
        """See :meth:`BetweenProducts.gate`."""
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)

    def gate_gradient(self, gate_up: Tensor, dm: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`BetweenProducts.gate_gradient`."""
        gate, up = gate_up.chunk(2, -1)
        d_gate_up = torch.empty_like(gate_up)
        d_gate, d_up = d_gate_up.chunk(2, -1)
        s = F.silu(gate)
        torch.mul(dm, s, out=d_up)
        torch.ops.aten.silu_backward.grad_input(dm * up, gate, grad_input=d_gate)
        return d_gate_up, s.mul_(up)

    def _rotate_gradient(self, qkv: Tensor, cos: Tensor, sin: Tensor, d: Triple) -> Tensor:
        """The backward pass of :meth:`rotate`: the gradient of ``qkv`` from ``d``, the gradients of its outputs."""
        dqk = torch.cat(d[:2], 1)
        dqk = (dqk * cos).add_(other_half(dqk * sin))
        if "q" in self.norms:
            a, (q, k, _) = self.module.self_attn, self.split(qkv)
            d_q, d_k = torch.split(dqk, [q.shape[1], k.shape[1]], 1)
            d_q = self._norm_gradient("q", a.q_norm, q.float(), d_q)[1]
            dqk = torch.cat([d_q, self._norm_gradient("k", a.k_norm, k.float(), d_k)[1]], 1)
        dqkv = torch.empty_like(qkv)
        heads = dqkv.view(len(qkv), -1, dqk.shape[2])
        heads[:, : dqk.shape[1]] = dqk
        heads[:, dqk.shape[1] :] = d[2]
        return dqkv

    def _norm(self, name: str, norm: Any, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.norms[name], norm.variance_epsilon)

    def _through_norm(self, name: str, norm: Any, x: Tensor, dh: Tensor, g: Tensor, g_low: Tensor) -> Tensor:
        h, dx = self._norm_gradient(name, norm, x, dh.float())
        g += dx
        g_low.copy_(g)
        return h.to(dh.dtype)

    def _norm_gradient(self, name: str, norm: Any, x: Tensor, dh: Tensor) -> tuple[Tensor, Tensor]:
        """The norm's output and the gradient of its input ``x``, from its output's gradient ``dh``.

        The gradient of the weight is added to its ``.grad``.
        """
        weight, eps, learned = self.norms[name], norm.variance_epsilon, norm.weight.requires_grad
        if x.is_cuda and hasattr(torch.ops.aten, "_fused_rms_norm_backward"):
            h, r = torch.ops.aten._fused_rms_norm(x, x.shape[-1:], weight, eps)
            dx, dw = torch.ops.aten._fused_rms_norm_backward(dh, x, x.shape[-1:], r, weight, [True, learned])
        else:
            r = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
            n, dn = x * r, dh * weight
            h, dx = n * weight, r * (dn - n * (dn * n).mean(-1, keepdim=True))
            dw = (dh * n).flatten(0, -2).sum(0) if learned else None
        if learned:
            add_gradient(norm.weight, dw)
        return h, dx


def other_half(x: Tensor) -> Tensor:
    """``x [..., D]`` with its halves exchanged."""
    return x.view(*x.shape[:-1], 2, -1).flip(-2).flatten(-2)
