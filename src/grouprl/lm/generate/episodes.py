"""Episodes as they were played: what sampling and the other side give, and samples to learn from are made of."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grouprl import objective
from grouprl.errors import UsageError, shown
from grouprl.lm.agents.interaction import Message
from grouprl.lm.generate.estimate import estimate_turns
from grouprl.lm.generate.old_policy import old_and_reference
from grouprl.lm.generate.samples import Samples, Turns
from grouprl.lm.messages import message_text
from grouprl.lm.policy.policy import Policy
from grouprl.lm.prompts import Prompt
from grouprl.lm.sample.turns import Sampled
from grouprl.lm.settings.config import GRPOConfig
from grouprl.objective import ESTIMATORS
from grouprl.objective.packed import last_index, segment_sum
from grouprl.objective.user_functions import TensorFunction


@dataclass(frozen=True)
class Episode:
    """One episode that was played.

    Attributes:
        start: the prompt that it began with. group: which start, counted from 0: members of a group may be compared.
        samples: one, or several if the history was rewritten; their turns one after the other are those of the episode.
        rewards: the reward of each turn; what a reward function gives for the whole episode is added to the last.
        terminated: it ended by its own rules. truncated: it was cut, by a budget or by the other side.
        states: identifies the state of each turn, or None where there is none.
        messages: the conversation as the model saw it, for reading and for reward functions.
        metrics: sums over its turns.
        spoken: where in the messages the turns of the model are; if there are fewer, the last has the rest.
    """

    start: Prompt
    group: int
    samples: Sequence[Sampled]
    rewards: Sequence[float]
    terminated: bool
    truncated: bool
    states: Sequence[Hashable | None]
    messages: Sequence[Message]
    metrics: Mapping[str, float] = field(default_factory=dict)
    spoken: Sequence[int] = ()


def samples_of_episodes(
    episodes: Sequence[Episode], config: GRPOConfig, *, policy: Policy | None = None, rewards: Tensor | None = None,
    weights: Tensor | None = None, own: TensorFunction | None = None, texts: Sequence[str] | None = None,
    extras: Mapping[str, Sequence[Any]] | None = None,
) -> Samples:  # fmt: skip
    """Samples to learn from, with an advantage for each turn that every token of the turn gets.

    An estimator compares episodes, however many samples an episode was divided into, and its steps are turns. What the
    settings take from rewards is taken here: for length from the last turn, for divergence from each turn its own.

    Args:
        episodes: E episodes. The number of a group is the index of its prompt in the samples.
        policy: computes log-probabilities; needed with kl_in="reward".
        rewards: ``[E, F]`` what each reward function gave, NaN where it does not apply; default: the return alone.
        weights: ``[F]`` of these; default: 1 each.
        own: a user's estimator, in the place of the settings'.
        texts: of each episode, what the model wrote; default: what its messages say.
        extras: columns logged by reward functions, E entries each.

    Raises TrainingError if rewards or advantages are too large to compute with.
    """
    parts = [(i, episode, sample) for i, episode in enumerate(episodes) for sample in episode.samples]
    of = torch.tensor([i for i, _, _ in parts])
    starts: dict[int, Prompt] = {}
    for episode in episodes:
        starts.setdefault(episode.group, episode.start)
    per_turn = torch.tensor([r for episode in episodes for r in episode.rewards], dtype=torch.float64)
    returns = segment_sum(per_turn, _n_turns(episodes))
    given = returns[:, None] if rewards is None else rewards
    written = [_written(episode) for episode in episodes] if texts is None else texts
    truncated = torch.tensor([episode.truncated for episode in episodes])
    logp = torch.cat([sample.logp for _, _, sample in parts])
    known = torch.zeros(len(logp), dtype=torch.bool)
    turns = Turns(
        spans=[sample.turns for _, _, sample in parts], contexts=[sample.prompt for _, _, sample in parts], episode=of,
        rewards=per_turn, advantages=torch.zeros(len(per_turn)),
        finished=torch.tensor([end for _, _, sample in parts for end in sample.finished]),
        terminated=torch.tensor([episode.terminated for episode in episodes]), truncated=truncated,
        messages=[list(episode.messages) for episode in episodes], metrics=[episode.metrics for episode in episodes],
        spoken=[list(episode.spoken) for episode in episodes],
    )  # fmt: skip
    samples = Samples(
        prompts=[starts[g] for g in range(len(starts))], group=torch.tensor([e.group for _, e, _ in parts]),
        completions=[sample.ids for _, _, sample in parts], finished=~truncated[of], logp_sampled=logp,
        texts=[written[i] for i in of.tolist()], rewards=given[of], returns=returns[of],
        advantages=torch.zeros(len(logp)), logp_old=torch.zeros(len(logp)), logp_ref=torch.zeros(len(logp)),
        known_old=known, known_ref=known.clone(),
        extras={name: [column[i] for i in of.tolist()] for name, column in (extras or {}).items()}, turns=turns,
    )  # fmt: skip
    penalties = _penalties(samples, episodes, config, policy)
    turns.advantages = turn_advantages(episodes, config, rewards=rewards, weights=weights, penalties=penalties, own=own)
    samples.advantages = turns.advantages.repeat_interleave(samples.turn_lengths)
    if own is None and ESTIMATORS[config.advantage].states:
        group = torch.tensor([episode.group for episode in episodes])
        turns.shared_states = objective.shared_states(_n_turns(episodes), group, _states(episodes))
    return samples


def turn_advantages(
    episodes: Sequence[Episode], config: GRPOConfig, *, rewards: Tensor | None = None, weights: Tensor | None = None,
    penalties: Tensor | None = None, own: TensorFunction | None = None,
) -> Tensor:  # fmt: skip
    """Advantages ``[T]`` float32 of the turns of all episodes, one episode after the other.

    Args:
        rewards, weights, own: as of :func:`samples_of_episodes`.
        penalties: ``[T]`` what is taken from the reward of each turn, or None.

    Raises TrainingError if rewards or advantages are too large to compute with.
    """
    per_turn = torch.tensor([r for episode in episodes for r in episode.rewards], dtype=torch.float64)
    lengths, group = _n_turns(episodes), torch.tensor([episode.group for episode in episodes])
    per_function = segment_sum(per_turn, lengths)[:, None] if rewards is None else rewards
    weights = torch.ones(per_function.shape[1], dtype=torch.float64) if weights is None else weights
    per_turn = per_turn if penalties is None else per_turn - penalties
    return estimate_turns(config, per_turn, per_function, weights, lengths, group, lambda: _states(episodes), own)


def _n_turns(episodes: Sequence[Episode]) -> Tensor:
    return torch.tensor([len(episode.rewards) for episode in episodes], dtype=torch.int64)


def _penalties(samples: Samples, episodes: Sequence[Episode], config: GRPOConfig, policy: Policy | None) -> Tensor:
    """``[T]`` what the settings take from the reward of each turn; fills the samples' log-probabilities if need be."""
    n_turns, taken = _n_turns(episodes), torch.zeros(len(samples.turn_lengths), dtype=torch.float64)
    taken[last_index(n_turns)] -= overlong(episodes, config)
    if config.kl_in == "reward" and policy is not None and policy.reference is not None:
        assert samples.turns is not None
        prompts, group = samples.contexts
        logp_old, logp_ref = old_and_reference(
            policy, prompts, samples.completions, group.tolist(), samples.lengths, samples.turns.spans
        )
        everything = torch.arange(len(samples.logp_old))
        samples.remember_old(everything, logp_old)
        samples.remember_reference(everything, logp_ref)
        kl = objective.kl_in_reward(
            torch.zeros_like(samples.logp_old), samples.logp_old, samples.logp_ref, config.beta, config.kl_estimator
        )
        taken -= segment_sum(kl.double(), samples.turn_lengths)
    return taken


