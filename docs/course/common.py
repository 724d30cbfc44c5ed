"""What the units of the course share: a network, episodes of CartPole in groups, the loop of training, and curves.

Shapes are in brackets: P starts with G episodes each make N = P G episodes of n_1..n_N steps. They are stored end to
end: S = n_1 + ... + n_N steps in all.
"""

from collections.abc import Callable
from typing import NamedTuple

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from grouprl import objective

LONGEST = 200
"""Steps after which an episode ends even if the pole still stands; the return is at most that."""


class Batch(NamedTuple):
    """The episodes that the current policy has played."""

    observations: Tensor  # [S, 4]
    actions: Tensor  # [S]
    rewards: Tensor  # [S], 1 for each step that the pole stands
    lengths: Tensor  # [N]
    group: Tensor  # [N], which start an episode began from

    def logp(self, policy: nn.Module) -> Tensor:
        """[S]: the log-probability of every action that was taken."""
        return Categorical(logits=policy(self.observations)).log_prob(self.actions)


def network(seed: int) -> nn.Module:
    """A policy: four observations to the logits of two actions."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2))


def episodes(
    policy: nn.Module, starts: int = 4, size: int = 8, spread: float = 0.05
) -> Batch:
    """Plays ``size`` episodes from each of ``starts`` random states, all at once; ``spread`` is how far these reach."""
    n = starts * size
    envs = gym.make_vec(
        "CartPole-v1",
        n,
        vectorization_mode="vector_entry_point",
        max_episode_steps=LONGEST,
    )
    envs.reset(seed=int(torch.randint(2**31, ())))
    envs.unwrapped.state = np.repeat(
        envs.np_random.uniform(-spread, spread, (4, starts)), size, axis=1
    )
    seen = torch.tensor(envs.unwrapped.state.T, dtype=torch.float32)
    alive, observations, actions, running = torch.ones(n, dtype=torch.bool), [], [], []
    while alive.any():
        with torch.no_grad():
            action = policy(seen).softmax(1).multinomial(1)[:, 0]
        observations.append(seen)
        actions.append(action)
        running.append(alive)
        after, _, terminated, truncated, _ = envs.step(action.numpy())
        seen = torch.from_numpy(after)
        alive = alive & torch.from_numpy(~(terminated | truncated))
    kept = torch.stack(running, 1)  # [N, steps]
    lengths = kept.sum(1)
    return Batch(
        torch.stack(observations, 1)[kept], torch.stack(actions, 1)[kept], torch.ones(int(lengths.sum())), lengths,
        torch.arange(n) // size,
    )  # fmt: skip


def returns(batch: Batch) -> Tensor:
    """[N]: the return of every episode."""
    return objective.segment_sum(batch.rewards, batch.lengths)


def train(
    advantages: Callable[[Batch], Tensor],
    losses: Callable[
        [Tensor, Tensor, Tensor], Tensor
    ] = lambda logp, logp_old, advantages: -logp * advantages,
    *,
    updates: int = 40,
    epochs: int = 1,
    seed: int = 0,
    learning_rate: float = 1e-2,
    **played,
) -> np.ndarray:
    """The mean return of every batch: plays episodes, takes ``epochs`` gradient steps on them, and starts again.

    ``advantages`` makes [S] of a batch; ``losses`` makes [S] of log-probabilities now and then, and advantages.
    """
    policy = network(seed)
    optimizer = torch.optim.Adam(policy.parameters(), learning_rate)
    curve = []
    for _ in range(updates):
        batch = episodes(policy, **played)
        curve.append(float(returns(batch).mean()))
        judged, logp_old = advantages(batch), batch.logp(policy).detach()
        weights = objective.token_mean(batch.lengths)
        for _ in range(epochs):
            optimizer.zero_grad()
            (weights * losses(batch.logp(policy), logp_old, judged)).sum().backward()
            optimizer.step()
    return np.array(curve)


def curves(
    shown: dict[str, np.ndarray],
    across: str = "updates",
    up: str = "mean return of a batch",
) -> None:
    """Draws a curve for each name: the mean over seeds of [seeds, points], in a band from lowest to highest.

    The figure is left open: a notebook shows it.
    """
    _, axes = plt.subplots(figsize=(6, 3.4))
    for name, values in shown.items():
        (line,) = axes.plot(values.mean(0), label=name)
        axes.fill_between(
            range(values.shape[1]),
            values.min(0),
            values.max(0),
            color=line.get_color(),
            alpha=0.15,
        )
    axes.set(xlabel=across, ylabel=up)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
