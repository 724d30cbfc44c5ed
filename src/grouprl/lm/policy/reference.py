"""The reference model of the KL divergence: the model as it was at the start, or another one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from grouprl.errors import UsageError
from grouprl.lm.policy.log_probs import LogProbs, MicroBatch


class Reference:
    """Log-probabilities of a model that is not trained.

    By default it is the model as it is now: a copy of the weights that are trained, which take the places of the
    model's own while log-probabilities are computed. So it runs the same code, to the last bit; what is frozen, below
    an adapter for one, is not copied; and an adapter that has learned something already is part of it.

    Args:
        model: the model that is trained. log_probs: computes its log-probabilities.
        other: another model and what computes its log-probabilities, to be the reference instead.
    """

    def __init__(self, model: nn.Module, log_probs: LogProbs, other: tuple[nn.Module, LogProbs] | None = None) -> None:
        self._mine = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._log_probs, self._stands_in = log_probs, other is None
        if other is None:
            self._weights: Mapping[str, Tensor] = {name: p.detach().clone() for name, p in self._mine.items()}
        else:
            self._weights, self._log_probs = dict(other[0].named_parameters()), other[1]

    def log_probs(self, micro_batches: Sequence[MicroBatch], lengths: Tensor) -> Tensor:
        """Log-probabilities ``[S]`` of the samples in ``micro_batches``, packed by ``lengths [N]``; 0 for others."""
        if not self._stands_in:
            return self._log_probs.without_gradient(micro_batches, lengths)
        with self._in_place():
            return self._log_probs.without_gradient(micro_batches, lengths)

    @contextmanager
    def _in_place(self) -> Iterator[None]:
        before = {name: p.data for name, p in self._mine.items()}
        try:
            for name, p in self._mine.items():
                p.data = self._weights[name]
            yield
        finally:
            for name, p in self._mine.items():
                p.data = before[name]

    def check_can_follow(self) -> None:
        """Raises UsageError if the reference has not the weights that are trained, and so cannot move towards them."""
        for name, p in self._mine.items():
            its = self._weights.get(name)
            if its is None or its.shape != p.shape:
                has = "none of that name" if its is None else f"one of shape {list(its.shape)}"
                raise UsageError(
                    f"sync_ref_model moves the reference towards the model, whose weight {name} has the shape "
                    f"{list(p.shape)}, but ref_model has {has}; give a ref_model of the same kind, leave it out (the "
                    "reference is then the model as it is now), or leave sync_ref_model out"
                )

    @torch.no_grad()
    def follow(self, alpha: float) -> None:
        """reference <- alpha * model + (1 - alpha) * reference (TR-DPO, arXiv 2404.09656), weight by weight."""
        for name, p in self._mine.items():
            self._weights[name].lerp_(p.to(self._weights[name]), alpha)

    def state(self) -> dict[str, Tensor]:
        """The weights that :meth:`follow` moves."""
        return {name: self._weights[name].detach() for name in self._mine}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        for name, value in state.items():
            self._weights[name].copy_(value)
