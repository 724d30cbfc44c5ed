"""A decode step of a Llama-shaped model on a GPU, nine kernels a layer: :mod:`grouprl.lm.llama.decode_c` for GPUs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grouprl.lm.llama.between_products import rotary
from grouprl.lm.llama.block import JoinedProducts, LayerProducts, LlamaBlocks
from grouprl.lm.packed.attention import AttentionPlan, AttentionSpec
from grouprl.lm.packed.decode_attention import DecodeAttention

LARGEST_HEAD, LARGEST_WIDTH = 256, 16384


def can_decode_in_triton(llama: LlamaBlocks, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels can run a model: half precision, SiLU, heads of at most 256 numbers.

    Triton itself need not be installed to ask.
    """
    sizes = {layer.self_attn.head_dim for layer in llama.decoder.layers}
    return (
        dtype in (torch.bfloat16, torch.float16)
        and llama.has_silu
        and len(sizes) == 1
        and max(sizes) <= LARGEST_HEAD
        and max(sizes) % 2 == 0
        and llama.decoder.norm.weight.numel() <= LARGEST_WIDTH
    )


class TritonBlocks:
    """The blocks of a Llama-shaped model as Triton kernels and joined products; valid until the weights change.

    Args:
        llama: the model, for which :func:`can_decode_in_triton` holds. joined: its products, in ``dtype``.
    """

    def __init__(self, llama: LlamaBlocks, joined: JoinedProducts, dtype: torch.dtype) -> None:
        from grouprl.lm.kernels import triton_kernels as kernels

        self._kernels: Any = kernels
        self._dtype = dtype
        self._decoder = decoder = llama.decoder
        a = decoder.layers[0].self_attn
        self._heads = a.q_proj.out_features // a.head_dim, a.k_proj.out_features // a.head_dim, a.head_dim
        self._first = _norm(decoder.layers[0].input_layernorm)
        # behind each MLP comes the norm of the next layer
        after = [*(layer.input_layernorm for layer in decoder.layers[1:]), decoder.norm]
        self._layers = [
            _LayerWeights(*of_layer, _norm(of_layer[0].post_attention_layernorm), _norm(norm), *_of_heads(of_layer[0]))
            for of_layer, norm in zip(zip(decoder.layers, llama.specs, joined.layers, strict=True), after, strict=True)
        ]

    def hidden(self, ids: Tensor, positions: Tensor, plan: AttentionPlan) -> Tensor:
        """Last hidden states ``[B, d]``, in the dtype of products, of tokens ``ids [B]`` at ``positions [B]``."""
        kernels, dtype = self._kernels, self._dtype
        x = self._decoder.embed_tokens.weight.detach()[ids].float()
        angles = rotary(self._decoder, x, positions)
        h: Tensor = kernels.add_norm(x, None, *self._first, dtype)
        for layer in self._layers:
            products, qkv = layer.products, layer.products.qkv(h)
            if isinstance(plan, DecodeAttention):
                out = self._of_rows(layer, qkv, angles, plan)
            else:
                out = self._of_prompts(layer, qkv, angles, plan)
            h = kernels.add_norm(x, products.o(out), *layer.post, dtype)
            h = kernels.add_norm(x, products.down(kernels.gate(products.gate_up(h))), *layer.after, dtype)
        return h

    def _of_rows(
        self, layer: _LayerWeights, qkv: Tensor, angles: tuple[Tensor, Tensor], plan: DecodeAttention
    ) -> Tensor:
        """Attended values ``[B, H D]`` of the newest token of each row."""
        cache, heads = plan.layers[layer.module.self_attn], self._heads
        self._kernels.turn_and_keep(qkv, *angles, layer.of_heads, layer.eps, cache.own, plan.at, heads)
        where = (plan.prompt_of_row, plan.length_of_row, plan.at)
        tensors = (cache.keys, cache.values, cache.own)
        out: Tensor = self._kernels.attend(qkv, *tensors, *where, layer.spec.scale, layer.spec.window, heads)
        return out

    def _of_prompts(
        self, layer: _LayerWeights, qkv: Tensor, angles: tuple[Tensor, Tensor], plan: AttentionPlan
    ) -> Tensor:
        """Attended values ``[S, H D]`` of tokens that follow another plan, such as the prompts."""
        rotated = self._kernels.turn(qkv, *angles, layer.of_heads, layer.eps, self._heads)
        h, k, d = self._heads
        values = qkv.view(len(qkv), -1, d)[:, h + k :]
        return plan.attend(layer.module.self_attn, rotated[:, :h], rotated[:, h:], values, layer.spec).reshape(
            len(qkv), -1
        )


class _LayerWeights(NamedTuple):
    """A layer as the kernels take it.

    Attributes:
        post, after: weight ``[d]`` float32 and epsilon of the norm behind attention, and of the norm behind the MLP.
        of_heads, eps: weights ``[2, D]`` of the norms of queries and keys, or None, and their epsilon.
    """

    module: Any
    spec: AttentionSpec
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
