"""The agent as a whole: seeds, saving, predicting, and what it says to wrong input."""

import os
import re
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import probes
import pytest
import torch
from gymnasium import spaces
from safetensors.torch import save_file

from grouprl import GRPO, TrainingError, UsageError, evaluate, objective
from grouprl.envs.evaluation import Evaluator
from grouprl.envs.policy import ACTING_ROWS
from grouprl.envs.vector import make_vector
from grouprl.envs.workers import close_vector
from grouprl.errors import DamagedFileError
from grouprl.runs.state import load_state, save_state

QUICK = {**probes.FAST, "n_steps": 16, "minibatch_size": 32, "epochs": 2}


def weights(agent):
    return agent.loop.learner.parameters.values()


def trained(seed=0, steps=600, env="CartPole-v1", **settings):
    return GRPO(env, **{**QUICK, "seed": seed, **settings}).learn(steps)


class TestSeeds:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"sticky": 0.5},
            {"vectorization": "sync"},
            {"collect": "auto", "min_steps": 128, "max_steps": 256},
            {"advantage": "outcome", "collect": "episodes", "min_steps": 128},
            {"advantage": "outcome", "collect": "episodes", "min_steps": 128, "group_size": 4},
        ],
    )
    def test_the_same_seed_gives_the_same_weights_bit_for_bit(self, settings):
        first, second = trained(3, **settings), trained(3, **settings)
        assert torch.equal(weights(first), weights(second))
        assert first.num_timesteps == second.num_timesteps
        assert list(first.recent_returns) == list(second.recent_returns)

    def test_another_seed_gives_another_policy(self):
        assert not torch.equal(weights(trained(1)), weights(trained(2)))

    def test_the_global_random_state_is_neither_used_nor_touched(self):
        torch.manual_seed(1)
        np.random.seed(1)
        first = trained()
        states = torch.get_rng_state(), np.random.get_state()[1]
        torch.manual_seed(1)
        np.random.seed(1)
        assert torch.equal(states[0], torch.get_rng_state())
        assert np.array_equal(states[1], np.random.get_state()[1])
        torch.manual_seed(99)
        np.random.seed(99)
        assert torch.equal(weights(first), weights(trained()))

    def test_threads_give_the_same_bits_every_time(self):
        settings = {"threads": 2, "n_envs": 32, "n_steps": 160, "minibatch_size": 5120, "collect": "segments"}
        first, second = trained(0, 6000, **settings), trained(0, 6000, **settings)
        assert torch.equal(weights(first), weights(second))

    def test_evaluating_in_between_does_not_disturb_training(self):
        def look(agent, metrics):
            evaluate(agent, episodes=2)

        plain, watched = trained(steps=500), GRPO("CartPole-v1", **QUICK)
        watched.learn(500, callback=look)
        assert torch.equal(weights(plain), weights(watched))

    def test_predicting_in_between_does_not_disturb_training(self):
        def look(agent, metrics):
            agent.predict(np.zeros(4, np.float32))

        plain, watched = trained(steps=500), GRPO("CartPole-v1", **QUICK)
        watched.learn(500, callback=look)
        assert torch.equal(weights(plain), weights(watched))


