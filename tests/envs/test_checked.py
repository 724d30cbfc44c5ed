"""What an environment returns, checked: nothing is converted without a word."""

from __future__ import annotations

import sys
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from grouprl import GRPO, TrainingError, UsageError, evaluate
from grouprl.envs.checked import Checked, fitting
from grouprl.envs.masks import many_masks, one_mask

QUICK: dict[str, Any] = {
    "preset": None, "n_envs": 2, "collect": "segments", "n_steps": 16, "epochs": 1, "warmup_steps": 0,
}  # fmt: skip
ZEROS = np.zeros(2, np.float32)
GOOD = {"observation": ZEROS, "reward": 1.0, "terminated": False, "truncated": False, "info": {}}


class Returns(gym.Env[Any, Any]):
    """Returns from the third step on what the test says."""

    observation_space: Any = spaces.Box(-1, 1, (2,), np.float32)
    action_space: Any = spaces.Discrete(2)

    def __init__(self, reset: Any = None, step: Any = None, **what: Any) -> None:
        self.first, self.whole, self.what, self.steps = reset, step, what, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return (ZEROS, {}) if self.first is None else self.first

    def step(self, action: Any) -> Any:
        self.steps += 1
        if self.steps < 3:
            return tuple(GOOD.values())
        return tuple((GOOD | self.what).values()) if self.whole is None else self.whole


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ({"terminated": "no"}, r"terminated must be True or False; it returned 'no' \(str\)"),
        ({"terminated": None}, "terminated must be True or False"),
        ({"terminated": float("nan")}, "terminated must be True or False"),
        ({"truncated": np.array([False, True])}, "truncated must be True or False"),
        ({"terminated": 2}, "terminated must be True or False"),
        ({"reward": "1.0"}, "a reward must be one number"),
        ({"reward": None}, "a reward must be one number"),
        ({"reward": 1j}, "a reward must be one number"),
        ({"observation": [0.0, 0.0]}, r"wants an array: return numpy.asarray\(observation, numpy.float32\)"),
        ({"observation": 3}, "wants an array"),
        ({"observation": np.zeros(3, np.float32)}, r"has shape \(3,\); its space .* wants \(2,\)"),
        ({"observation": np.zeros(2, complex)}, "wants an array"),
        ({"info": None}, "info that step returns must be a dict"),
        ({"step": (ZEROS, 1.0, False, {})}, "step must return"),
        ({"reset": ZEROS}, r"reset must return \(observation, info\)"),
        ({"reset": (ZEROS, None)}, r"reset must return \(observation, info\)"),
        ({"reset": (0.0, 0.0)}, r"reset must return \(observation, info\)"),
        ({"reset": ([0.0, 0.0], {})}, "the observation that reset returned"),
    ],
)
def test_what_no_environment_may_return_is_refused_with_its_number(what: Any, message: str, vectorization: str) -> None:
    agent = GRPO(lambda: Returns(**what), **QUICK | {"vectorization": vectorization, "n_envs": 1})
    with pytest.raises(TrainingError, match=f"^environment 0: .*{message}"):
        agent.learn(100)
    agent.close()


@pytest.mark.parametrize(
    "what",
    [
        {"terminated": np.False_, "truncated": 0, "reward": np.float32(2)},
        {"reward": torch.tensor(2.0), "terminated": torch.tensor(False)},
        {"reward": np.array([2]), "observation": np.zeros(2)},
        {"observation": np.zeros(2, int), "reward": True},
        {"observation": torch.zeros(2)},
    ],
)
def test_numbers_of_other_types_are_taken(what: Any) -> None:
    checked = Checked(Returns(**what))
    for _ in range(2):
        checked.step(0)
    observation, reward, terminated, truncated, _ = checked.step(0)
    assert isinstance(observation, np.ndarray)
    assert float(reward) == what.get("reward", 1.0)
    assert (bool(terminated), bool(truncated)) == (False, False)


