"""The compiled gradient of a minibatch against autograd through the update loop's own evaluation."""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor

import registers
from grouprl import GRPO
from grouprl.envs import update
from grouprl.envs.fused import fused_gradient
from grouprl.envs.native import kernels
from grouprl.envs.update import Gradient, Terms, UpdateSettings
from grouprl.objective import Objective

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not (shutil.which("cc") or shutil.which("gcc")), reason="there is no C compiler here"
)

SPACES = {
    "two actions": spaces.Discrete(2),
    "seven actions": spaces.Discrete(7, start=3),
    "a number": spaces.Box(-1, 1, (1,), np.float32),
    "five numbers": spaces.Box(-1, 1, (5,), np.float32),
}
SURROGATES = {
    "clip": {},
    "clip higher": {"epsilon": 0.1, "epsilon_high": 0.4},
    "delta": {"delta": 1.7},
    "spo": {"loss_type": "spo"},
    "entropy bonus": {"entropy_coef": 0.3},
}


class Scripted(gym.Env):
    def __init__(self, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space = spaces.Box(-9, 9, (6,), np.float32), action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.normal(size=6).astype(np.float32), {}

    def step(self, action):
        return self.np_random.normal(size=6).astype(np.float32), 0.0, False, False, {}


def settings_of(micro_batch: int = 8192, **objective) -> UpdateSettings:
    return UpdateSettings(epochs=1, minibatch_size=64, micro_batch=micro_batch, objective=Objective(**objective))


class Batch:
    """Steps whose ratios lie on both sides of every bound, and a policy that has left the one they were drawn from."""

    def __init__(self, space: spaces.Space, n: int = 500, **settings) -> None:
        self.agent = GRPO(lambda: Scripted(space), preset=None, seed=0, n_envs=2, output_gain=1.0, **settings)
        self.policy, distribution = self.agent.policy, self.agent.policy.distribution
        generator = torch.Generator().manual_seed(1)
        self.inputs = {"flat": torch.randn(n, 6, generator=generator)}
        with torch.no_grad():
            params = self.policy(self.inputs)
            drawn = distribution.sample(params.numpy(), np.random.default_rng(2))
            self.actions = torch.from_numpy(drawn)
            self.logp_old = distribution.log_prob(params, self.actions) + 0.3 * torch.randn(n, generator=generator)
            self.logp_old[:3] = -60.0  # ratios beyond the largest
        self.advantages = torch.randn(n, generator=generator)
        self.advantages[5] = 0.0

    def evaluate(self, index: Tensor) -> Terms:
        params = self.policy({"flat": self.inputs["flat"][index]})
        distribution = self.policy.distribution
        return Terms(distribution.log_prob(params, self.actions[index]), distribution.entropy(params), None)

    def by_autograd(self, index: Tensor, settings: UpdateSettings) -> tuple[Tensor, Tensor]:
        network = self.policy.network
        network.prefer_native = False
        parameters, batch = (
            self.agent.loop.learner.parameters,
            update.Batch(self.evaluate, self.logp_old, self.advantages),
        )
        gradient, sums = update._by_autograd(batch, parameters, index, len(index), settings)
        network.prefer_native = True
        return gradient, sums

    def fused(self, settings: UpdateSettings) -> Gradient | None:
        return fused_gradient(self.policy, settings, self.inputs, self.actions, self.logp_old, self.advantages)


@pytest.fixture(params=registers.WITHOUT)
def floats(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code for registers of so many floats."""
    registers.use(monkeypatch, kernels, request.param)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("space", SPACES)
def test_it_is_the_gradient_autograd_gives(space: str, surrogate: str, activation: str) -> None:
    batch = Batch(SPACES[space], activation=activation)
    settings = settings_of(**SURROGATES[surrogate])
    gradient = batch.fused(settings)
    assert gradient is not None
    for rows in (torch.arange(3, 500), torch.tensor([499, 7, 7, 5]), torch.tensor([42])):
        found, sums = gradient(rows, 77)
        wanted, wanted_sums = batch.by_autograd(rows, settings)
        wanted_sums = wanted_sums * len(rows) / 77
        wanted = wanted * len(rows) / 77
        assert float((found - wanted).norm()) <= 2e-5 * float(wanted.norm())
        torch.testing.assert_close(sums, wanted_sums, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("surrogate", [name for name in SURROGATES if name != "delta"])  # which bounds it
def test_a_step_gone_far_astray_is_pulled_back_as_by_autograd(surrogate: str) -> None:
    batch = Batch(SPACES["five numbers"])
    settings = settings_of(**SURROGATES[surrogate])
    gradient = batch.fused(settings)
    assert gradient is not None
    found, _ = gradient(torch.arange(3), 3)
    wanted, _ = batch.by_autograd(torch.arange(3), settings)
    assert torch.isfinite(found).all()
    assert float(wanted.norm()) > 1e3
    assert float((found - wanted).norm()) <= 1e-4 * float(wanted.norm())


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize("hidden", [(33,), (7, 100, 3), (64, 64, 64)])
@pytest.mark.parametrize("space", [spaces.Discrete(19), spaces.Box(-1, 1, (18,), np.float32)])
def test_widths_that_are_no_multiple_of_16_and_more_outputs_than_that(space: spaces.Space, hidden: tuple) -> None:
    batch, settings = Batch(space, hidden_sizes=hidden), settings_of(entropy_coef=0.1)
    gradient = batch.fused(settings)
    assert gradient is not None
    rows = torch.arange(3, 200)
    found, _ = gradient(rows, 197)
    wanted, _ = batch.by_autograd(rows, settings)
    assert float((found - wanted).norm()) <= 5e-5 * float(wanted.norm())


def test_two_threads_at_once_give_what_one_after_the_other_gives() -> None:
    batch = Batch(SPACES["seven actions"])
    gradient = batch.fused(settings_of())
    assert gradient is not None
    parts = [torch.randperm(500, generator=torch.Generator().manual_seed(i))[:400] for i in range(20)]
    wanted = [gradient(part, 400)[0] for part in parts]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda part: gradient(part, 400)[0], parts))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_parts_add_up_to_the_whole() -> None:
    batch = Batch(SPACES["seven actions"])
    gradient = batch.fused(settings_of(entropy_coef=0.1))
    assert gradient is not None
    rows = torch.randperm(500, generator=torch.Generator().manual_seed(0))
    whole, sums = gradient(rows, 500)
    parts = [gradient(part, 500) for part in torch.split(rows, 130)]
    assert float((sum(p[0] for p in parts) - whole).norm()) <= 1e-5 * float(whole.norm())
    torch.testing.assert_close(sum(p[1] for p in parts), sums, rtol=1e-5, atol=1e-6)


def test_parameters_are_read_where_they_are_at_every_call() -> None:
    batch = Batch(SPACES["a number"])
    gradient = batch.fused(settings_of())
    assert gradient is not None
    rows = torch.arange(100, 200)
    before, _ = gradient(rows, 100)
    parameters = batch.agent.loop.learner.parameters
    parameters.load(1.1 * parameters.values())
    after, _ = gradient(rows, 100)
    wanted, _ = batch.by_autograd(rows, settings_of())
    assert float((after - before).norm()) > 1e-3
    assert float((after - wanted).norm()) <= 2e-5 * float(wanted.norm())


@pytest.mark.parametrize("where", ["logp_old", "advantages", "observation"])
def test_a_number_that_is_not_finite_is_not_swallowed(where: str) -> None:
    batch = Batch(SPACES["two actions"])
    target = batch.inputs["flat"] if where == "observation" else getattr(batch, where)
    target[50] = float("nan")
    gradient = batch.fused(settings_of())
    assert gradient is not None
    assert not torch.isfinite(gradient(torch.arange(40, 60), 20)[0]).all()


@pytest.mark.parametrize(
    ("space", "settings"),
    [
        (spaces.MultiDiscrete([2, 3]), {}),
        (spaces.MultiBinary(3), {}),
        (spaces.Discrete(2), {"native": False}),
        (spaces.Discrete(2), {"beta": 0.1}),
    ],
)
def test_whatever_else_is_left_to_autograd(space: spaces.Space, settings: dict) -> None:
    batch = Batch(space, **settings)
    assert batch.fused(settings_of(beta=settings.get("beta", 0.0))) is None


class Own(torch.nn.Module):
    """A network of the user's, with a parameter that takes no part."""

    def __init__(self, n_inputs: int, n_outputs: int) -> None:
        super().__init__()
        self.idle = torch.nn.Parameter(torch.ones(3))
        self.body = torch.nn.Sequential(torch.nn.Linear(n_inputs, 9), torch.nn.SiLU(), torch.nn.Linear(9, n_outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize("network", [Own, None], ids=["own", "one layer"])
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("space", SPACES)
def test_behind_any_other_network_it_is_the_gradient_autograd_gives(space: str, surrogate: str, network) -> None:
    batch = Batch(SPACES[space], network=network, hidden_sizes=())
    settings = settings_of(100, **SURROGATES[surrogate])
    gradient = batch.fused(settings)
    assert gradient is not None
    rows = torch.randperm(497, generator=torch.Generator().manual_seed(3)) + 3
    found, sums = gradient(rows, 497)
    wanted, wanted_sums = batch.by_autograd(rows, settings)
    assert float((found - wanted).norm()) <= 2e-5 * float(wanted.norm())
    torch.testing.assert_close(sums, wanted_sums, rtol=1e-5, atol=1e-6)


class Constant(torch.nn.Module):
    """Outputs that no parameter reaches: only standard deviations are learned."""

    def __init__(self, n_inputs: int, n_outputs: int) -> None:
        super().__init__()
        self.n_outputs = n_outputs

    def forward(self, x: Tensor) -> Tensor:
        return torch.zeros(len(x), self.n_outputs)


def test_a_network_without_parameters_leaves_the_standard_deviations_to_learn() -> None:
    batch, settings = Batch(SPACES["five numbers"], network=Constant), settings_of()
    gradient = batch.fused(settings)
    assert gradient is not None
    rows = torch.arange(3, 500)
    found, wanted = gradient(rows, 497)[0], batch.by_autograd(rows, settings)[0]
    assert found.shape == (5,)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_images_are_learned_from_the_same_way() -> None:
    class Looks(Scripted):
        def __init__(self, action_space: spaces.Space) -> None:
            super().__init__(action_space)
            self.observation_space = spaces.Box(0, 255, (12, 12, 3), np.uint8)

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return self.look(), {}

        def step(self, action):
            return self.look(), float(self.np_random.normal()), False, False, {}

        def look(self):
            return self.np_random.integers(0, 256, (12, 12, 3), np.uint8)

    quick = {"n_envs": 2, "n_steps": 32, "collect": "segments", "minibatch_size": 32, "epochs": 2, "threads": 1}
    vectors = []
    for native in (True, False):
        agent = GRPO(lambda: Looks(SPACES["two actions"]), preset=None, seed=0, native=native, **quick)
        agent.learn(192)
        vectors.append(agent.loop.learner.parameters.values())
    assert float((vectors[0] - vectors[1]).norm()) <= 1e-4 * float(vectors[1].norm())


def test_frozen_parameters_are_left_to_autograd() -> None:
    batch = Batch(SPACES["two actions"])
    next(iter(batch.policy.parameters())).requires_grad_(False)
    assert batch.fused(settings_of()) is None