class TestLearn:
    def test_it_returns_the_agent_and_takes_at_least_the_steps_asked_for(self):
        agent = GRPO("CartPole-v1", **QUICK)
        assert agent.learn(500) is agent
        assert 500 <= agent.num_timesteps <= 500 + 8 * 16

    def test_a_second_call_continues(self):
        agent = trained(steps=300)
        before, steps = weights(agent), agent.num_timesteps
        agent.learn(300)
        assert steps + 300 <= agent.num_timesteps <= steps + 300 + 8 * 16
        assert not torch.equal(weights(agent), before)

    def test_warm_up_steps_count(self):
        seen = []
        GRPO("CartPole-v1", **{**QUICK, "warmup_steps": 160}).learn(
            1, callback=lambda agent, metrics: seen.append(metrics)
        )
        [metrics] = seen
        assert 140 < metrics["step"] - metrics["batch_steps"] <= 160

    def test_a_callback_sees_every_update_and_can_stop(self):
        seen = []

        def stop_at_third(agent, metrics):
            seen.append(metrics)
            return len(seen) < 3

        agent = GRPO("CartPole-v1", **QUICK)
        agent.learn(10_000, callback=stop_at_third)
        assert [m["update"] for m in seen] == [1, 2, 3]
        assert agent.num_timesteps == seen[-1]["step"] < 1000

    def test_every_callback_of_a_list_is_called_and_none_means_go_on(self):
        calls = []
        trained_agent = GRPO("CartPole-v1", **QUICK)
        trained_agent.learn(
            10_000, callback=[lambda a, m: calls.append(1), lambda a, m: False, lambda a, m: calls.append(3)]
        )
        assert calls == [1, 3]

    def test_the_metrics_are_finite_where_they_are_defined(self):
        rows = []
        trained_agent = GRPO("CartPole-v1", **QUICK)
        trained_agent.learn(1500, callback=lambda agent, metrics: rows.append(metrics))
        last = rows[-1]
        for name in ("return_mean", "policy_entropy", "approx_kl", "grad_norm", "explained_variance", "learning_rate"):
            assert np.isfinite(last[name]), name
        assert 0 < last["policy_entropy"] <= np.log(2)
        assert last["step"] == trained_agent.num_timesteps

    def test_a_budget_below_one_step_is_refused(self):
        with pytest.raises(UsageError, match=r"total_timesteps=0 .*at least 1"):
            GRPO("CartPole-v1", **QUICK).learn(0)

    def test_a_linear_learning_rate_falls_to_its_last_value(self):
        rates = []
        GRPO("CartPole-v1", **{**QUICK, "lr_schedule": "linear", "learning_rate": 1e-3, "lr_final": 0.5}).learn(
            1000, callback=lambda agent, metrics: rates.append(metrics["learning_rate"])
        )
        assert rates[0] == pytest.approx(1e-3)
        assert rates == sorted(rates, reverse=True)
        assert rates[-1] == pytest.approx(5e-4)

    def test_an_adaptive_learning_rate_that_begins_low_is_not_raised_where_the_policy_moved_too_far(self):
        agent = GRPO("CartPole-v1", **{**QUICK, "lr_schedule": "adaptive", "learning_rate": 1e-5})
        agent.loop.learner._adapt(approx_kl=1.0, progress=0.0)
        assert agent.loop.learner.learning_rate <= 1e-5
        agent.loop.learner._adapt(approx_kl=0.0, progress=0.0)
        assert agent.loop.learner.learning_rate > 1e-5

    @pytest.mark.parametrize(
        ("settings", "bound"),
        [
            ({"learning_rate": 1e-3}, 1e-2),
            ({"learning_rate": 1e-5}, 1e-2),
            ({"learning_rate": 5e-2}, 5e-2),
            ({"learning_rate": 1e-3, "lr_max": 0.2}, 0.2),
        ],
    )
    def test_an_adaptive_learning_rate_rises_no_further_than_its_bound(self, settings, bound):
        agent = GRPO("CartPole-v1", **{**QUICK, "lr_schedule": "adaptive"} | settings)
        for _ in range(40):
            agent.loop.learner._adapt(approx_kl=0.0, progress=0.0)
        assert agent.loop.learner.learning_rate == pytest.approx(bound)

    def test_any_network_can_be_used(self):
        def build(n_in, n_out):
            return torch.nn.Sequential(torch.nn.Linear(n_in, 8), torch.nn.ReLU(), torch.nn.Linear(8, n_out))

        agent = GRPO("CartPole-v1", **QUICK, network=build).learn(300)
        assert agent.predict(np.zeros(4, np.float32))[0] in (0, 1)
        x = np.random.default_rng(0).standard_normal((2 * ACTING_ROWS + 7, 4)).astype(np.float32)
        learned = agent.policy({"flat": torch.from_numpy(x)}).detach().numpy()
        for rows in (0, 1, ACTING_ROWS, len(x)):
            found = agent.policy.infer({"flat": x[:rows]})
            assert found.shape == (rows, 2)
            np.testing.assert_allclose(found, learned[:rows], atol=1e-6)

    @pytest.mark.parametrize("hidden", [(), (8,), (8, 8, 8)])
    @pytest.mark.parametrize("activation", ["tanh", "relu"])
    def test_acting_and_learning_see_the_same_network(self, hidden, activation):
        agent = GRPO("Pendulum-v1", **{**QUICK, "hidden_sizes": hidden, "activation": activation, "output_gain": 1.0})
        x = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
        learned = agent.policy({"flat": torch.from_numpy(x)}).detach().numpy()
        np.testing.assert_allclose(agent.policy.infer({"flat": x}), learned, atol=1e-6)


SPACES = {
    "box to discrete": (probes.NOTHING, spaces.Discrete(3)),
    "discrete with a start": (spaces.Discrete(4, start=2), spaces.Discrete(3, start=-1)),
    "multi discrete": (spaces.MultiDiscrete([2, 3]), spaces.MultiDiscrete([2, 3, 4])),
    "multi discrete table": (spaces.MultiBinary((2, 2)), spaces.MultiDiscrete([[2, 3], [4, 5]])),
    "multi binary": (spaces.MultiBinary(3), spaces.MultiBinary(5)),
    "box table": (spaces.Box(0, 9, (2, 3), np.float64), spaces.Box(-2, 5, (3, 2), np.float32)),
    "unbounded box": (probes.NOTHING, spaces.Box(-np.inf, np.inf, (2,), np.float64)),
    "image": (spaces.Box(0, 255, (20, 20, 3), np.uint8), spaces.Discrete(2)),
    "dict with image": (
        spaces.Dict({"eye": spaces.Box(0, 255, (3, 20, 20), np.uint8), "x": probes.NOTHING, "k": spaces.Discrete(3)}),
        spaces.Box(2.0, 10.0, (1,), np.float32),
    ),
    "two images of like names": (
        spaces.Dict({key: spaces.Box(0, 255, (16, 16), np.uint8) for key in ("a.b", "a_b")}),
        spaces.Discrete(2),
    ),
    "tuple": (spaces.Tuple([spaces.Discrete(3), probes.NOTHING]), spaces.MultiBinary(2)),
}


