"""Collection, on scripted environments whose every number is known beforehand."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from grouprl import GRPO, TrainingError, UsageError
from grouprl.envs.action_codec import ActionCodec
from grouprl.envs.collect import Collector
from grouprl.envs.config import make_config
from grouprl.envs.policy import Policy
from grouprl.envs.rollout import Rollout
from grouprl.envs.spaces import ObservationCodec
from grouprl.envs.stepper import Choice, Stepped
from grouprl.envs.trace import Trace

LENGTHS = (3, 2, 4)
"""Episode k of a counter has LENGTHS[k % 3] steps and ends by truncation where k is odd."""


class Counter(gym.Env):
    """Sees (episode, step); the reward of step t (from 0) of episode k is 10 k + t, plus `bonus`."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(3)

    def __init__(self, bonus: float = 0.0) -> None:
        self.episode, self.bonus = -1, bonus
        self.received: list[int] = []
        self.seeds: list[int | None] = []

    def _seen(self) -> np.ndarray:
        return np.array([self.episode, self.time], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.episode, self.time = self.episode + 1, 0
        return self._seen(), {}

    def step(self, action):
        self.received.append(int(action))
        reward = 10.0 * self.episode + self.time + self.bonus
        self.time += 1
        over = self.time >= LENGTHS[self.episode % 3]
        truncates = self.episode % 2 == 1
        return self._seen(), reward, over and not truncates, over and truncates, {}


class Nested(Counter):
    """The same in a Dict of a Tuple: final observations of every layout must survive."""

    observation_space = spaces.Dict(
        {
            "a": spaces.Box(-np.inf, np.inf, (1,), np.float32),
            "b": spaces.Tuple([spaces.Discrete(9), spaces.Discrete(9)]),
        }
    )

    def _seen(self) -> Any:
        return {"a": np.array([self.time], np.float32), "b": (np.int64(self.episode), np.int64(self.time))}


def collector(venv: Any, seed: int = 0, **settings: Any) -> tuple[Collector, Policy]:
    config = make_config({"collect": "segments", "normalize_observations": False, "n_envs": venv.num_envs, **settings})
    actions = ActionCodec(venv.single_action_space)
    observations = ObservationCodec(venv.single_observation_space, mask_size=actions.mask_size)
    torch.manual_seed(seed)
    made = Collector(venv, observations, actions, config, np.random.default_rng(seed))
    made.restart(seed)
    return made, Policy(observations, actions, config)


def sync(makers: list[Any], mode: AutoresetMode = AutoresetMode.NEXT_STEP) -> SyncVectorEnv:
    return SyncVectorEnv(makers, copy=False, autoreset_mode=mode)


@contextmanager
def asynchronous(makers: list[Any], **options: Any) -> Iterator[AsyncVectorEnv]:
    venv = AsyncVectorEnv(makers, **options)
    try:
        yield venv
    finally:
        venv.close(terminate=True)


def test_a_batch_holds_what_was_scripted():
    made, policy = collector(sync([Counter]), n_steps=6)
    rollout = made.collect(policy)
    # Episodes of 3 and 2 steps, a row after each that only resets and does not count, then the first step of the third.
    assert rollout.lengths.tolist() == [3, 2, 1]
    assert rollout.rewards.tolist() == [0, 1, 2, 10, 11, 20]
    assert rollout.inputs["flat"].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [2, 0]]
    assert rollout.last_inputs["flat"].tolist() == [[0, 3], [1, 2], [2, 1]]
    assert rollout.elapsed.tolist() == [0, 1, 2, 0, 1, 0]
    assert rollout.last_elapsed.tolist() == [3, 2, 1]
    assert rollout.terminated.tolist() == [True, False, False]
    assert rollout.truncated.tolist() == [False, True, False]
    assert rollout.group.tolist() == [0, 0, 0]
    assert rollout.trainable.all()
    assert rollout.mask is None
    assert rollout.episode_returns == [3, 21]
    assert rollout.episode_lengths == [3, 2]
    assert rollout.episode_envs == [0, 0]


