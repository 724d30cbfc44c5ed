"""The samples of a generation: completions with rewards and advantages, packed; optimizer steps learn from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from grouprl.lm.packed.packing import Spans
from grouprl.lm.prompts import Prompt
from grouprl.machine.ranks import Ranks
from grouprl.objective.packed import segment_sum


@dataclass
class Turns:
    """What samples of episodes of several turns are made of: E episodes, T turns in all, those of sample 0 first.

    An episode is one sample, or several where its history was rewritten. The samples of an episode stand together.

    Attributes:
        spans: for each of the N samples, where the turns of the model lie in its completion.
        contexts: for each sample the token ids of its prompt.
        episode: ``[N]`` int64, which episode each sample is a part of, counted from 0.
        rewards: ``[T]`` float64. advantages: ``[T]`` float32. finished: ``[T]`` bool, ended by an end token.
        terminated, truncated: ``[E]`` bool, how the episode ended.
        messages: for each episode the conversation.
        metrics: for each episode the sums over its turns.
        spoken: for each episode where in its messages the turns of the model are.
        shared_states: share of the turns whose state another turn of their group was in; None if nobody asks.
    """

    spans: list[Spans]
    contexts: list[Sequence[int]]
    episode: Tensor
    rewards: Tensor
    advantages: Tensor
    finished: Tensor
    terminated: Tensor
    truncated: Tensor
    messages: list[list[Mapping[str, Any]]]
    metrics: list[Mapping[str, float]]
    spoken: list[list[int]]
    shared_states: float | None = None


@dataclass
class Samples:
    """N completions of P prompts. The model wrote S tokens in all, those of sample 0 first.

    Attributes:
        prompts: P drawn prompts. group: ``[N]`` which of them each completion answers.
        completions: token ids of each: as sampled, and between the turns of an episode those of the model's partner.
        finished: ``[N]`` bool, ended by itself. logp_sampled: ``[S]`` as the sampler drew them.
        texts: decoded completions, special tokens left out.
        rewards: ``[N, F]`` float64, NaN where a function does not apply. returns: ``[N]`` their weighted sum.
        advantages: ``[S]``, fixed for as long as the samples are learned from.
        logp_old, logp_ref: ``[S]`` log-probabilities in nats under the policy at sampling time and under the reference,
            both by the model as it learns. Entries are filled when first needed: :meth:`remember_old` and
            :meth:`remember_reference` write them, ``known_old`` and ``known_ref`` ``[S]`` bool say which are there.
        extras: columns logged by reward functions, N entries each.
        sampled_elsewhere: whether a function of the user's sampled, by a policy that only ``logp_sampled`` tells of.
        turns: what the samples have beside if they are those of episodes of several turns, or None.
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
    sampled_elsewhere: bool = False
    turns: Turns | None = None

    @cached_property
    def lengths(self) -> Tensor:
        """``[N]`` the model's tokens in each completion."""
        if self.turns is None:
            return torch.tensor([len(c) for c in self.completions], dtype=torch.int64)
        return segment_sum(self.turn_lengths, self.n_turns)

    @cached_property
    def n_turns(self) -> Tensor:
        """``[N]`` turns of each sample: 1 where samples are completions."""
        n = [1] * len(self) if self.turns is None else [len(spans) for spans in self.turns.spans]
        return torch.tensor(n, dtype=torch.int64)

    @cached_property
    def turn_lengths(self) -> Tensor:
        """``[T]`` tokens of each turn, those of sample 0 first."""
        if self.turns is None:
            return self.lengths
        return torch.tensor([stop - start for spans in self.turns.spans for start, stop in spans], dtype=torch.int64)

    @cached_property
    def episode(self) -> Tensor:
        """``[N]`` int64, which episode each sample is a part of: a completion is an episode of its own."""
        return torch.arange(len(self)) if self.turns is None else self.turns.episode

    @cached_property
    def contexts(self) -> tuple[list[Sequence[int]], Tensor]:
        """The token ids of all prompts that the model read, and for each sample ``[N]`` which of them it follows."""
        if self.turns is None:
            return [prompt.ids for prompt in self.prompts], self.group
        found: dict[tuple[int, tuple[int, ...]], int] = {}
        group = [
            found.setdefault((g, tuple(ids)), len(found))
            for g, ids in zip(self.group.tolist(), self.turns.contexts, strict=True)
        ]
        return [ids for _, ids in found], torch.tensor(group, dtype=torch.int64)

    def steps(self, n_steps: int) -> list[Tensor]:
        """The samples of each of ``n_steps`` optimizer steps, by index: whole episodes, shared out equally in order.

        The prompts were drawn in random order, so nothing is shuffled, and groups stay together where numbers allow.
        """
        n_episodes = int(self.episode[-1]) + 1
        ends = torch.arange(1, n_steps + 1) * n_episodes // n_steps - 1
        stops = torch.searchsorted(self.episode, ends, right=True).tolist()
        return [torch.arange(start, stop) for start, stop in zip([0, *stops], stops, strict=False)]

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

    def share_known(self, ranks: Ranks) -> None:
        """Have every process know the log-probabilities that any of them knows."""
        for logp, known in ((self.logp_old, self.known_old), (self.logp_ref, self.known_ref)):
            for theirs, are_known in ranks.gather((logp, known)):
                fresh = are_known & ~known
                logp[fresh] = theirs[fresh]
                known |= fresh

    def forget_reference(self) -> None:
        """Have ``logp_ref`` computed again: for a reference that has moved."""
        self.known_ref.zero_()