def random_env(name):
    """An environment of the named spaces that shows and pays random numbers."""
    observation, action = SPACES[name]

    class Random(probes.Probe):
        def __init__(self):
            super().__init__(observation, action, lambda rng: self.draw(rng), lambda seen, a: self.pay())

        def draw(self, rng):
            self.observation_space.seed(int(rng.integers(2**31 - 1)))
            return self.observation_space.sample()

        def pay(self):
            return float(self.np_random.random())

    return Random


@pytest.mark.parametrize("name", SPACES)
class TestSpaces:
    def agent(self, name):
        return GRPO(random_env(name), **{**QUICK, "n_envs": 2, "n_steps": 8, "hidden_sizes": (8,)})

    def test_every_space_is_learned_from_and_predicted_in(self, name):
        agent = self.agent(name).learn(80)  # the environment asserts that every action is in its space
        assert torch.isfinite(weights(agent)).all()
        observation, action = SPACES[name]
        observation.seed(0)
        single = observation.sample()
        for deterministic in (True, False):
            chosen, state = agent.predict(single, deterministic=deterministic)
            assert state is None
            assert action.contains(chosen)
            assert np.shape(chosen) == (action.shape or ())

    def test_a_batch_gives_a_batch_of_the_same_actions(self, name):
        agent = self.agent(name)
        observation, action = SPACES[name]
        observation.seed(0)
        many = [observation.sample() for _ in range(5)]
        batch = gym.vector.utils.concatenate(observation, many, gym.vector.utils.create_empty_array(observation, 5))
        chosen, _ = agent.predict(batch, deterministic=True)
        assert np.shape(chosen) == (5, *(action.shape or ()))
        for one, row in zip(many, chosen, strict=True):
            np.testing.assert_allclose(agent.predict(one, deterministic=True)[0], row, atol=1e-5)

    def test_a_saved_policy_predicts_the_same(self, name, tmp_path):
        agent = self.agent(name).learn(40)
        loaded = GRPO.load(agent.save(tmp_path / "policy"))
        observation, _ = SPACES[name]
        observation.seed(0)
        for _ in range(5):
            one = observation.sample()
            ours, theirs = (a.predict(one, deterministic=True)[0] for a in (agent, loaded))
            assert np.array_equal(ours, theirs)
        assert loaded.observation_space == observation


class TestPredict:
    def test_an_observation_of_another_shape_is_refused(self):
        with pytest.raises(UsageError, match=r"\(3,\)"):
            GRPO("CartPole-v1", **QUICK).predict(np.zeros(3, np.float32))

    def test_actions_are_drawn_unless_it_is_deterministic(self):
        agent = GRPO("CartPole-v1", **QUICK)  # all but uniform
        x = np.zeros((200, 4), np.float32)
        assert 40 < agent.predict(x)[0].sum() < 160
        assert len(set(agent.predict(x, deterministic=True)[0].tolist())) == 1

    def test_a_mask_is_obeyed(self):
        agent = GRPO(probes.bandit, **QUICK)
        x = np.zeros((50, 1), np.float32)
        mask = np.array([0, 1, 0, 1])
        assert set(agent.predict(x, action_masks=np.tile(mask, (50, 1)))[0].tolist()) == {1, 3}
        assert agent.predict(x[0], action_masks=mask, deterministic=True)[0] in (1, 3)

    def test_a_state_is_handed_back(self):
        state = object()
        assert GRPO("CartPole-v1", **QUICK).predict(np.zeros(4, np.float32), state, True)[1] is state


def sb3_style_evaluation(model, venv, n_episodes, deterministic=True):
    """What Stable-Baselines3's evaluate_policy asks of a model, and no more."""
    counts, returns = np.zeros(venv.num_envs, int), []
    running = np.zeros(venv.num_envs)
    observations, _ = venv.reset(seed=0)
    states, starts = None, np.ones(venv.num_envs, bool)
    while len(returns) < n_episodes:
        actions, states = model.predict(observations, state=states, episode_start=starts, deterministic=deterministic)
        observations, rewards, terminated, truncated, _ = venv.step(actions)
        starts = terminated | truncated
        running += rewards
        for i in np.flatnonzero(starts):
            returns.append(running[i])
            counts[i] += 1
            running[i] = 0
    return returns


class TestLikeStableBaselines3:
    def test_its_evaluation_loop_runs(self):
        venv = gym.vector.SyncVectorEnv([lambda: probes.bandit()] * 3)
        assert len(sb3_style_evaluation(trained(env=probes.bandit), venv, 9)) >= 9

    def test_its_own_evaluate_policy_runs(self):
        evaluation = pytest.importorskip(
            "stable_baselines3.common.evaluation", reason="Stable-Baselines3 is not installed"
        )
        agent = trained()
        mean, _ = evaluation.evaluate_policy(agent, gym.make("CartPole-v1"), n_eval_episodes=3, warn=False)
        assert 8 <= mean <= 500


