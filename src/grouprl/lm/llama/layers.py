"""The layers of a Llama-shaped model as one autograd function each, for learning; block.py is for sampling.

This module computes the matrix products of a layer; between_products.py computes everything else: in C on a CPU, in
Triton or torch on a GPU. For its backward pass a layer keeps its input and the attended values, a quarter of what it
computes, and recomputes the rest. Some layers also keep the outputs of the largest products: on a CPU as many layers as
fit into 6.5 % of the memory of weights, gradients and moments, on a GPU as many as fit into an eighth of its memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grouprl.lm.kernels.linear import Linear, preferred
from grouprl.lm.llama.adapters import active_adapters, has_dtype
from grouprl.lm.llama.between_products import BetweenProducts
from grouprl.lm.llama.block import linears_of
from grouprl.lm.packed.attention import AttentionSpec
from grouprl.lm.packed.low_precision import add_gradient, add_product
from grouprl.lm.packed.packing import Pack

KEPT_SHARE = 0.065
"""Most bytes of kept product outputs, per byte of weights, gradients and moments."""

PACK_TOKENS = 1024
"""Tokens in a pack of several groups on a CPU. Larger packs save little time, and fewer layers could keep outputs."""


class _Product:
    """Linear layers that share their input, computed as one product, with PEFT's low-rank adapters (W x + s B A x).

    Args:
        linears: the layers, with or without adapters; their outputs lie side by side.
        dtype: the dtype that weights are rounded to.
    """

    def __init__(self, linears: Sequence[Any], dtype: torch.dtype) -> None:
        self.linears, self.dtype = linears, dtype
        ends = list(accumulate(linear.out_features for linear in linears))
        self.columns = [slice(end - linear.out_features, end) for end, linear in zip(ends, linears, strict=True)]
        on_cpu = linears[0].weight.device.type == "cpu"
        # to join would be to copy
        self.apart = not on_cpu and len(linears) > 1 and all(has_dtype(linear, dtype) for linear in linears)
        self.compiled = on_cpu and dtype == torch.bfloat16 and preferred() and ends[-1] % 32 == 0
        adapted = zip(self.columns, linears, strict=True)
        self.adapters = [(columns, *adapter) for columns, linear in adapted for adapter in active_adapters(linear)]

    @cached_property
    def _weight(self) -> Tensor:
        return _concatenated([linear.weight.detach() for linear in self.linears], self.dtype)

    @cached_property
    def _bias(self) -> Tensor | None:
        biases = [linear.bias for linear in self.linears]
        if all(bias is None for bias in biases):
            return None
        pairs = zip(biases, self.linears, strict=True)
        zeros = [p.weight.new_zeros(p.out_features) if b is None else b.detach() for b, p in pairs]
        return _concatenated(zeros, self.dtype)

    def _forwards(self, x: Tensor, y: Tensor) -> None:
        if self.compiled:
            Linear([linear.weight for linear in self.linears], [linear.bias for linear in self.linears], low=True).into(
                y, x
            )
        elif self.apart:
            for columns, linear in zip(self.columns, self.linears, strict=True):
                y[:, columns] = F.linear(
                    x, linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
                )
        elif self._bias is not None:
            torch.addmm(self._bias, x, self._weight.t(), out=y)
        else:
            torch.mm(x, self._weight.t(), out=y)

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """The outputs ``[S, out]`` side by side for ``x [S, in]`` in the products' dtype; written to ``y`` if given."""
        y = x.new_empty(len(x), self.columns[-1].stop) if y is None else y
        self._forwards(x, y)
        for columns, a, b, scale in self.adapters:
            y[:, columns].addmm_(x @ self._low(a).t(), self._low(b).t(), alpha=scale)
        return y

    def backward(self, g: Tensor) -> Tensor:
        """The gradient ``[S, in]`` of the input from the gradient ``g [S, out]`` of the output."""
        if self.compiled:
            dx = Linear.backwards([p.weight for p in self.linears])(g, self.dtype)
        elif self.apart:
            first, *others = zip(self.columns, self.linears, strict=True)
            dx = g[:, first[0]] @ first[1].weight.detach()
            for columns, linear in others:
                dx.addmm_(g[:, columns], linear.weight.detach())
        else:
            dx = g @ self._weight
        for columns, a, b, scale in self.adapters:
            dx.addmm_(g[:, columns] @ self._low(b), self._low(a), alpha=scale)
        return dx

    def learn(self, g: Tensor, x: Tensor) -> None:
        """Add the gradients of trainable weights, biases and adapters to their ``.grad``.

        Args:
            g: ``[S, out]`` the gradient of the output. x: ``[S, in]`` the input.
        """
        together = g.is_cuda and len(self.linears) > 1 and all(linear.weight.requires_grad for linear in self.linears)
        whole = g.t() @ x if together else None
        for columns, linear in zip(self.columns, self.linears, strict=True):
            if whole is not None:
                add_gradient(linear.weight, whole[columns])
            elif linear.weight.requires_grad:
                add_product(linear.weight, g[:, columns], x)
            if linear.bias is not None and linear.bias.requires_grad:
                add_gradient(linear.bias, g[:, columns].float().sum(0))
        for columns, a, b, scale in self.adapters:
            if a.requires_grad:
                add_product(a, (g[:, columns] @ self._low(b)).mul_(scale), x)
            if b.requires_grad:
                add_product(b, g[:, columns], (x @ self._low(a).t()).mul_(scale))

    def _low(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self.dtype)


