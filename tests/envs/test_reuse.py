"""Updates that learn from earlier batches again: weights, clip, advantages, and what is kept of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import probes
import pytest
import torch
from torch import nn

from grouprl import GRPO, UsageError
from grouprl.envs.config import make_config
from grouprl.envs.reuse import Earlier, Reuse
from grouprl.envs.rollout import Rollout
from grouprl.envs.sizes import least_bytes
from grouprl.objective import effective_share, gae, standardise, standardise_weighted
from grouprl.runs.state import load_state

SETTINGS: dict[str, Any] = probes.FAST | {"reuse": 3}


def own_network(inputs: int, outputs: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))


ARENA: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {
    "Discrete": (probes.Delayed, {}),
    "MultiDiscrete": (probes.multi_discrete, {}),
    "MultiBinary": (probes.multi_binary, {}),
    "Box": (lambda: probes.target(-1.0, 1.0, 0.3), {}),
    "masked": (probes.Masked, {}),
    "mask in the observation": (lambda: probes.Masked("dict"), {}),
    "Dict": (probes.dictionary, {}),
    "images": (probes.image, {"n_steps": 8}),
    "own network": (lambda: probes.target(-1.0, 1.0, 0.3), {"network": own_network}),
    "own network in float64": (probes.Delayed, {"network": lambda i, o: own_network(i, o).double()}),
    "torch": (lambda: probes.target(-1.0, 1.0, 0.3), {"native": False}),
    "repeated actions": (lambda: probes.Truncated(cost=0.5), {"sticky": 0.5}),
}


def collected(agent: GRPO) -> Rollout:
    return agent.ready().collect(agent.policy, sticky=agent.config.sticky)


@torch.no_grad()
def moved(agent: GRPO, by: float) -> None:
    """Another policy, on other statistics."""
    generator = torch.Generator().manual_seed(7)
    for p in agent.policy.parameters():
        p += by * torch.randn(p.shape, generator=generator).to(p)
    agent.policy.observe(np.full((400, agent.policy.observations.n_flat), 2.0, np.float32))


@pytest.mark.parametrize("name", ARENA)
def test_every_kind_of_action_observation_and_network_is_weighted_by_the_policies_themselves(name: str) -> None:
    make, settings = ARENA[name]
    agent = GRPO(make, **SETTINGS | settings)
    assert agent.config.reuse == 3
    policy, reuse = agent.policy, Reuse(3)
    policy.observe(np.random.default_rng(0).normal(size=(100, policy.observations.n_flat)).astype(np.float32))

    def values(inputs: Any, elapsed: torch.Tensor) -> torch.Tensor:
        return 0.1 * elapsed.float() + sum(value.flatten(1).float().mean(1) for value in inputs.values())

    old = collected(agent)
    shift, scale, _ = policy.normalisation()
    reuse.join(old, torch.zeros(old.n_steps), policy, values, agent.config)
    moved(agent, 0.3)

    def after() -> torch.Tensor:
        last = {key: value.numpy() for key, value in old.last_inputs.items()}
        if "flat" in last:
            last["flat"] = last["flat"] / scale + shift
        inputs = {key: torch.from_numpy(value) for key, value in policy.prepare(last).items()}
        return torch.where(old.terminated, 0.0, values(inputs, old.last_elapsed))

    new = collected(agent)
    raw = torch.randn(new.n_steps, generator=torch.Generator().manual_seed(1))
    joined, advantages, info = reuse.join(new, raw, policy, values, agent.config)

    # The old steps under today's policy and statistics, from the observations as they were before normalisation.
    seen = {key: value.numpy() for key, value in old.inputs.items()}
    if old.observed is not None:
        seen["flat"] = old.observed
    inputs = {key: torch.from_numpy(value) for key, value in policy.prepare(seen).items()}
    with torch.no_grad():
        params = policy(inputs)
    if old.mask is not None:
        params = policy.distribution.apply_mask(params, old.mask)
    log_prob = policy.distribution.log_prob
    ratio = (log_prob(params, old.actions) - log_prob(old.behaviour, old.actions)).exp()
    assert float(ratio.min()) < 0.99
    w = torch.cat((torch.ones(new.n_steps), ratio.clamp(max=2.0)))

    assert joined.n_steps == new.n_steps + old.n_steps
    for key, value in inputs.items():
        assert torch.equal(joined.inputs[key], torch.cat((new.inputs[key], value)))
    torch.testing.assert_close(joined.behaviour, torch.cat((new.behaviour, params)), rtol=1e-4, atol=1e-5)
    assert torch.equal(joined.actions, torch.cat((new.actions, old.actions)))
    earlier = gae(old.rewards, values(inputs, old.elapsed), after(), old.lengths, 0.99, 0.95)
    made = standardise_weighted(torch.cat((raw, earlier)), w, joined.trainable)
    torch.testing.assert_close(advantages, made, rtol=1e-3, atol=1e-4)
    expected = effective_share(w[new.n_steps :][old.trainable])
    assert info["reuse_effective"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", ARENA)
def test_every_kind_of_action_observation_and_network_trains(name: str) -> None:
    make, settings = ARENA[name]
    rows: list[dict[str, float]] = []
    agent = GRPO(make, **SETTINGS | settings)
    agent.learn(64 + 4 * 8 * agent.config.n_steps, callback=lambda agent, metrics: rows.append(dict(metrics)))
    shares = [row["reuse_effective"] for row in rows]
    assert np.isnan(shares[0])  # no batch came before
    assert all(0.3 < share <= 1.0 for share in shares[1:])
    assert min(shares[1:]) < 1.0
    steps = [row["optimizer_steps"] for row in rows]
    assert steps[1] > 1.5 * steps[0]
    assert steps[2] > 2.0 * steps[0]
    assert agent.loop.reuse is not None
    assert len(agent.loop.reuse) == 2


def test_one_batch_alone_is_learned_from_as_without_reuse() -> None:
    agent = GRPO(probes.Delayed, **SETTINGS)
    rollout = collected(agent)
    raw = torch.randn(rollout.n_steps)
    joined, advantages, _ = Reuse(3).join(rollout, raw, agent.policy, lambda i, e: e.float(), agent.config)
    torch.testing.assert_close(advantages, standardise(raw, rollout.trainable))
    assert torch.equal(joined.inputs["flat"], rollout.inputs["flat"])
    assert torch.equal(joined.behaviour, rollout.behaviour)


def test_the_same_policy_weighs_its_earlier_steps_in_full_and_their_ends_are_worth_what_they_were() -> None:
    agent = GRPO(lambda: probes.Truncated(cost=0.5), **SETTINGS)
    reuse, config = Reuse(2), agent.config

    def values(inputs: Any, elapsed: torch.Tensor) -> torch.Tensor:
        return inputs["flat"][:, 0] * 3 + elapsed

    rollouts = [collected(agent) for _ in range(2)]
    raw = [
        gae(r.rewards, values(r.inputs, r.elapsed), values(r.last_inputs, r.last_elapsed), r.lengths, 0.99, 0.95)
        for r in rollouts
    ]
    reuse.join(rollouts[0], raw[0], agent.policy, values, config)
    _, advantages, info = reuse.join(rollouts[1], raw[1], agent.policy, values, config)
    assert info["reuse_effective"] == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(advantages, standardise(torch.cat((raw[1], raw[0]))), rtol=1e-4, atol=1e-4)


def test_a_batch_without_masks_beside_one_with_masks_allows_every_action_there() -> None:
    agent = GRPO(probes.Masked, **SETTINGS)
    rollout = collected(agent)
    assert rollout.mask is not None
    plain = Rollout(**vars(rollout) | {"mask": None})
    for first, second in ((rollout, plain), (plain, rollout)):
        reuse, raw = Reuse(2), torch.randn(rollout.n_steps)
        reuse.join(first, raw, agent.policy, lambda i, e: e.float(), agent.config)
        joined, _, _ = reuse.join(second, raw, agent.policy, lambda i, e: e.float(), agent.config)
        assert joined.mask is not None
        masks = dict(zip(("second", "first"), joined.mask.chunk(2), strict=True))
        assert bool(masks["first" if first is plain else "second"].all())
        assert torch.equal(masks["second" if first is plain else "first"], rollout.mask)


@pytest.mark.parametrize("make", [probes.Delayed, lambda: probes.target(-1.0, 1.0, 0.3)])
def test_compiled_code_learns_what_torch_does(make: Any) -> None:
    agents = [GRPO(make, **SETTINGS | {"native": native}).learn(64 + 3 * 256) for native in (True, False)]
    one, other = ([p.detach() for p in agent.policy.parameters()] for agent in agents)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-3)


def test_batches_are_kept_in_checkpoints_and_forgotten_for_another_environment(tmp_path: Path) -> None:
    agent = GRPO(probes.Masked, **SETTINGS).learn(64 + 3 * 256)
    agent.checkpoint(tmp_path / "point.safetensors")
    names = {name for name in load_state(tmp_path / "point.safetensors")[0] if name.startswith("reuse.1.")}
    assert names == {f"reuse.1.{name}" for name in (
        "seen.flat", "last.flat", "actions", "behaviour", "mask", "trainable", "rewards", "elapsed", "last_elapsed",
        "lengths", "terminated",
    )}  # fmt: skip
    again = GRPO.from_checkpoint(tmp_path / "point.safetensors", probes.Masked)
    for one in (agent, again):
        one.learn(256)
    for a, b in zip(agent.policy.parameters(), again.policy.parameters(), strict=True):
        assert torch.equal(a, b)
    assert agent.loop.reuse is not None
    agent.set_env(probes.Masked)
    assert len(agent.loop.reuse) == 0


def test_estimators_without_values_are_refused() -> None:
    with pytest.raises(UsageError, match=r"reuse=2 needs values .* advantage='outcome' does not have; set reuse=1"):
        make_config({"reuse": 2, "advantage": "outcome"})
    with pytest.raises(UsageError, match="advantage_function takes its place; set reuse=1"):
        GRPO(probes.Delayed, **SETTINGS, advantage_function=lambda rewards, lengths, group: rewards)


def test_the_memory_that_kept_batches_take_is_counted_before_it_is_taken() -> None:
    needs = least_bytes(make_config({"reuse": 4, "baseline_memory": 8192}))
    assert needs["min_steps=4096 and reuse=4"] == 4 * needs["min_steps=4096"]
    assert needs["baseline_memory=8192 and baseline_features=128"] == 8192 * 128 * 4


def test_of_more_batches_than_are_kept_the_newest_are_read() -> None:
    agent = GRPO(probes.Delayed, **SETTINGS).learn(64 + 4 * 8 * 64)
    assert agent.loop.reuse is not None
    state = agent.loop.reuse.state()
    assert "1.rewards" in state
    fewer = Reuse(2)
    fewer.load(state)  # must end
    assert torch.equal(fewer.state()["0.rewards"], state["1.rewards"])
    assert len(fewer) == 1


def test_the_state_behind_a_sample_is_kept_as_it_was_however_far_out_it_lies() -> None:
    """Inputs are clipped to 10 deviations, from which no observation can be made again."""
    agent = GRPO(probes.Delayed, **SETTINGS)
    moved(agent, 0.0)
    rollout = collected(agent)
    assert rollout.last_observed is not None
    far = replace(rollout, last_observed=np.full_like(rollout.last_observed, 1e4))
    assert np.array_equal(Earlier.of(far).last["flat"], far.last_observed)


def test_a_reference_sees_what_was_observed_under_its_own_statistics() -> None:
    agent = GRPO(probes.Delayed, **SETTINGS, beta=0.1, reference="initial", kl_estimator="exact")
    agent.learn(200)
    reference = agent.loop.learner.reference
    assert reference is not None
    moved(agent, 0.0)
    rollout = collected(agent)
    far = np.full_like(rollout.observed, 50.0)
    inputs = {key: torch.from_numpy(value) for key, value in agent.policy.prepare({"flat": far}).items()}
    found = agent.loop.learner._reference_params(far, inputs, rollout.behaviour, None)
    wanted = reference({"flat": torch.from_numpy(reference.prepare({"flat": far})["flat"])})
    assert found is not None
    torch.testing.assert_close(found, wanted.detach(), rtol=0, atol=0)
