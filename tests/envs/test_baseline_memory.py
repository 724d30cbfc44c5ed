"""Earlier batches in the regression of the baseline: which are kept, in memory and in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import probes
import pytest
import torch
from gymnasium.wrappers import TimeLimit

from grouprl import GRPO, UsageError
from grouprl.envs.baseline_memory import BaselineMemory, Seen
from grouprl.envs.config import make_config
from grouprl.envs.estimate import DEFAULT_HORIZON
from grouprl.objective import RandomFeatures
from grouprl.runs.state import load_state

SETTINGS: dict[str, Any] = probes.FAST | {"baseline_memory": 600, "baseline_level": True}


def seen(steps: int, number: float = 0.0) -> Seen:
    """One sample that terminated."""
    generator = torch.Generator().manual_seed(int(number))
    states = torch.randn(steps, 3, generator=generator)
    counted = torch.arange(steps)
    ends = torch.ones(1, dtype=torch.bool)
    return Seen(states, counted, states[:1], counted[:1], torch.full((steps,), number), torch.tensor([steps]), ends)


def test_the_newest_whole_batches_that_fit_are_kept() -> None:
    features, memory = RandomFeatures.create(3, 4, seed=0), BaselineMemory(100)
    for number, steps in enumerate([40, 30, 50, 20]):
        memory.add(seen(steps, number), seen(steps, number).batch(features))
    assert [float(batch.rewards[0]) for batch in memory] == [1.0, 2.0, 3.0]  # 30 + 50 + 20 steps
    with pytest.warns(UserWarning, match="a batch of 101 steps"):
        memory.add(seen(101, 4), seen(101, 4).batch(features))
    assert list(memory) == []  # it holds no batch of 101


def test_what_is_read_back_gives_the_same_features() -> None:
    features, memory, again = RandomFeatures.create(3, 4, seed=0), BaselineMemory(100), BaselineMemory(100)
    for number in (1, 2):
        memory.add(seen(30, number), seen(30, number).batch(features))
    state = memory.state()
    assert sum(t.numel() for name, t in state.items() if name.startswith("0.")) == 30 * (3 + 1 + 1) + 3 + 1 + 1 + 1
    again.load(state, features)
    for one, other in zip(memory, again, strict=True):
        assert torch.equal(one.phi, other.phi)
        assert torch.equal(one.gram, other.gram)
        assert torch.equal(one.phi_last, other.phi_last)
        assert torch.equal(one.rewards, other.rewards)
    del state["1.rewards"]
    with pytest.raises(KeyError, match="rewards"):
        again.load(state, features)


def kept(agent: GRPO) -> list[int]:
    assert agent.loop.baseline is not None
    return [len(batch.phi) for batch in agent.loop.baseline.memory]


def test_a_run_keeps_batches_until_another_environment_is_set(tmp_path: Path) -> None:
    agent = GRPO(probes.Delayed, **SETTINGS).learn(64 + 4 * 256)
    assert kept(agent) == [256, 256]
    agent.checkpoint(tmp_path / "point.safetensors")
    names = load_state(tmp_path / "point.safetensors")[0]
    assert {name for name in names if name.startswith("baseline.kept.1.")} == {
        f"baseline.kept.1.{name}" for name in Seen.__dataclass_fields__
    }
    assert kept(GRPO.from_checkpoint(tmp_path / "point.safetensors", probes.Delayed)) == [256, 256]
    agent.set_env(probes.Delayed)
    assert kept(agent) == []
    without = GRPO(probes.Delayed, **SETTINGS | {"baseline_memory": 0}).learn(64 + 2 * 256)
    assert kept(without) == []


def test_the_time_in_an_episode_is_measured_by_the_limit_of_the_environment_that_is_trained_on() -> None:
    agent = GRPO(lambda: TimeLimit(probes.Delayed(), 30), **SETTINGS)
    assert agent.loop.baseline is not None
    assert agent.loop.baseline.horizon == 30
    agent.set_env(lambda: TimeLimit(probes.Delayed(), 50))
    assert agent.loop.baseline.horizon == 50
    agent.set_env(probes.Delayed)
    assert agent.loop.baseline.horizon == DEFAULT_HORIZON


def test_a_copy_keeps_them_too() -> None:
    agent = GRPO(probes.Delayed, **SETTINGS).learn(64 + 3 * 256)
    twin = agent.__deepcopy__({}).__deepcopy__({})  # whose environments are not made yet
    twin.ready()
    assert kept(twin) == kept(agent) == [256, 256]
    assert agent.loop.baseline is not None
    assert twin.loop.baseline is not None
    assert torch.equal(twin.loop.baseline.weights, agent.loop.baseline.weights)


def test_the_weights_differ_from_those_of_a_run_without() -> None:
    one, other = (
        GRPO(probes.Delayed, **SETTINGS | {"baseline_memory": n, "baseline_level": False}).learn(64 + 2 * 256)
        for n in (0, 600)
    )
    assert one.loop.baseline is not None
    assert other.loop.baseline is not None
    assert not torch.equal(one.loop.baseline.weights, other.loop.baseline.weights)


def test_a_memory_that_holds_no_batch_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"baseline_memory=1000 holds no whole batch, which has 2048 steps; set .* 20480"
    ):
        make_config({"collect": "segments", "baseline_memory": 1000})
    with pytest.raises(UsageError, match="4096 steps"):
        make_config({"baseline_memory": 4095})
    assert make_config({"baseline_memory": 4096}).baseline_memory == 4096


@pytest.mark.parametrize("other", [{"baseline_memory": 40_960}, {"baseline_level": True}])
def test_a_pulled_fit_has_neither_memory_nor_level(other: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="baseline_pull keeps what earlier batches said"):
        make_config({"baseline_pull": 0.3, **other})


def test_batches_that_are_too_large_for_it_are_named_once(recwarn: pytest.WarningsRecorder) -> None:
    settings = {"preset": None, "min_steps": 100, "max_steps": 400, "min_signals": 400, "n_envs": 4, "warmup_steps": 0}
    agent = GRPO("CartPole-v1", baseline_memory=150, **settings).learn(1500)
    assert agent.loop.baseline is not None
    assert not list(agent.loop.baseline.memory)
    assert agent.loop.batches > 2
    (said,) = [str(one.message) for one in recwarn if "baseline_memory" in str(one.message)]
    assert said.startswith("baseline_memory=150 has no effect on a batch of 4")