def _concatenated(weights: list[Tensor], dtype: torch.dtype) -> Tensor:
    if len(weights) == 1:
        return weights[0].to(dtype)
    out = weights[0].new_empty(sum(w.shape[0] for w in weights), *weights[0].shape[1:], dtype=dtype)
    for place, weight in zip(torch.split(out, [w.shape[0] for w in weights]), weights, strict=True):
        place.copy_(weight)
    return out


@dataclass(frozen=True)
class _RoundedLayer:
    """The four products of a layer, weights in the products' dtype, and the operations between them."""

    between: BetweenProducts
    dtype: torch.dtype
    qkv: _Product
    o: _Product
    gate_up: _Product
    down: _Product

    @classmethod
    def rounded(cls, between: BetweenProducts, dtype: torch.dtype) -> _RoundedLayer:
        return cls(between, dtype, *(_Product(group, dtype) for group in linears_of(between.module)))


@dataclass(frozen=True)
class _Kept:
    """The tensors that a layer keeps for its backward pass, and its output; None for what is recomputed.

    They are allocated before the layer's temporary tensors: among those they would leave the memory fragmented.
    """

    out: Tensor
    attended: Tensor | None
    qkv: Tensor | None
    gate_up: Tensor | None

    @classmethod
    def of(cls, layer: Any, x: Tensor, dtype: torch.dtype, everything: bool) -> _Kept:
        """Allocate the output ``[S, d]`` float32, on a CPU the attended values, and with ``everything`` the outputs of
        the largest products.
        """
        tokens = len(x)

        def place(width: int, of: torch.dtype = dtype) -> Tensor:
            return torch.empty(tokens, width, dtype=of, device=x.device)

        return cls(
            place(x.shape[1], torch.float32),
            place(layer.self_attn.o_proj.in_features) if x.device.type == "cpu" else None,
            *(place(width) if everything else None for width in _widths(layer)),
        )


def _widths(layer: Any) -> tuple[int, int]:
    """Numbers of outputs of the two largest products: queries, keys and values; gate and up."""
    a, mlp = layer.self_attn, layer.mlp
    qkv = a.q_proj.out_features + a.k_proj.out_features + a.v_proj.out_features
    return qkv, mlp.gate_proj.out_features + mlp.up_proj.out_features


