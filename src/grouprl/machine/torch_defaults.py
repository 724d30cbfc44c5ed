"""What torch lets a script set for the whole process, and what grouprl computes under instead."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Torch as it is when it is imported: new tensors are float32 on the CPU, gradients are computed, nothing is cast.

    While the context is open nothing depends on ``set_default_dtype``, ``set_default_device``, ``no_grad``,
    ``inference_mode`` and ``autocast`` of the caller. Functions of the user that are called within it see the same.
    What is set while it is open ends with it, so a function of the user that is called within one of its own leaves
    nothing behind. The context is also a decorator.

    Several threads may each have one open. The default dtype is the one of these settings that threads share: it is
    put back to float32 where another thread has a context open, whatever that thread's function has set it to.
    """
    dtype, device = _dtype_outside(), torch.get_default_device()
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        _without_autocast(),
        torch.device("cpu") if device.type != "cpu" else nullcontext(),
    ):
        torch.set_default_dtype(torch.float32)
        me = threading.get_ident()
        _open.append(me)
        try:
            yield
        finally:
            _open.remove(me)
            torch.set_default_dtype(dtype)
            if torch.get_default_device().type != "cpu":
                torch.set_default_device(None if device.type == "cpu" else device)


_open: list[int] = []
"""The threads that have the context open, once for each time; appending and removing need no lock."""


def _dtype_outside() -> torch.dtype:
    """What the default dtype is to be when the context that this thread opens now has ended."""
    me = threading.get_ident()
    return torch.float32 if any(thread != me for thread in tuple(_open)) else torch.get_default_dtype()


@contextmanager
def _without_autocast() -> Iterator[None]:
    kinds = ("cpu", "cuda")
    before = [torch.is_autocast_enabled(kind) for kind in kinds]
    for kind in kinds:
        torch.set_autocast_enabled(kind, False)
    try:
        yield
    finally:
        for kind, enabled in zip(kinds, before, strict=True):
            torch.set_autocast_enabled(kind, enabled)