class TestSaving:
    @pytest.mark.parametrize("suffix", ["", ".safetensors"])
    def test_a_file_with_or_without_its_suffix(self, tmp_path, suffix):
        agent = trained()
        path = agent.save(tmp_path / f"some.name{suffix}")
        assert path == tmp_path / "some.name.safetensors"
        loaded = GRPO.load(tmp_path / f"some.name{suffix}")
        assert torch.equal(weights(agent), weights(loaded))
        assert loaded.num_timesteps == agent.num_timesteps
        assert loaded.config == agent.config

    def test_normalisation_statistics_come_along(self, tmp_path):
        agent = trained()
        loaded = GRPO.load(agent.save(tmp_path / "x"))
        assert float(loaded.policy.count) == float(agent.policy.count) > 600
        assert torch.equal(loaded.policy.mean, agent.policy.mean)
        x = np.random.default_rng(0).standard_normal((50, 4)).astype(np.float32) * [1, 2, 0.1, 2]
        x = x.astype(np.float32)
        ours, theirs = (a.policy.prepare({"flat": x})["flat"] for a in (agent, loaded))
        assert np.array_equal(ours, theirs)
        assert not np.allclose(ours, x)

    def test_statistics_do_not_move_when_predicting_or_evaluating(self):
        agent = trained()
        before = agent.policy.mean.clone()
        agent.predict(np.full(4, 5, np.float32))
        evaluate(agent, episodes=2)
        assert torch.equal(agent.policy.mean, before)

    def test_a_loaded_agent_learns_on_in_the_environment_it_names(self, tmp_path):
        path = trained().save(tmp_path / "x")
        loaded = GRPO.load(path)
        steps = loaded.num_timesteps
        assert loaded.get_env() is None
        loaded.learn(100)
        assert loaded.num_timesteps >= steps + 100
        assert GRPO.load(path, env="CartPole-v1", n_envs=3).get_env().num_envs == 3

    def test_settings_can_be_overridden(self, tmp_path):
        assert GRPO.load(trained().save(tmp_path / "x"), learning_rate=0.5).config.learning_rate == 0.5

    def test_an_agent_of_a_callable_needs_it_again_and_says_so(self, tmp_path):
        path = trained(env=lambda: probes.bandit()).save(tmp_path / "x")
        with pytest.raises(UsageError, match=r"set_env|env="):
            GRPO.load(path).learn(10)
        GRPO.load(path, env=lambda: probes.bandit()).learn(10)

    def test_a_custom_network_must_be_given_again(self, tmp_path):
        def build(n_in, n_out):
            return torch.nn.Linear(n_in, n_out)

        agent = GRPO("CartPole-v1", **QUICK, network=build)
        path = agent.save(tmp_path / "x")
        with pytest.raises(UsageError, match="network="):
            GRPO.load(path)
        assert torch.equal(weights(GRPO.load(path, network=build)), weights(agent))

    def test_files_that_are_no_saved_policy_are_refused(self, tmp_path):
        missing = tmp_path / "nothing"
        with pytest.raises(UsageError, match="no file"):
            GRPO.load(missing)
        empty = tmp_path / "empty.safetensors"
        empty.write_bytes(b"")
        with pytest.raises(UsageError, match="empty"):
            GRPO.load(empty)
        text = tmp_path / "text.safetensors"
        text.write_text("not a model at all")
        with pytest.raises(UsageError, match="not a safetensors file"):
            GRPO.load(text)
        foreign = tmp_path / "foreign.safetensors"
        save_file({"weight": torch.zeros(3)}, str(foreign))
        with pytest.raises(UsageError, match="holds no state of a run"):
            GRPO.load(foreign)
        whole = trained(steps=100).save(tmp_path / "whole").read_bytes()
        for length in (9, 200, len(whole) - 5):
            cut = tmp_path / "cut.safetensors"
            cut.write_bytes(whole[:length])
            with pytest.raises(UsageError, match="damaged"):
                GRPO.load(cut)
        with pytest.raises(UsageError, match="no file"):
            GRPO.load(tmp_path)  # a folder without a model

    def test_a_setting_that_the_weights_do_not_fit_is_named(self, tmp_path):
        path = trained(steps=100, hidden_sizes=(4,)).save(tmp_path / "x")
        for sizes in ((5,), (4, 4), (4, 2)):
            said = f"do not fit hidden_sizes={sizes}; they were saved with hidden_sizes=(4,)"
            with pytest.raises(UsageError, match=re.escape(said)) as caught:
                GRPO.load(path, hidden_sizes=sizes)
            assert not isinstance(caught.value, DamagedFileError)

    @pytest.mark.parametrize(("name", "value", "saved"), [("normalize_observations", False, True),
                                                          ("activation", "relu", "tanh")])  # fmt: skip
    def test_a_setting_that_would_make_another_policy_is_refused(self, name, value, saved, tmp_path):
        path = trained(steps=100, beta=0.1).save(tmp_path / "x")
        said = rf"{name}={value!r} would make another policy of the weights in .* trained with {name}={saved!r}"
        with pytest.raises(UsageError, match=said):
            GRPO.load(path, **{name: value})
        assert GRPO.load(path, **{name: saved}).config == GRPO.load(path).config
        other = GRPO("CartPole-v1", **QUICK | {name: value, "beta": 0.1, "reference": str(path)})
        with pytest.raises(UsageError, match=f"was trained with {name}={saved!r}, and this agent has {name}={value!r}"):
            other.learn(100)
        GRPO("CartPole-v1", **QUICK | {"beta": 0.1, "reference": str(path)}).learn(100)

    def test_a_network_of_the_users_has_an_activation_of_its_own(self, tmp_path):
        agent = GRPO("CartPole-v1", **QUICK, network=torch.nn.Linear)
        with pytest.warns(UserWarning, match="activation='relu' has no effect: the network is one of your own"):
            loaded = GRPO.load(agent.save(tmp_path / "x"), network=torch.nn.Linear, activation="relu")
        assert torch.equal(weights(loaded), weights(agent))

    def test_a_setting_without_effect_is_named_as_where_an_agent_is_made(self, tmp_path, recwarn):
        path = trained(steps=100).save(tmp_path / "x")
        recwarn.clear()
        GRPO.load(path, learning_rate=0.5, n_envs=8, warmup_steps=GRPO.load(path).config.warmup_steps)
        assert not recwarn.list
        given = {"output_gain": 0.5, "log_std_init": -1.0, "warmup_steps": 5, "kl_estimator": "k3"}
        GRPO.load(path, **given)
        said = [str(one.message) for one in recwarn if "has no effect" in str(one.message)]
        assert sorted(one.partition("=")[0] for one in said) == sorted(given)
        assert all(Path(one.filename) == Path(__file__) for one in recwarn)
        recwarn.clear()
        GRPO.load(path, env=gym.make("CartPole-v1"), n_envs=3)
        assert [str(one.message) for one in recwarn] == ["n_envs=3 has no effect: the environment given holds 1"]

    def test_a_damaged_file_is_called_so_whatever_the_settings(self, tmp_path):
        agent = trained(steps=100)
        path = agent.save(tmp_path / "x")
        tensors, meta = load_state(path)
        save_state(path, {name: value for name, value in tensors.items() if "layers.0" not in name}, meta)
        with pytest.raises(DamagedFileError, match="lacks the tensor"):
            GRPO.load(path, hidden_sizes=(5,), learning_rate=0.5)


