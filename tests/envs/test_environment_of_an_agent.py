"""An agent and the environment it was given: saved, loaded, copied, shared, interrupted."""

from __future__ import annotations

import copy
import enum
import os
import pickle
import signal
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import TransformReward

from grouprl import GRPO, TrainingError, UsageError, evaluate
from grouprl.envs import training
from grouprl.envs.callbacks import Evaluations
from grouprl.envs.env_kwargs import from_json, to_json
from grouprl.envs.watch import make_rendering, play_episode

QUICK: dict[str, Any] = {
    "preset": None, "n_envs": 2, "collect": "segments", "n_steps": 16, "epochs": 1, "warmup_steps": 0,
}  # fmt: skip


class Sign(gym.Env[Any, Any]):
    """Pays ``pay`` where the action is the sign of the first number; ten steps."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space: Any = spaces.Discrete(2)

    def __init__(self, pay: Any = 1.0, **other: Any) -> None:
        self.pay, self.other = pay, other

    def look(self) -> Any:
        self.x = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.x

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.t = 0
        return self.look(), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        return self.look(), float((self.x[0] > 0) == action) * float(np.sum(self.pay)), self.t >= 10, False, {}


@pytest.fixture(autouse=True)
def sign_registered() -> Any:
    gym.register("Sign-v0", entry_point=Sign)
    yield
    del gym.registry["Sign-v0"]


def paid_100() -> gym.Env[Any, Any]:
    return TransformReward(gym.make("Sign-v0"), lambda reward: 100 * reward)


@pytest.mark.parametrize(
    "make",
    [
        paid_100, lambda: partial(gym.make, "Sign-v0", pay=100), lambda: paid_100,
        lambda: gym.make_vec("Sign-v0", num_envs=2, vectorization_mode="sync", pay=100),
        lambda: gym.make("Sign-v0").unwrapped,
    ],
)  # fmt: skip
def test_a_loaded_agent_never_stands_on_another_environment_without_a_word(make: Any, tmp_path: Path) -> None:
    env = make()
    agent = GRPO(env, **QUICK).learn(64)
    before = evaluate(agent, episodes=4).returns
    loaded = GRPO.load(agent.save(tmp_path / "agent"))
    for use in (lambda: evaluate(loaded), lambda: loaded.learn(1), lambda: make_rendering(loaded, "rgb_array")):
        with pytest.raises(UsageError, match=r"no environment: it was given as .*agent.set_env\(env\)"):
            use()
    assert evaluate(loaded, env, episodes=4).returns == before
    agent.checkpoint(tmp_path / "point.safetensors")
    with pytest.raises(UsageError, match="no environment"):
        GRPO.from_checkpoint(tmp_path / "point.safetensors")
    GRPO.from_checkpoint(tmp_path / "point.safetensors", env).learn(1)


class Kind(enum.Enum):
    A = 1


class Text(str, enum.Enum):
    A = "a"


@pytest.mark.parametrize("pay", [sum, Kind.A, Text.A, object(), [1.0, {"a": Sign}], np.array([None]), 1j])
def test_arguments_that_no_file_can_hold_lose_no_weights(pay: Any, tmp_path: Path) -> None:
    agent = GRPO("Sign-v0", env_kwargs={"pay": 2.0, "thing": pay}, **QUICK).learn(64)
    returns = evaluate(agent, episodes=4).returns
    loaded = GRPO.load(agent.save(tmp_path / "agent"))
    assert torch.equal(loaded.policy.state_dict()["mean"], agent.policy.state_dict()["mean"])
    with pytest.raises(UsageError, match="no file can hold the argument thing="):
        loaded.learn(1)
    loaded = GRPO.load(tmp_path / "agent", env_kwargs={"pay": 2.0, "thing": pay})
    assert evaluate(loaded, episodes=4).returns == returns
    with pytest.raises(UsageError, match="must be able to make its environment again: no file can hold the argument"):
        training.train("Sign-v0", tmp_path / "run", env_kwargs={"thing": pay}, settings={"n_envs": 2}, steps=64)
    assert not (tmp_path / "run").exists()


def test_arguments_come_back_with_their_types(tmp_path: Path) -> None:
    given = {
        "size": (3, 3), "map": {1: "a", (0, 1): [2.5, None, True]}, "file": Path("a/b.xml"), "names": {"x", "y"},
        "weights": np.array([[1.0, 2.0]], np.float32), "number": np.int16(3), "odd": {"!": 1}, "deep": [{"k": ((),)}],
        "infinite": float("inf"), "frozen": frozenset({1}),
    }  # fmt: skip
    agent = GRPO("Sign-v0", env_kwargs=given, **QUICK)
    back = GRPO.load(agent.save(tmp_path / "agent")).env_kwargs
    assert repr(back) == repr(given) or {**back, "names": 0} == {**given, "names": 0, "weights": back["weights"]}
    assert [type(value) for value in back.values()] == [type(value) for value in given.values()]
    assert (back["weights"].dtype, back["number"].dtype) == (np.float32, np.int16)
    assert to_json({"plain": {"a": [1, "x", 2.0]}}) == {"plain": {"a": [1, "x", 2.0]}}
    assert from_json({"plain": {"a": [1]}}) == {"plain": {"a": [1]}}


def test_a_preset_is_no_reason_to_refuse_the_environment_it_is_for() -> None:
    with pytest.warns(UserWarning, match="CliffWalking-v1 made with max_episode_steps=200"):
        agent = GRPO(gym.make("CliffWalking-v1"))
    assert agent.env_kwargs == {}
    with pytest.warns(UserWarning, match="LunarLander-v3 made with continuous=True"):
        GRPO(Sign, preset="LunarLander-v3-continuous")
    made = gym.make("CliffWalking-v1", max_episode_steps=200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GRPO(made)


def test_an_environment_shared_with_others_begins_fresh_episodes_in_each_call() -> None:
    env = Sign()
    agent = GRPO(env, preset=None, min_steps=64, max_steps=128, warmup_steps=16)
    for _ in range(4):
        agent.learn(64)
        env.reset()
        for _ in range(3):
            env.step(0)
    assert set(agent.loop.recent_lengths) == {10}
    evaluate(agent, gym.wrappers.TimeLimit(env, 7), episodes=1)
    agent.learn(64)
    assert set(agent.loop.recent_lengths) == {10}


class Flaky(Sign):
    """Is interrupted, as by a Ctrl-C in a notebook, at the step that the test says."""

    calls, at, what = 0, 217, KeyboardInterrupt

    def step(self, action: Any) -> Any:
        type(self).calls += 1
        if self.calls == self.at:
            raise self.what
        return super().step(action)


@pytest.mark.parametrize("what", [KeyboardInterrupt, SystemExit, ValueError])
def test_after_an_exception_episodes_begin_anew(what: Any) -> None:
    class Once(Flaky):
        pass

    Once.what = what
    agent = GRPO(Once, preset=None, n_envs=4, min_steps=64, warmup_steps=16)
    with pytest.raises((what, TrainingError)):
        agent.learn(2_000)
    agent.learn(300)
    assert set(agent.loop.recent_lengths) == {10}


class Slow(Sign):
    def step(self, action: Any) -> Any:
        time.sleep(0.02)
        return super().step(action)


@pytest.mark.parametrize("given", ["callable", "object"])
def test_workers_go_on_after_an_interruption(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interruption comes while answers are due: within an answer the pipe would be of no use any more."""
    env: Any = Slow if given == "callable" else gym.vector.AsyncVectorEnv([Slow, Slow])
    agent = GRPO(env, **QUICK | {"vectorization": "async"})
    wait, waits = gym.vector.AsyncVectorEnv.step_wait, iter(range(1_000))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(waits) == 5:
            raise KeyboardInterrupt
        return wait(*args, **kwargs)

    monkeypatch.setattr(gym.vector.AsyncVectorEnv, "step_wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        agent.learn(100_000)
    agent.learn(32)
    processes = list(agent.get_env().processes)  # type: ignore[union-attr]
    os.kill(processes[0].pid, signal.SIGKILL)
    with pytest.raises(TrainingError, match="worker process died"):
        agent.learn(32)
    if given == "callable":
        agent.learn(32)
        assert not any(process.is_alive() for process in processes)
    else:
        with pytest.raises(UsageError, match=r"has ended .*agent.set_env\(venv\)"):
            agent.learn(32)
    agent.close()


def test_an_environment_of_the_users_is_closed_only_with_the_agent() -> None:
    closed = []

    class Open(Sign):
        def close(self) -> None:
            closed.append(self)

    env = Open()
    agent = GRPO(env, **QUICK)
    agent.set_env(Open)
    assert closed == []
    made = [each.unwrapped for each in agent.get_env().envs]  # type: ignore[union-attr]
    agent.set_env(Open)
    assert closed == made
    agent.close()
    agent.learn(32)  # made again
    agent.close()
    agent.close()
    assert len(closed) == 6


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_training_goes_on_in_no_episode_of_a_loop_of_ones_own(vectorization: str) -> None:
    agent = GRPO(Sign, **QUICK | {"vectorization": vectorization}).learn(16)
    venv: Any = agent.get_env()
    for _ in range(2):
        venv.reset()
        for _ in range(7):
            venv.step(np.zeros(2, int))
        before = len(agent.loop.recent_lengths)
        agent.learn(32)
        assert list(agent.loop.recent_lengths)[before:] == [10, 10]
    agent.close()


def test_episodes_of_an_environment_that_nobody_else_has_go_on() -> None:
    agent = GRPO(Sign, **QUICK).learn(32).learn(32, callback=Evaluations(8, episodes=1))
    assert list(agent.loop.recent_lengths) == [10] * 6


def test_returns_of_another_environment_are_not_counted_any_more() -> None:
    agent = GRPO(Sign, **QUICK).learn(64)
    seen = agent.recent_returns
    agent.set_env(Sign)
    assert agent.recent_returns == seen != []
    agent.set_env(lambda: Sign())
    assert agent.recent_returns == []
    assert list(agent.loop.recent_lengths) == []
    agent.close()


def test_returns_of_the_same_id_with_the_same_arguments_count_on() -> None:
    short = {"max_episode_steps": 8}
    agent = GRPO("CliffWalking-v1", env_kwargs=short, **QUICK).learn(64)
    seen = agent.recent_returns
    agent.set_env("CliffWalking-v1", short)
    assert agent.recent_returns == seen != []
    agent.set_env("CliffWalking-v1", {"max_episode_steps": 9})
    assert agent.recent_returns == []
    agent.close()


def test_copies_train_by_themselves() -> None:
    agent = GRPO(Sign, **QUICK, seed=1).learn(64)
    plain = {name: value.clone() for name, value in agent.policy.state_dict().items()}
    twins = [copy.deepcopy(agent), pickle.loads(pickle.dumps(agent)), copy.copy(agent)]
    results = []
    for twin in twins:
        twin.learn(64)
        results.append(twin.policy.state_dict())
        assert twin.num_timesteps == 2 * agent.num_timesteps
        assert all(torch.equal(value, plain[name]) for name, value in agent.policy.state_dict().items())
        assert not all(torch.equal(value, plain[name]) for name, value in twin.policy.state_dict().items())
    agent.restart_episodes()
    agent.learn(64)
    for result in results[1:]:
        assert all(torch.equal(value, results[0][name]) for name, value in result.items())


@pytest.mark.parametrize("env", [lambda: Sign(), Sign()])
def test_a_pickle_leaves_behind_what_cannot_be_pickled(env: Any) -> None:
    agent = GRPO(env, **QUICK)
    twin = pickle.loads(pickle.dumps(agent))
    with pytest.raises(UsageError, match="no environment"):
        twin.learn(1)
    twin.set_env(Sign)
    twin.learn(1)
    assert (copy.deepcopy(agent).env is None) == isinstance(env, gym.Env)


def test_a_model_beside_a_folder_of_its_name_is_found(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "logs").mkdir()
    agent = GRPO(Sign, **QUICK).learn(32)
    assert agent.save("~/logs") == tmp_path / "logs.safetensors"
    assert GRPO.load("~/logs").num_timesteps == agent.num_timesteps
    (tmp_path / "logs" / "model.safetensors").write_bytes((tmp_path / "logs.safetensors").read_bytes())
    with pytest.raises(UsageError, match="name the file that you mean"):
        GRPO.load(tmp_path / "logs")


class Turns(Sign):
    action_space = spaces.Discrete(3)

    def action_masks(self) -> list[int]:
        return [0, 1, 0]

    def step(self, action: Any) -> Any:
        assert action == 1, "a forbidden action was taken"
        return super().step(action)


def test_predict_hears_masks_or_refuses_them(tmp_path: Path) -> None:
    agent = GRPO(Turns, **QUICK).learn(64)
    one, two = np.zeros(2, np.float32), np.zeros((2, 2), np.float32)
    for mask in ([0, 1, 0], (False, True, False), np.array([[0, 1, 0]]), torch.tensor([0, 1, 0])):
        assert agent.predict(one, action_masks=mask)[0] == 1
        assert agent.predict(two, action_masks=mask)[0].tolist() == [1, 1]
    assert agent.predict(two, action_masks=[[1, 0, 0], [0, 0, 1]])[0].tolist() == [0, 2]
    for mask, message in (([0, 0, 0], "forbids all"), ([1, 0], "3 actions"), ([0.3, 1, 1], "0.3"), ("abc", "zeros")):
        with pytest.raises(UsageError, match=message):
            agent.predict(one, action_masks=mask)
    loaded = GRPO.load(agent.save(tmp_path / "agent"))
    for each in (agent, loaded, copy.deepcopy(agent)):
        with pytest.raises(UsageError, match="named the valid actions; give them"):
            each.predict(one)
        assert each.predict(one, action_masks=np.ones(3))[0] in (0, 1, 2)
    assert list(play_episode(agent, Turns(), seed=0))
    with pytest.raises(UsageError, match="no finite set of actions"):
        GRPO("Pendulum-v1", **QUICK).predict(np.zeros(3, np.float32), action_masks=[1])


def test_a_group_must_fit_the_environments_given() -> None:
    settings = QUICK | {"advantage": "outcome", "collect": "episodes", "group_size": 2}
    with pytest.raises(UsageError, match="group_size=2 needs a multiple of 2 environments, and 3 were given"):
        GRPO(gym.vector.SyncVectorEnv([Sign] * 3), **settings)
    with pytest.raises(UsageError, match="and 1 were given"):
        GRPO(Sign(), **settings)


@pytest.mark.parametrize("verdict", [False, np.False_, 0, torch.tensor(False), np.zeros(()), 0.0])
def test_a_callback_stops_by_anything_that_is_false(verdict: Any) -> None:
    seen: list[int] = []
    GRPO(Sign, **QUICK).learn(500, callback=lambda agent, metrics: seen.append(1) or verdict)  # type: ignore[func-returns-value]
    assert len(seen) == 1


@pytest.mark.parametrize("verdict", [None, True, np.True_, 1, {}, [], "", torch.zeros(2)])
def test_a_callback_goes_on_otherwise(verdict: Any) -> None:
    seen: list[int] = []
    GRPO(Sign, **QUICK).learn(100, callback=[lambda agent, metrics: (seen.append(1), verdict)[1]])
    assert len(seen) == 4


@pytest.mark.parametrize("steps", [0, -1, 2.5, "5", None, True, float("nan"), float("inf")])
def test_a_number_of_steps_that_is_none_is_refused(steps: Any) -> None:
    with pytest.raises(UsageError, match=r"total_timesteps=.* must be a whole number, at least 1"):
        GRPO(Sign, **QUICK).learn(steps)


def test_a_callback_that_would_not_run_is_refused() -> None:
    async def later(agent: Any, metrics: Any) -> bool:
        return False

    def generates(agent: Any, metrics: Any) -> Any:
        yield False

    for callback in (later, generates):
        with pytest.raises(UsageError, match="would not run when called"):
            GRPO(Sign, **QUICK).learn(32, callback=callback)  # type: ignore[arg-type]


def test_arguments_alone_do_not_bring_back_an_environment_that_was_no_id(tmp_path: Path) -> None:
    path = GRPO(TransformReward(gym.make("Sign-v0"), lambda reward: 100 * reward), **QUICK).save(tmp_path / "policy")
    with pytest.raises(UsageError, match="this agent was trained on none"):
        GRPO.load(path, env_kwargs={"pay": 2})


def test_arguments_that_contain_themselves_lose_no_weights(tmp_path: Path) -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    path = GRPO("Sign-v0", env_kwargs={"other": cycle}, **QUICK).save(tmp_path / "policy")
    assert "no file can hold the argument other" in GRPO.load(path).env_lost


@pytest.mark.parametrize("path", ["", ".", "..", None, 3, "a\0b"])
def test_a_path_that_is_none_is_refused(path: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"is no path|cannot be a path|is a folder"):
        GRPO(Sign, **QUICK).save(path)


def test_a_run_is_loaded_from_within_its_folder(tmp_path: Path, monkeypatch: Any) -> None:
    GRPO(Sign, **QUICK).save(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    assert GRPO.load(".").env_id == "Sign"