class Tenths(Counter):
    """Each step gives 0.1, which float32 does not hold."""

    def step(self, action):
        seen, _, terminated, truncated, info = super().step(action)
        return seen, 0.1, terminated, truncated, info


def test_returns_are_of_rewards_as_they_were_given_and_learning_has_its_own():
    made, policy = collector(sync([Tenths]), n_steps=8)
    for _ in range(2):  # the third episode goes on in the second batch
        rollout = made.collect(policy)
        assert rollout.rewards.dtype == torch.float32
        for length, exact, rounded in zip(
            rollout.episode_lengths, rollout.episode_returns, rollout.learned_returns, strict=True
        ):
            assert exact == pytest.approx(length * 0.1, rel=1e-15)
            assert rounded == pytest.approx(length * float(np.float32(0.1)), rel=1e-15)
            assert exact != rounded
    under_way, _ = made.state()
    assert under_way["exact_return"] != under_way["episode_return"]


def test_a_checkpoint_that_has_one_return_of_an_episode_under_way_is_read():
    made, policy = collector(sync([Counter]), n_steps=6)
    made.collect(policy)
    arrays, state = made.state()
    again, _ = collector(sync([Counter]), n_steps=6)
    again.load({name: value for name, value in arrays.items() if name != "exact_return"}, state)
    assert again.collect(policy).episode_returns == [20 + 21 + 22 + 23, 30 + 31 + 32]


def rows_of(rng: np.random.Generator, n_rows: int, n: int, kinds: int) -> Iterator[tuple[Stepped, np.ndarray]]:
    """Vector steps whose rewards have at most so many values, and where each step is one of an episode."""
    some = rng.standard_normal(kinds).astype(np.float32)
    for _ in range(n_rows):
        ends = rng.random(n) < 0.1
        yield Stepped(rng.choice(some, n), ends, ends, np.empty(0, np.intp), None), rng.random(n) < 0.8


def add(trace: Trace, stepped: Stepped, valid: np.ndarray) -> None:
    n = len(valid)
    trace.add_choice({"flat": np.zeros((n, 1))}, Choice(np.zeros((n, 2)), None, np.zeros(n)), valid)
    trace.add_outcome(stepped)


@pytest.mark.parametrize("kinds", [1, 2, 3, 50])
@pytest.mark.parametrize("n", [1, 4])
def test_signals_are_unusual_rewards_and_terminations_of_all_steps_so_far(kinds, n):
    trace, rng = Trace(), np.random.default_rng(kinds)
    for number, (stepped, valid) in enumerate(rows_of(rng, 60, n, kinds)):
        add(trace, stepped, valid if number else np.ones(n, bool))
        if number % 7 == 0:
            seen = np.stack(trace.valid)
            rewards = np.stack(trace.rewards).astype(np.float32)[seen]
            expected = (rewards != np.median(rewards)).sum() + np.stack(trace.terminated)[seen].sum()
            assert trace.signals() == trace.signals() == expected


def test_signals_read_no_step_twice():
    trace, rng = Trace(), np.random.default_rng(0)
    for stepped, _ in rows_of(rng, 30, 2, 2):
        add(trace, stepped, np.ones(2, bool))
    before = trace.signals()
    trace.rewards[:] = [np.full(2, np.nan)] * 30
    trace.terminated[:] = [np.ones(2, bool)] * 30
    assert trace.signals() == before


def test_an_episode_that_goes_on_in_the_next_batch_keeps_its_time_and_return():
    made, policy = collector(sync([Counter]), n_steps=6)
    made.collect(policy)
    rollout = made.collect(policy)  # 3 more steps of episode 2, reset, 3 of episode 3, reset
    assert rollout.lengths.tolist() == [3, 3]
    assert rollout.rewards.tolist() == [21, 22, 23, 30, 31, 32]
    assert rollout.elapsed.tolist() == [1, 2, 3, 0, 1, 2]
    assert rollout.last_elapsed.tolist() == [4, 3]
    assert rollout.episode_returns == [20 + 21 + 22 + 23, 30 + 31 + 32]
    assert rollout.episode_lengths == [4, 3]
    assert made.collect(policy).elapsed.tolist() == [0, 1, 0, 1, 2, 3]


