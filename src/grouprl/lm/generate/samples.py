"""What a generation yields and an optimizer step learns from: completions with their rewards, packed."""

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
        logp_old, logp_ref: ``[S]`` under the policy at sampling time and the reference, both by the learner; entries
            are filled when first needed (``known_old`` and ``known_ref`` say where).
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


def parts_of_a_generation(n: int, n_parts: int) -> list[Tensor]:
    """Split ``n`` samples into the minibatches of ``n_parts`` optimizer steps, by index, equally and in order.

    The prompts were drawn in random order, so nothing is shuffled, and groups stay together where the numbers allow.
    """
    return list(torch.split(torch.arange(n), n // n_parts))
