"""PEFT's plain low-rank adapters, W x + s B A x, as compiled code and fused layers take them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grouprl.errors import TrainingError


def is_lora(module: Any) -> bool:
    """Whether it is PEFT's plain low-rank layer around a linear one: no variant of it, no bias of its own."""
    return (
        type(module).__module__ == "peft.tuners.lora.layer"
        and type(module).__name__ == "Linear"
        and not getattr(module, "lora_variant", None)
        and not any(getattr(module, "lora_bias", {}).values())
        and type(module.base_layer) is nn.Linear
    )


def is_of(module: Any, dtype: torch.dtype) -> bool:
    """Whether weight and bias of a linear layer, without adapters, are of this type."""
    bias: Tensor | None = module.bias
    return bool(module.weight.dtype == dtype) and (bias is None or bias.dtype == dtype)


def added(module: Any) -> Iterator[tuple[Tensor, Tensor, float]]:
    """A ``[r, in]``, B ``[out, r]`` and s of what a linear layer's active adapters add to its weight now.

    Raises TrainingError if they are merged into the weight and disabled, which only PEFT's own forward can undo.
    """
    if type(module) is nn.Linear:
        return
    if module.merged and module.disable_adapters:
        raise TrainingError("the adapters are merged into the weights and disabled; call model.unmerge_adapter() first")
    if not module.merged and not module.disable_adapters:
        for name in module.active_adapters:
            if name in module.lora_A:
                yield module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]


def with_added(module: Any) -> Tensor:
    """The weight ``[out, in]`` that a layer multiplies by, adapters added."""
    weight: Tensor = module.weight.detach()
    for a, b, scale in added(module):
        weight = weight + (scale * (b.detach().float() @ a.detach().float())).to(weight.dtype)
    return weight


@contextmanager
def doing_something(model: nn.Module) -> Iterator[None]:
    """Within, no B is 0, as it is in new adapters: what a trial finds equal holds for trained ones too."""
    adapted: list[Any] = [m for m in model.modules() if is_lora(m)]
    empty = [b.weight for m in adapted for b in m.lora_B.values() if not bool(b.weight.any())]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for b in empty:
            b.copy_(0.02 * torch.randn(b.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for b in empty:
                b.zero_()
