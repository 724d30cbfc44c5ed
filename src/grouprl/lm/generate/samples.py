"""The samples of a generation: completions with rewards and advantages, packed; optimizer steps learn from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from grouprl.lm.prompts import Prompt


@dataclass
class Samples:
    """N completions of P prompts; S tokens in all, those of sample 0 first.

    Attributes:
        prompts: P drawn prompts. group: ``[N]`` which of them each completion answers.
        completions: token ids of each, as sampled.
        finished: ``[N]`` bool, ended by itself. logp_sampled: ``[S]`` as the sampler drew them.
        texts: decoded completions, special tokens left out.
        rewards: ``[N, F]`` float64, NaN where a function does not apply. returns: ``[N]`` their weighted sum.
        advantages: ``[S]``, fixed for as long as the samples are learned from.
        logp_old, logp_ref: ``[S]`` log-probabilities in nats under the policy at sampling time and under the reference,
            both by the model as it learns. Entries are filled when first needed: :meth:`remember_old` and
            :meth:`remember_reference` write them, ``known_old`` and ``known_ref`` ``[S]`` bool say which are there.
        extras: columns logged by reward functions, N entries each.
    """

    prompts: list[Prompt]
    group: Tensor
    completions: list[list[int]]
    finished: Tensor
    logp_sampled: Tensor
    texts: list[str]
    rewards: Tensor
    returns: Tensor
    advantages: Tensor
    logp_old: Tensor
    logp_ref: Tensor
    known_old: Tensor
    known_ref: Tensor
    extras: dict[str, list[Any]] = field(default_factory=dict)

    @cached_property
    def lengths(self) -> Tensor:
        """``[N]`` tokens of each completion."""
        return torch.tensor([len(c) for c in self.completions], dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.completions)

    def knows_old(self, index: Tensor) -> bool:
        """Whether ``logp_old`` is there for all tokens in ``index [m]``."""
        return bool(self.known_old[index].all())

    def knows_reference(self, index: Tensor) -> bool:
        """Whether ``logp_ref`` is there for all tokens in ``index [m]``."""
        return bool(self.known_ref[index].all())

    def remember_old(self, index: Tensor, logp: Tensor) -> None:
        """Store log-probabilities ``logp [m]`` of the tokens in ``index [m]`` under the policy at sampling time."""
        self.logp_old[index], self.known_old[index] = logp, True

    def remember_reference(self, index: Tensor, logp: Tensor) -> None:
        """Store log-probabilities ``logp [m]`` of the tokens in ``index [m]`` under the reference."""
        self.logp_ref[index], self.known_ref[index] = logp, True

    def forget_reference(self) -> None:
        """Have ``logp_ref`` computed again: for a reference that has moved."""
        self.known_ref.zero_()


def split_into_steps(n: int, n_steps: int) -> list[Tensor]:
    """Split ``n`` samples into the minibatches of ``n_steps`` optimizer steps, by index, equally and in order.

    The prompts were drawn in random order, so nothing is shuffled, and groups stay together where the numbers allow.
    """
    return list(torch.split(torch.arange(n), n // n_steps))
