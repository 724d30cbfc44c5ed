"""Models that come wrapped in another module: what is trained and saved is the model itself."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from grouprl.errors import UsageError

_log = logging.getLogger("grouprl")

_SHARDED = ("FullyShardedDataParallel", "DeepSpeedEngine")


def unwrapped(model: Any) -> Any:
    """The model without wrappers around it or around its parts, which are taken out of it in place.

    Wrappers give parameters other names, under which nothing finds them in a saved model, and training calls the parts
    of the model one by one, past a wrapper. Known are ``torch.compile(model)`` and ``DataParallel`` (also distributed).
    ``model.compile()`` wraps nothing.

    Raises UsageError if the model is sharded over processes.
    """
    if not isinstance(model, nn.Module):
        return model
    found = set()
    while (inner := _inside(model)) is not None:
        found.add(type(model).__name__)
        model = inner
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            while child is not None and (inner := _inside(child)) is not None:
                found.add(type(child).__name__)
                parent._modules[name] = child = inner
    if found:
        _log.warning(
            "the model comes in %s; it is taken out, and trained and saved as it is: such a wrapper makes nothing "
            "faster here", ", ".join(sorted(found)),
        )  # fmt: skip
    return model


def _inside(module: nn.Module) -> nn.Module | None:
    """What ``module`` wraps, or None if it is no wrapper."""
    if type(module).__name__ in _SHARDED:
        raise UsageError(
            f"the model is a {type(module).__name__}, sharded over processes, and grouprl trains on one; give the "
            "model that was wrapped"
        )
    compiled: nn.Module | None = module._modules.get("_orig_mod")  # without importing torch's compiler
    if compiled is not None:
        return compiled
    parallel = isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel)
    return module._modules["module"] if parallel else None