class TestEnvironments:
    def test_another_environment_of_the_same_spaces_is_taken(self):
        agent = trained(steps=200)
        agent.set_env("CartPole-v0")
        assert agent.env_id == "CartPole-v0"
        agent.learn(100)

    def test_an_environment_of_other_spaces_is_refused_and_the_old_one_kept(self):
        agent = trained(steps=200)
        with pytest.raises(UsageError, match=r"observation space .* differs"):
            agent.set_env("Acrobot-v1")
        with pytest.raises(UsageError, match=r"action space .* differs"):
            agent.set_env(lambda: probes.Probe(agent.observation_space, spaces.Discrete(3), None, None))
        assert agent.env_id == "CartPole-v1"
        agent.learn(100)

    def test_a_vector_environment_is_used_as_it_is(self):
        venv = gym.vector.SyncVectorEnv([probes.bandit] * 3)
        agent = GRPO(venv, **QUICK)
        assert agent.get_env() is venv
        agent.learn(100)

    def test_one_environment_is_used_alone(self):
        agent = GRPO(probes.bandit(), **QUICK)
        assert agent.get_env().num_envs == 1
        agent.learn(50)

    def test_a_callable_that_returns_one_environment_again_and_again_is_refused(self):
        env = probes.bandit()
        with pytest.raises(UsageError, match="same environment"):
            GRPO(lambda: env, **QUICK)

    def test_evaluating_the_very_environment_of_training_does_not_derail_training(self):
        agent = GRPO(Stateful(), **{**QUICK, "n_steps": 4})
        agent.learn(20)
        evaluate(agent, episodes=1)
        agent.learn(20)  # the environment asserts that it is reset before it is stepped on

    @pytest.mark.parametrize("env", ["CartPole-v1", probes.bandit])
    def test_groups_of_one_start_work_whatever_the_environment_is_given_as(self, env):
        settings = {"advantage": "outcome", "collect": "episodes", "group_size": 4, "min_steps": 64}
        agent = trained(steps=200, env=env, **settings)
        assert agent.num_timesteps >= 200

    def test_envpool_cannot_start_groups_and_says_so(self):
        pytest.importorskip("envpool", reason="EnvPool is not installed")
        settings = {"advantage": "outcome", "collect": "episodes", "group_size": 4, "min_steps": 64}
        with pytest.raises(UsageError, match="group_size needs a seed per environment"):
            trained(env="envpool:CartPole-v1", **settings)

    def test_a_way_of_stepping_that_needs_an_id_is_refused_for_a_callable(self):
        with pytest.raises(UsageError, match="needs an environment id"):
            GRPO(probes.bandit, **QUICK, vectorization="vector_entry_point")

    def test_the_same_environment_set_again_stays_open(self):
        class Closable(probes.Truncated):
            closed = False

            def close(self):
                self.closed = True

        env = Closable()
        agent = GRPO(env, **QUICK)
        agent.set_env(env)
        assert not env.closed
        agent.learn(50)
        agent.close()
        assert env.closed

    def test_an_agent_with_a_dead_worker_can_be_closed(self):
        class Dying(probes.Truncated):
            def step(self, action):
                os._exit(3)

        agent = GRPO(lambda: Dying(), **{**QUICK, "n_envs": 2, "vectorization": "async"})
        with pytest.raises(TrainingError, match="worker process died"):
            agent.learn(100)
        workers = agent.get_env().processes
        agent.close()
        assert agent.get_env() is None
        assert not any(worker.is_alive() for worker in workers)

    @pytest.mark.parametrize("busy", [False, True])
    def test_workers_close_their_environments_unless_they_are_stuck(self, tmp_path, busy):
        class Closing(probes.Truncated):
            def step(self, action):
                if busy:
                    time.sleep(60)
                return super().step(action)

            def close(self):
                (tmp_path / str(os.getpid())).touch()

        venv = make_vector(lambda: Closing(), 2, "async")
        venv.reset()
        if busy:
            venv.step_async(np.zeros(2, dtype=np.int64))
        close_vector(venv, patience=0.5 if busy else 60.0)
        assert venv.closed
        assert not any(worker.is_alive() for worker in venv.processes)
        closed = [(tmp_path / str(worker.pid)).exists() for worker in venv.processes]
        assert closed == [not busy, not busy]

    def test_a_worker_stuck_with_a_large_result_still_closes_its_environment(self, tmp_path):
        class Talkative(probes.Truncated):
            def step(self, action):
                *rest, info = super().step(action)
                return *rest, {**info, "story": "x" * 2_000_000}

            def close(self):
                (tmp_path / str(os.getpid())).touch()

        venv = make_vector(lambda: Talkative(), 2, "async")
        venv.reset()
        venv.step_async(np.zeros(2, dtype=np.int64))
        close_vector(venv, patience=60.0)
        assert all((tmp_path / str(worker.pid)).exists() for worker in venv.processes)

    def test_an_unknown_environment_is_refused_with_a_close_name(self):
        with pytest.raises(UsageError, match="CartPole-v1"):
            GRPO("CartPoll-v1")
        with pytest.raises(UsageError, match="NoSuch-v0"):
            evaluate(trained(steps=50), "NoSuch-v0")

    def test_arguments_of_the_environment_are_passed_on(self):
        agent = GRPO("Pendulum-v1", **QUICK, env_kwargs={"g": 3.0}, vectorization="sync")
        assert agent.get_env().envs[0].unwrapped.g == 3.0
        with pytest.raises(UsageError, match="env_kwargs"):
            GRPO("Pendulum-v1", **QUICK, env_kwargs={"gravity": 3.0})
        with pytest.raises(UsageError, match="environment id"):
            GRPO(probes.bandit, **QUICK, env_kwargs={"g": 3.0})

    def test_what_is_no_environment_is_refused(self):
        with pytest.raises(UsageError, match="of several callables pass one, and how many in n_envs="):
            GRPO([lambda: gym.make("CartPole-v1")] * 2)
        with pytest.raises(UsageError, match="cannot make environments from 5"):
            GRPO(5, **QUICK)

    def test_a_space_that_is_not_supported_is_refused(self):
        make = lambda: probes.Probe(spaces.Text(5), spaces.Discrete(2), None, None)  # noqa: E731
        with pytest.raises(UsageError, match="Text"):
            GRPO(make, **QUICK)