def overlong(episodes: Sequence[Episode], config: GRPOConfig) -> Tensor:
    """``[E]`` float64, at most 0: what ``soft_overlong_cache`` adds to the return of each, by its longest sample."""
    longest = torch.tensor([max(len(sample.ids) for sample in episode.samples) for episode in episodes])
    if config.soft_overlong_cache is None:
        return torch.zeros(len(longest), dtype=torch.float64)
    return objective.soft_overlong(longest, config.max_completion_length, config.soft_overlong_cache).double()


def _states(episodes: Sequence[Episode]) -> Tensor:
    """``[T]`` int64, equal where the states of turns are: the user's, or what the model read just before the turn."""
    numbers: dict[Hashable, int] = {}
    found = []
    for episode in episodes:
        read = _read_before_turns(episode)
        for t, (state, seen) in enumerate(zip(episode.states, read, strict=True)):
            try:
                found.append(numbers.setdefault((state is None, seen if state is None else state), len(numbers)))
            except TypeError:
                raise UsageError(
                    f"the state of turn {t + 1} is {shown(state)}, which cannot be told from others as it has no hash; "
                    "make it a string, a number, or a tuple of them"
                ) from None
    return torch.tensor(found, dtype=torch.int64)


def _read_before_turns(episode: Episode) -> Iterator[tuple[int, ...]]:
    """For each turn, the token ids between it and the turn before; the prompt before the first turn of a sample."""
    for sample in episode.samples:
        end = 0
        for start, stop in sample.turns:
            yield tuple(sample.ids[end:start]) if end else (*sample.prompt, *sample.ids[:start])
            end = stop


def _written(episode: Episode) -> str:
    """What the model said in an episode, its turns on lines of their own."""
    return "\n".join(message_text(m) for m in episode.messages if m.get("role") == "assistant")
