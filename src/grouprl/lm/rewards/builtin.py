"""Rewards that need no package and no model: format, exact match, length, repetition.

Each is a factory that returns a reward function (see :mod:`grouprl.lm.rewards.text`) whose name is that of its metrics.
Add them up by giving a trainer several, with weights.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from grouprl.errors import UsageError
from grouprl.lm.rewards.text import Completion, RewardFunction, column, completion_text, named

__all__ = [
    "accuracy",
    "completion_text",
    "cosine_length",
    "matches",
    "repetition_penalty",
    "soft_overlong",
    "think_answer_format",
]

_NO_TAG = r"(?:(?!</?(?:think|answer)>).)*"
_THINK_ANSWER = rf"(?s)\s*<think>{_NO_TAG}</think>\s*<answer>{_NO_TAG}</answer>\s*"


def matches(pattern: str, name: str = "matches") -> RewardFunction:
    """1 where the regular expression `pattern` matches the whole completion, else 0.

    A dot does not match a line break unless the pattern begins with (?s). Raises UsageError if it is no pattern.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{pattern!r} is no regular expression: {error}.") from error

    def reward(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        return [float(compiled.fullmatch(completion_text(completion)) is not None) for completion in completions]

    return named(reward, name)


def think_answer_format() -> RewardFunction:
    """1 where the completion is exactly <think>...</think><answer>...</answer>, each tag once, else 0.

    White space may stand before, between and after. Source: the format reward of DeepSeek-R1, arXiv 2501.12948.
    """
    return matches(_THINK_ANSWER, "think_answer_format")


def accuracy(answer: str = "answer") -> RewardFunction:
    """1 where the completion is the entry of the column `answer`, white space around them aside, else 0.

    None where that entry is None. The function raises UsageError if the column is missing.
    """

    def reward(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        answers = column(answer, columns, len(completions), "accuracy")
        return [
            None if right is None else float(completion_text(completion).strip() == str(right).strip())
            for completion, right in zip(completions, answers, strict=True)
        ]

    return named(reward, "accuracy")


def soft_overlong(max_completion_length: int, cache: int) -> RewardFunction:
    """0 up to L - cache tokens, then falling linearly to -1 at L = max_completion_length, and -1 beyond.

    See :func:`grouprl.objective.soft_overlong`. Raises UsageError unless 0 <= cache <= L and L >= 1.
    """
    import torch

    from grouprl.objective import soft_overlong as penalty

    def values(lengths: list[int]) -> list[float | None]:
        return [
            float(value) for value in penalty(torch.tensor(lengths, dtype=torch.int64), max_completion_length, cache)
        ]

    values([])  # wrong arguments are an error now, not after the first rollout

    def reward(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        return values(_lengths(completions, columns, "soft_overlong"))

    return named(reward, "soft_overlong")


def cosine_length(
    correct: RewardFunction,
    max_completion_length: int,
    *,
    correct_short: float = 2.0,
    correct_long: float = 1.0,
    wrong_short: float = -10.0,
    wrong_long: float = 0.0,
    exceeded: float = -10.0,
) -> RewardFunction:
    """Right answers are worth more when short, wrong ones cost less when long, along half a cosine.

    For n < L = max_completion_length tokens: long + (short - long) (1 + cos(pi n / L)) / 2; at L and beyond: exceeded.
    A completion is right where the reward function `correct` gives 1 or more; where it gives None, so does this one.
    Source: cosine reward, arXiv 2502.03373, section 4.2; the defaults are the paper's. Raises UsageError if L < 1.
    """
    if max_completion_length < 1:
        raise UsageError(f"cosine_length needs max_completion_length >= 1, got {max_completion_length}.")

    def value(right: bool, length: int) -> float:
        if length >= max_completion_length:
            return exceeded
        short, long = (correct_short, correct_long) if right else (wrong_short, wrong_long)
        return long + (short - long) * (1.0 + math.cos(math.pi * length / max_completion_length)) / 2.0

    def reward(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        lengths = _lengths(completions, columns, "cosine_length")
        verdicts = correct(prompts=prompts, completions=completions, **columns)
        return [
            None if verdict is None else value(verdict >= 1.0, length)
            for verdict, length in zip(verdicts, lengths, strict=True)
        ]

    return named(reward, "cosine_length")


def repetition_penalty(ngram_size: int = 4, max_penalty: float = -1.0) -> RewardFunction:
    """max_penalty times the share of the completion's n-grams of words that occurred before: 1 - unique / total.

    Words are separated by white space, upper and lower case alike; fewer words than `ngram_size` give 0.
    Source: after the repetition penalty of arXiv 2502.03373, which is paid per token.
    Raises UsageError if ngram_size < 1 or max_penalty > 0.
    """
    if ngram_size < 1 or max_penalty > 0:
        raise UsageError(
            f"repetition_penalty needs ngram_size >= 1 and max_penalty <= 0, got {ngram_size} and {max_penalty}."
        )

    def value(text: str) -> float:
        words = text.lower().split()
        grams = [tuple(words[i : i + ngram_size]) for i in range(len(words) - ngram_size + 1)]
        return max_penalty * (1.0 - len(set(grams)) / len(grams)) if grams else 0.0

    def reward(prompts: Sequence[Any], completions: Sequence[Completion], **columns: Any) -> list[float | None]:
        return [value(completion_text(completion)) for completion in completions]

    return named(reward, "repetition_penalty")


def _lengths(completions: Sequence[Completion], columns: dict[str, Any], who: str) -> list[int]:
    """Tokens of each completion, the end token included, as the trainer sampled them."""
    return [len(ids) for ids in column("completion_ids", columns, len(completions), who)]
