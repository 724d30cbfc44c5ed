"""Matrix products in low precision from full-precision master weights, for any model made of linear layers.

This module replaces torch's autocast and costs less:

- It rounds each weight once per update and not once per pass.
- It adds the gradient of a weight to its ``.grad`` in place.
- It rounds an input that several layers share once.
- It lays out the weights of the sampler for the processor in advance.

Everything else in the model stays in the precision of its weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grouprl.lm.kernels import gradient as native


def supports_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products are faster than float32 products on ``device``."""
    if device.type == "cuda":  # torch supports bfloat16 on older GPUs too, but they convert to float32 and back
        return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and _processor_multiplies_bf16()


def _processor_multiplies_bf16() -> bool:
    """Whether the processor has instructions for it.

    oneDNN takes bfloat16 on every x86 processor with AVX-512, and is 2 to 4 times slower than in float32 without them.
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    x86 = torch.cpu._is_avx512_supported()
    return not x86 or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def add_gradient(parameter: Tensor, value: Tensor) -> None:
    """Add ``value`` to ``parameter.grad`` in place.

    If ``parameter.grad`` is None, the function copies ``value`` into ``parameter.main_grad``, which then becomes
    ``parameter.grad``. ``main_grad`` is a view of a larger gradient buffer. A copy costs less than adding to zeros,
    most of all from a lower precision. Without a ``main_grad``, ``parameter.grad`` becomes a new tensor.

    Args:
        parameter: any parameter.
        value: a tensor of the same shape and any dtype.
    """
    if parameter.grad is not None:
        parameter.grad.add_(value)
        return
    place: Tensor | None = getattr(parameter, "main_grad", None)
    parameter.grad = value.to(parameter.dtype) if place is None else place.copy_(value)


def add_product(parameter: Tensor, a: Tensor, b: Tensor, compiled: bool = True) -> None:
    """Add ``a^T b`` to ``parameter.grad``, by the rules of :func:`add_gradient`.

    Args:
        parameter: ``[out, in]``.
        a: ``[n, out]``.
        b: ``[n, in]``, of the same dtype.
        compiled: whether to use compiled code where it supports the tensors.
    """
    place: Tensor | None = parameter.grad
    if place is not None and place.dtype == a.dtype:
        place.addmm_(a.t(), b)
        return
    into = getattr(parameter, "main_grad", None) if place is None else place
    if compiled and into is not None and native.can_add_weight_gradient(into, a, b):
        native.weight_gradient(into, a, b, add=place is not None)
        parameter.grad = into
    else:
        add_gradient(parameter, a.t() @ b)


def add_rows(to: Tensor, index: Tensor, rows: Tensor) -> None:
    """Compute ``to[index] += rows`` in place. The order of additions is the same every time, so the result is too.

    Args:
        to: ``[n, ...]``.
        index: ``[m]`` int64, may contain a row several times.
        rows: ``[m, ...]``, of the dtype of ``to``.
    """
    if to.device.type == "cuda":  # index_add_ on a GPU adds in the order in which threads arrive
        to.index_put_((index,), rows, accumulate=True)
    else:
        to.index_add_(0, index, rows)


def _zero_gradient(parameter: Tensor) -> Tensor:
    """Return ``parameter.grad``. If it is None, fill it with zeros first, in ``main_grad`` if the parameter has one."""
    if parameter.grad is None:
        place: Tensor | None = getattr(parameter, "main_grad", None)
        parameter.grad = torch.zeros_like(parameter) if place is None else place.zero_()
    return parameter.grad


def is_touched(module: nn.Module) -> bool:
    """Whether calling a module does more than the forward of its class, or its weights are not its own parameters.

    It is so for modules with hooks, with a forward that was assigned to them, and with weights that are computed from
    other ones (pruning, weight normalisation).
    """
    hooks = (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
    return any(hooks) or not _computes_alone(module)


def _computes_alone(module: nn.Module) -> bool:
    """Whether the forward of a module's class computes its output, from parameters of the module."""
    return not any(name in vars(module) for name in ("forward", "weight", "bias"))


