"""Operations of a user's own network that compiled code does in half the time or less, put in the place of torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from ctypes import c_size_t, c_void_p
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from grouprl.envs.mlp import backwards, fits, forwards, kernels

FEWEST_ROWS = 256
"""Under which a call from Python costs as much as it saves."""
FEWEST_NUMBERS = 64 * FEWEST_ROWS
"""The same for an operation on single numbers."""
LEAST_WIDTH = 16
"""Outputs of a layer under which torch is as fast."""
MOST_WEIGHTS = 512
"""Of a layer, per row: laying them out has to pay."""


class QuickOperations(TorchFunctionMode):
    """Within, linear layers and tanh of many float32 rows on a CPU are computed here, forwards and backwards.

    They agree with torch's within rounding. Everything else is left alone: small arrays, other types, layouts and
    devices, subclasses of tensors, and whatever happens under autocast, a function transform (``torch.func``), forward
    mode differentiation, a compiler, a dispatch mode or hooks on saved tensors (as of activation checkpointing).
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        quick = None if kwargs or torch.compiler.is_compiling() else _QUICK.get(func)
        made = None if quick is None or not _nothing_special() else quick(*args)
        return func(*args, **(kwargs or {})) if made is None else made


def _nothing_special() -> bool:
    """Whether an operation here and now is one on numbers and nothing else. If torch cannot say, it is not."""
    try:
        return not (
            torch._C._are_functorch_transforms_active()
            or torch._C._len_torch_dispatch_stack()
            or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
            or forward_ad._current_level >= 0
            or torch.is_autocast_enabled("cpu")
        )
    except AttributeError:  # none of the first four is documented
        return False


def _plain(*tensors: Tensor) -> bool:
    """Whether each is a tensor and no more, and lies in memory as compiled code reads it."""
    try:
        return all(
            type(t) in (Tensor, nn.Parameter)
            and t.layout == torch.strided
            and not (t.is_nested or t.is_neg() or t._is_zerotensor())
            and fits(t)
            and t.data_ptr() >= 0
            for t in tensors
        )
    except RuntimeError:  # one that lies nowhere, such as many gradients at once
        return False


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if bias is None or not _plain(x, weight, bias):
        return None
    if x.ndim != 2 or not FEWEST_ROWS <= len(x) >= weight.numel() / MOST_WEIGHTS or len(weight) < LEAST_WIDTH:
        return None
    if weight.shape[1:] != x.shape[1:] or bias.shape != weight.shape[:1]:
        return None
    out: Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


def _tanh(x: Tensor) -> Tensor | None:
    if not _plain(x) or x.numel() < FEWEST_NUMBERS:
        return None
    out: Tensor = _Tanh.apply(x)  # type: ignore[no-untyped-call]
    return out


_QUICK: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    functional.linear: _linear,
    torch.tanh: _tanh,
    Tensor.tanh: _tanh,
}


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        out, _ = forwards(x, True, (weight, bias))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        to_inputs = ctx.needs_input_grad[0]
        # The gradient may itself be differentiated, or be one of many at once: what of that there is, torch knows.
        gradient = gradient.contiguous()
        if torch.is_grad_enabled() or not _nothing_special() or not _plain(gradient):
            return gradient @ weight if to_inputs else None, gradient.t() @ x, gradient.sum(0)
        dx, made = backwards(x, True, (weight, bias), x.new_empty(0), gradient, to_inputs=to_inputs)
        return dx, *made


class _Tanh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        kernels.functions().grouprl_tanh(c_size_t(x.numel()), c_void_p(x.data_ptr()), c_void_p(out.data_ptr()))
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        made: Tensor = torch.ops.aten.tanh_backward(gradient, out)
        return made
