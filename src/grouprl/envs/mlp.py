"""The default network: fully connected layers, on CPUs as one compiled function with a compiled gradient."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import Structure, c_int32, c_size_t, c_void_p
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from grouprl.envs.native import kernels

MAX_LAYERS = 8
"""Most layers that compiled code takes: ``DEEPEST`` in ``native/layers.h``."""


class MLP(nn.Module):
    """Fully connected layers with orthogonal initialisation and zero biases.

    Args:
        n_inputs, n_outputs: widths of both ends.
        hidden: widths between them.
        activation: ``"tanh"`` or ``"relu"``, after every layer but the last.
        hidden_gain, output_gain: of the orthogonal initialisation.
        native: compiled code for float32 on CPUs, where there is a compiler; torch operations otherwise. They agree
            within rounding. Hooks on single layers do not run with it.
    """

    def __init__(
        self,
        n_inputs: int,
        n_outputs: int,
        hidden: tuple[int, ...],
        activation: str,
        hidden_gain: float,
        output_gain: float,
        native: bool = True,
    ) -> None:
        super().__init__()
        sizes = (n_inputs, *hidden, n_outputs)
        self.layers = nn.ModuleList(nn.Linear(a, b, dtype=torch.float32) for a, b in pairwise(sizes))
        self.tanh = activation == "tanh"
        for i, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Linear)
            nn.init.orthogonal_(layer.weight, output_gain if i == len(self.layers) - 1 else hidden_gain)
            nn.init.zeros_(layer.bias)
        self.prefer_native = native

    __jit_unused_properties__ = ["native", "in_order"]  # noqa: RUF012 - read from the class by torch.jit.script

    @property
    def native(self) -> bool:
        """Whether compiled code can do it here."""
        return self.prefer_native and 1 < len(self.layers) <= MAX_LAYERS and kernels.available

    @property
    def in_order(self) -> list[Tensor]:
        """Weight ``[out, in]`` and bias ``[out]`` of each layer in turn, as they are now."""
        return [p for layer in self.layers for p in (layer.weight, layer.bias)]  # type: ignore[misc]

    def _compiled(self, parameters: Sequence[Tensor], n_dimensions: int, width: int) -> bool:
        """Whether compiled code can read the parameters, and inputs of that shape; torch says what is wrong if not."""
        return self.native and n_dimensions == 2 and width == parameters[0].shape[1] and fits(*parameters)

    def forward(self, x: Tensor) -> Tensor:
        """``[m, n_inputs]`` -> ``[m, n_outputs]``."""
        if not torch.jit.is_scripting():  # type: ignore[attr-defined]
            parameters = self.in_order
            plain = x.device.type == "cpu" and x.dtype == torch.float32 and not being_recorded()
            if plain and self._compiled(parameters, x.ndim, x.shape[-1]):
                out: Tensor = _Compiled.apply(x, self.tanh, *parameters)  # type: ignore[no-untyped-call]
                return out
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < last:
                x = torch.tanh_(x) if self.tanh else torch.relu_(x)
        return x

    def inference(self) -> Callable[[np.ndarray], np.ndarray]:
        """:meth:`forward` without a gradient, from ``[m, n_inputs]`` to ``[m, n_outputs]`` in numpy.

        It is made ready for many calls, and holds for as long as the parameters stay where they are in memory. Inputs
        of float32 are computed by compiled code where that is available.
        """
        parameters = self.in_order
        widths = [bias.shape[0] for bias in parameters[1::2]]
        n_hidden = sum(map(_padded, widths[:-1]))
        compiled = self._compiled(parameters, 2, parameters[0].shape[1])
        network = described(self.tanh, parameters) if compiled else None

        def infer(x: np.ndarray) -> np.ndarray:
            if network is None or x.dtype != np.float32 or x.ndim != 2 or x.shape[1] != network.width[0]:
                with torch.inference_mode():
                    out: np.ndarray = self(torch.from_numpy(x).to(parameters[0].device)).cpu().numpy()
                    return out
            x = np.ascontiguousarray(x)
            made = np.empty((len(x), widths[-1]), np.float32)
            hidden = np.empty(len(x) * n_hidden, np.float32)
            _call(network, len(x), *(a.__array_interface__["data"][0] for a in (x, hidden, made)))
            return made

        return infer


def being_recorded() -> bool:
    """Whether torch is writing down the operations that run, to export or compile them: it would miss compiled code."""
    return torch.jit.is_tracing() or torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export()  # type: ignore[attr-defined, no-untyped-call]


def fits(*tensors: Tensor) -> bool:
    """Whether compiled code can read them where they are: float32, row after row, in the CPU's memory."""
    return all(t.dtype == torch.float32 and t.device.type == "cpu" and t.is_contiguous() for t in tensors)


