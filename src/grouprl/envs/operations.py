"""Operations of a user's own network that compiled code does in half the time or less, put in the place of torch's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from grouprl.envs.mlp import fits, layers

FEWEST_ROWS = 256
"""Under which a call from Python costs as much as it saves."""
FEWEST_NUMBERS = 64 * FEWEST_ROWS


class QuickOperations(TorchFunctionMode):
    """Within, linear layers and tanh of many float32 rows on a CPU are computed here, forwards and backwards.

    They agree with torch's within rounding. Everything else is left alone: small arrays, other types and devices,
    subclasses of tensors, function transforms (``torch.func``), and what is compiled or scripted.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
            quick = None if kwargs else _QUICK.get(func)
            made = None if quick is None else quick(*args)
            if made is not None:
                return made
        return func(*args, **(kwargs or {}))


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if bias is None or x.ndim != 2 or len(x) < FEWEST_ROWS or not fits(x, weight, bias):
        return None
    if weight.shape[1:] != x.shape[1:] or bias.shape != weight.shape[:1]:
        return None
    return layers(x, True, (weight, bias))


def _tanh(x: Tensor) -> Tensor | None:
    if x.numel() < FEWEST_NUMBERS or not fits(x):
        return None
    out: Tensor = _Tanh.apply(x)  # type: ignore[no-untyped-call]
    return out


_QUICK: dict[Callable[..., Any], Callable[..., Tensor | None]] = {
    functional.linear: _linear,
    torch.tanh: _tanh,
    Tensor.tanh: _tanh,
}


class _Tanh(torch.autograd.Function):
    """tanh(x) = 2 sigmoid(2x) - 1, which torch computes in a fraction of the time of tanh on some processors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        out = torch.add(x, x).sigmoid_().mul_(2.0).sub_(1.0)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        made: Tensor = torch.ops.aten.tanh_backward(gradient, out)
        return made
