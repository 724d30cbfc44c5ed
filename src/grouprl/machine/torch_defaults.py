"""What torch lets a script set for the whole process, and what grouprl computes under instead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Torch as it is when it is imported: new tensors are float32 on the CPU, and gradients are computed.

    While the context is open nothing depends on ``set_default_dtype``, ``set_default_device``, ``no_grad`` and
    ``inference_mode`` of the caller. Functions of the user that are called within it see the same. The context is also
    a decorator.
    """
    dtype = torch.get_default_dtype()
    elsewhere = torch.get_default_device().type != "cpu"
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu") if elsewhere else nullcontext():
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
