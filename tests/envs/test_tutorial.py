"""The `tutorial` configuration is the textbook's loss: compared with a plain implementation that shares no code."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Categorical, kl_divergence
from torch.testing import assert_close

from grouprl import GRPO
from grouprl.envs import update as update_module
from grouprl.envs.estimate import advantages
from grouprl.envs.learner import Learner

TUTORIAL = {
    "advantage": "batch_returns",
    "collect": "segments",
    "n_envs": 1,
    "n_steps": 200,
    "epochs": 10,
    "minibatch_size": 32,
    "minibatch_remainder": "keep",
    "epsilon": 0.2,
    "beta": 0.001,
    "entropy_coef": 0.0,
    "kl_estimator": "exact_forward",
    "reference": "old",
    "gamma": 0.99,
    "learning_rate": 3e-4,
    "lr_schedule": "constant",
    "adam_epsilon": 1e-8,
    "max_grad_norm": 0.5,
    "output_gain": 1.0,
    "hidden_gain": 1.0,
    "normalize_observations": False,
    "reset_each_batch": True,
    "sticky": 0.0,
    "warmup_steps": 0,
    "skip_without_signal": False,
}


def plain_advantages(rewards, ends, gamma=0.99):
    """Discounted rewards to go, restarted after every end and taken as 0 beyond the batch; then to mean 0 and std 1."""
    worth, total = [0.0] * len(rewards), 0.0
    for t in range(len(rewards) - 1, -1, -1):
        total = rewards[t] + (0.0 if ends[t] else gamma * total)
        worth[t] = total
    worth = torch.tensor(worth, dtype=torch.float32)
    return (worth - worth.mean()) / (worth.std() + 1e-8)


def plain_update(network, states, actions, advantage, order, beta=0.001, clip=0.2):
    """One pass over the minibatches in `order`; returns the mean policy loss and the mean KL(old || new)."""
    with torch.no_grad():
        old = Categorical(logits=network(states))
        old_log_prob = old.log_prob(actions)
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-4)
    losses, divergences = [], []
    for rows in order:
        new = Categorical(logits=network(states[rows]))
        ratio = (new.log_prob(actions[rows]) - old_log_prob[rows]).exp()
        unbounded = ratio * advantage[rows]
        bounded = ratio.clamp(1 - clip, 1 + clip) * advantage[rows]
        policy_loss = -torch.minimum(unbounded, bounded).mean()
        kl = kl_divergence(Categorical(logits=old.logits[rows]), new).mean()
        optimizer.zero_grad()
        (policy_loss + beta * kl).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
        losses.append(policy_loss.item())
        divergences.append(kl.item())
    return float(np.mean(losses)), float(np.mean(divergences))


class Batch:
    """A batch of ours, and a network of plain layers with the weights it was collected with.

    Both learn in float64: 70 steps of Adam, which divides by the size of the gradient, let float32 rounding grow.
    """

    def __init__(self, seed=0, **settings):
        self.agent = GRPO("CartPole-v1", preset=None, seed=seed, **{**TUTORIAL, **settings})
        sizes = (4, 64, 64, 2)
        self.network = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2))
        layers = [layer for layer in self.network if isinstance(layer, nn.Linear)]
        for layer, ours, n_in in zip(layers, self.agent.policy.network.layers, sizes, strict=False):
            assert layer.in_features == n_in
            layer.load_state_dict(copy.deepcopy(ours.state_dict()))
        self.rollout = self.agent.ready().collect(self.agent.policy)
        self.network.double()
        self.agent.policy.double()
        self.states = self.rollout.inputs["flat"].double()
        behaviour = self.agent.policy({"flat": self.states}).detach()
        assert_close(behaviour.float(), self.rollout.behaviour)
        self.rollout = replace(self.rollout, inputs={"flat": self.states}, behaviour=behaviour)
        self.learner = Learner(self.agent.policy, self.agent.config, np.random.default_rng(seed))
        self.actions = self.rollout.actions
        ends = torch.zeros(self.rollout.n_steps, dtype=torch.bool)
        last = self.rollout.lengths.cumsum(0) - 1
        ends[last] = self.rollout.terminated | self.rollout.truncated
        self.advantage = plain_advantages(self.rollout.rewards.tolist(), ends.tolist())


def test_the_network_starts_as_the_textbook_says():
    batch = Batch()
    for layer in batch.agent.policy.network.layers:
        weight = layer.weight.detach()
        gram = weight.T @ weight if weight.shape[0] > weight.shape[1] else weight @ weight.T
        assert_close(gram, torch.eye(len(gram), dtype=gram.dtype), atol=1e-5, rtol=0)  # orthogonal with gain 1
        assert not layer.bias.any()
    assert batch.agent.policy.network.tanh


def test_the_advantages_are_the_textbook_s():
    batch = Batch()
    assert batch.rollout.terminated.any()  # several episodes in one batch, the last one cut
    ours, _ = advantages(batch.rollout, batch.agent.config, batch.agent.loop.baseline)
    assert_close(ours, batch.advantage, atol=1e-6, rtol=0)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_whole_update_is_the_textbook_s(seed, monkeypatch):
    batch = Batch(seed)
    order = []
    original = update_module.minibatches

    def recorded(*args):
        parts = original(*args)
        order.extend(parts)
        return parts

    monkeypatch.setattr(update_module, "minibatches", recorded)
    ours, _ = advantages(batch.rollout, batch.agent.config, batch.agent.loop.baseline)
    stats = batch.learner.learn(batch.rollout, ours.double(), progress=0.0)
    n = batch.rollout.n_steps
    assert len(order) == 10 * -(-n // 32) == stats.optimizer_steps
    before = [p.detach().clone() for p in batch.network.parameters()]
    policy_loss, kl = plain_update(batch.network, batch.states, batch.actions, batch.advantage.double(), order)
    assert kl > 1e-4
    assert stats.policy_loss == pytest.approx(policy_loss, abs=1e-6)
    assert stats.kl == pytest.approx(kl, abs=1e-6)
    moved = 0.0
    for ours_now, theirs, start in zip(
        batch.agent.policy.parameters(), batch.network.parameters(), before, strict=True
    ):
        assert_close(ours_now, theirs, atol=1e-6, rtol=0)
        moved = max(moved, (theirs - start).abs().max().item())
    assert moved > 1e-3  # a thousand times what the two may differ by


def test_the_comparison_would_notice_another_divergence(monkeypatch):
    batch = Batch(kl_estimator="exact", beta=1.0)
    order = []
    original = update_module.minibatches
    monkeypatch.setattr(update_module, "minibatches", lambda *args: order.extend(original(*args)) or order[-7:])
    ours, _ = advantages(batch.rollout, batch.agent.config, batch.agent.loop.baseline)
    stats = batch.learner.learn(batch.rollout, ours.double(), progress=0.0)
    _, kl = plain_update(batch.network, batch.states, batch.actions, batch.advantage.double(), order, beta=1.0)
    assert abs(stats.kl - kl) > 1e-6


def test_every_batch_starts_from_fresh_episodes():
    agent = GRPO("CartPole-v1", preset=None, **TUTORIAL)
    for _ in range(2):
        rollout = agent.ready().collect(agent.policy)
        assert rollout.elapsed[0] == 0
        assert rollout.n_steps <= 200
