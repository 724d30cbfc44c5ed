"""A decode step of a Llama-shaped model without the library's modules around it.

A step of sampling is a few rows through hundreds of small operations, so what a module costs beside its arithmetic
(hooks, wrappers, conversions of single tensors) is a good part of the time. Many architectures (Llama, Qwen2 and 3,
SmolLM2) are the same block: norm, attention with rotary positions, norm, gated MLP. This module runs that block from
the model's own layers, in the same order and precision. The sampler uses it only if the model has these parts and no
other, and if a step of it gives the hidden states of the model itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grouprl.lm.attention import How, Plan
from grouprl.lm.backbone import Backbone
from grouprl.lm.products import Products

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

    def hidden(self, ids: Tensor, positions: Tensor, plan: Plan, joined: Joined | None = None) -> Tensor:
        """Last hidden states ``[B, d]`` of tokens ``ids [B]`` at ``positions [B]``."""
        decoder = self.decoder
        x: Tensor = decoder.embed_tokens.weight[ids]
        cos, sin = (t[0, :, None] for t in decoder.rotary_emb(x[None], positions[None]))
        first, second = sin.chunk(2, -1)
        sin = torch.cat([-first, second], -1)
        for layer, how in zip(decoder.layers, self.ways, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            qk, v = _queries_keys_values(attention, _norm(layer.input_layernorm, x), joined)
            heads = qk.shape[1] - v.shape[1]
            turned = qk.view(*qk.shape[:-1], 2, -1).flip(-2).flatten(-2)
            qk = (qk * cos).addcmul_(turned, sin)
            out = plan.attend(attention, qk[:, :heads], qk[:, heads:], v, how)
            x = x + attention.o_proj.forward(out.reshape(len(ids), -1))
            gate, up = _gate_up(mlp, _norm(layer.post_attention_layernorm, x), joined)
            x = x + mlp.down_proj.forward(mlp.act_fn(gate) * up)
        return _norm(decoder.norm, x)


class Joined:
    """Layers with one input as one product each, for as long as the weights do not change.

    Args:
        step: whose layers. products: their precision.

    Attributes:
        layers: all that need no product of their own.
    """

    def __init__(self, step: LeanStep, products: Products) -> None:
        self._products = products
        self._made: dict[nn.Module, tuple[Tensor, Tensor | None]] = {}
        self.layers: set[nn.Module] = set()
        for layer in step.decoder.layers:
            a, mlp = layer.self_attn, layer.mlp
            for owner, parts in ((a, (a.q_proj, a.k_proj, a.v_proj)), (mlp, (mlp.gate_proj, mlp.up_proj))):
                biased = {part.bias is not None for part in parts} if all(type(p) is nn.Linear for p in parts) else {}
                if len(biased) == 1:  # all of them, or none
                    weight = torch.cat([part.weight.detach() for part in parts]).to(products.dtype)
                    bias = torch.cat([p.bias.detach() for p in parts]).to(products.dtype) if True in biased else None
                    self._made[owner] = weight, bias
                    self.layers.update(parts)

    def __contains__(self, owner: nn.Module) -> bool:
        return owner in self._made

    def __call__(self, owner: nn.Module, x: Tensor) -> Tensor:
        """All outputs of the layers of an attention or MLP module, side by side."""
        return F.linear(self._products.rounded(x), *self._made[owner])


def _queries_keys_values(attention: Any, h: Tensor, joined: Joined | None) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[B, H + K, D]``, normed where that is done; values ``[B, K, D]``."""
    d, normed = attention.head_dim, hasattr(attention, "q_norm")
    if joined is not None and attention in joined:
        qkv = joined(attention, h).view(len(h), -1, d)
        k_heads = attention.k_proj.out_features // d
        qk, v = qkv[:, :-k_heads], qkv[:, -k_heads:]
        if not normed:
            return qk, v
        q, k = qk[:, :-k_heads], qk[:, -k_heads:]
    else:
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (part.forward(h).view(len(h), -1, d) for part in parts)
    if normed:
        q, k = attention.q_norm(q), attention.k_norm(k)
    return torch.cat([q, k], 1), v


def _gate_up(mlp: Any, h: Tensor, joined: Joined | None) -> tuple[Tensor, Tensor]:
    if joined is not None and mlp in joined:
        gate, up = joined(mlp, h).chunk(2, -1)
        return gate, up
    return mlp.gate_proj.forward(h), mlp.up_proj.forward(h)


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
