"""GRPO on environments whose right answer is known; each test isolates one thing that can go wrong."""

import math

import numpy as np
import probes
import pytest
import torch

from grouprl import GRPO, TrainingError, UsageError, evaluate
from grouprl.envs.estimate import advantages

SPARSE = {"collect": "episodes", "min_steps": 256}


def solve(make, steps=8000, **settings):
    return GRPO(make, **{**probes.FAST, **settings}).learn(steps)


def greedy(agent, make, episodes=40):
    return evaluate(agent, make, episodes=episodes).summary()["mean_return"]


def test_a_bandit_is_solved():
    assert greedy(solve(probes.bandit), probes.bandit) == 1.0


def test_a_contextual_bandit_is_solved():
    assert greedy(solve(probes.contextual), probes.contextual) == 1.0


@pytest.mark.parametrize("advantage", ["outcome", "leave_one_out", "timestep"])
def test_every_whole_episode_estimator_solves_the_contextual_bandit(advantage):
    assert greedy(solve(probes.contextual, advantage=advantage, **SPARSE), probes.contextual) == 1.0


def test_the_tutorial_estimator_solves_the_contextual_bandit():
    assert greedy(solve(probes.contextual, advantage="batch_returns"), probes.contextual) == 1.0


def test_groups_that_share_their_start_solve_the_contextual_bandit():
    agent = solve(probes.contextual, advantage="outcome", group_size=4, **SPARSE)
    assert greedy(agent, probes.contextual) == 1.0


def test_the_robust_default_solves_the_contextual_bandit():
    agent = GRPO(probes.contextual, preset=None, min_steps=512, max_steps=1024, warmup_steps=64).learn(15_000)
    assert greedy(agent, probes.contextual) == 1.0


@pytest.mark.parametrize(
    "loss",
    [{"loss_type": "grpo"}, {"delta": 3.0}, {"loss_type": "spo"}, {"loss_type": "cispo", "epsilon_high": 5.0},
     {"loss_type": "sapo"}, {"loss_type": "dppo_tv"}, {"loss_type": "dppo_kl"}],
)  # fmt: skip
def test_every_loss_solves_the_contextual_bandit(loss):
    assert greedy(solve(probes.contextual, **loss), probes.contextual) == 1.0


@pytest.mark.parametrize("reference", ["old", "initial", "periodic"])
@pytest.mark.parametrize("kl", ["exact", "exact_forward", "k1", "k2", "k3"])
def test_every_divergence_to_every_reference_lets_the_contextual_bandit_be_solved(kl, reference):
    agent = solve(probes.contextual, 5000, beta=0.01, kl_estimator=kl, reference=reference, reference_every=3)
    assert greedy(agent, probes.contextual) == 1.0


def test_a_strong_pull_to_the_initial_policy_keeps_it_there():
    agent = solve(probes.bandit, 4000, beta=30.0, kl_estimator="exact", reference="initial")
    free = solve(probes.bandit, 4000)
    assert entropy(agent) > 0.95 * math.log(4)
    assert entropy(free) < 0.3 * math.log(4)


def test_the_reference_can_be_a_saved_policy(tmp_path):
    expert = solve(probes.bandit, 4000)
    path = expert.save(tmp_path / "expert")
    settings = {**probes.FAST, "kl_estimator": "exact", "beta": 3.0, "skip_without_signal": False}
    pupil = GRPO(lambda: probes.bandit(best=99), **settings, reference=str(path)).learn(4000)
    assert greedy(pupil, probes.bandit) == 1.0
    with pytest.raises(UsageError, match="inital"):
        GRPO(probes.bandit, **settings, reference="inital").learn(1)


def entropy(agent, observation=(0.0,)):
    policy = agent.policy
    encoded = agent.observations.encode_single(np.array(observation, np.float32))
    return float(policy.distribution.entropy(torch.from_numpy(policy.infer(policy.prepare(encoded)))))


def test_reward_that_comes_a_step_late_is_credited_to_the_action_that_earned_it():
    agent = solve(probes.Delayed)
    assert greedy(agent, probes.Delayed) == 1.0


