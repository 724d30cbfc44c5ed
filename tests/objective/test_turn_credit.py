"""What the gradients of estimators are on average, beside the true one: exact, over all groups of a few episodes."""

import math
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import turn_credit
from turn_credit import ESTIMATES, PROBLEMS, ROUNDING, Problem, Step, by_sampling, exactly

STOPPING, BRANCH, AGAIN = PROBLEMS


def random_problem(seed: int) -> Problem:
    """Episodes of up to three turns on a tree that may end anywhere, with random rewards."""
    draw, episodes, logits = random.Random(seed), [], []

    def grow(so_far: list[Step], depth: int) -> None:
        if depth == 3 or (depth and draw.random() < 0.4):
            episodes.append(so_far)
            return
        state = len(logits)
        logits.append(draw.uniform(-2, 2))
        for action in (0, 1):
            grow([*so_far, Step(state, action, draw.uniform(-1, 1))], depth + 1)

    grow([], 0)
    return Problem("random", "", logits, episodes)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([2, 3, 4]))
def test_timestep_and_leave_one_out_have_no_bias_whatever_the_episodes(seed: int, size: int) -> None:
    problem = random_problem(seed)
    for name in ("timestep", "leave_one_out"):
        found = exactly(problem, ESTIMATES[name], size)
        assert found.along == pytest.approx(1, abs=ROUNDING)
        assert found.cosine == pytest.approx(1, abs=ROUNDING)
    found = exactly(problem, ESTIMATES["outcome, scale_rewards=none"], size)
    assert found.along == pytest.approx((size - 1) / size, abs=ROUNDING)


def test_chances_of_the_episodes_are_all_there_are() -> None:
    for problem in (*PROBLEMS, random_problem(3)):
        assert float(problem.chances(problem.theta).sum()) == pytest.approx(1)
    # 1 + p + p^2 + p^3 turns at p = 1/2, differentiated in each logit: p (1 - p) of what comes after
    assert STOPPING.true_gradient().tolist() == pytest.approx([0.25 * 1.75, 0.5 * 0.25 * 1.5, 0.25 * 0.25])


def test_the_mean_of_those_still_going_on_loses_the_signal_where_the_policy_decides_when_to_stop() -> None:
    summed = exactly(STOPPING, ESTIMATES["*rewards less the mean of those alive, summed*"])
    assert summed.along == pytest.approx(0.0093, abs=1e-4)
    to_go = exactly(STOPPING, ESTIMATES["*return-to-go less the mean of those alive*"])
    assert to_go.along == pytest.approx(0.8506, abs=1e-4)
    assert to_go.cosine < 0.999  # no common factor: another direction
    others = exactly(STOPPING, ESTIMATES["*return-to-go less the mean of the others alive*"])
    assert others.along == pytest.approx(1, abs=ROUNDING)  # it is a group's own episode in its mean that does it


def test_gigpo_is_biased_with_and_without_the_divisions() -> None:
    without = [exactly(problem, ESTIMATES["gigpo, scale_rewards=none"]) for problem in PROBLEMS]
    assert [f.along for f in without] == pytest.approx([1.7256, 1.7171, 1.6566], abs=1e-4)
    assert without[1].cosine < 0.999  # the state that is rarely visited counts less
    assert exactly(BRANCH, ESTIMATES["gigpo"]).cosine < without[1].cosine


def test_timestep_has_less_noise_than_one_advantage_for_a_whole_episode() -> None:
    for problem, at_most in ((STOPPING, 0.91), (BRANCH, 1.0), (AGAIN, 0.61)):
        ours, whole = (exactly(problem, ESTIMATES[name]).noise for name in ("timestep", "leave_one_out"))
        assert ours <= at_most * whole + 1e-9


def test_sampled_groups_agree_with_the_sums() -> None:
    for name in ("timestep", "gigpo", "*rewards less the mean of those alive, summed*"):
        mean, error = by_sampling(STOPPING, ESTIMATES[name], 20_000)
        assert abs(mean - exactly(STOPPING, ESTIMATES[name]).along) < 4 * error
        assert error < 0.01


def test_the_verdicts_of_the_table_are_those_of_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn_credit, "GROUP_SIZE", 3)  # the sizes do not matter, and small ones are soon done
    written = turn_credit.RESULTS.read_text(encoding="utf-8").split("## All problems")[1]
    for name in ESTIMATES:
        assert f"| {turn_credit._ticked(name)} | {turn_credit.verdict(name)} |" in written
    assert math.isclose(exactly(AGAIN, ESTIMATES["timestep"], 3).along, 1)
