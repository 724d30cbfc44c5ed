"""From a rollout to advantages: which steps a regression sees, and what it makes of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from grouprl.envs import estimate
from grouprl.envs.config import make_config
from grouprl.envs.estimate import Baseline, fit_subset
from grouprl.envs.rollout import Rollout
from grouprl.objective import RandomFeatures, gae, gigpo


def chain(samples: int, length: int) -> Rollout:
    """Samples of equal length, reward 1 a step, terminated; the observation is the number of steps to go."""
    n = samples * length
    position = torch.arange(length).repeat(samples)
    none: list[Any] = []
    return Rollout(
        observed=None,
        inputs={"flat": (length - position).float()[:, None] / length},
        last_inputs={"flat": torch.zeros(samples, 1)},
        actions=torch.zeros(n, dtype=torch.int64),
        behaviour=torch.zeros(n, 2),
        mask=None,
        trainable=torch.ones(n, dtype=torch.bool),
        rewards=torch.ones(n),
        elapsed=position,
        last_elapsed=torch.full((samples,), length),
        lengths=torch.full((samples,), length),
        group=torch.zeros(samples, dtype=torch.int64),
        terminated=torch.ones(samples, dtype=torch.bool),
        truncated=torch.zeros(samples, dtype=torch.bool),
        episode_returns=none,
        learned_returns=none,
        episode_lengths=none,
        episode_envs=none,
    )


def test_states_are_equal_where_all_of_the_observation_is() -> None:
    rollout = chain(2, 3)
    assert estimate.states(rollout).tolist() == [0, 1, 2, 0, 1, 2]
    image = torch.zeros(6, 1, 16, 16, dtype=torch.uint8)
    image[4, 0, 3, 3] = 1
    seen = np.array([[0.0], [1.0], [2.0], [-0.0], [1.0], [2.0]], np.float32)  # before normalisation
    same = replace(rollout, observed=seen, inputs={"flat": torch.rand(6, 1), "image:": image})
    assert estimate.states(same).tolist() == [0, 1, 2, 0, 3, 2]


def test_gigpo_compares_steps_from_equal_observations() -> None:
    rollout = replace(chain(2, 2), rewards=torch.tensor([0.0, 1.0, 0.0, 0.0]))
    rollout.inputs["flat"][3] = 7.0
    config = make_config({"advantage": "gigpo", "scale_rewards": "none", "gamma": 1.0, "gigpo_weight": 2.0})
    made, info = estimate.advantages(rollout, config, None)
    assert made.tolist() == [1.5, 0.5, -1.5, -0.5]  # used as they come
    assert info == {"degenerate_groups": 0.0, "shared_states": 0.5}


def test_a_small_batch_is_fitted_whole() -> None:
    samples, steps = fit_subset(torch.tensor([3, 1, 2]))
    assert samples.tolist() == [0, 1, 2]
    assert steps.tolist() == [0, 1, 2, 3, 4, 5]


def test_a_large_batch_is_fitted_on_whole_samples_spread_over_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "MAX_FIT_STEPS", 100)
    lengths = torch.full((1000,), 10)
    samples, steps = fit_subset(lengths)
    assert samples.shape == (10,)
    assert steps.shape == (100,)
    assert torch.equal(steps.view(10, 10), samples[:, None] * 10 + torch.arange(10))
    gaps = torch.diff(samples)
    assert int(gaps.max()) <= 2.7 * int(gaps.min())  # the golden ratio leaves gaps of at most three sizes


def test_one_sample_larger_than_the_bound_is_still_fitted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "MAX_FIT_STEPS", 5)
    samples, steps = fit_subset(torch.tensor([8, 8]))
    assert samples.shape == (1,)
    assert steps.shape == (8,)


def test_a_fit_on_a_part_gives_the_advantages_of_a_fit_on_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rollout, config = chain(200, 20), make_config({"gamma": 1.0, "gae_lambda": 1.0, "baseline_ridge": 1e-8})
    _, whole, _ = Baseline(RandomFeatures.create(1, 4, 0), 20).fit(rollout, config)
    monkeypatch.setattr(estimate, "MAX_FIT_STEPS", 400)
    monkeypatch.setattr(estimate, "CHUNK", 333)
    _, part, explained = Baseline(RandomFeatures.create(1, 4, 0), 20).fit(rollout, config)
    assert explained > 0.999
    # The value, 1 to 20, is linear in the observation: what is left is rounding in a nearly singular regression.
    assert float(whole.abs().max()) < 0.5
    assert float((part - whole).abs().max()) < 0.5


def test_a_pulled_fit_values_a_batch_by_the_weights_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a batch of which only some samples enter the regression."""
    monkeypatch.setattr(estimate, "MAX_FIT_STEPS", 100)
    config = make_config({"baseline_pull": 0.3, "baseline_features": 4, "gae_lambda": 0.9, "gamma": 0.9})
    rollout = chain(9, 20)
    baseline = Baseline.create(1, config, horizon=20)
    for _ in range(2):
        before = baseline.weights
        values, made, _ = baseline.fit(rollout, config)
        phi = baseline.phi(rollout.inputs["flat"], rollout.elapsed)
        last = baseline.phi(rollout.last_inputs["flat"], rollout.last_elapsed)
        w = torch.zeros(phi.shape[1]) if before is None else before
        torch.testing.assert_close(values, phi @ w, rtol=1e-4, atol=1e-5)
        after = torch.where(rollout.terminated, 0.0, last @ w)
        expected = gae(rollout.rewards, phi @ w, after, rollout.lengths, 0.9, 0.9)
        torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)
        assert baseline.weights is not None
        assert not torch.equal(baseline.weights, w)


