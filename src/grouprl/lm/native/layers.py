"""The layers of a Llama-shaped model as one differentiable function each: what :mod:`grouprl.lm.lean` is to sampling.

torch does the products, compiled code all that lies between them. A layer keeps for its backward pass only what a
product gave (queries, keys and values; gates; attended values) and the residual stream, and computes the rest again.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, Structure, c_float, c_int32, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grouprl.lm.attention import How, PackedAttention
from grouprl.lm.backbone import Backbone
from grouprl.lm.lean import lean_step
from grouprl.lm.native.attention import attention
from grouprl.lm.native.compile import available, library
from grouprl.lm.native.decode import supported
from grouprl.lm.packing import Group, Pack
from grouprl.lm.products import add_gradient, add_product


class _Rotary(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("tokens", "heads", "k_heads", "d", "low")), ("eps", c_float),
        *((name, c_void_p) for name in ("q_norm", "k_norm", "cos", "sin", "dq_norm", "dk_norm")),
    ]  # fmt: skip


@dataclass(frozen=True)
class _Layer:
    """One layer with its weights in the dtype of the products. Linear layers with one input are one weight."""

    module: Any
    how: How
    dtype: torch.dtype
    qkv: Tensor
    qkv_bias: Tensor | None
    o: Tensor
    o_bias: Tensor | None
    gate_up: Tensor
    down: Tensor
    down_bias: Tensor | None
    norms: dict[str, Tensor]

    @classmethod
    def of(cls, module: Any, how: How, dtype: torch.dtype) -> _Layer:
        a, mlp = module.self_attn, module.mlp
        qkv = (a.q_proj, a.k_proj, a.v_proj)

        def joined(*layers: nn.Linear) -> Tensor:
            return _joined([layer.weight.detach() for layer in layers], dtype)

        bias = None
        if any(p.bias is not None for p in qkv):
            bias = _joined([torch.zeros(p.out_features) if p.bias is None else p.bias.detach() for p in qkv], dtype)
        norms = {"input": module.input_layernorm, "post": module.post_attention_layernorm}
        if hasattr(a, "q_norm"):
            norms |= {"q": a.q_norm, "k": a.k_norm}
        return cls(
            module, how, dtype, joined(*qkv), bias, joined(a.o_proj),
            None if a.o_proj.bias is None else a.o_proj.bias.detach().to(dtype),
            joined(mlp.gate_proj, mlp.up_proj), joined(mlp.down_proj),
            None if mlp.down_proj.bias is None else mlp.down_proj.bias.detach().to(dtype),
            {name: norm.weight.detach().float().contiguous() for name, norm in norms.items()},
        )  # fmt: skip

    @property
    def heads(self) -> tuple[int, int, int]:
        """Query heads, key heads, size of a head."""
        a = self.module.self_attn
        return a.q_proj.out_features // a.head_dim, a.k_proj.out_features // a.head_dim, a.head_dim

    @property
    def anchor(self) -> Tensor | None:
        """A weight that is learned, so that autograd knows that something is."""
        return next((p for p in self.module.parameters() if p.requires_grad), None)


def _joined(weights: list[Tensor], dtype: torch.dtype) -> Tensor:
    if len(weights) == 1:
        return weights[0].to(dtype)
    out = weights[0].new_empty(sum(w.shape[0] for w in weights), *weights[0].shape[1:], dtype=dtype)
    for place, weight in zip(torch.split(out, [w.shape[0] for w in weights]), weights, strict=True):
        place.copy_(weight)
    return out


class LlamaLayers:
    """The layers of a Llama-shaped model, for learning. See :func:`find_layers`."""

    def __init__(self, decoder: Any, ways: tuple[How, ...], dtype: torch.dtype) -> None:
        self.decoder, self.ways, self.dtype = decoder, ways, dtype
        self.linears = frozenset(m for m in decoder.layers.modules() if type(m) is nn.Linear)
        self._layers: list[_Layer] = []

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Within, weights are rounded once and must not change."""
        layers = zip(self.decoder.layers, self.ways, strict=True)
        self._layers = [_Layer.of(module, how, self.dtype) for module, how in layers]
        try:
            yield
        finally:
            self._layers = []

    def hidden(self, pack: Pack) -> Tensor:
        """Last hidden states ``[S, d]`` of a pack; within :meth:`learning`."""
        x: Tensor = self.decoder.embed_tokens(pack.ids).float()
        cos, sin = self.rotary(x, pack)
        for layer in self._layers:
            x = _Run.apply(x, layer.anchor, layer, cos, sin, pack)  # type: ignore[no-untyped-call]
        out: Tensor = self.decoder.norm(x)
        return out

    def rotary(self, x: Tensor, pack: Pack) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the positions, each ``[S, D]`` float32."""
        cos, sin = self.decoder.rotary_emb(x.detach()[None], pack.positions[None])
        return cos[0].float().contiguous(), sin[0].float().contiguous()


@torch.no_grad()
def find_layers(backbone: Backbone, dtype: torch.dtype) -> LlamaLayers | None:
    """The layers of ``backbone`` as fused functions, if each gives what the model's own module gives, else None.

    Needs a Llama-shaped model on a CPU (see :mod:`grouprl.lm.lean`), without adapters, and a C compiler.
    """
    step = lean_step(backbone)
    if step is None or not supported(backbone.decoder, backbone.head) or not available():
        return None
    layers = LlamaLayers(backbone.decoder, step.ways, dtype)
    if len(layers.linears) != 7 * len(backbone.decoder.layers):
        return None
    pack = Pack.of([Group([1, 2, 3, 4, 2], ([3, 1, 2], [0, 4])), Group([2, 1], ([1, 3, 2],))], backbone.device)
    differences: list[float] = []

    def compare(module: nn.Module, given: tuple[Tensor, ...], out: Any) -> None:
        x, wanted = given[0][0].float().contiguous(), (out[0] if isinstance(out, tuple) else out)[0].float()
        how = step.ways[len(differences)]
        layer = _Layer.of(module, how, torch.float32)
        found = _Run.apply(x, None, layer, *layers.rotary(x, pack), pack)  # type: ignore[no-untyped-call]
        differences.append(float((found - wanted).norm() / wanted.norm()))

    training = backbone.model.training
    backbone.model.eval()
    hooks = [layer.register_forward_hook(compare) for layer in backbone.decoder.layers]
    try:
        with backbone.following(PackedAttention(pack)):
            backbone.hidden(pack.ids, pack.positions)
    finally:
        backbone.model.train(training)
        for hook in hooks:
            hook.remove()
    exact = backbone.head.weight.dtype == torch.float32
    return layers if max(differences) < (1e-4 if exact else 0.05) else None


class _Run(torch.autograd.Function):
    """``x [S, d]`` float32 -> the same behind the layer. ``anchor`` only carries the graph."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor | None, layer: _Layer, cos: Tensor, sin: Tensor, pack: Pack
    ) -> Tensor:
        low, norms = layer.dtype, layer.norms
        h = _norm(x, norms["input"], layer.module.input_layernorm.variance_epsilon, low)
        qkv = F.linear(h, layer.qkv, layer.qkv_bias)
        q, k, v = _split(_rotate(layer, qkv, cos, sin), layer)
        attended = torch.empty(q.shape, dtype=low)
        attention(q, k, v, pack, layer.how.scale, layer.how.window, {"out": attended})
        attended = attended.flatten(1)
        y = F.linear(attended, layer.o, layer.o_bias)
        x2 = torch.empty_like(x)
        h = _norm(x, norms["post"], layer.module.post_attention_layernorm.variance_epsilon, low, y, x2)
        gate_up = F.linear(h, layer.gate_up)
        m = gate_up.new_empty(len(x), gate_up.shape[1] // 2)
        library().grouprl_gate(*_low(m), *m.shape, _at(gate_up), _at(m))
        ctx.save_for_backward(x, qkv, attended, x2, gate_up, cos, sin)
        ctx.layer, ctx.pack = layer, pack
        return x2 + F.linear(m, layer.down, layer.down_bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, qkv, attended, x2, gate_up, cos, sin = ctx.saved_tensors
        layer: _Layer = ctx.layer
        low, a, mlp = layer.dtype, layer.module.self_attn, layer.module.mlp
        lib = library()
        g = gradient.float().clone(memory_format=torch.contiguous_format)
        g_low = g.to(low, copy=True)

        dm = g_low @ layer.down
        d_gate_up, m = torch.empty_like(gate_up), torch.empty_like(dm)
        lib.grouprl_gate_gradient(*_low(m), *m.shape, _at(gate_up), _at(dm), _at(d_gate_up), _at(m))
        _learn(mlp.down_proj, g_low, m)
        del dm, m
        dh = d_gate_up @ layer.gate_up
        h = torch.empty_like(dh)
        _norm_gradient(layer.module.post_attention_layernorm, layer.norms["post"], x2, dh, g, g_low, h)
        for part, d in zip((mlp.gate_proj, mlp.up_proj), d_gate_up.chunk(2, 1), strict=True):
            _learn(part, d, h)
        del d_gate_up

        d_attended = g_low @ layer.o
        _learn(a.o_proj, g_low, attended)
        made = torch.empty(qkv.shape, dtype=torch.float32)
        parts = dict(zip(("dq", "dk", "dv"), _split(made, layer), strict=True))
        q, k, v = _split(_rotate(layer, qkv, cos, sin), layer)
        attention(q, k, v, ctx.pack, layer.how.scale, layer.how.window, parts, d_attended.view(q.shape))
        dqkv = _rotate_gradient(layer, qkv, cos, sin, made)
        del made, parts, q, k, v, d_attended
        dh = dqkv @ layer.qkv
        h = torch.empty_like(dh)
        _norm_gradient(layer.module.input_layernorm, layer.norms["input"], x, dh, g, g_low, h)
        sizes = [part.out_features for part in (a.q_proj, a.k_proj, a.v_proj)]
        for part, d in zip((a.q_proj, a.k_proj, a.v_proj), torch.split(dqkv, sizes, 1), strict=True):
            _learn(part, d, h)
        return g, None, None, None, None, None


def _learn(linear: nn.Linear, g: Tensor, x: Tensor) -> None:
    """Add the gradient of a linear layer whose output's is ``g [S, out]`` and whose input is ``x [S, in]``."""
    if linear.weight.requires_grad:
        add_product(linear.weight, g, x)
    if linear.bias is not None and linear.bias.requires_grad:
        add_gradient(linear.bias, g.float().sum(0))


def _split(x: Tensor, layer: _Layer) -> tuple[Tensor, Tensor, Tensor]:
    """``[S, (H + 2 K) D]`` -> views of queries ``[S, H, D]``, keys and values ``[S, K, D]``."""
    heads, k_heads, d = layer.heads
    q, k, v = torch.split(x.view(len(x), -1, d), [heads, k_heads, k_heads], 1)
    return q, k, v


def _at(x: Tensor | None) -> c_void_p:
    return c_void_p(None if x is None else x.data_ptr())


def _low(x: Tensor) -> tuple[int]:
    return (int(x.dtype == torch.bfloat16),)


def _norm(
    x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, y: Tensor | None = None, to: Tensor | None = None
) -> Tensor:
    h = torch.empty(x.shape, dtype=dtype)
    library().grouprl_norm(*_low(h), *x.shape, _at(x), _at(y), _at(weight), c_float(eps), _at(to), _at(h))
    return h


def _norm_gradient(norm: Any, weight: Tensor, x: Tensor, dh: Tensor, g: Tensor, g_low: Tensor, h: Tensor) -> None:
    """Add to ``g`` what flows back through the norm of ``x``; write ``g_low`` and ``h``."""
    dweight = torch.zeros_like(weight)
    pointers = (_at(dh), _at(g), _at(g_low), _at(h), _at(dweight))
    if library().grouprl_norm_gradient(
        *_low(h), *x.shape, _at(x), _at(weight), c_float(norm.variance_epsilon), *pointers
    ):
        raise MemoryError("no memory for the gradient of a norm")
    if norm.weight.requires_grad:
        add_gradient(norm.weight, dweight)


def _rotary(layer: _Layer, qkv: Tensor, cos: Tensor, sin: Tensor, *made: Tensor) -> Any:
    heads, k_heads, d = layer.heads
    norm = getattr(layer.module.self_attn, "q_norm", None)
    struct = _Rotary(
        len(qkv), heads, k_heads, d, *_low(qkv), 0.0 if norm is None else norm.variance_epsilon,
        *(_at(layer.norms.get(name)) for name in ("q", "k")), _at(cos), _at(sin), *(_at(x) for x in made),
    )  # fmt: skip
    return ctypes.cast(ctypes.pointer(struct), POINTER(_Rotary))


def _rotate(layer: _Layer, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    out = torch.empty_like(qkv)
    library().grouprl_rotate(_rotary(layer, qkv, cos, sin), _at(qkv), _at(out))
    return out


def _rotate_gradient(layer: _Layer, qkv: Tensor, cos: Tensor, sin: Tensor, g: Tensor) -> Tensor:
    out = torch.empty_like(qkv)
    made = [torch.zeros_like(layer.norms[name]) for name in ("q", "k") if name in layer.norms]
    if library().grouprl_rotate_gradient(_rotary(layer, qkv, cos, sin, *made), _at(qkv), _at(g), _at(out)):
        raise MemoryError("no memory for the gradient of a rotation")
    a = layer.module.self_attn
    for norm, d in zip((a.q_norm, a.k_norm) if made else (), made, strict=True):
        if norm.weight.requires_grad:
            add_gradient(norm.weight, d)
    return out