@pytest.mark.parametrize("advantage", ["outcome", "timestep"])
def test_whole_episode_estimators_credit_late_reward_too(advantage):
    assert greedy(solve(probes.Delayed, advantage=advantage, **SPARSE), probes.Delayed) == 1.0


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize(
    ("advantage", "extra"),
    [("baseline", {}), ("batch_returns", {}), ("outcome", SPARSE), ("leave_one_out", SPARSE), ("timestep", SPARSE)],
)
def test_where_every_action_pays_the_same_the_policy_stays_as_it_was(advantage, extra, skip):
    agent = GRPO(probes.constant, **{**probes.FAST, "advantage": advantage, "skip_without_signal": skip, **extra})
    before = agent.loop.learner.parameters.values()
    agent.learn(4000)
    assert agent.num_timesteps >= 4000
    assert entropy(agent, (0.5,)) == pytest.approx(math.log(3), abs=0.005)
    assert torch.allclose(agent.loop.learner.parameters.values(), before, atol=0.02)


@pytest.mark.parametrize("where", ["info", "dict"])
def test_a_masked_action_is_never_taken_however_well_it_would_pay(where):
    agent = solve(lambda: probes.Masked(where), 4000)  # the environment raises where the forbidden action is taken
    assert greedy(agent, lambda: probes.Masked(where)) == 3.0
    observation, info = probes.Masked(where).reset()
    for deterministic in (True, False):
        action, _ = agent.predict(observation, deterministic=deterministic, action_masks=info.get("action_mask"))
        assert action in (0, 1)


def batch_of(agent):
    collector = agent.ready()
    collector.warm_up(agent.policy, agent.config.warmup_steps)
    return collector.collect(agent.policy)


def test_an_environment_that_only_truncates_is_worth_the_endless_sum_at_every_step():
    agent = GRPO(probes.Truncated, **{**probes.FAST, "gamma": 0.9, "baseline_sweeps": 20})
    for _ in range(5):
        rollout = batch_of(agent)
        advantages(rollout, agent.config, agent.loop.baseline)
    assert rollout.truncated.any()
    assert not rollout.terminated.any()
    baseline = agent.loop.baseline
    values = baseline.phi(baseline.seen(dict(rollout.inputs)), rollout.elapsed) @ baseline.weights
    assert torch.allclose(values, torch.full_like(values, 1 / (1 - 0.9)), rtol=0.02)


@pytest.mark.parametrize("shows_time", [False, True])
def test_the_step_before_a_truncation_is_not_taught_to_be_worse(shows_time):
    def make():
        return probes.Truncated(cost=0.5, shows_time=shows_time)

    agent = GRPO(make, **{**probes.FAST, "gamma": 0.9, "baseline_features": 128, "baseline_sweeps": 10, "n_steps": 220})
    agent.ready().warm_up(agent.policy, 64)
    for _ in range(5):
        rollout = agent.ready().collect(agent.policy)
        advantage, _ = advantages(rollout, agent.config, agent.loop.baseline)
    early = rollout.elapsed < 5
    for action, sign in ((0, 1), (1, -1)):
        chosen = rollout.actions == action
        at_first, at_last = sign * advantage[chosen & early].mean(), sign * advantage[chosen & ~early].mean()
        assert at_first > 0.4
        assert at_last > 0.4
        assert abs(at_first - at_last) < 0.2
    assert greedy(solve(make), make) == 10.0


@pytest.mark.parametrize(("low", "high", "goal"), [(-1.0, 1.0, 0.4), (2.0, 10.0, 8.5), (-3.0, 1.0, -2.0)])
def test_a_continuous_action_reaches_its_target_within_any_bounds(low, high, goal):
    agent = solve(lambda: probes.target(low, high, goal), 16_000)
    action, _ = agent.predict(np.zeros(1, np.float32), deterministic=True)
    assert abs(float(action[0]) - goal) < 0.1 * (high - low) / 2


@pytest.mark.parametrize("make", [probes.multi_discrete, probes.multi_binary, probes.shifted])
def test_every_discrete_kind_of_action_finds_its_target(make):
    assert greedy(solve(make), make) == 1.0


@pytest.mark.parametrize("make", [probes.dictionary, probes.pair])
def test_parts_of_a_nested_observation_are_combined(make):
    assert greedy(solve(make, 20_000), make) == 1.0


def test_an_image_is_looked_at():
    agent = solve(probes.image, 3000, n_steps=16, learning_rate=2e-3)
    assert greedy(agent, probes.image) == 1.0


def test_a_forbidden_action_would_have_raised():
    with pytest.raises(TrainingError, match="the forbidden action was taken"):
        GRPO(lambda: Unmasked(), **probes.FAST).learn(500)


class Unmasked(probes.Masked):
    """The same environment, hiding its mask: shows that the tests of masks can fail."""

    def _out(self):
        return np.zeros(1, np.float32), {}