@pytest.mark.parametrize(
    ("space", "given", "good"),
    [
        (spaces.Discrete(3), 2.0, np.int64(2)),
        (spaces.Discrete(3), np.array([2]), 2),
        (spaces.MultiDiscrete([2, 3]), np.zeros(2), np.zeros(2, int)),
        (spaces.MultiBinary(2), [0, 1], np.array([0, 1], np.int8)),
        (spaces.Box(0, 255, (2,), np.uint8), np.full(2, 0.5), np.zeros(2, np.uint8)),
        (spaces.Box(0, 1, ()), np.zeros(1), 0.5),
        (spaces.Dict(a=spaces.Discrete(2)), {"b": 0}, {"a": 0, "b": 9}),
        (spaces.Tuple([spaces.Discrete(2)]), (0, 1), (0,)),
    ],
)
def test_an_observation_must_fit_each_kind_of_space(space: Any, given: Any, good: Any) -> None:
    fitting(space, good)
    with pytest.raises(ValueError, match=r"its space|cannot hold"):
        fitting(space, given)


def test_info_may_hold_a_number_here_and_none_there() -> None:
    infos = iter([{"winner": 1}, {"winner": None}, {"winner": "white"}, {"winner": np.zeros(3)}] * 100)

    class Game(Returns):
        def step(self, action: Any) -> Any:
            return *tuple(GOOD.values())[:4], next(infos)

    assert GRPO(Game, **QUICK).learn(100).num_timesteps >= 100


class Old(gym.Env[Any, Any]):
    observation_space, action_space = Returns.observation_space, Returns.action_space

    def reset(self) -> Any:  # type: ignore[override]
        return ZEROS

    def step(self, action: Any) -> Any:
        return ZEROS, 1.0, False, {}


def test_the_reset_of_the_old_gym_is_told_how_it_must_look() -> None:
    with pytest.raises(TrainingError, match=r"def reset\(self, \*, seed=None, options=None\)"):
        GRPO(Old, **QUICK).learn(100)


