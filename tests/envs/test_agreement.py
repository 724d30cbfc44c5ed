"""Whether halves of a batch agree, and what an adaptive learning rate makes of it."""

import math

import numpy as np
import probes
import pytest
import torch
from gymnasium import spaces

from grouprl import GRPO
from grouprl.envs.agreement import Agreement, about_rewards, agreement, halves
from grouprl.envs.update import Batch, Terms, UpdateSettings
from grouprl.learning.parameters import TrainedParameters
from grouprl.objective import Objective


def test_halves_are_every_other_episode():
    #              episode 0   1  2        3
    lengths = torch.tensor([2, 1, 3, 2])
    first, second = halves(lengths, torch.arange(8))
    assert first.tolist() == [0, 1, 3, 4, 5]
    assert second.tolist() == [2, 6, 7]
    first, second = halves(lengths, torch.tensor([1, 2, 5, 7]))  # places among those that are learned from
    assert first.tolist() == [0, 2]
    assert second.tolist() == [1, 3]
    assert [len(part) for part in halves(torch.tensor([4]), torch.arange(4))] == [4, 0]


class Slope(torch.nn.Module):
    """log p = w x, whose gradient is x."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(2))


def found(x, advantages, objective=None):
    """The agreement of the first half of the steps with the second."""
    x, advantages = torch.tensor(x), torch.tensor(advantages)
    policy, n = Slope(), len(x)
    batch = Batch(
        lambda index: Terms(x[index] @ policy.w, entropy=policy.w.sum() * torch.ones(len(index))),
        torch.zeros(n), advantages,
    )  # fmt: skip
    settings = about_rewards(UpdateSettings(epochs=1, minibatch_size=n, objective=objective or Objective()))
    parts = torch.arange(n).tensor_split(2)
    return agreement(batch, TrainedParameters(policy), parts, settings)


def test_the_agreement_is_the_cosine_of_the_gradients_of_the_halves():
    # the gradients are the means of A x: (1, 0) and (1, 1)
    assert found([[1.0, 0.0], [1.0, 0.0], [2.0, 0.0], [0.0, 1.0]], [1.0, 1.0, 1.0, 2.0]) == pytest.approx(
        1 / math.sqrt(2)
    )
    assert found([[1.0, 2.0], [3.0, 6.0]], [1.0, 0.5]) == pytest.approx(1.0)
    assert found([[1.0, 2.0], [1.0, 2.0]], [1.0, -5.0]) == pytest.approx(-1.0)
    assert found([[1.0, 2.0], [1.0, 2.0]], [1.0, 0.0]) == 0.0  # one says nothing


def test_a_bonus_for_entropy_is_no_agreement():
    of_loss = Objective(entropy_coef=100.0)
    assert found([[1.0, 2.0], [1.0, 2.0]], [1.0, -1.0], of_loss) == pytest.approx(-1.0)


def test_later_batches_count_more():
    agreed = Agreement()
    assert agreed.enough  # nothing is known
    agreed.note(1.0)
    agreed.note(0.0)
    assert agreed.total / agreed.weight == pytest.approx(0.7 * 0.3 / (0.7 * 0.3 + 0.3))
    assert agreed.enough
    for _ in range(3):
        agreed.note(0.0)
    assert not agreed.enough
    agreed.note(1.0)
    assert agreed.enough


def rates(make, steps=20 * 256, **settings):
    """The learning rates of a run whose updates are all below the target."""
    settings = {"lr_schedule": "adaptive", "learning_rate": 1e-4, "lr_max": 1.0, "kl_target": 100.0, **settings}
    found = []
    agent = GRPO(make, **probes.FAST | settings, seed=1)
    agent.learn(steps, callback=lambda agent, metrics: found.append(metrics["learning_rate"]))
    return found, agent


def coin() -> probes.Probe:
    """What an action pays is decided by a coin."""
    chance = np.random.default_rng(5)
    return probes.Probe(
        spaces.Box(-1, 1, (4,), np.float32),
        spaces.Discrete(4),
        lambda rng: rng.uniform(-1, 1, 4).astype(np.float32),
        lambda seen, action: float(chance.choice([-1.0, 1.0])),
    )


def test_a_learning_rate_rises_where_episodes_teach_and_not_on_noise():
    taught, _ = rates(probes.bandit)
    assert taught[5] == pytest.approx(1e-4 * 1.5**5)
    noisy, agent = rates(coin)
    assert noisy[-1] < 1e-4 * 1.5**10
    assert agent.loop.learner.agreement.total < 0.3 * agent.loop.learner.agreement.weight


def test_one_episode_alone_has_nothing_to_agree_with():
    found, agent = rates(probes.bandit, n_envs=1, steps=8, n_steps=1, warmup_steps=0, skip_without_signal=False)
    assert agent.loop.learner.agreement == Agreement()
    assert found[5] == pytest.approx(1e-4 * 1.5**5)


def test_the_agreement_of_a_batch_is_a_metric():
    found = []
    settings = {"lr_schedule": "adaptive", "n_envs": 4}
    GRPO(probes.bandit, **probes.FAST | settings, seed=1).learn(512, callback=lambda a, metrics: found.append(metrics))
    assert all(-1 <= metrics["agreement"] <= 1 for metrics in found)
    assert found[0]["agreement"] > 0.5


def test_a_rate_that_does_not_adapt_compares_nothing():
    _, agent = rates(probes.bandit, lr_schedule="constant", lr_max=None, kl_target=0.02)
    assert agent.loop.learner.agreement == Agreement()
