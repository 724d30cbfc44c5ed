"""A decode step of a Llama-shaped model without the library's modules around it.

A step of sampling is a few rows through hundreds of small operations, so what a module costs beside its arithmetic
(hooks, wrappers, conversions of single tensors) is a good part of the time. Many architectures (Llama, Qwen2 and 3,
SmolLM2) are the same block: norm, attention with rotary positions, norm, gated MLP. This module runs that block from
the model's own layers, in the same order and precision. The sampler uses it only if the model has these parts and no
other, and if a step of it gives the hidden states of the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grouprl.lm.llama.adapters import added, is_lora, is_of, with_added
from grouprl.lm.llama.between_products import by_halves, other_half
from grouprl.lm.packed.attention import How, Plan
from grouprl.lm.packed.backbone import Backbone
from grouprl.lm.packed.low_precision import Products

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_ATTENTION_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}


@dataclass(frozen=True)
class LeanStep:
    """The step. ``ways`` holds what each layer asks of attention."""

    decoder: Any
    ways: tuple[How, ...]

    @property
    def has_silu(self) -> bool:
        """Whether its gates are SiLU."""
        return all(type(layer.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation") for layer in self.decoder.layers)

    def hidden(self, ids: Tensor, positions: Tensor, plan: Plan, joined: Joined | None = None) -> Tensor:
        """Last hidden states ``[B, d]`` of tokens ``ids [B]`` at ``positions [B]``."""
        decoder = self.decoder
        x: Tensor = decoder.embed_tokens.weight[ids]
        cos, sin = by_halves(*(t[0] for t in decoder.rotary_emb(x[None], positions[None])))
        products = _apart(decoder) if joined is None else joined.layers
        for layer, how, its in zip(decoder.layers, self.ways, products, strict=True):
            attention, d = layer.self_attn, layer.self_attn.head_dim
            qkv = its.qkv(_norm(layer.input_layernorm, x)).view(len(ids), -1, d)
            heads, k_heads = attention.q_proj.out_features // d, attention.k_proj.out_features // d
            qk, v = qkv[:, :-k_heads], qkv[:, -k_heads:]
            if hasattr(attention, "q_norm"):
                qk = torch.cat([attention.q_norm(qk[:, :heads]), attention.k_norm(qk[:, heads:])], 1)
            qk = (qk * cos).addcmul_(other_half(qk), sin)
            out = plan.attend(attention, qk[:, :heads], qk[:, heads:], v, how)
            x = x + its.o(out.reshape(len(ids), -1))
            gate, up = its.gate_up(_norm(layer.post_attention_layernorm, x)).chunk(2, -1)
            x = x + its.down(layer.mlp.act_fn(gate) * up)
        return _norm(decoder.norm, x)


Product = Callable[[Tensor], Tensor]


class LayerProducts(NamedTuple):
    """The products of a layer. Queries, keys and values come side by side, and so do gate and up."""

    qkv: Product
    o: Product
    gate_up: Product
    down: Product


def groups_of(layer: Any) -> tuple[tuple[Any, ...], ...]:
    """The linear layers of each product."""
    a, mlp = layer.self_attn, layer.mlp
    return (a.q_proj, a.k_proj, a.v_proj), (a.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)


def _apart(decoder: Any) -> Iterator[LayerProducts]:
    """A product for each linear layer."""

    def product(parts: tuple[Any, ...]) -> Product:
        if len(parts) == 1:
            forward: Product = parts[0].forward
            return forward
        return lambda x: torch.cat([part.forward(x) for part in parts], -1)

    return (LayerProducts(*map(product, groups_of(layer))) for layer in decoder.layers)


class Joined:
    """Linear layers with one input as one product, their adapters added, in the dtype of the products; for as long as
    the weights do not change. Where they are in that dtype already, nothing is copied and there are more products.

    Attributes:
        layers: the products of each layer. linears: modules that need no products of their own.
    """

    def __init__(self, step: LeanStep, products: Products) -> None:
        groups = [groups_of(layer) for layer in step.decoder.layers]
        self.layers = [LayerProducts(*(_joined(parts, products) for parts in of_layer)) for of_layer in groups]
        self.linears = {m for of_layer in groups for parts in of_layer for part in parts for m in part.modules()}

    @staticmethod
    def supported(step: LeanStep) -> bool:
        """Whether all layers are linear, or PEFT's plain low-rank ones around those."""
        parts = (part for layer in step.decoder.layers for group in groups_of(layer) for part in group)
        return all(type(part) is nn.Linear or is_lora(part) for part in parts)


def _joined(parts: tuple[Any, ...], products: Products) -> Product:
    if all(is_of(part, products.dtype) for part in parts):
        return _in_turn(parts)
    weights = [with_added(part) for part in parts]
    weight = (torch.cat(weights) if len(parts) > 1 else weights[0]).to(products.dtype)
    bias = None
    if any(part.bias is not None for part in parts):
        biases = [weight.new_zeros(p.out_features) if p.bias is None else p.bias.detach() for p in parts]
        bias = torch.cat([b.to(products.dtype) for b in biases])
    return lambda x: F.linear(products.rounded(x), weight, bias)


def _in_turn(parts: tuple[Any, ...]) -> Product:
    """Layers whose weights are in the dtype of the products already: a copy would be as large as they are, and what
    adapters add would be lost in rounding."""
    dtype = parts[0].weight.dtype
    adapters = [
        [(a.detach().to(dtype), (scale * b.detach()).to(dtype)) for a, b, scale in added(part)] for part in parts
    ]

    def product(x: Tensor) -> Tensor:
        x, out = x.to(dtype), []
        for part, its in zip(parts, adapters, strict=True):
            y = F.linear(x, part.weight.detach(), part.bias)
            for a, b in its:
                y = y + F.linear(F.linear(x, a), b)
            out.append(y)
        return torch.cat(out, -1) if len(out) > 1 else out[0]

    return product


def _norm(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def lean_step(backbone: Backbone) -> LeanStep | None:
    """The step of a model whose decoder has exactly the parts above, or None."""
    decoder = backbone.decoder
    if not isinstance(decoder, nn.Module) or set(dict(decoder.named_children())) != _DECODER:
        return None
    if type(decoder.embed_tokens) is not nn.Embedding or not _is_rms(decoder.norm):
        return None
    ways = []
    layers: Any = decoder.layers
    for layer in layers:
        parts = dict(layer.named_children())
        if set(parts) != _LAYER or not (_is_rms(layer.input_layernorm) and _is_rms(layer.post_attention_layernorm)):
            return None
        inside, mlp = set(dict(layer.self_attn.named_children())), set(dict(layer.mlp.named_children()))
        if inside not in (_ATTENTION, _ATTENTION | _ATTENTION_NORMS) or mlp != _MLP:
            return None
        way = backbone.asked.get(layer.self_attn)
        if way is None or way.softcap is not None or getattr(layer.self_attn, "head_dim", None) is None:
            return None
        ways.append(way)
    return LeanStep(decoder, tuple(ways))


def _is_rms(module: Any) -> bool:
    """Whether a norm is x / rms(x) * weight: Gemma's 1 + weight has the same look, so it is tried."""
    if not hasattr(module, "variance_epsilon") or [n for n, _ in module.named_parameters()] != ["weight"]:
        return False
    weight = module.weight.detach().float()
    x = torch.linspace(-2.0, 3.0, 2 * weight.numel(), device=weight.device).view(2, -1)
    with torch.no_grad():
        wanted = F.rms_norm(x, weight.shape, weight, module.variance_epsilon)
        return bool(torch.allclose(module(x).float(), wanted, rtol=1e-4, atol=1e-5))
