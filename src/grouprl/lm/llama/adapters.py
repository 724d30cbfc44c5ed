"""PEFT's plain low-rank adapters, W x + s B A x: which layers have them, and the matrices that act now."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from grouprl.errors import TrainingError
from grouprl.learning.shards import held


def is_lora(module: Any) -> bool:
    """Whether ``module`` is PEFT's plain low-rank layer around torch's Linear: no variant such as DoRA, no bias."""
    return (
        type(module).__module__ == "peft.tuners.lora.layer"
        and type(module).__name__ == "Linear"
        and not getattr(module, "lora_variant", None)
        and not any(getattr(module, "lora_bias", {}).values())
        and type(module.base_layer) is nn.Linear
    )


def has_dtype(module: Any, dtype: torch.dtype) -> bool:
    """Whether the weight and the bias of a linear layer, without its adapters, have this dtype."""
    bias: Tensor | None = module.bias
    return bool(module.weight.dtype == dtype) and (bias is None or bias.dtype == dtype)


def active_adapters(module: Any) -> Iterator[tuple[Tensor, Tensor, float]]:
    """For each active adapter of a linear layer A ``[r, in]``, B ``[out, r]`` and s: it adds s B A to the weight.

    Adapters that are merged into the weight, or disabled, add nothing. Raises TrainingError if they are merged and
    disabled at once, which only PEFT's own forward can undo.
    """
    if type(module) is nn.Linear:
        return
    if module.merged and module.disable_adapters:
        raise TrainingError("the adapters are merged into the weights and disabled; call model.unmerge_adapter() first")
    if not module.merged and not module.disable_adapters:
        for name in module.active_adapters:
            if name in module.lora_A:
                yield module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name]


def merged_weight(module: Any) -> Tensor:
    """The weight ``[out, in]`` of a linear layer with its active adapters added, in the weight's dtype."""
    weight: Tensor = module.weight.detach()
    for a, b, scale in active_adapters(module):
        weight = weight + (scale * (b.detach().float() @ a.detach().float())).to(weight.dtype)
    return weight


@contextmanager
def nonzero_adapters(model: nn.Module) -> Iterator[None]:
    """The context of a trial: fills each trainable parameter that is 0 with random numbers, and empties it again.

    A part of each new adapter is 0. Otherwise a computation that leaves adapters out would pass the trial.
    """
    empty = [held(p) for p in model.parameters() if p.requires_grad and _is_zero(held(p))]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in empty:
            p.copy_(0.02 * torch.randn(p.shape, generator=generator))
    try:
        yield
    finally:
        with torch.no_grad():
            for p in empty:
                p.zero_()


def _is_zero(x: Tensor) -> bool:
    """Whether all entries are 0. Most tensors that are not show it in their first entry."""
    return x.numel() > 0 and x.is_floating_point() and not bool(x[(0,) * x.dim()]) and not bool(x.any())
