"""Weights that are sharded: each process holds a part of each tensor, PyTorch's DTensor, as `fully_shard` makes it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of the tensor alone."""
    module: Any = sys.modules.get("torch.distributed.tensor")  # whoever made such a tensor has imported it
    return module is not None and isinstance(tensor, module.DTensor)


def held(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, without its history: the same memory, all of it if it is not sharded."""
    tensor = tensor.detach()
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def place_of(tensor: Tensor) -> tuple[int, int, torch.Size]:
    """Where in memory a tensor lies, and its shape: the same of two tensors that are tied alone."""
    here = held(tensor)  # an empty part has a place of its own too
    return here.untyped_storage().data_ptr(), int(here.storage_offset()), tensor.shape


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered from all processes if it is sharded. All of them must call this."""
    tensor = tensor.detach()
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, in all processes the same, as ``like`` is: what this process holds of it if that is sharded."""
    if not is_sharded(like) or is_sharded(tensor) or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    mesh, places = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return distribute_tensor(tensor.to(like.device), mesh, places, src_data_rank=None)


@torch.no_grad()
def put(into: Tensor, values: Tensor) -> None:
    """Copy a whole tensor, in all processes the same, into a weight: what this process holds of it."""
    held(into).copy_(held(sharded_like(values, into)))


@torch.no_grad()
def exchange(a: Tensor, b: Tensor) -> None:
    """Swap the values of two tensors of one shape, which stay the same objects.

    Two whole tensors swap their memory. A sharded one must keep its own, from which its module is gathered.
    """
    if not is_sharded(a):
        a.data, b.data = b.data, a.data
        return
    mine, other = held(a), held(b)
    kept = mine.clone()
    mine.copy_(other)
    other.copy_(kept)
