"""The trainable parameters of a sharded module, of which each process steps its own parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from grouprl.learning.parameters import TrainedParameters, norm_of
from grouprl.learning.shards import held, put, whole
from grouprl.machine.ranks import Ranks


class ShardedParameters(TrainedParameters):
    """The trainable parameters of a module that ``fully_shard`` was applied to, in its interface for one process.

    Backward passes leave in each part the sum of the gradients of all processes, so there is no vector that holds the
    gradient, and nothing is left to be summed.

    Args:
        module: whose parameters. ranks: the processes that hold them.
    """

    def __init__(self, module: nn.Module, ranks: Ranks) -> None:
        self._ranks = ranks
        super().__init__(module)

    def _check_apart(self) -> None:
        """Nothing: it was checked before they were sharded."""

    def values(self) -> Tensor:
        """A copy ``[P]`` of all weights, end to end. All processes must call this."""
        return torch.cat([whole(p).reshape(-1) for p in self.tensors])

    @torch.no_grad()
    def load(self, values: Tensor) -> None:
        """Set all weights to ``values [P]``, as :meth:`values` gave them."""
        for p, part in zip(self.tensors, self.split(values), strict=True):
            put(p, part)

    def total(self) -> float:
        """The sum of all weights. All processes must call this."""
        total = torch.tensor([super().total()], dtype=torch.float64)
        self._ranks.add(total)
        return float(total)

    @contextmanager
    def written_in_place(self) -> Iterator[None]:
        """Leave no gradient with the parameters when the context closes."""
        try:
            yield
        finally:
            for p in self.tensors:
                p.grad = None

    @property
    def gradient(self) -> Tensor:
        """``[P]``, of the last step, gathered from all processes. All must ask for it."""
        return torch.cat([whole(self._gradient_of(p)).reshape(-1) for p in self.tensors])

    def start(self) -> None:
        """Begin a gradient."""
        for p in self.tensors:
            p.grad = None

    def finish(self) -> None:
        """End a gradient that backward passes wrote: parameters that no loss reached get 0."""
        for p in self.tensors:
            p.grad = self._gradient_of(p)

    def add_over(self, ranks: Ranks) -> None:
        """Nothing: each backward pass has added the gradients of all processes."""

    def clip(self, max_norm: float) -> float:
        """As that of one process: the norm is of all parts. All processes must call this."""
        parts = [held(self._gradient_of(p)) for p in self.tensors]
        squares = torch.tensor(sum(norm_of(part.view(-1)) ** 2 for part in parts), dtype=torch.float64)
        self._ranks.add(squares)
        norm = float(squares.sqrt())
        if 0 < max_norm < norm:
            for part in parts:
                part.mul_(max_norm / (norm + 1e-6))
        return norm

    @staticmethod
    def _gradient_of(p: nn.Parameter) -> Tensor:
        return torch.zeros_like(p) if p.grad is None else p.grad
