"""pass@k and avg@n of an evaluation: by hand, by counting choices, and of a run."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from small_runs import EVAL_ROWS, trainer

from grouprl.errors import UsageError
from grouprl.lm.settings.config import GRPOConfig
from grouprl.lm.train.evaluation import pass_at


def test_pass_at_k_by_hand() -> None:
    assert pass_at([1], 4, 1) == 0.25
    assert pass_at([1], 4, 2) == 0.5  # 3 of 6 pairs hold the right one
    assert pass_at([1, 0, 4], 4, 2) == pytest.approx((0.5 + 0 + 1) / 3)
    assert pass_at([3], 4, 2) == pass_at([1], 4, 4) == 1.0
    assert pass_at([0], 4, 4) == 0.0


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_share_of_choices_that_hold_a_right_one(k: int) -> None:
    for c in range(6):
        choices = list(itertools.combinations([True] * c + [False] * (5 - c), k))
        assert pass_at([c], 5, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def judged(completions: list[str], **kwargs: Any) -> list[float]:
    """Of each four in a row the first is right; of the first four two are."""
    return [1.0 if i % 4 == 0 or i == 1 else 0.0 for i, _ in enumerate(completions)]


def always(completions: list[str], **kwargs: Any) -> list[float]:
    return [0.5] * len(completions)


@pytest.mark.parametrize("at_once", [None, 8])
def test_an_evaluation_has_them_for_all_prompts(at_once: int | None, tmp_path: Path) -> None:
    made = trainer(
        tmp_path, reward=judged, eval_dataset=EVAL_ROWS[:4], num_generations_eval=4, eval_pass_k=[1, 2, 4],
        per_device_eval_batch_size=at_once,
    )  # fmt: skip
    metrics = made.evaluate()
    twice = 1 if at_once is None else 2  # in how many prompts two completions are right
    assert metrics["eval_pass@1"] == metrics["eval_avg@4"] == pytest.approx((4 + twice) / 16)
    assert metrics["eval_pass@2"] == pytest.approx((twice * 5 / 6 + (4 - twice) / 2) / 4)
    assert metrics["eval_pass@4"] == 1.0
    assert not [name for name in made.evaluate(greedy=True) if "@" in name]


def test_a_function_and_a_bound_say_which_completions_are_right(tmp_path: Path) -> None:
    given = {"reward": [judged, always], "eval_dataset": EVAL_ROWS[:2], "eval_pass_k": 1, "num_generations_eval": 4}
    by_sum = trainer(tmp_path / "a", **given).evaluate()
    assert by_sum["eval_avg@4"] == pytest.approx(3 / 8)
    assert trainer(tmp_path / "b", **given, solved_reward=0.5).evaluate()["eval_avg@4"] == 1.0
    assert trainer(tmp_path / "c", **given, solved_reward=0.5, solved_by="judged").evaluate()["eval_avg@4"] == 3 / 8
    with pytest.raises(UsageError, match=r"solved_by='judge' is no reward function of .*'judged', 'always'"):
        trainer(tmp_path / "d", **given, solved_by="judge")


def test_k_must_fit_an_evaluation() -> None:
    with pytest.raises(UsageError, match=r"eval_pass_k=\[9\]: an evaluation samples 8 completions .*raise num_gen"):
        GRPOConfig(eval_pass_k=9)
    with pytest.raises(UsageError, match="must hold whole numbers of at least 1"):
        GRPOConfig(eval_pass_k=[0, 2])
    assert GRPOConfig(eval_pass_k=[]).eval_pass_k is None
