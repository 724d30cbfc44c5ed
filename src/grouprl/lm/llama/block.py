"""Llama's block in torch operations: a decode step of a Llama-shaped model without transformers' modules around it.

A step of sampling runs a few rows through hundreds of small operations, so the overhead of each module (hooks,
wrappers, conversions of single tensors) is a good part of the time. Many architectures (Llama, Qwen2 and 3, SmolLM2)
consist of the same block: norm, attention with rotary positions, norm, gated MLP. This module runs that block with the
model's own layers, in the same order and precision. The sampler uses it only if the model has these modules and no
others, and if a step gives the same hidden states as the model itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grouprl.lm.llama.adapters import active_adapters, has_dtype, is_lora, merged_weight, nonzero_adapters
from grouprl.lm.llama.between_products import by_halves, other_half
from grouprl.lm.packed.attention import AttentionPlan, AttentionSpec, PackedAttention
from grouprl.lm.packed.backbone import Backbone
from grouprl.lm.packed.low_precision import LowPrecision, is_touched
from grouprl.lm.packed.trial import Trial, own_pass

_ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
_ATTENTION_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_DECODER = {"embed_tokens", "layers", "norm", "rotary_emb"}


@dataclass(frozen=True)
class LlamaBlocks:
    """The blocks of a Llama-shaped decoder.

    Attributes:
        decoder: the model's decoder. specs: scale and window of attention in each layer.
    """

    decoder: Any
    specs: tuple[AttentionSpec, ...]

    @property
    def has_silu(self) -> bool:
        """Whether all gates are SiLU."""
        return all(type(layer.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation") for layer in self.decoder.layers)

    def hidden(
        self, ids: Tensor, positions: Tensor, plan: AttentionPlan, joined: JoinedProducts | None = None
    ) -> Tensor:
        """Last hidden states ``[B, d]`` of tokens ``ids [B]`` at ``positions [B]``.

        Args:
            plan: which tokens see which. joined: the products of the layers; default: each linear layer by itself.
        """
        decoder = self.decoder
        x: Tensor = decoder.embed_tokens(ids)
        cos, sin = by_halves(*(t[0] for t in decoder.rotary_emb(x[None], positions[None])))
        products = _separate_products(decoder) if joined is None else joined.layers
        for layer, spec, of_layer in zip(decoder.layers, self.specs, products, strict=True):
            attention, d = layer.self_attn, layer.self_attn.head_dim
            qkv = of_layer.qkv(_norm(layer.input_layernorm, x)).view(len(ids), -1, d)
            heads, k_heads = attention.q_proj.out_features // d, attention.k_proj.out_features // d
            qk, v = qkv[:, :-k_heads], qkv[:, -k_heads:]
            if hasattr(attention, "q_norm"):
                qk = torch.cat([attention.q_norm(qk[:, :heads]), attention.k_norm(qk[:, heads:])], 1)
            qk = (qk * cos).addcmul_(other_half(qk), sin)
            out = plan.attend(attention, qk[:, :heads], qk[:, heads:], v, spec)
            x = x + of_layer.o(out.reshape(len(ids), -1))
            gate, up = of_layer.gate_up(_norm(layer.post_attention_layernorm, x)).chunk(2, -1)
            x = x + of_layer.down(layer.mlp.act_fn(gate) * up)
        return _norm(decoder.norm, x)


Product = Callable[[Tensor], Tensor]


class LayerProducts(NamedTuple):
    """The products of a layer, each ``[B, in] -> [B, out]``; outputs of q, k, v are side by side, as of gate, up."""

    qkv: Product
    o: Product
    gate_up: Product
    down: Product


def linears_of(layer: Any) -> tuple[tuple[Any, ...], ...]:
    """The linear layers in each of the four products of :class:`LayerProducts`, in its order."""
    a, mlp = layer.self_attn, layer.mlp
    return (a.q_proj, a.k_proj, a.v_proj), (a.o_proj,), (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)


def _separate_products(decoder: Any) -> Iterator[LayerProducts]:
    """The products of each layer, with every linear layer computed by itself."""

    def product(linears: tuple[Any, ...]) -> Product:
        if len(linears) == 1:
            forward: Product = linears[0].forward
            return forward
        return lambda x: torch.cat([linear.forward(x) for linear in linears], -1)

    return (LayerProducts(*map(product, linears_of(layer))) for layer in decoder.layers)


class JoinedProducts:
    """The products of each layer, with linear layers that share their input joined to one; valid until weights change.

    Weights are copied in the products' dtype, with adapters added. Weights that are in that dtype already are not
    copied; those linear layers are computed one by one.

    Attributes:
        layers: the products of each layer. linears: all modules whose work these products do.
    """

    def __init__(self, llama: LlamaBlocks, precision: LowPrecision) -> None:
        groups = [linears_of(layer) for layer in llama.decoder.layers]
        self.layers = [
            LayerProducts(*(_as_one_product(linears, precision) for linears in of_layer)) for of_layer in groups
        ]
        self.linears = {m for of_layer in groups for linears in of_layer for one in linears for m in one.modules()}

    @staticmethod
    def can_join(llama: LlamaBlocks) -> bool:
        """Whether all linear layers are torch's own, or PEFT's plain low-rank layers around those."""
        linears = (linear for layer in llama.decoder.layers for group in linears_of(layer) for linear in group)
        return all(type(linear) is nn.Linear or is_lora(linear) for linear in linears)


def _as_one_product(linears: tuple[Any, ...], precision: LowPrecision) -> Product:
    if all(has_dtype(linear, precision.dtype) for linear in linears):
        return _without_copy(linears)
    weights = [merged_weight(linear) for linear in linears]
    weight = (torch.cat(weights) if len(linears) > 1 else weights[0]).to(precision.dtype)
    bias = None
    if any(linear.bias is not None for linear in linears):
        biases = [weight.new_zeros(p.out_features) if p.bias is None else p.bias.detach() for p in linears]
        bias = torch.cat([b.to(precision.dtype) for b in biases])
    return lambda x: F.linear(precision.rounded(x), weight, bias)


def _without_copy(linears: tuple[Any, ...]) -> Product:
    """One linear layer after another, from weights that are in the products' dtype already.

    A copy would take as much memory as the model, and adding adapters to it would lose them in rounding.
    """
    dtype = linears[0].weight.dtype
    adapters = [
        [(a.detach().to(dtype), (scale * b.detach()).to(dtype)) for a, b, scale in active_adapters(linear)]
        for linear in linears
    ]

    def product(x: Tensor) -> Tensor:
        x, out = x.to(dtype), []
        for linear, added_to_it in zip(linears, adapters, strict=True):
            y = F.linear(x, linear.weight.detach(), linear.bias)
            for a, b in added_to_it:
                y = y + F.linear(F.linear(x, a), b)
            out.append(y)
        return torch.cat(out, -1) if len(out) > 1 else out[0]

    return product


def _norm(norm: Any, x: Tensor) -> Tensor:
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


_found: WeakKeyDictionary[Backbone, LlamaBlocks | None] = WeakKeyDictionary()


def find_llama(backbone: Backbone) -> LlamaBlocks | None:
    """The blocks of a model whose decoder has exactly the modules of Llama's block and computes the same, or None.

    Modules with hooks or with a forward of their own are not Llama's, since the block does not call them. The hidden
    states are compared at the first positions and at far ones: some models scale their queries there. The answer is
    remembered for each backbone, because the learner and the sampler both ask.
    """
    if backbone not in _found:
        _found[backbone] = _find_llama(backbone)
    return _found[backbone]


def _find_llama(backbone: Backbone) -> LlamaBlocks | None:
    decoder = backbone.decoder
    if not isinstance(decoder, nn.Module) or set(dict(decoder.named_children())) != _DECODER:
        return None
    if type(decoder.embed_tokens) is not nn.Embedding or not _is_rms(decoder.norm):
        return None
    if any(map(is_touched, decoder.modules())):
        return None
    specs = []
    layers: Any = decoder.layers
    for layer in layers:
        parts = dict(layer.named_children())
        if set(parts) != _LAYER or not (_is_rms(layer.input_layernorm) and _is_rms(layer.post_attention_layernorm)):
            return None
        inside, mlp = set(dict(layer.self_attn.named_children())), set(dict(layer.mlp.named_children()))
        if inside not in (_ATTENTION, _ATTENTION | _ATTENTION_NORMS) or mlp != _MLP:
            return None
        spec = backbone.asked.get(layer.self_attn)
        if spec is None or spec.softcap is not None or getattr(layer.self_attn, "head_dim", None) is None:
            return None
        specs.append(spec)
    llama = LlamaBlocks(decoder, tuple(specs))
    return llama if _computes_the_same(backbone, llama) else None


def _computes_the_same(backbone: Backbone, llama: LlamaBlocks) -> bool:
    """Whether the blocks give the hidden states of the decoder, to 0.1 % (in low precision 5 %) for every token."""
    pack = Trial(backbone.model).pack
    low = backbone.decoder.norm.weight.dtype != torch.float32
    with nonzero_adapters(backbone.decoder), own_pass(backbone.model):
        with backbone.following(PackedAttention(pack)):
            own = backbone.hidden(pack.ids, pack.positions).float()
        found = llama.hidden(pack.ids, pack.positions, PackedAttention(pack)).float()
    return bool(((found - own).norm(dim=-1) <= (0.05 if low else 1e-3) * own.norm(dim=-1)).all())


def _is_rms(module: Any) -> bool:
    """Whether a norm computes x / rms(x) * weight. It is called to find out, as Gemma's 1 + weight looks the same."""
    if not hasattr(module, "variance_epsilon") or [n for n, _ in module.named_parameters()] != ["weight"]:
        return False
    weight = module.weight.detach().float()
    x = torch.linspace(-2.0, 3.0, 2 * weight.numel(), device=weight.device).view(2, -1)
    with torch.no_grad():
        expected = F.rms_norm(x, weight.shape, weight, module.variance_epsilon)
        return bool(torch.allclose(module(x).float(), expected, rtol=1e-4, atol=1e-5))