class Stateful(probes.Truncated):
    """Refuses to be stepped after its end."""

    def reset(self, *, seed=None, options=None):
        self.over = False
        return super().reset(seed=seed)

    def step(self, action):
        assert not self.over, "stepped after the end"
        out = super().step(action)
        self.over = out[3]
        return out


class TestEvaluation:
    def test_returns_and_lengths_are_those_of_whole_episodes(self):
        agent = trained(steps=100, env=probes.Truncated)
        result = evaluate(agent, probes.Truncated, episodes=7)
        assert result.returns == [10.0] * 7
        assert result.lengths == [10] * 7
        assert result.summary() == {
            "episodes": 7, "mean_return": 10.0, "std_return": 0.0, "min": 10.0, "max": 10.0, "mean_length": 10.0,
            "cut": 0,
        }  # fmt: skip

    def test_the_same_seed_gives_the_same_episodes(self):
        agent = trained(steps=100)
        first, second, other = (evaluate(agent, episodes=5, deterministic=False, seed=s).returns for s in (1, 1, 2))
        assert first == second
        assert first != other

    def test_an_environment_of_other_spaces_is_refused(self):
        with pytest.raises(UsageError, match="evaluate it where they are the same"):
            evaluate(trained(steps=50), "Acrobot-v1")

    def test_an_episode_cut_for_want_of_an_end_is_followed_by_a_fresh_one(self, monkeypatch):
        class Endless(probes.Truncated):
            def step(self, action):
                self.time += 1
                return self._seen(), float(self.time <= 10), False, False, {}

        monkeypatch.setattr("grouprl.envs.evaluation.MAX_STEPS", 20)
        result = Evaluator(Endless, n_envs=1).run(GRPO(Endless, **QUICK), 3)
        assert result.returns == [10.0] * 3

    @pytest.mark.parametrize("episodes", [0, -1])
    def test_fewer_than_one_episode_is_refused(self, episodes):
        with pytest.raises(UsageError, match=f"episodes={episodes}"):
            evaluate(trained(steps=50), episodes=episodes)


