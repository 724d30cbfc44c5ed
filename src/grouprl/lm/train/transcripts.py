"""What is written of sampled completions: from samples and evaluations to the rows of `grouprl.runs.transcripts`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

import torch
from torch import Tensor

from grouprl.lm.agents.interaction import Message
from grouprl.lm.generate.episodes import Episode
from grouprl.lm.generate.samples import Samples, Turns
from grouprl.lm.generate.scored_groups import ScoredGroups
from grouprl.lm.messages import message_text
from grouprl.lm.prompts import Prompt
from grouprl.objective.packed import segment_sum
from grouprl.runs.transcripts import Transcript


def whole_groups(samples: Samples, at_least: int | Literal["all"]) -> int:
    """How many samples to keep for the first groups to be whole and ``at_least`` so many samples to be there.

    Episodes count, and not the samples that they are divided into.
    """
    n = len(samples) if samples.turns is None else len(samples.turns.messages)
    size = n // len(samples.prompts)
    return n if at_least == "all" else min(-(-at_least // size) * size, n)


def transcripts_of(samples: Samples, names: Sequence[str], step: int, n: int) -> Iterator[Transcript]:
    """The first ``n`` samples of a generation, or episodes; ``names`` are those of the rewards."""
    if samples.turns is not None:
        yield from _episodes(samples, samples.turns, names, step, n)
        return
    starts = samples.lengths.cumsum(0) - samples.lengths
    for i in range(n):
        group = int(samples.group[i])
        yield _transcript(
            samples.prompts[group], i, names, samples.rewards, samples.extras, step=step, group=group,
            completion=samples.texts[i], tokens=int(samples.lengths[i]), finished=bool(samples.finished[i]),
            reward=float(samples.returns[i]), advantage=float(samples.advantages[int(starts[i])]),
        )  # fmt: skip


def transcripts_of_evaluation(drawn: ScoredGroups, names: Sequence[str]) -> Iterator[Transcript]:
    """All samples of an evaluation, or of a part of it."""
    returns, lengths, finished = drawn.returns.tolist(), drawn.lengths.tolist(), drawn.finished.tolist()
    for i, played in enumerate(drawn.completions):
        group = i // drawn.group_size
        turns = []
        if isinstance(played, Episode):
            turns = _turns(played.messages, played.start.prompt, played.spoken, played.rewards)
        yield _transcript(
            drawn.prompts[group], i, names, drawn.rewards.values, drawn.rewards.extras, step=0, group=group,
            completion=drawn.texts[i], tokens=lengths[i], finished=finished[i], reward=returns[i], advantage=None,
            turns=turns,
        )  # fmt: skip


def _episodes(samples: Samples, turns: Turns, names: Sequence[str], step: int, n: int) -> Iterator[Transcript]:
    """The first ``n`` episodes of a generation. The advantage of an episode is the mean of those of its turns."""
    parts = torch.bincount(turns.episode)
    firsts = (parts.cumsum(0) - parts).tolist()
    n_turns = segment_sum(samples.n_turns.double(), parts).long().tolist()
    lengths = segment_sum(samples.lengths.double(), parts).long().tolist()
    rewards = torch.split(turns.rewards, n_turns)
    advantages = torch.split(turns.advantages, n_turns)
    for e in range(n):
        i = firsts[e]
        group = int(samples.group[i])
        prompt = samples.prompts[group]
        yield _transcript(
            prompt, i, names, samples.rewards, samples.extras, step=step, group=group, completion=samples.texts[i],
            tokens=lengths[e], finished=not bool(turns.truncated[e]), reward=float(samples.returns[i]),
            advantage=float(advantages[e].mean()),
            turns=_turns(
                turns.messages[e], prompt.prompt, turns.spoken[e], rewards[e].tolist(), advantages[e].tolist()
            ),
        )  # fmt: skip


def _turns(
    messages: Sequence[Message], prompt: str | Sequence[Any], spoken: Sequence[int], rewards: Sequence[float],
    advantages: Sequence[float] | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """What followed the prompt, with reward and advantage of the turns of the model.

    Args:
        spoken: where in the messages the turns of the model are; if there are fewer, the last has the rest.
    """
    first = min([1 if isinstance(prompt, str) else len(prompt), *spoken])  # the first turn may continue the prompt
    said = [{"role": str(m["role"]), "text": message_text(m)} for m in messages[first:]]
    turns: list[dict[str, Any]] = list(said)
    for t, place in enumerate(spoken):
        of = slice(t, None if place == spoken[-1] else t + 1)
        turns[place - first]["reward"] = sum(rewards[of])
        turns[place - first]["advantage"] = None if advantages is None else fmean(advantages[of])
    return turns


def _transcript(
    prompt: Prompt, i: int, names: Sequence[str], rewards: Tensor, extras: Mapping[str, Sequence[Any]], **others: Any
) -> Transcript:
    """Sample ``i``, an answer to ``prompt``."""
    judged = zip(names, rewards[i].tolist(), strict=True)
    return Transcript(
        prompt_index=prompt.index, prompt=prompt.prompt,
        rewards={name: None if math.isnan(value) else value for name, value in judged},
        extra=prompt.columns | {name: column[i] for name, column in extras.items()}, **others,
    )  # fmt: skip