@pytest.mark.parametrize("elapsed", [0, 10**6])
def test_the_baseline_sees_as_much_late_in_an_endless_episode_as_at_its_start(elapsed: int) -> None:
    config = make_config({"gamma": 0.0, "gae_lambda": 0.0})
    seen = torch.randn(4097, 2, generator=torch.Generator().manual_seed(0))
    rollout = replace(
        chain(1, 4096),
        inputs={"flat": seen[:-1]}, last_inputs={"flat": seen[-1:]}, rewards=torch.sin(2 * seen[:-1, 0]),
        elapsed=torch.arange(4096) + elapsed, last_elapsed=torch.tensor([4096 + elapsed]),
        terminated=torch.zeros(1, dtype=torch.bool),
    )  # fmt: skip
    _, _, explained = Baseline.create(2, config, horizon=1000).fit(rollout, config)
    assert explained > 0.9


def test_a_batch_of_equal_rewards_has_a_signal_only_if_it_can_end_early() -> None:
    rollout = chain(2, 3)
    assert estimate.has_signal(rollout)
    endless = Rollout(**(rollout.__dict__ | {"terminated": torch.zeros(2, dtype=torch.bool)}))
    assert not estimate.has_signal(endless)
    worthless = Rollout(**(rollout.__dict__ | {"rewards": torch.zeros(6)}))
    assert not estimate.has_signal(worthless)


@pytest.mark.parametrize(
    ("elapsed", "truncated", "signal"),
    [
        ((10, 10), (True, True), False),  # a time limit
        ((10, 4), (True, False), False),  # the second is under way
        ((3, 4), (True, False), True),  # the second is further already, so the first was not cut by a time limit
        ((3, 10), (True, True), True),
        ((4, 4), (False, False), False),
    ],
)
def test_truncated_episodes_of_different_lengths_are_a_signal(elapsed: Any, truncated: Any, signal: bool) -> None:
    ends = {
        "terminated": torch.zeros(2, dtype=torch.bool),
        "truncated": torch.tensor(truncated),
        "last_elapsed": torch.tensor(elapsed),
    }
    rollout = Rollout(**(chain(2, 3).__dict__ | ends))
    assert estimate.has_signal(rollout) is signal
    nothing = Rollout(**(rollout.__dict__ | {"rewards": torch.zeros(6)}))
    assert not estimate.has_signal(nothing)


