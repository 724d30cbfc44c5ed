"""Playing completions: a prompt, what the model writes behind it, and what that becomes to learn from."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from grouprl import objective
from grouprl.errors import first_line
from grouprl.lm.agents.responses import has_response_template, read_response
from grouprl.lm.generate.estimate import estimate_advantages
from grouprl.lm.generate.old_policy import old_and_reference
from grouprl.lm.generate.samples import Samples
from grouprl.lm.generate.scored_groups import ScoredGroups
from grouprl.lm.policy.policy import Policy
from grouprl.lm.prompts import Prompt
from grouprl.lm.rewards.call import RewardCaller
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.rows import Completion
from grouprl.lm.sample.streams import Draws, Stream
from grouprl.lm.settings.config import GRPOConfig
from grouprl.objective.user_functions import TensorFunction

_log = logging.getLogger("grouprl")


class CompletionPlayer:
    """Completions: a prompt, and what the model writes behind it.

    Args:
        policy: samples the completions. tokenizer: decodes them. rewards: scores them.
    """

    def __init__(self, policy: Policy, tokenizer: Any, rewards: RewardCaller, config: GRPOConfig) -> None:
        self.policy, self.tokenizer, self.rewards, self.config = policy, tokenizer, rewards, config
        self.names = rewards.names

    def draw(
        self, prompts: list[Prompt], group_size: int, stream: Stream | Draws, numbers: Sequence[int],
        settings: SamplingSettings | None = None, state: Any = None,
    ) -> ScoredGroups:  # fmt: skip
        """As `Player.draw`."""
        return sample_and_score(
            self.policy, self.tokenizer, self.rewards, prompts, group_size, stream, settings, state,
            skip_special_tokens=self.config.skip_special_tokens,
        )  # fmt: skip

    def returns(self, groups: ScoredGroups) -> Tensor:
        """As `Player.returns`."""
        most, cache = self.config.max_completion_length, self.config.soft_overlong_cache
        if cache is None:
            return groups.returns
        return groups.returns + objective.soft_overlong(groups.lengths, most, cache).to(groups.returns)

    def samples(self, groups: ScoredGroups, own: TensorFunction | None) -> Samples:
        """As `Player.samples`."""
        config = self.config
        completions = [c.ids for c in groups.completions]
        lengths, returns = groups.lengths, self.returns(groups)
        group = torch.arange(groups.n_prompts).repeat_interleave(groups.group_size)
        n = int(lengths.sum())
        logp_old, logp_ref, known = torch.zeros(n), torch.zeros(n), torch.zeros(n, dtype=torch.bool)
        penalties = None
        if self.policy.reference is not None and config.kl_in == "reward":
            logp_old, logp_ref = old_and_reference(
                self.policy, [p.ids for p in groups.prompts], completions, group.tolist(), lengths
            )
            known = ~known
            penalties = -objective.kl_in_reward(
                torch.zeros_like(logp_old), logp_old, logp_ref, config.beta, config.kl_estimator
            )
        advantages = estimate_advantages(
            config, groups.rewards.values, self.rewards.weights, returns, lengths, group, penalties, own
        )
        return Samples(
            prompts=groups.prompts, group=group, completions=completions,
            finished=groups.finished,
            logp_sampled=torch.cat([c.logp for c in groups.completions]), texts=groups.texts,
            rewards=groups.rewards.values, returns=returns, advantages=advantages,
            logp_old=logp_old, logp_ref=logp_ref, known_old=known, known_ref=known.clone(),
            extras=groups.rewards.extras,
        )  # fmt: skip

    def judged_by(self, rewards: RewardCaller) -> CompletionPlayer:
        """As `Player.judged_by`."""
        return CompletionPlayer(self.policy, self.tokenizer, rewards, self.config)

    def close(self) -> None:
        """As `Player.close`: there is nothing."""


def sample_and_score(
    policy: Policy, tokenizer: Any, rewards: RewardCaller, prompts: list[Prompt], group_size: int,
    stream: Stream | Draws, settings: SamplingSettings | None = None, state: Any = None, *,
    skip_special_tokens: bool = False,
) -> ScoredGroups:  # fmt: skip
    """Sample ``group_size`` completions of each prompt and call the reward functions.

    Args:
        stream: where the random numbers come from.
        settings: how to sample; default: as the policy's configuration says.
        state: the trainer's state, handed to reward functions.
        skip_special_tokens: leave all special tokens out of the texts, and not only those that end or fill.

    Raises UsageError or TrainingError if a reward function fails or returns something else than numbers.
    """
    completions = policy.sample([p.ids for p in prompts], group_size, stream, settings)
    texts = texts_of(completions, tokenizer, skip_special_tokens)
    rows = [p for p in prompts for _ in range(group_size)]
    said = as_messages(texts, rows, completions, tokenizer, skip_special_tokens)
    values = rewards(rows, said, [c.ids for c in completions], state)
    return ScoredGroups(prompts, group_size, completions, texts, values, rewards.weights)


def texts_of(completions: Sequence[Completion], tokenizer: Any, skip_special_tokens: bool) -> list[str]:
    """What the model wrote, without the token that ended it and without padding."""
    padding = getattr(tokenizer, "pad_token_id", None)
    ids = [[t for t in (c.ids[:-1] if c.finished and not c.stopped else c.ids) if t != padding] for c in completions]
    return list(tokenizer.batch_decode(ids, skip_special_tokens=skip_special_tokens))


def as_messages(
    texts: Sequence[str], rows: Sequence[Prompt], completions: Sequence[Completion], tokenizer: Any,
    skip_special_tokens: bool,
) -> list[str | list[dict[str, Any]]]:  # fmt: skip
    """Completions as rewards read them: the messages that the tokenizer's response template makes, and texts.

    A completion stays text if its prompt is text, or if the template cannot read it. ``rows`` holds the prompt of each.
    """
    if not has_response_template(tokenizer):
        return list(texts)
    said: list[str | list[dict[str, Any]]] = []
    whole = texts_of(completions, tokenizer, False) if skip_special_tokens else texts
    for text, raw, row, completion in zip(texts, whole, rows, completions, strict=True):
        said.append(text)
        if isinstance(row.prompt, str):
            continue
        begun = str(row.completion("")[0]["content"])  # type: ignore[index]
        opening = tokenizer.decode(list(row.ids)).removesuffix(begun)
        end = tokenizer.decode(completion.ids[-1:]) if completion.finished and not completion.stopped else ""
        try:
            read = read_response(tokenizer, begun + raw, end, opening, skip_special_tokens=skip_special_tokens)
        except Exception as error:  # templates raise what they like
            _log.debug("the response template cannot read a completion: %s", first_line(error))
        else:
            said[-1] = [read]
    return said
