"""A discount that rises while training goes on: what it is at a time, and that all that discounts has it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from grouprl import GRPO, objective
from grouprl.envs.config import make_config
from grouprl.errors import UsageError
from grouprl.objective.estimators import Estimation

SMALL: dict[str, Any] = {
    "n_envs": 4, "collect": "segments", "n_steps": 64, "minibatch_size": 64, "epochs": 1, "warmup_steps": 64,
}  # fmt: skip


def test_the_horizon_grows_geometrically() -> None:
    config = make_config({"gamma": 0.9, "gamma_final": 0.999})  # horizons of 10 and of 1,000: half-way 100
    assert [config.at(p).gamma for p in (0.0, 0.5, 1.0)] == pytest.approx([0.9, 0.99, 0.999], abs=1e-12)
    assert config.at(1.5).gamma == pytest.approx(0.999)


def test_without_a_final_one_the_discount_stays() -> None:
    config = make_config({"gamma": 0.9})
    assert config.at(0.7) is config


@pytest.mark.parametrize("gamma", [0.995, 1.0])
def test_a_horizon_that_would_shrink_is_refused(gamma: float) -> None:
    with pytest.raises(UsageError, match=rf"gamma_final=0.99 is below gamma={gamma}.*set it to None"):
        make_config({"gamma": gamma, "gamma_final": 0.99})


def test_the_same_discount_or_none_is_one_throughout() -> None:
    assert make_config({"gamma": 0.9, "gamma_final": 0.9}).at(0.3).gamma == pytest.approx(0.9)
    assert GRPO("Hopper-v5", gamma=0.999, gamma_final=None).config.at(0.3).gamma == 0.999
    with pytest.raises(UsageError, match="gamma_final"):
        make_config({"gamma_final": 1.0})


def test_an_estimator_of_the_users_own_is_given_the_discount_of_the_batch() -> None:
    asked: list[float] = []

    def own(rewards: Any, lengths: Any, group: Any, gamma: float) -> Any:
        asked.append(gamma)
        return rewards.cumsum(0)

    agent = GRPO(
        "CartPole-v1", **SMALL, gamma=0.9, gamma_final=0.999, advantage_function=own, skip_without_signal=False
    )
    logged: list[float] = []
    agent.learn(1000, callback=lambda agent, metrics: logged.append(metrics["gamma"]))
    assert asked == logged
    assert asked[-1] > asked[0] >= 0.9
    asked.clear()
    agent.learn(300)  # another call begins at gamma again
    assert asked[0] < logged[-1]


@pytest.mark.parametrize("nested", [False, True])
def test_a_discount_that_a_partial_binds_is_left_alone(nested: bool) -> None:
    used: list[tuple[float, bool]] = []

    def own(rewards: Any, lengths: Any, group: Any, gamma: float = 0.5, values: Any = None, scale: float = 1.0) -> Any:
        used.append((gamma, values is None))
        return scale * rewards.cumsum(0)

    bound = partial(partial(own, gamma=1.0), scale=2.0) if nested else partial(own, gamma=1.0)
    GRPO("CartPole-v1", **SMALL, preset=None, gamma=0.9, advantage_function=bound).learn(300)
    assert set(used) == {(1.0, False)}  # what it does not bind is still given


def test_an_estimator_by_name_is_given_the_discount_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []

    def told(gamma: float, *others: Any, **more: Any) -> Estimation:
        made.append(gamma)
        return Estimation(gamma, *others, **more)

    monkeypatch.setattr("grouprl.envs.estimate.Estimation", told)
    logged: list[float] = []
    settings = SMALL | {"collect": "episodes", "min_steps": 200, "advantage": "timestep"}
    del settings["n_steps"]
    agent = GRPO("CartPole-v1", **settings, gamma=0.9, gamma_final=0.999, skip_without_signal=False)
    agent.learn(1500, callback=lambda agent, metrics: logged.append(metrics["gamma"]))
    assert made == logged
    assert made[-1] > made[0]


@pytest.mark.parametrize("settings", [{}, {"reuse": 3}, {"baseline_pull": 0.3, "reuse": 2}])
def test_every_advantage_of_a_batch_has_its_discount(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    own, used = objective.gae, []

    def gae(rewards: Any, values: Any, last: Any, lengths: Any, gamma: float, lam: float) -> Any:
        used.append(gamma)
        return own(rewards, values, last, lengths, gamma, lam)

    for room in ("grouprl.objective", "grouprl.objective.baseline", "grouprl.objective.pulled_baseline"):
        monkeypatch.setattr(f"{room}.gae", gae)
    batches: list[tuple[float, float, set[float]]] = []
    told: list[float] = []
    agent = GRPO("CartPole-v1", **SMALL, gamma=0.9, gamma_final=0.999, **settings)
    agent.loop.on_batch.append(lambda rollout, advantages, gamma: told.append(gamma))

    def watch(agent: GRPO, metrics: dict[str, float]) -> None:
        if told:  # nothing is estimated for a batch without a signal
            batches.append((metrics["gamma"], told.pop(), set(used)))
        used.clear()

    agent.learn(1500, callback=watch)
    assert len(batches) >= 5
    assert all(gamma == heard and used == {gamma} for gamma, heard, used in batches)
    gammas = [gamma for gamma, *_ in batches]
    assert gammas == sorted(gammas)
    assert 0.9 <= gammas[0] < 0.95 < gammas[-1] <= 0.999
