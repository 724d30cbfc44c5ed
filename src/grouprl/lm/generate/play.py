"""Playing episodes: prompts become conversations with tools or an environment, and these become samples."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from grouprl.errors import UsageError, shown
from grouprl.lm.agents.chat_format import ChatFormat
from grouprl.lm.agents.conversation import Conversation, Conversations, Rules
from grouprl.lm.agents.interactions import Interactions, name_of
from grouprl.lm.generate.episodes import Episode, overlong, samples_of_episodes, turn_advantages
from grouprl.lm.generate.samples import Samples
from grouprl.lm.generate.scored_groups import Metrics, ScoredGroups
from grouprl.lm.messages import conversation_text
from grouprl.lm.policy.policy import Policy
from grouprl.lm.prompts import Prompt
from grouprl.lm.rewards.call import RewardCaller, total
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.streams import Draws, Stream
from grouprl.lm.sample.turns import Sampled
from grouprl.lm.settings.config import GRPOConfig
from grouprl.objective.user_functions import TensorFunction

_log = logging.getLogger("grouprl")
TURN_REWARDS = "environment"
"""The name of the sum of the rewards that an environment gave in the turns of an episode."""

_OF_TOOLS = ("tools/calls", "tools/failures", "tools/parse_failures", "tools/timeouts")


class EpisodeGroups(ScoredGroups):
    """Groups of episodes with their rewards; ``completions`` are the episodes."""

    completions: list[Episode]

    @property
    def lengths(self) -> Tensor:
        """``[N]`` tokens that the model wrote."""
        return torch.tensor([sum(len(sample.logp) for sample in e.samples) for e in self.completions])

    @property
    def finished(self) -> Tensor:
        """``[N]`` bool: whether nothing cut the episode off."""
        return torch.tensor([not e.truncated for e in self.completions])

    @property
    def n_tokens(self) -> int:
        """Tokens of all samples, their prompts and those of the other side included."""
        return sum(len(sample.prompt) + len(sample.ids) for e in self.completions for sample in e.samples)

    def metrics(self) -> Metrics:
        """How long episodes are and how they ended; sums over turns that tools and environments count."""
        episodes = self.completions
        turns = [len(e.rewards) for e in episodes]
        counted: dict[str, float] = {}
        for e in episodes:
            for name, value in e.metrics.items():
                counted[name] = counted.get(name, 0.0) + value
        n = len(episodes)
        calls, failures = counted.pop("tools/calls", None), counted.pop("tools/failures", 0.0)
        of_tools = {} if calls is None else {
            "tools/call_frequency": calls / n, "tools/failure_frequency": failures / calls if calls else 0.0,
        }  # fmt: skip
        return {
            "episodes/mean_turns": sum(turns) / n, "episodes/max_turns": float(max(turns)),
            "episodes/terminated": sum(e.terminated for e in episodes) / n,
            "episodes/truncated": sum(e.truncated for e in episodes) / n,
            **of_tools, **{name: value / n for name, value in counted.items()},
        }  # fmt: skip

    def numbered(self) -> list[Episode]:
        """The episodes, with the numbers of their groups here: they may have come from several draws or processes."""
        return [replace(e, group=i // self.group_size) for i, e in enumerate(self.completions)]

    def leave_out_columns(self) -> None:
        """As `ScoredGroups.leave_out_columns`."""
        super().leave_out_columns()
        self.completions = [replace(e, start=replace(e.start, columns={})) for e in self.completions]

    def take_columns(self, rows: Sequence[Prompt]) -> None:
        """As `ScoredGroups.take_columns`."""
        super().take_columns(rows)
        of_each = [row.columns for row in rows for _ in range(self.group_size)]
        played = zip(self.completions, of_each, strict=True)
        self.completions = [replace(e, start=replace(e.start, columns=columns)) for e, columns in played]

    def solved(self, reward: float = 1.0, by: str | None = None) -> list[bool]:
        """``[N]`` whether an episode was solved: as its environment says, unless ``by`` is given, else by reward."""
        by_return = super().solved(reward, by)
        if by is not None:
            return by_return
        return [bool(e.metrics.get("success", right)) for e, right in zip(self.completions, by_return, strict=True)]

    def signal(self, config: GRPOConfig, own: TensorFunction | None) -> list[bool]:
        """For each group whether one of its turns has an advantage."""
        advantages = turn_advantages(
            self.numbered(), config, rewards=self.rewards.values, weights=self.weights, own=own
        )
        per_episode = torch.split(advantages, [len(e.rewards) for e in self.completions])
        found = [bool((part != 0).any()) for part in per_episode]
        return [any(found[g * self.group_size : (g + 1) * self.group_size]) for g in range(self.n_prompts)]


class EpisodePlayer:
    """Episodes of several turns.

    Args:
        policy: samples the turns of the model. form: renders and reads messages.
        interactions: the other sides. rewards: judge whole episodes, after the environment has.
    """

    def __init__(
        self, policy: Policy, form: ChatFormat, interactions: Interactions, rewards: RewardCaller, config: GRPOConfig
    ) -> None:
        self.policy, self.form, self.interactions, self.config = policy, form, interactions, config
        self._judge_by(rewards)
        self._rules = Rules(
            config.max_turns, config.history == "turn", config.tool_timeout, config.max_tool_output,
            counted=_OF_TOOLS if interactions.has_tools else (),
        )  # fmt: skip
        if interactions.has_tools and form.unread is not None:
            _log.warning("the chat template shows tools, but tools and calls are text of grouprl's: %s", form.unread)
        if form.rewrites is not None and not self._rules.anew:
            _log.warning(
                "the chat template %s, and here they stay: what was sampled is what is learned from. Serve the model "
                "with a template that keeps them, or set history='turn'", form.rewrites,
            )  # fmt: skip

    def _judge_by(self, rewards: RewardCaller) -> None:
        given = [TURN_REWARDS] if self.interactions.gives_rewards else []
        self.rewards, self.names = rewards, (*rewards.names, *given)
        self.weights = torch.cat([rewards.weights, torch.ones(len(given), dtype=torch.float64)])

    def draw(
        self, prompts: list[Prompt], group_size: int, stream: Stream | Draws, numbers: Sequence[int],
        settings: SamplingSettings | None = None, state: Any = None,
    ) -> EpisodeGroups:  # fmt: skip
        """As `Player.draw`; members of a group start equal."""
        running: list[Conversation] = []
        try:
            for row, number in zip(prompts, numbers, strict=True):
                self._begin(row, number, group_size, running)
            starts = [conversation.start for conversation in running[::group_size]]
            partner = Conversations(running)
            sampled = self.policy.sample_episodes(
                [start.ids for start in starts], group_size, stream, partner, settings
            )
            partner.check()
            for conversation in running:
                conversation.cut()
            return self._judged(starts, group_size, running, sampled, state)
        finally:
            for conversation in running:
                self.interactions.give_back(conversation.row, conversation.interaction, broken=conversation.broken)

    def returns(self, groups: EpisodeGroups) -> Tensor:
        """As `Player.returns`."""
        return groups.returns + overlong(groups.completions, self.config)

    def samples(self, groups: EpisodeGroups, own: TensorFunction | None) -> Samples:
        """As `Player.samples`."""
        return samples_of_groups(groups, self.policy, self.config, own)

    def judged_by(self, rewards: RewardCaller) -> EpisodePlayer:
        """As `Player.judged_by`; both play in the same environments."""
        other = copy.copy(self)
        other._judge_by(rewards)
        return other

    def close(self) -> None:
        """As `Player.close`: close the environments."""
        self.interactions.close()

    def check_format(self) -> None:
        """Raises UsageError if conversations cannot be appended to, and would have to be."""
        if self.form.fault is not None and not self._rules.anew and self.config.max_turns != 1:
            raise UsageError(
                f"{self.form.fault}; give the tokenizer another chat_template, or set history='turn', which renders "
                "each turn anew"
            )

    def _begin(self, row: Prompt, number: int, group_size: int, running: list[Conversation]) -> None:
        """Begin the episodes of a group, and add them to those that are running."""
        seed = group_seed(self.config.seed, number)
        bare = not row.prompt and not row.columns  # as where there is no dataset
        where = f"start {number} (seed {seed})" if bare else f"row {row.index} of the dataset"
        first: Conversation | None = None
        for _ in range(group_size):
            interaction, prompt = self.interactions.begin(row, seed, where)
            if first is None:
                if not isinstance(prompt, str):
                    self.check_format()
                start = self.form.first(prompt, interaction.tools, row, where)
            elif prompt != first.start.prompt:
                raise UsageError(
                    f"{name_of(interaction)} began {where} with {shown(first.start.prompt)}, and then for another "
                    f"member of the group with {shown(prompt)}; members of a group are compared, so they must start "
                    "equal: let reset take an argument seed, and draw from it alone"
                )
            running.append(Conversation(interaction, row, start, self.form, self._rules))
            first = first or running[-1]

    def _judged(
        self, starts: list[Prompt], group_size: int, running: list[Conversation], sampled: list[list[Sampled]],
        state: Any,
    ) -> EpisodeGroups:  # fmt: skip
        ids = [[token for sample in samples for token in sample.ids] for samples in sampled]
        said: list[Any] = [conversation.completion for conversation in running]
        rows = [conversation.start for conversation in running]
        environments = [getattr(c.interaction, "environment", c.interaction) for c in running]
        judged = self.rewards(rows, said, ids, state, environments=environments)
        totals = total(judged.values, self.rewards.weights).tolist()
        if self.interactions.gives_rewards:
            given = [sum(c.rewards) if c.interaction.gives_rewards else math.nan for c in running]
            values = torch.cat([judged.values, torch.tensor(given, dtype=torch.float64)[:, None]], 1)
            judged = replace(judged, values=values, names=self.names)
        episodes = [
            Episode(
                start=c.start, group=i // group_size, samples=samples,
                rewards=[*c.rewards[:-1], c.rewards[-1] + of_all], terminated=c.terminated, truncated=c.truncated,
                states=c.states, messages=c.messages, metrics=c.metrics, spoken=c.spoken,
            )
            for i, (c, samples, of_all) in enumerate(zip(running, sampled, totals, strict=True))
        ]  # fmt: skip
        texts = [said if isinstance(said, str) else conversation_text(said) for said in said]
        return EpisodeGroups(starts, group_size, episodes, texts, judged, self.weights)


def samples_of_groups(
    groups: EpisodeGroups, policy: Policy, config: GRPOConfig, own: TensorFunction | None
) -> Samples:  # fmt: skip
    """What is learned from groups of episodes."""
    return samples_of_episodes(
        groups.numbered(), config, policy=policy, rewards=groups.rewards.values, weights=groups.weights,
        texts=groups.texts, extras=groups.rewards.extras, own=own,
    )  # fmt: skip


def group_seed(seed: int, number: int) -> int:
    """The seed from which the members of a group start: 31 bits of (seed of the run, number of the group)."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0]) >> 1
