"""The layers of a Llama-shaped model as one differentiable function each, for learning; block.py is for sampling.

A layer is matrix products, which stand here, and everything between them, which between_products.py computes: in C on a
CPU, in Triton or torch on a GPU. For its backward pass a layer keeps its input and the attended values, a quarter of
what it computes, and recomputes the rest. As many layers as memory allows also keep what the largest products gave: on
a CPU so many that it is little beside what the weights take anyway, on a GPU as many as its memory holds.
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
from grouprl.lm.llama.adapters import added, is_of
from grouprl.lm.llama.between_products import Parts
from grouprl.lm.llama.block import groups_of
from grouprl.lm.packed.attention import How
from grouprl.lm.packed.low_precision import add_gradient, add_product
from grouprl.lm.packed.packing import Pack

KEPT_SHARE = 0.065
"""Most bytes kept of what products gave, per byte of weights, gradients and moments."""

TOGETHER = 1024
"""Tokens of a pack beside which one more pass over all weights costs little; with fewer of them more layers keep."""


class _Product:
    """Linear layers with one input as one product, and their low-rank adapters (PEFT's, W x + s B A x).

    Args:
        parts: the layers; their outputs lie side by side.
        dtype: what weights are rounded to.
    """

    def __init__(self, parts: Sequence[Any], dtype: torch.dtype) -> None:
        self.parts, self.dtype = parts, dtype
        ends = list(accumulate(part.out_features for part in parts))
        self.columns = [slice(end - part.out_features, end) for end, part in zip(ends, parts, strict=True)]
        on_cpu = parts[0].weight.device.type == "cpu"
        # to join would be to copy
        self.apart = not on_cpu and len(parts) > 1 and all(is_of(part, dtype) for part in parts)
        self.compiled = on_cpu and dtype == torch.bfloat16 and preferred() and ends[-1] % 32 == 0
        adapted = zip(self.columns, parts, strict=True)
        self.adapters = [(columns, *adapter) for columns, part in adapted for adapter in added(part)]

    @cached_property
    def _weight(self) -> Tensor:
        return _joined([part.weight.detach() for part in self.parts], self.dtype)

    @cached_property
    def _bias(self) -> Tensor | None:
        biases = [part.bias for part in self.parts]
        if all(bias is None for bias in biases):
            return None
        found = zip(biases, self.parts, strict=True)
        zeros = [p.weight.new_zeros(p.out_features) if b is None else b.detach() for b, p in found]
        return _joined(zeros, self.dtype)

    def _forwards(self, x: Tensor, y: Tensor) -> None:
        if self.compiled:
            Linear([part.weight for part in self.parts], [part.bias for part in self.parts], low=True).into(y, x)
        elif self.apart:
            for columns, part in zip(self.columns, self.parts, strict=True):
                y[:, columns] = F.linear(x, part.weight.detach(), None if part.bias is None else part.bias.detach())
        elif self._bias is not None:
            torch.addmm(self._bias, x, self._weight.t(), out=y)
        else:
            torch.mm(x, self._weight.t(), out=y)

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """``x [S, in]`` in the dtype -> ``[S, sum of outputs]``, in the place of ``y`` if that is given."""
        y = x.new_empty(len(x), self.columns[-1].stop) if y is None else y
        self._forwards(x, y)
        for columns, a, b, scale in self.adapters:
            y[:, columns].addmm_(x @ self._low(a).t(), self._low(b).t(), alpha=scale)
        return y

    def backward(self, g: Tensor) -> Tensor:
        """The gradient of the input from that of the output."""
        if self.compiled:
            dx = Linear.backwards([p.weight for p in self.parts])(g, self.dtype)
        elif self.apart:
            first, *others = zip(self.columns, self.parts, strict=True)
            dx = g[:, first[0]] @ first[1].weight.detach()
            for columns, part in others:
                dx.addmm_(g[:, columns], part.weight.detach())
        else:
            dx = g @ self._weight
        for columns, a, b, scale in self.adapters:
            dx.addmm_(g[:, columns] @ self._low(b), self._low(a), alpha=scale)
        return dx

    def learn(self, g: Tensor, x: Tensor) -> None:
        """Add the gradients of all that is learned, from that of the output and the input."""
        together = g.is_cuda and len(self.parts) > 1 and all(part.weight.requires_grad for part in self.parts)
        whole = g.t() @ x if together else None
        for columns, part in zip(self.columns, self.parts, strict=True):
            if whole is not None:
                add_gradient(part.weight, whole[columns])
            elif part.weight.requires_grad:
                add_product(part.weight, g[:, columns], x)
            if part.bias is not None and part.bias.requires_grad:
                add_gradient(part.bias, g[:, columns].float().sum(0))
        for columns, a, b, scale in self.adapters:
            if a.requires_grad:
                add_product(a, (g[:, columns] @ self._low(b)).mul_(scale), x)
            if b.requires_grad:
                add_product(b, g[:, columns], (x @ self._low(a).t()).mul_(scale))

    def _low(self, weight: Tensor) -> Tensor:
        return weight.detach().to(self.dtype)


def _joined(weights: list[Tensor], dtype: torch.dtype) -> Tensor:
    if len(weights) == 1:
        return weights[0].to(dtype)
    out = weights[0].new_empty(sum(w.shape[0] for w in weights), *weights[0].shape[1:], dtype=dtype)
    for place, weight in zip(torch.split(out, [w.shape[0] for w in weights]), weights, strict=True):
        place.copy_(weight)
    return out


@dataclass(frozen=True)
class _Layer:
    """A layer with its weights in the dtype of the products."""

    parts: Parts
    dtype: torch.dtype
    qkv: _Product
    o: _Product
    gate_up: _Product
    down: _Product

    @classmethod
    def rounded(cls, parts: Parts, dtype: torch.dtype) -> _Layer:
        return cls(parts, dtype, *(_Product(group, dtype) for group in groups_of(parts.module)))


@dataclass(frozen=True)
class _Kept:
    """Where a layer puts what its backward pass needs.

    Made before all else that the layer makes and soon frees: between that it would leave holes that nothing fits in.
    """

    out: Tensor
    attended: Tensor | None
    qkv: Tensor | None
    gate_up: Tensor | None

    @classmethod
    def of(cls, layer: Any, x: Tensor, dtype: torch.dtype, everything: bool) -> _Kept:
        """The output ``[S, d]`` float32, attended values, and with ``everything`` what the largest products give."""
        tokens = len(x)

        def place(width: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.empty(tokens, width, dtype=kind, device=x.device)

        return cls(
            place(x.shape[1], torch.float32),
            place(layer.self_attn.o_proj.in_features) if x.device.type == "cpu" else None,
            *(place(width) if everything else None for width in _widths(layer)),
        )


def _widths(layer: Any) -> tuple[int, int]:
    """Outputs of the largest products: queries, keys and values; gate and up."""
    a, mlp = layer.self_attn, layer.mlp
    qkv = a.q_proj.out_features + a.k_proj.out_features + a.v_proj.out_features
    return qkv, mlp.gate_proj.out_features + mlp.up_proj.out_features


class LlamaLayers:
    """The layers of a Llama-shaped model, for learning. :mod:`grouprl.lm.llama.trial` finds them.

    Args:
        decoder: the model. ways: what each layer asks of attention. dtype: of products.
        kind: what does all that lies between the products.
    """

    def __init__(self, decoder: Any, ways: tuple[How, ...], dtype: torch.dtype, kind: type[Parts]) -> None:
        self.decoder, self.ways, self.dtype, self.kind = decoder, ways, dtype, kind
        self.linears = frozenset(m for m in decoder.layers.modules() if type(m) is nn.Linear)
        self._on_cpu = decoder.embed_tokens.weight.device.type == "cpu"
        self._rounded: list[_Layer] | None = None

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Within, weights do not change. On a GPU they are then rounded once for all that is learned."""
        if not self._on_cpu:
            self._rounded = [self._layer(i) for i in range(len(self.ways))]
        try:
            yield
        finally:
            self._rounded = None

    def _layer(self, i: int) -> _Layer:
        """Layer ``i`` with its weights as they are now."""
        if self._rounded is not None:
            return self._rounded[i]
        return _Layer.rounded(self.kind.of(self.decoder.layers[i], self.ways[i]), self.dtype)

    def hidden(self, pack: Pack) -> Tensor:
        """Last hidden states ``[S, d]`` of a pack."""
        x: Tensor = self.decoder.embed_tokens(pack.ids).float()
        angles, seen = self.kind.angles(self.decoder, x, pack.positions), self.kind.seen(pack)
        keeping = self.keeping(len(pack.ids)) if torch.is_grad_enabled() else 0
        for i, module in enumerate(self.decoder.layers):
            place = _Kept.of(module, x, self.dtype, i < keeping)
            # One weight that is learned tells autograd that something is.
            anchor = next((p for p in module.parameters() if p.requires_grad), None)
            x = _Run.apply(x, anchor, partial(self._layer, i), *angles, seen, place)  # type: ignore[no-untyped-call]
        out: Tensor = self.decoder.norm(x)
        return out

    def keeping(self, tokens: int) -> int:
        """How many layers keep what products gave for the backward pass of a pack of ``tokens``."""
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
    def together(self) -> int | None:
        """The tokens that groups are best learned from together; None for any number, where few layers could keep."""
        return TOGETHER if self._on_cpu and 2 * self.keeping(TOGETHER) >= len(self.decoder.layers) else None


def run_layer(decoder: Any, parts: Parts, dtype: torch.dtype, x: Tensor, pack: Pack) -> Tensor:
    """One layer alone, products in ``dtype``, nothing kept: ``x [S, d]`` float32 -> the same behind it."""
    place, seen = _Kept.of(parts.module, x, dtype, False), parts.seen(pack)
    layer, angles = partial(_Layer.rounded, parts, dtype), parts.angles(decoder, x, pack.positions)
    out: Tensor = _Run.apply(x, None, layer, *angles, seen, place)  # type: ignore[no-untyped-call]
    return out


class _Run(torch.autograd.Function):
    """``x [S, d]`` float32 -> the same behind the layer. ``anchor`` only carries the graph."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        anchor: Tensor | None,
        layer_now: Callable[[], _Layer],
        cos: Tensor,
        sin: Tensor,
        seen: Any,
        place: _Kept,
    ) -> Tensor:
        layer = layer_now()
        parts = layer.parts
        qkv = layer.qkv(parts.norm(x, layer.dtype), place.qkv)
        found = parts.attend(*parts.rotate(qkv, cos, sin), seen, place.attended)
        x2, h = parts.post_norm(x, layer.o(found[0]))
        gate_up = layer.gate_up(h, place.gate_up)
        ctx.save_for_backward(x, cos, sin, *(() if place.qkv is None else (qkv, gate_up)), *found)
        ctx.layer, ctx.seen, ctx.kept = layer_now, seen, place.qkv is not None
        return torch.add(x2, layer.down(parts.gate(gate_up)), out=place.out)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, cos, sin, *saved = ctx.saved_tensors
        kept, found = (saved[:2], tuple(saved[2:])) if ctx.kept else ((), tuple(saved))
        layer = ctx.layer()
        parts = layer.parts
        g = gradient.float().clone(memory_format=torch.contiguous_format)
        g_low = g.to(layer.dtype, copy=True)

        x2, h = parts.post_norm(x, layer.o(found[0]))
        gate_up = kept[1] if kept else layer.gate_up(h)
        d_gate_up, m = parts.gate_gradient(gate_up, layer.down.backward(g_low))
        layer.down.learn(g_low, m)
        del m, gate_up
        h = parts.post_norm_gradient(x2, layer.gate_up.backward(d_gate_up), g, g_low)
        layer.gate_up.learn(d_gate_up, h)
        del d_gate_up

        d_attended = layer.o.backward(g_low)
        layer.o.learn(g_low, found[0])
        qkv = kept[0] if kept else layer.qkv(parts.norm(x, layer.dtype))
        turned = parts.rotate(qkv, cos, sin)
        dqkv = parts.attention_gradient(qkv, turned, cos, sin, ctx.seen, found, d_attended)
        del turned, d_attended
        h = parts.norm_gradient(x, layer.qkv.backward(dqkv), g, g_low)
        layer.qkv.learn(dqkv, h)
        return g, None, None, None, None, None, None
