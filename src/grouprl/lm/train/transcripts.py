"""What is written of sampled completions: from samples and evaluations to the rows of `grouprl.runs.transcripts`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from grouprl.lm.generate.collect import ScoredGroups
from grouprl.lm.generate.samples import Samples
from grouprl.lm.prompts import Prompt
from grouprl.runs.transcripts import Transcript


def whole_groups(samples: Samples, at_least: int | Literal["all"]) -> int:
    """How many samples to keep for the first groups to be whole and ``at_least`` so many samples to be there."""
    size = len(samples) // len(samples.prompts)
    return len(samples) if at_least == "all" else min(-(-at_least // size) * size, len(samples))


def transcripts_of(samples: Samples, names: Sequence[str], step: int, n: int) -> Iterator[Transcript]:
    """The first ``n`` samples of a generation; ``names`` are those of the reward functions."""
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
    returns = drawn.returns.tolist()
    for i, completion in enumerate(drawn.completions):
        group = i // drawn.group_size
        yield _transcript(
            drawn.prompts[group], i, names, drawn.rewards.values, drawn.rewards.extras, step=0, group=group,
            completion=drawn.texts[i], tokens=len(completion.ids), finished=completion.finished, reward=returns[i],
            advantage=None,
        )  # fmt: skip


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