class TestConfiguration:
    def test_an_unknown_setting_is_refused_with_the_closest_name(self):
        with pytest.raises(UsageError, match="did you mean 'learning_rate'"):
            GRPO("CartPole-v1", learning_rat=1)
        with pytest.raises(UsageError, match="grouprl settings, and help"):
            GRPO("CartPole-v1", xyzzy=1)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"gamma": 1.5}, r"gamma=1.5.*less than or equal to 1"),
            ({"n_envs": 0}, r"n_envs=0"),
            ({"advantage": "magic"}, r"advantage='magic'.*'baseline'"),
            ({"advantage": "outcome", "collect": "segments"}, "set collect=episodes"),
            ({"group_size": 4, "collect": "segments"}, "collect=episodes"),
            ({"group_size": 3, "n_envs": 16}, "use n_envs=18"),
            ({"group_size": 4, "vectorization": "vector_entry_point"}, "vectorization=sync"),
            ({"advantage": "outcome", "n_envs": 1}, "n_envs=2"),
            ({"min_steps": 99_999}, "max_steps=16384 is below min_steps=99999"),
            ({"hidden_sizes": (64, 0)}, "hidden_sizes"),
            ({"delta": 1.1}, "delta=1.1 must exceed"),
            ({"device": "gpu"}, "device"),
            ({"device": "cuda:99"}, "device"),
            ({"learning_rate": float("nan")}, "learning_rate"),
            ({"learning_rate": 0.02, "lr_max": 0.01}, "learning_rate=0.02 is above lr_max=0.01.*raise lr_max"),
        ],
    )
    def test_a_value_that_is_not_allowed_is_refused_with_the_way_out(self, settings, message):
        with pytest.raises(UsageError, match=message):
            GRPO("CartPole-v1", preset=None, **settings)

    def test_an_unknown_preset_is_refused(self):
        with pytest.raises(UsageError, match="no preset 'nonsense'"):
            GRPO("CartPole-v1", preset="nonsense")

    def test_a_configuration_cannot_be_changed_afterwards(self):
        agent = GRPO("CartPole-v1", **QUICK)
        with pytest.raises(ValueError, match="frozen"):
            agent.config.gamma = 0.5


class TestAnEstimatorOfOnesOwn:
    def test_a_function_of_objective_gives_what_its_setting_gives(self):
        by_name = trained(advantage="leave_one_out", collect="episodes")

        def scaled(rewards, lengths, group, trainable):
            return objective.standardise(objective.leave_one_out(rewards, lengths, group), trainable)

        given = trained(advantage_function=scaled, collect="episodes")
        for a, b in zip(by_name.policy.parameters(), given.policy.parameters(), strict=True):
            assert torch.equal(a, b)

    def test_what_it_returns_is_used_as_it_is(self):
        plain, double = (
            trained(advantage_function=lambda r, n, g, factor=factor: factor * objective.leave_one_out(r, n, g),
                    collect="episodes", loss_type="grpo", max_grad_norm=1e9, adam_epsilon=1.0)
            for factor in (1.0, 2.0)
        )  # fmt: skip
        assert not all(
            torch.equal(a, b) for a, b in zip(plain.policy.parameters(), double.policy.parameters(), strict=True)
        )

    def test_it_is_given_what_it_asks_for(self):
        seen = {}

        def curious(rewards, lengths, group, *, observations, values, terminated, truncated, elapsed, nothing=None):
            seen.update(locals())
            return rewards - values

        agent = trained(advantage_function=curious, collect="episodes")
        steps, samples = len(seen["rewards"]), len(seen["lengths"])
        assert seen["nothing"] is None
        assert seen["observations"].shape == (steps, *agent.observation_space.shape)
        assert {len(seen[name]) for name in ("values", "elapsed")} == {steps}
        assert bool((seen["terminated"] ^ seen["truncated"]).all())
        assert len(seen["terminated"]) == samples
        assert seen["elapsed"].tolist() == [t for n in seen["lengths"].tolist() for t in range(n)]
        assert float(seen["values"].std()) > 0

    def test_what_it_cannot_be_given_is_named_before_training(self):
        with pytest.raises(UsageError, match=r"asks for 'returns'; .* can ask for observations, values, states, gamma"):
            GRPO("CartPole-v1", preset=None, advantage_function=lambda r, n, g, returns: r, n_envs=2)

    def test_it_may_take_its_tensors_together(self):
        agent = GRPO("CartPole-v1", preset=None, advantage_function=lambda rewards, *others: rewards, n_envs=2)
        assert agent.learn(100).num_timesteps >= 100
        with pytest.raises(UsageError, match="asks for 'returns'"):
            GRPO("CartPole-v1", preset=None, advantage_function=lambda *three, returns: returns, n_envs=2)

    def test_it_is_needed_to_train_on_and_not_to_act(self, tmp_path):
        agent = GRPO("CartPole-v1", preset=None, advantage_function=objective.leave_one_out, n_envs=2)
        path = agent.learn(100).save(tmp_path / "agent")
        loaded = GRPO.load(path)
        loaded.predict(np.zeros(4, np.float32))
        with pytest.raises(UsageError, match="pass advantage_function="):
            loaded.learn(100)
        GRPO.load(path, advantage_function=objective.leave_one_out).learn(100)

    @pytest.mark.parametrize(
        ("function", "kind", "message"),
        [
            ("median", UsageError, r"advantage_function='median' must be a function .* advantage=\.\.\."),
            (lambda r, n, g: r[:1], TrainingError, r"returned shape \[1\]"),
            (lambda r, n, g: r / 0, TrainingError, "not finite"),
        ],
    )
    def test_one_at_fault_is_named(self, function, kind, message):
        with pytest.raises(kind, match=message):
            GRPO("CartPole-v1", preset=None, advantage_function=function, n_envs=2).learn(100)


