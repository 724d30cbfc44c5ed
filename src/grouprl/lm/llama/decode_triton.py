"""A decode step of a Llama-shaped model on a GPU, nine kernels a layer: :mod:`grouprl.lm.llama.decode_c` for GPUs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grouprl.lm.llama.between_products import rotary
from grouprl.lm.llama.block import Joined, LayerProducts, LeanStep
from grouprl.lm.packed.attention import How, Plan
from grouprl.lm.packed.decode_attention import DecodeAttention

LARGEST_HEAD, LARGEST_WIDTH = 256, 16384


def supported(step: LeanStep, dtype: torch.dtype) -> bool:
    """Whether the kernels can run a model: half precision, SiLU, heads that fit. They need Triton."""
    sizes = {layer.self_attn.head_dim for layer in step.decoder.layers}
    return (
        dtype in (torch.bfloat16, torch.float16)
        and step.has_silu
        and len(sizes) == 1
        and max(sizes) <= LARGEST_HEAD
        and max(sizes) % 2 == 0
        and step.decoder.norm.weight.numel() <= LARGEST_WIDTH
    )


class KernelStep:
    """The step, for as long as the weights do not change.

    Args:
        step: the model. joined: its products, in ``dtype``.
    """

    def __init__(self, step: LeanStep, joined: Joined, dtype: torch.dtype) -> None:
        from grouprl.lm.kernels import triton_kernels as kernels

        self._kernels: Any = kernels
        self._dtype = dtype
        self._decoder = decoder = step.decoder
        a = decoder.layers[0].self_attn
        self._heads = a.q_proj.out_features // a.head_dim, a.k_proj.out_features // a.head_dim, a.head_dim
        self._first = _norm(decoder.layers[0].input_layernorm)
        # behind each MLP comes the norm of the next layer
        after = [*(layer.input_layernorm for layer in decoder.layers[1:]), decoder.norm]
        self._layers = [
            _Layer(*of_layer, _norm(of_layer[0].post_attention_layernorm), _norm(norm), *_of_heads(of_layer[0]))
            for of_layer, norm in zip(zip(decoder.layers, step.ways, joined.layers, strict=True), after, strict=True)
        ]

    def hidden(self, ids: Tensor, positions: Tensor, plan: Plan) -> Tensor:
        """Last hidden states ``[B, d]``, in the dtype of products, of tokens ``ids [B]`` at ``positions [B]``."""
        kernels, dtype = self._kernels, self._dtype
        x = self._decoder.embed_tokens.weight.detach()[ids].float()
        angles = rotary(self._decoder, x, positions)
        h: Tensor = kernels.add_norm(x, None, *self._first, dtype)
        for its in self._layers:
            products, qkv = its.products, its.products.qkv(h)
            if isinstance(plan, DecodeAttention):
                out = self._of_rows(its, qkv, angles, plan)
            else:
                out = self._of_prompts(its, qkv, angles, plan)
            h = kernels.add_norm(x, products.o(out), *its.post, dtype)
            h = kernels.add_norm(x, products.down(kernels.gate(products.gate_up(h))), *its.after, dtype)
        return h

    def _of_rows(self, its: _Layer, qkv: Tensor, angles: tuple[Tensor, Tensor], plan: DecodeAttention) -> Tensor:
        """Attended values ``[B, H D]`` of the newest token of each row."""
        kept, heads = plan.layers[its.module.self_attn], self._heads
        self._kernels.turn_and_keep(qkv, *angles, its.of_heads, its.eps, kept.own, plan.at, heads)
        where = (plan.prompt_of_row, plan.length_of_row, plan.at)
        cache = (kept.keys, kept.values, kept.own)
        out: Tensor = self._kernels.attend(qkv, *cache, *where, its.how.scale, its.how.window, heads)
        return out

    def _of_prompts(self, its: _Layer, qkv: Tensor, angles: tuple[Tensor, Tensor], plan: Plan) -> Tensor:
        """The same of tokens that follow another plan."""
        turned = self._kernels.turn(qkv, *angles, its.of_heads, its.eps, self._heads)
        h, k, d = self._heads
        values = qkv.view(len(qkv), -1, d)[:, h + k :]
        return plan.attend(its.module.self_attn, turned[:, :h], turned[:, h:], values, its.how).reshape(len(qkv), -1)


class _Layer(NamedTuple):
    """A layer: its products, its weights in float32 of the norms behind attention and MLP, each with its epsilon, and
    of those of queries and keys, or None."""

    module: Any
    how: How
    products: LayerProducts
    post: tuple[Tensor, float]
    after: tuple[Tensor, float]
    of_heads: Tensor | None
    eps: float


def _norm(norm: Any) -> tuple[Tensor, float]:
    return norm.weight.detach().float().contiguous(), norm.variance_epsilon


def _of_heads(layer: Any) -> tuple[Tensor | None, float]:
    a = layer.self_attn
    if not hasattr(a, "q_norm"):
        return None, 0.0
    return torch.stack([_norm(a.q_norm)[0], _norm(a.k_norm)[0]]), a.q_norm.variance_epsilon