def test_an_exception_names_the_environment_and_the_line() -> None:
    class Fails(Returns):
        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            raise KeyError("level")

    with pytest.raises(TrainingError, match=rf"environment 0 failed in reset: KeyError: 'level'.* of {__file__}"):
        GRPO(Fails, **QUICK).learn(100)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gym.vector.SyncVectorEnv([Returns]), "pass that itself"),
        (lambda: "CartPole-v1", "a gymnasium.Env is wanted"),
        (lambda: Spaceless(), "its observation_space is"),
    ],
)
def test_what_a_callable_must_not_return_is_named(make: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GRPO(make, **QUICK)


class Spaceless(Returns):
    observation_space = (2,)


class Turns(gym.Env[Any, Any]):
    """Only one action is valid at each time, and it asserts that no other arrives; the test says where the mask is."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space: Any = spaces.Discrete(3)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self.time = 0
        return ZEROS, {}

    def valid(self) -> list[int]:
        return [int(i == self.time % 3) for i in range(3)]

    def step(self, action: Any) -> Any:
        assert action == self.time % 3, "a forbidden action was taken"
        self.time += 1
        return ZEROS, 1.0, self.time >= 5, False, {}


class Method(Turns):
    def action_masks(self) -> Any:
        assert self.time < 5, "no action is valid any more"
        return self.valid()


class Listed(Turns):
    kind: Any = list

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        return super().reset(seed=seed)[0], {"action_mask": self.kind(self.valid())}

    def step(self, action: Any) -> Any:
        return *super().step(action)[:4], {"action_mask": self.kind(self.valid())}


class Tensors(Listed):
    kind = torch.tensor


class Tuples(Listed):
    kind = tuple


@pytest.mark.parametrize("make", [Method, lambda: gym.wrappers.TimeLimit(Method(), 99), Listed, Tuples, Tensors])
@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_masks_are_heard_in_every_form(make: Any, vectorization: str) -> None:
    agent = GRPO(make, **QUICK | {"vectorization": vectorization}).learn(64)
    assert evaluate(agent, episodes=2).returns == [5.0, 5.0]
    agent.close()


def test_masks_of_a_vector_environment_are_heard_as_lists_too() -> None:
    GRPO(gym.vector.SyncVectorEnv([Listed, Listed]), **QUICK).learn(64)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([1, 0], r"environment 0: action_mask has shape \(2,\), and the action space has 3 actions"),
        ([[1, 0], [1, 1]], r"action_mask has shape \(4,\)"),
        ([0.5, 1, 1], "action mask holds 0.5"),
        ([0.0, -np.inf, -np.inf], "action mask holds -inf"),
        (["a", "b", "c"], "must hold zeros and ones"),
        ([0, 0, 0], "forbids all 3 actions"),
    ],
)
def test_masks_that_are_none_are_refused(mask: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GRPO(lambda: Returns3(reset=(ZEROS, {"action_mask": mask})), **QUICK).learn(64)


class Returns3(Returns):
    action_space = spaces.Discrete(3)


def test_masks_where_the_actions_take_none_or_under_another_name_are_refused() -> None:
    class Continuous(Method):
        action_space = spaces.Box(-1, 1, (3,))

    with pytest.raises(UsageError, match=r"action_masks\(\), and its action space"):
        GRPO(Continuous, **QUICK)
    with pytest.raises(UsageError, match="name the key 'action_mask'"):
        GRPO(lambda: Returns(reset=(ZEROS, {"action_masks": [1, 0]})), **QUICK).learn(64)


def test_a_mask_is_read_from_any_nesting() -> None:
    want = [True, False, True, True, False]
    for given in (
        np.array([1, 0, 1, 1, 0]), [1, 0, 1, 1, 0], ([1, 0], [1, 1, 0]), [np.array([1, 0]), np.array([1.0, 1.0, 0.0])],
        torch.tensor([1, 0, 1, 1, 0], requires_grad=False), torch.tensor([1.0, 0, 1, 1, 0], requires_grad=True),
    ):  # fmt: skip
        assert one_mask(given, 5).tolist() == want
        assert many_masks(given, 2, 5).tolist() == [want, want]
        assert many_masks([given, given], 2, 5).tolist() == [want, want]
    assert many_masks(np.array([[1, 0], [0, 1]]), 2, 2).tolist() == [[True, False], [False, True]]
    for wrong in (np.ones((3, 2)), [[1, 0, 1], [1]], np.ones(3)):
        with pytest.raises(UsageError, match="2 actions to mask"):
            many_masks(wrong, 2, 2)


class Strict(gym.Env[Any, Any]):
    """Episodes of unequal lengths, and an error for an action that its mask forbids."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(4)

    def info(self) -> dict[str, Any]:
        self.mask = self.np_random.permutation([True, False, False, False])
        return {"action_mask": self.mask}

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return ZEROS, self.info()

    def step(self, action: Any) -> Any:
        assert self.mask[action], "a forbidden action"
        return ZEROS, float(self.np_random.random()), bool(self.np_random.random() < 0.2), False, self.info()


@pytest.mark.parametrize("how", [{"collect": "episodes"}, {"group_size": 2}, {"advantage": "timestep"}])
def test_environments_that_wait_for_the_others_get_valid_actions_too(how: Any) -> None:
    agent = GRPO(Strict, preset=None, n_envs=4, min_steps=64, epochs=1, warmup_steps=16, **how).learn(200)
    assert evaluate(agent, episodes=20, max_steps=4).cut > 0


@pytest.mark.parametrize("reward", [10**400, -(10**400), np.ma.masked])
def test_a_reward_that_is_no_number_for_a_float_is_named(reward: Any) -> None:
    with pytest.raises(TrainingError, match="environment 0: a reward must be one number"):
        GRPO(lambda: Returns(reward=reward), **QUICK).learn(64)


def test_an_observation_with_entries_masked_out_is_refused() -> None:
    masked = np.ma.masked_array(ZEROS, [True, False])
    with pytest.raises(TrainingError, match="environment 0: the observation that step returned"):
        GRPO(lambda: Returns(observation=masked), **QUICK).learn(64)


def test_predict_refuses_a_mask_that_is_one_number() -> None:
    with pytest.raises(UsageError, match="action_mask has shape"):
        GRPO(Returns, **QUICK).predict(ZEROS, action_masks=1)


@pytest.mark.parametrize("code", [0, 3, None, "the window was closed"])
def test_an_environment_that_exits_does_not_end_the_program_without_a_word(code: Any) -> None:
    class Exits(Returns):
        def step(self, action: Any) -> Any:
            sys.exit(code)

    with pytest.raises(TrainingError, match=r"environment 0 failed in step: SystemExit.* at line"):
        GRPO(Exits, **QUICK).learn(64)
