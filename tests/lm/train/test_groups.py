"""Copies within groups, and rewards that go with length, worked out by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from grouprl.lm.train.groups import describe_groups


def samples(
    completions: list[list[int]], group: list[int], returns: list[float], episode: list[int] | None = None
) -> Any:
    lengths = torch.tensor([len(c) for c in completions])
    return SimpleNamespace(
        completions=completions, group=torch.tensor(group), returns=torch.tensor(returns), lengths=lengths,
        episode=torch.tensor(list(range(len(group))) if episode is None else episode),
    )  # fmt: skip


def test_copies_count_within_their_group_only() -> None:
    made = samples([[1, 2], [1, 2], [3], [1, 2], [4], [5]], [0, 0, 0, 1, 1, 1], [0.0] * 6)
    assert describe_groups(made)["frac_duplicates"] == pytest.approx(2 / 6)


def test_a_reward_that_is_the_length_has_correlation_1_whatever_the_prompt_is_worth() -> None:
    made = samples([[0], [0, 0], [0] * 5, [0] * 6], [0, 0, 1, 1], [11.0, 12.0, 5.0, 6.0])
    assert describe_groups(made)["length_reward_correlation"] == pytest.approx(1.0)
    # Between groups the shorter have more, which does not count.
    made = samples([[0], [0], [0] * 5, [0] * 5], [0, 0, 1, 1], [9.0, 9.0, 1.0, 1.0])
    assert "length_reward_correlation" not in describe_groups(made)


def test_an_episode_of_several_samples_counts_as_one_completion() -> None:
    # Of three episodes none is a copy, although their turns are; the reward is their length.
    made = samples([[1], [1], [1], [1], [1], [1, 1]], [0] * 6, [1.0, 2.0, 2.0, 4.0, 4.0, 4.0], [0, 1, 1, 2, 2, 2])
    found = describe_groups(made)
    assert found["frac_duplicates"] == 0.0
    assert found["length_reward_correlation"] == pytest.approx(1.0)
