"""Any space Gymnasium has, nested as you like: a policy trains on it, or it is refused in words."""

from __future__ import annotations

import json
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import batch_space
from hypothesis import given
from hypothesis import strategies as st
from odd import result_or_clear_error

from grouprl import GRPO
from grouprl.envs.action_codec import ActionCodec
from grouprl.envs.space_json import space_from_json, space_to_json
from grouprl.envs.spaces import ObservationCodec

DTYPES = [np.float32, np.float64, np.float16, np.int8, np.uint8, np.int32, np.int64, np.uint32, np.uint64, np.bool_]
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple) | st.sampled_from([(16, 16), (16, 16, 3), (4, 16, 16)])


@st.composite
def boxes(draw: st.DrawFn) -> spaces.Box:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(shapes)
    if dtype is np.bool_:
        return spaces.Box(0, 1, shape, dtype)
    whole = np.issubdtype(dtype, np.integer)
    least, most = (np.iinfo(dtype).min, np.iinfo(dtype).max) if whole else (-np.inf, np.inf)
    limit = None if whole else float(np.finfo(dtype).max) / 2  # Gymnasium cannot sample from all of them
    ends = [-1, 0, 1, 5, least, most, *([-limit, limit, 1e-3] if limit is not None else [])]
    if whole:
        least, most = int(least) // 4, int(most) // 4  # Gymnasium cannot sample from all integers of 64 bits
        ends = [min(max(end, least), most) for end in ends]
    low, high = sorted((draw(st.sampled_from(ends)), draw(st.sampled_from(ends))))
    return spaces.Box(0 if low == np.inf else low, 0 if high == -np.inf else high, shape, dtype)


@st.composite
def multi_discretes(draw: st.DrawFn) -> spaces.MultiDiscrete:
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    starts = draw(st.lists(st.integers(-5, 5), min_size=len(sizes), max_size=len(sizes)))
    return spaces.MultiDiscrete(sizes, start=starts, dtype=draw(st.sampled_from([np.int64, np.int32, np.int8])))


discretes = st.builds(
    lambda n, start, dtype: spaces.Discrete(n, start=start, dtype=dtype),
    st.integers(1, 40), st.integers(-50, 50), st.sampled_from([np.int64, np.int32, np.int8]),
)  # fmt: skip
binaries = st.one_of(st.integers(1, 4), st.lists(st.integers(1, 3), min_size=1, max_size=2)).map(spaces.MultiBinary)
strange = st.sampled_from([
    spaces.Text(5), spaces.Sequence(spaces.Discrete(3)), spaces.Graph(spaces.Box(-1, 1, (2,)), None),
    spaces.OneOf([spaces.Discrete(2), spaces.Box(0, 1, (1,))]), spaces.Dict({}), spaces.Tuple([]),
])  # fmt: skip
keys = st.one_of(st.sampled_from(["a", "b", "action_mask", "a/b", "~", "", "observation"]), st.text(max_size=3))
leaves = st.one_of(boxes(), discretes, multi_discretes(), binaries)
nested = st.recursive(
    leaves | strange,
    lambda inner: (
        st.lists(inner, min_size=1, max_size=3).map(spaces.Tuple)
        | st.dictionaries(keys, inner, min_size=1, max_size=3).map(spaces.Dict)
    ),
    max_leaves=4,
)


class Sampled(gym.Env[Any, Any]):
    """An environment whose observations are samples of its space, and that checks the actions it is given."""

    def __init__(self, observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> None:
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.left = 5
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), (action, self.action_space)
        self.left -= 1
        return self.observation_space.sample(), float(self.np_random.random()), self.left == 0, False, {}


def learned(observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> GRPO:
    agent = GRPO(
        lambda: Sampled(observation_space, action_space),
        preset=None, n_envs=2, collect="segments", n_steps=8, epochs=1, warmup_steps=4, hidden_sizes=[4], threads=1,
        vectorization="sync",
    )  # fmt: skip
    try:
        agent.learn(16)
        action = agent.predict(observation_space.sample())
        assert agent.action_space.contains(action[0] if isinstance(action, tuple) else action)
    finally:
        agent.close()
    return agent


@given(nested)
def test_a_policy_learns_on_an_observation_space_or_says_why_not(space: gym.Space[Any]) -> None:
    result_or_clear_error(lambda: learned(space, spaces.Discrete(2)))


@given(nested)
def test_a_policy_learns_on_an_action_space_or_says_why_not(space: gym.Space[Any]) -> None:
    result_or_clear_error(lambda: learned(spaces.Box(-1, 1, (2,)), space))


@given(nested)
def test_a_space_is_the_same_after_it_was_saved(space: gym.Space[Any]) -> None:
    saved = result_or_clear_error(lambda: space_to_json(space))
    if saved is not None:
        assert space_from_json(json.loads(json.dumps(saved, allow_nan=False))) == space


@given(nested, st.integers(1, 3))
def test_observations_are_encoded_whole_and_finite_where_the_space_is(space: gym.Space[Any], n: int) -> None:
    codec = result_or_clear_error(lambda: ObservationCodec(space))
    if codec is not None:
        batched = batch_space(space, n)
        batched.seed(0)
        encoded = codec.encode(batched.sample())
        assert all(len(part) == n for part in encoded.values())
        if codec.n_flat:
            assert encoded["flat"].shape == (n, codec.n_flat)
            assert encoded["flat"].dtype == np.float32


@given(nested, st.integers(1, 3))
def test_actions_lie_in_their_space(space: gym.Space[Any], n: int) -> None:
    codec = result_or_clear_error(lambda: ActionCodec(space))
    if codec is not None:
        parameters = np.random.default_rng(n).standard_normal((n, codec.distribution.n_params)).astype(np.float32) * 3
        samples = codec.distribution.sample(parameters, np.random.default_rng(0))
        for action in codec.to_env(samples):
            assert space.contains(action), (action, space)
