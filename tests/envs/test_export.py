"""Policies outside of grouprl: whatever torch makes of them gives what the agent gives."""

from __future__ import annotations

import io
import warnings
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from policies_to_export import CASES, agent_for
from torch import nn


def batch(space: spaces.Space[Any], m: int) -> tuple[Any, list[torch.Tensor]]:
    """Observations in Gymnasium's batched layout, and their leaves as tensors."""
    space.seed(0)
    many = gym.vector.utils.batch_space(space, m).sample()
    if isinstance(space, spaces.Dict) and "action_mask" in space.spaces:
        many["action_mask"][:, 1] = 1
    found: list[torch.Tensor] = []

    def walk(part: Any) -> None:
        if isinstance(part, dict):
            [walk(one) for one in part.values()]
        elif isinstance(part, tuple):
            [walk(one) for one in part]
        else:
            found.append(torch.from_numpy(np.asarray(part)))

    walk(many)
    return many, found


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("masked ")])
def test_every_way_out_of_torch_gives_what_the_agent_gives(name: str) -> None:
    agent = agent_for(name)
    space = agent.observation_space
    few, few_leaves = batch(space, 3)
    many, many_leaves = batch(space, 7)
    actions, parameters = agent.export_module(), agent.export_module(actions=False)
    single = not isinstance(space, spaces.Dict | spaces.Tuple)

    def call(module: Any, leaves: list[torch.Tensor]) -> Any:
        return module(leaves[0]) if single else module(leaves)

    example: Any = (few_leaves[0],) if single else (few_leaves,)
    ways: dict[str, tuple[Any, Any]] = {"as it is": (actions, parameters)}
    ways["script"] = tuple(_again(torch.jit.script(module)) for module in (actions, parameters))
    ways["trace"] = tuple(_again(torch.jit.trace(module, example)) for module in (actions, parameters))
    rows = torch.export.Dim("rows", min=2, max=100)
    shapes: Any = ({0: rows},) if single else ([{0: rows}] * len(few_leaves),)
    ways["export"] = tuple(
        torch.export.export(module, example, dynamic_shapes=shapes).module() for module in (actions, parameters)
    )
    for observations, leaves in ((few, few_leaves), (many, many_leaves)):
        expected, _ = agent.predict(observations, deterministic=True)
        encoded = agent.policy.prepare(agent.observations.encode(observations))
        params = agent.policy.infer(encoded)
        mask = agent.observations.mask(observations)
        if mask is not None:
            params = agent.policy.distribution.apply_mask(params, mask)
        for way, (act, parameter) in ways.items():
            found = call(act, leaves).numpy()
            assert found.shape == expected.shape, way
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=way)
            np.testing.assert_allclose(call(parameter, leaves).numpy(), params, rtol=1e-4, atol=1e-4, err_msg=way)


def _again(module: Any) -> Any:
    """Written and read."""
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_the_policy_itself_is_traced_scripted_and_exported_with_its_layers() -> None:
    agent = agent_for("box")
    policy, network = agent.policy, agent.policy.network
    few, many = torch.randn(1, 3), torch.randn(5, 3)

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.policy = policy

        def forward(self, x: torch.Tensor) -> Any:
            return self.policy({"flat": x})

    rows = torch.export.Dim("rows", min=1, max=100)
    made = [
        torch.jit.trace(Wrapped(), (few,)),
        torch.jit.script(network),
        torch.jit.trace(network, (few,)),
        torch.export.export(Wrapped(), (many[:2],), dynamic_shapes=({0: rows},)).module(),
    ]
    with torch.no_grad():
        for module in made:
            torch.testing.assert_close(module(many), network(many))
            torch.testing.assert_close(module(few), network(few))


def test_later_training_does_not_change_an_exported_module() -> None:
    agent = agent_for("box")
    module = agent.export_module(actions=False)
    x = torch.randn(4, 3)
    before = module(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agent.learn(128)
    assert torch.equal(module(x), before)
    assert not torch.equal(agent.export_module(actions=False)(x), before)
    assert not any(p.requires_grad for p in module.parameters())
