"""The reference model of the KL divergence: the model as it was at the start of the run, or another model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from grouprl.errors import TrainingError, UsageError
from grouprl.learning.shards import exchange, held, put
from grouprl.lm.policy.log_probs import LogProbs, MicroBatch
from grouprl.lm.sample.finite import NotFiniteError


class Reference:
    """Computes log-probabilities under the reference model, which is not trained.

    By default the reference is the model as it is now. The constructor copies the trainable weights. :meth:`log_probs`
    puts the copies into the model and restores the model's weights afterwards. So the reference and the model run the
    same code and agree to the last bit. Frozen weights, such as the weights below an adapter, are not copied. If an
    adapter was trained before, the reference includes it.

    Args:
        model: the model in training.
        log_probs: computes log-probabilities under the model.
        other: another model as the reference, and the :class:`LogProbs` of this model. None makes the model itself the
            reference.
    """

    def __init__(self, model: nn.Module, log_probs: LogProbs, other: tuple[nn.Module, LogProbs] | None = None) -> None:
        self._mine = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._log_probs, self._stands_in, self._is_in_place = log_probs, other is None, False
        if other is None:
            self._weights: Mapping[str, Tensor] = {name: p.detach().clone() for name, p in self._mine.items()}
        else:
            self._weights, self._log_probs = dict(other[0].named_parameters()), other[1]

    def log_probs(self, micro_batches: Sequence[MicroBatch], lengths: Tensor) -> Tensor:
        """Compute log-probabilities under the reference, without gradients and without dropout.

        Args:
            micro_batches: the samples to evaluate.
            lengths: ``[N]`` int64, the numbers of the model's tokens in all N samples.

        Returns:
            Log-probabilities ``[S]`` float32 in nats of all S tokens of the model in the N samples, sample after
            sample. Samples that are in no micro-batch have 0.

        Raises:
            TrainingError: some are not finite.
        """
        try:
            with self.in_place():
                return self._log_probs.without_gradient(micro_batches, lengths)
        except NotFiniteError as error:
            raise TrainingError(f"of the reference of the KL divergence, {error}") from None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Put the weights of the reference into the model while the context is open.

        :meth:`log_probs` does so by itself. But a sharded model is the reference in all processes or in none, so those
        that have nothing to compute come here too.
        """
        if self._is_in_place or not self._stands_in:
            yield
            return
        self._swap()
        self._is_in_place = True
        try:
            yield
        finally:
            self._is_in_place = False
            self._swap()

    def _swap(self) -> None:
        for name, p in self._mine.items():
            exchange(p, self._weights[name])

    def check_can_follow(self) -> None:
        """Check that :meth:`follow` can move the reference towards the model.

        Raises:
            UsageError: the reference lacks a trainable weight of the model, or has it in another shape.
        """
        for name, p in self._mine.items():
            weight = self._weights.get(name)
            if weight is None or weight.shape != p.shape:
                has = "none of that name" if weight is None else f"one of shape {list(weight.shape)}"
                raise UsageError(
                    f"sync_ref_model moves the reference towards the model, whose weight {name} has the shape "
                    f"{list(p.shape)}, but ref_model has {has}; give a ref_model of the same kind, leave it out (the "
                    "reference is then the model as it is now), or leave sync_ref_model out"
                )

    @torch.no_grad()
    def follow(self, alpha: float) -> None:
        """Move the reference towards the model: reference <- alpha * model + (1 - alpha) * reference, for each weight.

        This is the soft update of TR-DPO (arXiv 2404.09656).

        Args:
            alpha: the share of the model, in [0, 1].
        """
        for name, p in self._mine.items():
            to = held(self._weights[name])
            to.lerp_(held(p).to(to), alpha)

    def state(self) -> dict[str, Tensor]:
        """The weights that :meth:`follow` changes, by name."""
        return {name: self._weights[name].detach() for name in self._mine}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore the weights from a dictionary that :meth:`state` returned."""
        for name, value in state.items():
            put(self._weights[name], value)