class LowPrecision:
    """Replaces how the linear and embedding layers of a model compute, while one of its contexts is open.

    Layers with a forward of their own, and layers whose weights are computed from other ones (by pruning for example),
    stay as they are.

    Args:
        model: any module. Its layers must not change afterwards.
        dtype: the dtype of matrix products. Weights of another dtype are rounded to it.
        native: whether to use compiled code where it supports a product.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, native: bool = True) -> None:
        from transformers.pytorch_utils import Conv1D

        self.dtype, self.native = dtype, native
        modules = [m for m in model.modules() if _computes_alone(m)]
        self._layers = [m for m in modules if type(m) is nn.Linear or isinstance(m, Conv1D)]
        self._embeddings = [m for m in modules if type(m) is nn.Embedding]
        self._norms = [m for m in modules if type(m) is nn.LayerNorm]
        self._last: tuple[Tensor, int, Tensor] | None = None
        self._weights: _Rounded | None = None

    @contextmanager
    def learning(self, without: Collection[nn.Module] = ()) -> Iterator[None]:
        """Run layers forwards and backwards in low precision while the context is open.

        The backward pass adds the gradients of weights to their ``.grad``. The context rounds each weight once, so
        weights must not change in it.

        Args:
            without: layers that keep their own computation.
        """
        self._weights = weights = _Rounded(self.dtype)
        try:
            with self._forwards(lambda layer: None if layer in without else self._learner(layer, weights), self._embed):
                yield
        finally:
            self._weights = None

    def weight(self, parameter: Tensor) -> Tensor:
        """Return ``parameter`` in the dtype of products. Within :meth:`learning` it is rounded once."""
        return parameter.detach().to(self.dtype) if self._weights is None else self._weights(parameter)

    @contextmanager
    def sampling(self, without: Collection[nn.Module] = ()) -> Iterator[None]:
        """Run layers forwards only, with weights laid out for many small products, while the context is open.

        Args:
            without: layers that keep their own computation.
        """
        packed = self.dtype == torch.bfloat16 and all(m.weight.device.type == "cpu" for m in self._layers)
        forward = self._packed if packed and supports_bf16(torch.device("cpu")) else self._plain
        with torch.no_grad(), self._forwards(lambda layer: None if layer in without else forward(layer), None):
            yield

    @contextmanager
    def exactly(self) -> Iterator[None]:
        """Run layers forwards only and in float32 while the context is open.

        Each layer converts its weight to float32 at each call, so that one converted weight is in memory at a time.
        """
        with torch.no_grad(), self._forwards(_exact_linear, _exact_embedding, _exact_norm):
            yield

    @contextmanager
    def _forwards(
        self,
        of_layer: Callable[[Any], Callable[..., Tensor] | None],
        of_embedding: Callable[[Any], Callable[..., Tensor]] | None,
        of_norm: Callable[[Any], Callable[..., Tensor]] | None = None,
    ) -> Iterator[None]:
        """Replace the ``forward`` of every layer, and restore it at the end."""
        before: list[tuple[nn.Module, Any]] = []

        def give(module: nn.Module, forward: Callable[..., Tensor] | None) -> None:
            if forward is None:
                return
            before.append((module, vars(module).get("forward")))
            kind: Any = type(module)

            def unless_changed(*inputs: Any) -> Tensor:
                # Some adapters of PEFT put another weight into a layer for the time of a call, and change its class.
                if type(module) is kind:
                    return forward(*inputs)
                out: Tensor = type(module).forward(module, *inputs)
                return out

            module.forward = unless_changed

        try:
            for layer in self._layers:
                give(layer, of_layer(layer))
            if of_norm is not None:
                for norm in self._norms:
                    give(norm, of_norm(norm))
            if of_embedding is not None:
                for embedding in self._embeddings:
                    if type(embedding).forward is nn.Embedding.forward and embedding.max_norm is None:
                        give(embedding, of_embedding(embedding))
            yield
        finally:
            for module, forward in before:
                if forward is None:
                    del module.forward
                else:
                    module.forward = forward
            self._last = None

    def _learner(self, layer: Any, weights: _Rounded) -> Callable[[Tensor], Tensor]:
        weight, bias = layer.weight, layer.bias
        transposed = not isinstance(layer, nn.Linear)

        def forward(x: Tensor) -> Tensor:
            rounded, rounded_bias = weights(weight), None if bias is None else weights(bias)
            out: Tensor = _Linear.apply(x, weight, bias, rounded, rounded_bias, transposed, self)  # type: ignore[no-untyped-call]
            return out

        return forward

    def _embed(self, layer: nn.Embedding) -> Callable[[Tensor], Tensor]:
        def forward(ids: Tensor) -> Tensor:
            out: Tensor = _Embedding.apply(ids, layer.weight)  # type: ignore[no-untyped-call]
            return out

        return forward

    def _plain(self, layer: Any) -> Callable[[Tensor], Tensor]:
        weight = layer.weight.detach().to(self.dtype)
        weight = weight if isinstance(layer, nn.Linear) else weight.t()
        bias = None if layer.bias is None else layer.bias.detach().to(self.dtype)
        return lambda x: F.linear(self.rounded(x), weight, bias)

    def _packed(self, layer: Any) -> Callable[[Tensor], Tensor]:
        weight = layer.weight.detach()
        weight = (weight if isinstance(layer, nn.Linear) else weight.t()).to(self.dtype).contiguous()
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, 32)
        bias = None if layer.bias is None else layer.bias.detach().to(self.dtype)
        linear = torch.ops.mkldnn._linear_pointwise
        return lambda x: linear(self.rounded(x), packed, bias, "none", [], "")

    def rounded(self, x: Tensor) -> Tensor:
        """Return ``x`` in the dtype of products.

        The last result is cached, because the layers of queries, keys and values round the same input.
        """
        if x.dtype == self.dtype:
            return x
        last = self._last
        if last is not None and last[0] is x and last[1] == x._version:
            return last[2]
        low = x.detach().to(self.dtype)
        self._last = (x, x._version, low)
        return low


def _exact_linear(layer: Any) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()
        return F.linear(x.float(), weight.float(), None if layer.bias is None else layer.bias.float())

    return forward


def _exact_embedding(layer: nn.Embedding) -> Callable[[Tensor], Tensor]:
    return lambda ids: F.embedding(ids, layer.weight).float()


def _exact_norm(layer: nn.LayerNorm) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        weight, bias = (None if p is None else p.float() for p in (layer.weight, layer.bias))
        return F.layer_norm(x.float(), layer.normalized_shape, weight, bias, layer.eps)

    return forward


class _Rounded:
    """Converts weights to another dtype, each weight once."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.weights: dict[int, Tensor] = {}

    def __call__(self, parameter: Tensor) -> Tensor:
        if id(parameter) not in self.weights:
            self.weights[id(parameter)] = parameter.detach().to(self.dtype)
        return self.weights[id(parameter)]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        w: Tensor,
        b: Tensor | None,
        transposed: bool,
        precision: LowPrecision,
    ) -> Tensor:
        low = precision.rounded(x)
        ctx.save_for_backward(low, w)
        ctx.weight, ctx.bias, ctx.transposed, ctx.dtype = weight, bias, transposed, x.dtype
        ctx.native = precision.native
        if b is None or low.dim() < 3:
            return F.linear(low, w.t() if transposed else w, b)
        # F.linear would return a view of a matrix, which autograd does not let adapters add to in place.
        out = low.new_empty(*low.shape[:-1], len(b))
        torch.addmm(b, low.flatten(0, -2), w if transposed else w.t(), out=out.view(-1, len(b)))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        g = gradient.to(w.dtype)
        dx = None
        if ctx.needs_input_grad[0]:
            dx = torch.matmul(g, w.t() if ctx.transposed else w).to(ctx.dtype)
        g, x = g.flatten(0, -2), x.flatten(0, -2)
        if ctx.weight.requires_grad:
            a, b = (x, g) if ctx.transposed else (g, x)
            add_product(ctx.weight, a, b, ctx.native)
        if ctx.bias is not None and ctx.bias.requires_grad:
            add_gradient(ctx.bias, gradient.flatten(0, -2).float().sum(0))
        return dx, None, None, None, None, None, None


class _Embedding(torch.autograd.Function):
    """Looks up rows of an embedding table.

    The backward pass adds the gradient to the looked-up rows of ``.grad`` and needs no table of zeros. It ignores
    ``padding_idx``: the padding token has a gradient like every other token.
    """

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.ids, ctx.weight = ids, weight
        return weight.detach()[ids]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        weight = ctx.weight
        add_rows(_zero_gradient(weight), ctx.ids.reshape(-1), gradient.flatten(0, -2).to(weight.dtype))
        return None, None