class _Network(Structure):
    _fields_ = [
        ("layers", c_int32), ("tanh", c_int32), ("width", c_int32 * (MAX_LAYERS + 1)),
        ("weight", c_void_p * MAX_LAYERS), ("bias", c_void_p * MAX_LAYERS),
    ]  # fmt: skip


def described(tanh: bool, parameters: Sequence[Tensor]) -> Any:
    """The network as compiled code takes it; it reads ``parameters`` where they are at each call."""
    weights, biases = parameters[::2], parameters[1::2]
    struct = _Network(len(weights), tanh)
    struct.width[0] = weights[0].shape[1]
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        struct.width[i + 1] = weight.shape[0]
        struct.weight[i], struct.bias[i] = weight.data_ptr(), bias.data_ptr()
    return struct


def forwards(x: Tensor, tanh: bool, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Outputs ``[m, n_outputs]`` for ``x [m, n_inputs]``, and what every hidden layer gave, one after the other."""
    rows = len(x)
    hidden = x.new_empty(rows * sum(_padded(bias.shape[0]) for bias in parameters[1:-2:2]))
    out = x.new_empty(rows, parameters[-1].shape[0])
    _call(described(tanh, parameters), rows, x.data_ptr(), hidden.data_ptr(), out.data_ptr())
    return out, hidden


def backwards(
    x: Tensor, tanh: bool, parameters: Sequence[Tensor], hidden: Tensor, dout: Tensor, *, to_inputs: bool
) -> tuple[Tensor | None, list[Tensor]]:
    """The gradients of ``x``, if that is asked for, and of ``parameters``, from that of what :func:`forwards` gave."""
    dout = dout.contiguous()
    sizes = [p.numel() for p in parameters]
    gradient = x.new_empty(sum(sizes))
    dx = torch.empty_like(x) if to_inputs else None
    failed = kernels.functions().grouprl_mlp_gradient(
        ctypes.byref(described(tanh, parameters)), c_size_t(len(x)),
        *(c_void_p(t.data_ptr()) for t in (x, hidden, dout, gradient)), c_void_p(None if dx is None else dx.data_ptr()),
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory for the gradient of a network on {len(x)} rows")
    return dx, [part.view(p.shape) for part, p in zip(torch.split(gradient, sizes), parameters, strict=True)]


def _call(network: Any, rows: int, *addresses: int) -> None:
    if kernels.functions().grouprl_mlp(ctypes.byref(network), c_size_t(rows), *map(c_void_p, addresses)):
        raise MemoryError(f"no memory for a network on {rows} rows")


def _padded(n: int) -> int:
    return (n + 15) // 16 * 16


class _Compiled(torch.autograd.Function):
    """The layers with parameters (weight ``[out, in]``, bias ``[out]``) of each, in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, tanh: bool, *parameters: Tensor) -> Tensor:
        x = x.contiguous()
        out, hidden = forwards(x, tanh, parameters)
        ctx.tanh = tanh
        ctx.save_for_backward(x, hidden, *parameters)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, hidden, *parameters = ctx.saved_tensors
        dx, made = backwards(x, ctx.tanh, parameters, hidden, dout, to_inputs=ctx.needs_input_grad[0])
        return dx, None, *made
