"""What of a model decides how it computes, apart from its weights: so that changes of it are noticed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_NO_MATTER = {"training", "gradient_checkpointing"}
_PLAIN = (bool, int, float, str, type(None))


def structure(model: nn.Module) -> list[tuple[Any, ...]]:
    """A description of all modules, which is equal as long as none is replaced, hooked, overwritten or set otherwise.

    It takes a walk over the modules, some milliseconds for a large model, and says nothing of weights and buffers.
    """
    return [
        (name, id(module), type(module), *(_said(key, value) for key, value in vars(module).items()))
        for name, module in model.named_modules()
    ]


def _said(key: str, value: Any) -> Any:
    if key in _NO_MATTER:
        return key
    if key.endswith("_hooks"):
        return key, tuple(map(id, value.values() if isinstance(value, Mapping) else value))
    if isinstance(value, _PLAIN):
        return key, value
    if isinstance(value, Mapping) and all(isinstance(v, _PLAIN) for v in value.values()):
        return key, tuple(value.items())
    if isinstance(value, list) and all(isinstance(v, _PLAIN) for v in value):
        return key, tuple(value)
    return key, id(value) if key == "forward" else 0