class TestALossOfOnesOwn:
    def test_a_function_of_objective_gives_what_its_setting_gives(self):
        common = {"native": False}  # a function of the user's is differentiated by autograd
        by_name, given = trained(**common), trained(surrogate_function=objective.clipped, **common)
        for a, b in zip(by_name.policy.parameters(), given.policy.parameters(), strict=True):
            assert torch.equal(a, b)
        plain = trained(surrogate_function=lambda logp, old, a: -(logp - old).exp() * a, **common)
        pairs = zip(by_name.policy.parameters(), plain.policy.parameters(), strict=True)
        assert not all(torch.equal(a, b) for a, b in pairs)

    def test_it_is_needed_to_train_on_and_not_to_act(self, tmp_path):
        agent = GRPO("CartPole-v1", preset=None, surrogate_function=objective.clipped, n_envs=2)
        path = agent.learn(100).save(tmp_path / "agent")
        loaded = GRPO.load(path)
        loaded.predict(np.zeros(4, np.float32))
        with pytest.raises(UsageError, match="pass surrogate_function="):
            loaded.learn(100)
        GRPO.load(path, surrogate_function=objective.clipped).learn(100)

    def test_one_at_fault_is_named(self):
        with pytest.raises(TrainingError, match="surrogate_function returned shape"):
            GRPO("CartPole-v1", preset=None, surrogate_function=lambda n, o, a: a.sum(), n_envs=2).learn(100)

    def test_a_loss_of_probabilities_is_refused_where_actions_have_densities(self):
        with pytest.raises(UsageError, match="loss_type='dppo_tv' needs the probability of each action"):
            GRPO("Pendulum-v1", preset=None, loss_type="dppo_tv", n_envs=2)

    def test_the_mean_over_samples_weighs_steps_by_their_sample(self):
        by_step, by_sample = trained(collect="episodes"), trained(collect="episodes", loss_type="grpo")
        pairs = zip(by_step.policy.parameters(), by_sample.policy.parameters(), strict=True)
        assert not all(torch.equal(a, b) for a, b in pairs)


def test_agents_of_one_network_each_train_it_and_so_does_one_whose_network_got_other_storage():
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    settings = {"preset": None, "n_steps": 16, "warmup_steps": 0}
    agents = [GRPO("CartPole-v1", network=lambda n_in, n_out: network, seed=seed, **settings) for seed in (0, 1)]
    for agent in (*agents, *agents):
        network.double().float()
        before = [p.detach().clone() for p in network.parameters()]
        agent.learn(512)
        assert not any(torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))
    sizes = [(p.numel() * 4, p.untyped_storage().nbytes()) for p in agents[0].policy.parameters()]
    assert all(own == whole for own, whole in sizes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda policy: policy.half(), "became float16, from float32"),
        (lambda policy: policy.requires_grad_(False), "was frozen"),
        (lambda policy: setattr(policy, "network", torch.nn.Linear(4, 2)), "network"),
    ],
)
def test_a_policy_whose_parameters_are_others_than_before_is_refused(change, said):
    agent = GRPO("CartPole-v1", n_steps=16).learn(512)
    change(agent.policy)
    with pytest.raises(UsageError, match=said):
        agent.learn(512)