def test_states_of_ones_own_are_a_function_of_the_observations() -> None:
    def by_cell(rewards, lengths, group, observations, gamma):
        _, states = torch.unique((observations / 0.25).round(), dim=0, return_inverse=True)
        return gigpo(rewards, lengths, group, states, gamma, scale="none")

    seen = np.array([[0.0], [1.02], [0.01], [5.0]], np.float32)  # the first and the third are in one cell
    rollout = replace(chain(2, 2), rewards=torch.tensor([0.0, 1.0, 0.0, 0.0]), observed=seen)
    config = make_config({"gamma": 1.0, "collect": "episodes"})
    made, _ = estimate.advantages(rollout, config, None, by_cell)
    assert made.tolist() == [1.0, 0.5, -1.0, -0.5]


@pytest.mark.parametrize("advantage", ["leave_one_out", "timestep", "outcome", "opo", "maxrl", "reinforce_pp_baseline"])
def test_a_group_of_equal_returns_gets_exactly_zero_in_a_batch_whose_mean_is_not(advantage: str) -> None:
    """Group 0 ends after three steps each, group 1 after two and eight: the mean over steps lies above 0."""
    lengths = torch.tensor([3, 3, 2, 8])
    rollout = replace(
        chain(1, 16), lengths=lengths, group=torch.tensor([0, 0, 1, 1]), last_elapsed=lengths,
        terminated=torch.ones(4, dtype=torch.bool), truncated=torch.zeros(4, dtype=torch.bool),
    )  # fmt: skip
    config = make_config({"advantage": advantage, "group_size": 2, "n_envs": 4})
    made, info = estimate.advantages(rollout, config, None)
    assert advantage == "reinforce_pp_baseline" or info["degenerate_groups"] == 0.5
    assert made[:6].tolist() == [0.0] * 6
    assert bool((made[6:] != 0).any())


@pytest.mark.parametrize("advantage", ["leave_one_out", "opo"])
def test_a_return_equal_to_the_mean_of_its_group_is_shifted_like_the_others(advantage: str) -> None:
    returns = torch.tensor([1.0, 3.0, 2.0, 2.1, 2.0, 3.0, 4.0, 3.0])  # the mean of the second group is 3, that of two
    rollout = replace(chain(8, 1), rewards=returns, group=torch.tensor([0] * 4 + [1] * 4))
    made, _ = estimate.advantages(rollout, make_config({"advantage": advantage}), None)
    from_mean = torch.cat([returns[:4] - returns[:4].mean(), returns[4:] - returns[4:].mean()])
    torch.testing.assert_close(made, (from_mean - from_mean.mean()) / from_mean.std(), atol=1e-6, rtol=0)
    assert made.argsort().tolist() == from_mean.argsort().tolist()


def test_steps_at_which_all_returns_to_go_are_equal_get_zero_and_no_others() -> None:
    rewards = torch.tensor(
        [1.0, 3.0, 1.0, 5.0, 1.0, 4.0]
    )  # to go, without discount: 4 3, 6 5, 5 4; the third is the mean
    rollout = replace(chain(3, 2), rewards=rewards)
    config = make_config({"advantage": "timestep", "gamma": 1.0})
    made, _ = estimate.advantages(rollout, config, None)
    torch.testing.assert_close(made, torch.tensor([-1.0, -1.0, 1.0, 1.0, 0.0, 0.0]) / 0.8**0.5, atol=1e-6, rtol=0)
    first_alike = torch.tensor([1.0, 3.0, -1.0, 5.0, 0.0, 4.0])  # to go: 4 3, 4 5, 4 4
    made, _ = estimate.advantages(replace(rollout, rewards=first_alike), config, None)
    assert made[[0, 2, 4]].tolist() == [0.0, 0.0, 0.0]
    assert made[5] == pytest.approx(0.0, abs=1e-6)