class LlamaLayers:
    """The layers of a Llama-shaped model, for learning. :mod:`grouprl.lm.llama.trial` finds them.

    Args:
        decoder: the model's decoder. specs: scale and window of attention in each layer. dtype: of the products.
        operations: the implementation of everything between the products.
    """

    def __init__(
        self, decoder: Any, specs: tuple[AttentionSpec, ...], dtype: torch.dtype, operations: type[BetweenProducts]
    ) -> None:
        self.decoder, self.specs, self.dtype, self.operations = decoder, specs, dtype, operations
        self.linears = frozenset(m for m in decoder.layers.modules() if type(m) is nn.Linear)
        self._on_cpu = decoder.embed_tokens.weight.device.type == "cpu"
        self._rounded: list[_RoundedLayer] | None = None

    @contextmanager
    def learning(self) -> Iterator[None]:
        """The context of learning, in which weights must not change: on a GPU they are rounded once, at its start."""
        if not self._on_cpu:
            self._rounded = [self._layer(i) for i in range(len(self.specs))]
        try:
            yield
        finally:
            self._rounded = None

    def _layer(self, i: int) -> _RoundedLayer:
        """Layer ``i`` with its weights as they are now."""
        if self._rounded is not None:
            return self._rounded[i]
        return _RoundedLayer.rounded(self.operations.of(self.decoder.layers[i], self.specs[i]), self.dtype)

    def hidden(self, pack: Pack) -> Tensor:
        """Last hidden states ``[S, d]`` float32 of a pack of S input tokens, with a gradient path."""
        x: Tensor = self.decoder.embed_tokens(pack.ids).float()
        angles, seen = self.operations.angles(self.decoder, x, pack.positions), self.operations.seen(pack)
        keeping = self.keeping(len(pack.ids)) if torch.is_grad_enabled() else 0
        for i, module in enumerate(self.decoder.layers):
            place = _Kept.of(module, x, self.dtype, i < keeping)
            # One weight that is learned tells autograd that something is.
            anchor = next((p for p in module.parameters() if p.requires_grad), None)
            x = _Run.apply(x, anchor, partial(self._layer, i), *angles, seen, place)  # type: ignore[no-untyped-call]
        out: Tensor = self.decoder.norm(x)
        return out

    def keeping(self, tokens: int) -> int:
        """How many layers keep the outputs of their largest products for the backward pass of a pack of ``tokens``."""
        width = sum(_widths(self.decoder.layers[0])) * self.dtype.itemsize
        if self._on_cpu:
            weights = sum(
                p.numel() * p.element_size() * (4 if p.requires_grad else 1) for p in self.decoder.parameters()
            )
            room = KEPT_SHARE * weights
        else:  # of all, not of what is free: a run must not depend on what else is there
            device = self.decoder.embed_tokens.weight.device
            room = torch.cuda.get_device_properties(device).total_memory / 8
        return int(room / (tokens * width))

    @property
    def pack_tokens(self) -> int | None:
        """Most tokens of a pack of several groups; None for no limit, where few layers could keep outputs anyway."""
        return PACK_TOKENS if self._on_cpu and 2 * self.keeping(PACK_TOKENS) >= len(self.decoder.layers) else None


def run_layer(decoder: Any, between: BetweenProducts, dtype: torch.dtype, x: Tensor, pack: Pack) -> Tensor:
    """The output ``[S, d]`` float32 of one layer for ``x [S, d]`` float32, with products in ``dtype``."""
    place, seen = _Kept.of(between.module, x, dtype, False), between.seen(pack)
    layer, angles = partial(_RoundedLayer.rounded, between, dtype), between.angles(decoder, x, pack.positions)
    out: Tensor = _Run.apply(x, None, layer, *angles, seen, place)  # type: ignore[no-untyped-call]
    return out


class _Run(torch.autograd.Function):
    """One layer: ``x [S, d]`` float32 to its output ``[S, d]`` float32. ``anchor`` only makes autograd record it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor | None,
        layer_now: Callable[[], _RoundedLayer],
        cos: Tensor,
        sin: Tensor,
        seen: Any,
        place: _Kept,
    ) -> Tensor:
        layer = layer_now()
        between = layer.between
        qkv = layer.qkv(between.norm(x, layer.dtype), place.qkv)
        attended = between.attend(*between.rotate(qkv, cos, sin), seen, place.attended)
        x2, h = between.post_norm(x, layer.o(attended[0]))
        gate_up = layer.gate_up(h, place.gate_up)
        ctx.save_for_backward(x, cos, sin, *(() if place.qkv is None else (qkv, gate_up)), *attended)
        ctx.layer, ctx.seen, ctx.kept = layer_now, seen, place.qkv is not None
        return torch.add(x2, layer.down(between.gate(gate_up)), out=place.out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin, *saved = ctx.saved_tensors
        kept, attended = (saved[:2], tuple(saved[2:])) if ctx.kept else ((), tuple(saved))
        layer = ctx.layer()
        between = layer.between
        g = gradient.float().clone(memory_format=torch.contiguous_format)
        g_low = g.to(layer.dtype, copy=True)

        x2, h = between.post_norm(x, layer.o(attended[0]))
        gate_up = kept[1] if kept else layer.gate_up(h)
        d_gate_up, m = between.gate_gradient(gate_up, layer.down.backward(g_low))
        layer.down.learn(g_low, m)
        del m, gate_up
        h = between.post_norm_gradient(x2, layer.gate_up.backward(d_gate_up), g, g_low)
        layer.gate_up.learn(d_gate_up, h)
        del d_gate_up

        d_attended = layer.o.backward(g_low)
        layer.o.learn(g_low, attended[0])
        qkv = kept[0] if kept else layer.qkv(between.norm(x, layer.dtype))
        rotated = between.rotate(qkv, cos, sin)
        dqkv = between.attention_gradient(qkv, rotated, cos, sin, ctx.seen, attended, d_attended)
        del rotated, d_attended
        h = between.norm_gradient(x, layer.qkv.backward(dqkv), g, g_low)
        layer.qkv.learn(dqkv, h)
        return g, None, None, None, None, None, None