def test_samples_are_packed_environment_by_environment_and_episodes_listed_as_they_ended():
    made, policy = collector(sync([Counter, lambda: Late()]), n_steps=5)  # 10 steps in 6 rows
    rollout = made.collect(policy)
    assert rollout.rewards.tolist() == [0, 1, 2, 10, 11, 20, 21, 22, 23, 30]
    assert rollout.lengths.tolist() == [3, 2, 4, 1]
    assert rollout.episode_envs == [0, 1, 0]
    assert rollout.episode_lengths == [3, 4, 2]


class Late(Counter):
    """As Counter, with a first episode of 4 steps."""

    def __init__(self) -> None:
        super().__init__()
        self.episode = 1


def batches(mode: AutoresetMode, make: Any, n_batches: int, **settings: Any) -> list[Rollout]:
    made, policy = collector(sync([make, lambda: make(100.0), lambda: make(200.0)], mode), **settings)
    return [made.collect(policy) for _ in range(n_batches)]


def same(first: Rollout, second: Rollout) -> None:
    """Equal but for the actions: the modes draw random numbers for different rows."""
    for name in ("rewards", "elapsed", "last_elapsed", "lengths", "group", "terminated", "truncated"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert torch.equal(first.inputs["flat"], second.inputs["flat"])
    assert torch.equal(first.last_inputs["flat"], second.last_inputs["flat"])
    assert first.episode_returns == second.episode_returns
    assert first.episode_lengths == second.episode_lengths
    assert first.episode_envs == second.episode_envs


@pytest.mark.parametrize("make", [Counter, Nested])
@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_every_autoreset_mode_gives_the_same_whole_episodes(mode, make):
    if mode is AutoresetMode.NEXT_STEP:
        [rollout] = batches(mode, make, 1, collect="episodes", min_steps=7)
        # Three rounds of 3 environments; a round is 3, 2, 4 steps each (and 4 when the next one is needed).
        assert rollout.n_steps == 9
        assert rollout.rewards.tolist() == [0, 1, 2, 100, 101, 102, 200, 201, 202]
    else:
        [reference] = batches(AutoresetMode.NEXT_STEP, make, 1, collect="episodes", min_steps=7)
        same(batches(mode, make, 1, collect="episodes", min_steps=7)[0], reference)


@pytest.mark.parametrize("make", [Counter, Nested])
def test_modes_without_reset_rows_give_the_same_segments_batch_after_batch(make):
    for a, b in zip(
        batches(AutoresetMode.SAME_STEP, make, 3, n_steps=7),
        batches(AutoresetMode.DISABLED, make, 3, n_steps=7),
        strict=True,
    ):
        assert a.n_steps == 21
        same(a, b)
        assert torch.equal(a.actions, b.actions)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_the_steps_of_an_environment_are_the_same_in_every_mode(mode):
    made, policy = collector(sync([Counter], mode), n_steps=6)
    seen: list[tuple[float, ...]] = []
    last: list[tuple[float, ...]] = []
    returns: list[float] = []
    for _ in range(6):
        r = made.collect(policy)
        seen += [
            (*s, e, w)
            for s, e, w in zip(r.inputs["flat"].tolist(), r.elapsed.tolist(), r.rewards.tolist(), strict=True)
        ]
        ended = r.terminated | r.truncated
        ends = zip(r.last_inputs["flat"].tolist(), r.last_elapsed.tolist(), r.terminated.tolist(), strict=True)
        last += [(*s, e, t) for (s, e, t), over in zip(ends, ended.tolist(), strict=True) if over]
        returns += r.episode_returns
    wanted = [(k, t, t, 10 * k + t) for k in range(20) for t in range(LENGTHS[k % 3])]
    assert len(seen) >= 24
    assert seen == wanted[: len(seen)]
    assert last == [(k, n, n, k % 2 == 0) for k in range(20) for n in [LENGTHS[k % 3]]][: len(last)]
    assert returns == [sum(10 * k + t for t in range(LENGTHS[k % 3])) for k in range(20)][: len(returns)]
    assert len(returns) == len(last) >= 7


def test_asynchronous_environments_give_the_same_samples():
    makers = [Counter, lambda: Counter(100.0)]
    with asynchronous(makers) as venv:
        made, policy = collector(venv, n_steps=7)
        theirs = [made.collect(policy) for _ in range(2)]
    made, policy = collector(sync(makers), n_steps=7)
    for ours, other in zip([made.collect(policy) for _ in range(2)], theirs, strict=True):
        same(ours, other)
        assert torch.equal(ours.actions, other.actions)
        assert torch.equal(ours.behaviour, other.behaviour)


def test_batches_of_automatic_size_wait_for_steps_and_for_signals():
    made, policy = collector(sync([Counter] * 2), collect="auto", min_steps=16, max_steps=512, min_signals=0)
    assert 16 <= made.collect(policy).n_steps <= 32
    made, policy = collector(sync([Silent] * 2), collect="auto", min_steps=16, max_steps=100, min_signals=1)
    assert made.collect(policy).n_steps == 100


class Silent(Counter):
    """Never ends and never pays."""

    def step(self, action):
        self.time += 1
        return self._seen(), 0.0, False, False, {}


def test_a_batch_that_starts_afresh_cuts_the_episodes_before():
    made, policy = collector(sync([Counter]), n_steps=2, reset_each_batch=True)
    for k in range(3):
        rollout = made.collect(policy)
        assert rollout.inputs["flat"].tolist()[0] == [k, 0]
        assert rollout.elapsed.tolist()[0] == 0


class Seeded(Counter):
    """Shows a number drawn at the reset."""

    def _seen(self) -> np.ndarray:
        if self.time == 0:
            self.start = float(self.np_random.random())
        return np.array([self.start, self.time], np.float32)


def test_the_episodes_of_a_group_share_their_start_and_no_other_group_does():
    made, policy = collector(sync([Seeded] * 6), collect="episodes", group_size=3, min_steps=30)
    for rollout in (made.collect(policy), made.collect(policy)):
        first = rollout.elapsed == 0
        starts: dict[int, set[float]] = {}
        for group, start in zip(rollout.group.tolist(), rollout.inputs["flat"][first, 0].tolist(), strict=True):
            starts.setdefault(group, set()).add(start)
        counts = torch.bincount(rollout.group)
        assert (counts == 3).all()
        assert len(starts) == len(counts) >= 4  # at least two rounds of two groups
        assert all(len(values) == 1 for values in starts.values())
        assert len(set.union(*starts.values())) == len(starts)


class Unseeded(Seeded):
    """Draws its start from somewhere else than its own generator; shows it in one of two leaves."""

    observation_space = spaces.Dict({"a": spaces.Discrete(9), "b": Seeded.observation_space})
    draws = np.random.default_rng(0)

    def _seen(self) -> Any:
        self.np_random = self.draws
        return {"a": np.int64(self.time), "b": super()._seen()}


def test_groups_whose_episodes_begin_differently_are_warned_of_once():
    settings = {"collect": "episodes", "group_size": 3, "min_steps": 30}
    made, policy = collector(sync([Unseeded] * 6), **settings)
    with pytest.warns(UserWarning, match="group_size=3 .* different observations .* self.np_random"):
        made.collect(policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.collect(policy)
        made, policy = collector(sync([Seeded] * 6), **settings)
        made.collect(policy)


def test_repeated_actions_are_marked_and_the_environment_really_got_them():
    envs = [Counter() for _ in range(4)]
    made, policy = collector(sync([lambda env=env: env for env in envs]), n_steps=60)
    rollout = made.collect(policy, sticky=0.7)
    offset = 0
    repeats = 0
    sample_env = [0]
    for i, ended in enumerate((rollout.terminated | rollout.truncated).tolist()[:-1]):
        new_env = rollout.inputs["flat"][rollout.lengths[: i + 1].sum(), 0] == 0
        sample_env.append(sample_env[-1] + int(new_env))
        assert ended or new_env
    received = [iter(env.received) for env in envs]
    for env, length in zip(sample_env, rollout.lengths.tolist(), strict=True):
        previous = None
        for t in range(offset, offset + length):
            got = next(received[env])
            if rollout.trainable[t]:
                assert got == int(rollout.actions[t])
            else:
                assert env >= 2  # half of the environments repeat
                assert previous is not None  # never the first of an episode
                assert got == previous
                repeats += 1
            previous = got
        offset += length
    # 2 environments, about 60 * 3/4 valid steps each, 2/3 of them not the first: 0.7 * 60 = 42 expected.
    assert 25 <= repeats <= 58


def test_without_sticky_no_step_is_repeated():
    made, policy = collector(sync([Counter] * 2), n_steps=20)
    assert made.collect(policy).trainable.all()


class Misbehaving(Counter):
    """Does `what` on the fourth step, counted over episodes."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.count = what, 0

    def step(self, action):
        self.count += 1
        seen, reward, terminated, truncated, info = super().step(action)
        if self.count == 4:
            if self.what == "raise":
                raise RuntimeError("the motor is stuck")
            if self.what == "die":
                os._exit(3)
            if self.what == "reward":
                reward = float("nan")
            if self.what == "observation":
                seen[1] = np.nan
        return seen, reward, terminated, truncated, info


def test_an_exception_in_an_environment_is_a_training_error_that_tells_it():
    with pytest.raises(TrainingError, match="in step: RuntimeError: the motor is stuck"):
        run(sync([Counter, lambda: Misbehaving("raise")]))


@pytest.mark.parametrize("what", ["raise", "die"])
def test_a_worker_that_fails_is_a_training_error(what):
    with asynchronous([Counter, lambda: Misbehaving(what)]) as venv, pytest.raises(TrainingError, match="in step"):
        run(venv)


def test_a_reset_that_fails_is_a_training_error():
    class Broken(Counter):
        def reset(self, *, seed=None, options=None):
            raise OSError("no such level")

    with pytest.raises(TrainingError, match="in reset: OSError: no such level"):
        run(sync([Broken]))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("reward", r"environment 1 returned the reward nan on step 4 of this batch"),
        ("observation", r"the observation of environment 1 on step 5 of this batch holds nan in component 1"),
    ],
)
def test_a_number_that_is_not_finite_is_reported_with_its_environment(what, message):
    with pytest.raises(TrainingError, match=message):
        run(sync([Counter, lambda: Misbehaving(what)]))


def run(venv: Any, **settings: Any) -> Rollout:
    made, policy = collector(venv, n_steps=12, **settings)
    return made.collect(policy)


class LastIsNaN(Counter):
    """Only the observation an episode ends with is not a number."""

    def step(self, action):
        seen, *rest = super().step(action)
        if rest[1] or rest[2]:
            seen[1] = np.nan
        return (seen, *rest)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_an_observation_that_ends_an_episode_and_is_not_finite_names_its_environment(mode):
    with pytest.raises(TrainingError, match="environment 1"):
        run(sync([Counter, LastIsNaN], mode))


def test_an_observation_that_is_not_finite_during_warm_up_is_reported():
    agent = GRPO(lambda: Misbehaving("observation"), preset=None, n_envs=2, warmup_steps=64, collect="segments")
    with pytest.raises(TrainingError, match="environment 0"):
        agent.ready().warm_up(agent.policy, 64)


class InfoMask(Counter):
    """Allows action `1 + time % 2` alone, and asserts it; gives its mask at the moments named."""

    def __init__(self, moments: str = "reset step", at_end: bool = True) -> None:
        super().__init__()
        self.moments, self.at_end = moments, at_end

    def _info(self, moment: str, over: bool = False) -> dict[str, Any]:
        mask = np.zeros(3, np.int8)
        if not over or self.at_end:
            mask[1 + self.time % 2] = 1
        return {"action_mask": mask} if moment in self.moments else {}

    def reset(self, *, seed=None, options=None):
        seen, _ = super().reset(seed=seed)
        return seen, self._info("reset")

    def step(self, action):
        if "step" in self.moments if self.time else "reset" in self.moments:
            assert action == 1 + self.time % 2, "a forbidden action was taken"
        seen, reward, terminated, truncated, _ = super().step(action)
        return seen, reward, terminated, truncated, self._info("step", terminated or truncated)


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_masks_in_info_are_obeyed_in_every_mode(mode):
    makers = [InfoMask, lambda: Shifted(), InfoMask]
    made, policy = collector(sync(makers, mode), n_steps=40)
    rollout = made.collect(policy)
    assert torch.equal(rollout.actions, 1 + rollout.elapsed % 2)
    assert rollout.mask is not None
    assert (rollout.mask.sum(1) == 1).all()


class Shifted(InfoMask):
    """Ends at other times than the rest, so that resets do not coincide."""

    def __init__(self) -> None:
        super().__init__()
        self.episode = 1


@pytest.mark.parametrize("moments", ["reset", "step"])
def test_steps_without_a_mask_allow_every_action(moments):
    made, policy = collector(sync([lambda: InfoMask(moments)] * 2), n_steps=40)
    rollout = made.collect(policy)
    given = (rollout.elapsed == 0) if moments == "reset" else (rollout.elapsed > 0)
    assert torch.equal(rollout.actions[given], (1 + rollout.elapsed % 2)[given])
    assert set(rollout.actions[~given].tolist()) == {0, 1, 2}


def test_the_observation_that_ended_an_episode_may_forbid_every_action():
    made, policy = collector(sync([lambda: InfoMask(at_end=False)] * 2), n_steps=20)
    rollout = made.collect(policy)
    assert torch.equal(rollout.actions, 1 + rollout.elapsed % 2)


def test_a_mask_that_leaves_no_action_in_mid_episode_is_an_error():
    class Stuck(InfoMask):
        def _info(self, moment, over=False):
            return {"action_mask": np.zeros(3, np.int8)}

    with pytest.raises((TrainingError, UsageError), match="environment 0"):
        run(sync([Stuck]))


def test_a_component_without_a_choice_is_an_error():
    class Parts(Counter):
        action_space = spaces.MultiDiscrete([2, 3])

        def reset(self, *, seed=None, options=None):
            return super().reset(seed=seed)[0], {"action_mask": np.array([1, 1, 0, 0, 0], np.int8)}

        def step(self, action):
            return super().step(action[0])

    with pytest.raises((TrainingError, UsageError), match="component 1"):
        run(sync([Parts]))


def test_a_mask_of_another_size_is_an_error():
    class Wide(InfoMask):
        def _info(self, moment, over=False):
            return {"action_mask": np.ones(4, np.int8)}

    with pytest.raises(UsageError, match=r"shape \(4,\), and the action space has 3 actions"):
        run(sync([Wide]))


def test_warm_up_counts_its_steps_and_sets_the_statistics():
    made, policy = collector(sync([Counter] * 2), normalize_observations=True, n_steps=4)
    taken = made.warm_up(policy, 100)
    assert taken == int(policy.count) >= 70  # of 100 rows, one in about four only resets
    assert taken < 100
    before = policy.mean.clone()
    rollout = made.collect(policy)
    assert rollout.inputs["flat"].abs().max() <= 10
    assert torch.equal(policy.mean, before)  # collecting leaves the policy alone: the caller decides when it observes
    policy.observe(rollout.observed)
    assert not torch.equal(policy.mean, before)


def test_a_batch_without_a_single_step_still_ends():
    made, policy = collector(sync([Counter]), n_steps=1)
    assert [made.collect(policy).n_steps for _ in range(6)] == [1] * 6
