"""What a hand used to Stable-Baselines3 types gets one sentence with the name here."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from grouprl import GRPO, UsageError
from grouprl.envs.config import GRPOConfig, make_config
from grouprl.envs.metric_names import tracked
from grouprl.envs.stable_baselines import ATTRIBUTES, EVERYWHERE

QUICK: dict[str, Any] = {"preset": None, "n_envs": 2, "collect": "segments", "n_steps": 16, "warmup_steps": 0}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"policy": "MlpPolicy"}, "no names of policies.*hidden_sizes"),
        ({"policy_kwargs": {"net_arch": [64]}}, "net_arch is hidden_sizes"),
        ({"verbose": 1}, "progress_bar=True"),
        ({"tensorboard_log": "logs"}, "TensorBoard"),
        ({"vf_coef": 0.5}, "no value network"),
        ({"use_sde": True}, "sticky"),
        ({"clip_range": 0.2}, "epsilon here"),
        ({"clip_range_vf": 0.2}, "no value network"),
        ({"normalize_advantage": True}, "standardised"),
        ({"target_kl": 0.01}, "kl_stop here; kl_target is another thing"),
        ({"learning_rate": lambda left: left * 1e-3}, "lr_schedule is 'constant', 'linear'"),
        ({"epsilon": lambda left: 0.2}, "give the first value as a number"),
        ({"device": "auto"}, "'cpu' is the default"),
        ({"n_epochs": 3}, "'n_epochs' is called 'epochs' here"),
        ({"ent_coef": 0.0}, "'ent_coef' is called 'entropy_coef' here"),
        ({"batch_size": 64}, "'batch_size' is called 'minibatch_size' here"),
        ({"lr": 1e-3}, "'lr' is called 'learning_rate' here"),
        ({"net_arch": [64]}, "'net_arch' is called 'hidden_sizes' here"),
    ],
)
def test_its_settings_are_told_their_name_here(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        GRPO("CartPole-v1", **setting)
    assert "did you mean" not in str(caught.value)


def test_a_device_of_torch_is_a_device() -> None:
    assert make_config({"device": torch.device("cpu")}).device == "cpu"


def test_the_name_of_a_policy_comes_not_first() -> None:
    for arguments in (("MlpPolicy", "CartPole-v1"), ("CnnPolicy", lambda: None)):
        with pytest.raises(UsageError, match=r"there are no names of policies: .*hidden_sizes"):
            GRPO(*arguments)
    with pytest.raises(UsageError, match="only the environment is given by position"):
        GRPO("CartPole-v1", "default")


@pytest.mark.parametrize("name", ["log_interval", "tb_log_name", "reset_num_timesteps", "eval_freq"])
def test_arguments_of_its_learn_are_refused_by_name(name: str) -> None:
    with pytest.raises(UsageError, match=f"learn has no argument '{name}': "):
        GRPO("CartPole-v1", **QUICK).learn(10, **{name: 1})


class ItsCallback:
    """As its BaseCallback: an object with methods, which is not called."""

    def init_callback(self, model: Any) -> None: ...
    def on_step(self) -> bool:
        return True


def of_locals(_locals: Any, _globals: Any) -> bool:
    return True


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (ItsCallback(), "callback of another library; a callback is a function"),
        ([ItsCallback], "callback of another library"),
        (3, r"callback=3 \(int\); a callback is a function"),
        (lambda metrics: None, r"takes \(metrics\)"),
        (of_locals, "as Stable-Baselines3 calls it"),
    ],
)
def test_callbacks_that_cannot_be_called_are_refused_before_training(callback: Any, message: str) -> None:
    agent = GRPO("CartPole-v1", **QUICK)
    with pytest.raises(UsageError, match=rf"{message}.*callback\(agent, metrics\)"):
        agent.learn(10, callback=callback)
    assert agent.num_timesteps == 0


def test_its_vector_environments_and_its_order_of_arguments_are_told_apart() -> None:
    class DummyVecEnv:
        num_envs = 2

        def step_async(self, actions: Any) -> None: ...

    with pytest.raises(UsageError, match=r"a vector environment of Stable-Baselines3; pass .* n_envs=2"):
        GRPO(DummyVecEnv())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="progress_bar=4 must be True or False"):
        GRPO("CartPole-v1", **QUICK).learn(10, None, 4)  # type: ignore[arg-type]


def test_what_is_read_from_a_model_is_there_or_named() -> None:
    agent = GRPO("CartPole-v1", **QUICK)
    assert (agent.n_envs, agent.device) == (2, torch.device("cpu"))
    parameters = agent.get_parameters()["policy"]
    assert parameters
    assert all(torch.equal(parameters[k], v) for k, v in agent.policy.state_dict().items())
    for name, message in {
        "gamma": "it is agent.config.gamma", "n_epochs": "it is agent.config.epochs", "logger": "metrics.csv",
        "ep_info_buffer": "agent.recent_returns", "clip_range": "epsilon", "no_such_thing": "'no_such_thing'$",
    }.items():  # fmt: skip
        with pytest.raises(AttributeError, match=message):
            getattr(agent, name)
    assert not hasattr(agent, "rollout_buffer")
    with pytest.raises(UsageError, match=r"agent\.predict"):
        agent.policy.predict(agent.observation_space.sample())


@pytest.mark.parametrize("text", sorted({*ATTRIBUTES.values(), *EVERYWHERE.values()}))
def test_what_is_advised_exists(text: str) -> None:
    agent = GRPO("CartPole-v1", **QUICK)
    for name in re.findall(r"\bagent\.(\w+)", text):
        assert hasattr(agent, name)
    for setting in re.findall(r"\b(\w+)=", text):
        assert setting in GRPOConfig.model_fields or setting in ("network", "progress_bar", "seed", "callback", "env")


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("clip_coef", "epsilon"),
        ("anneal_lr", "lr_schedule"),
        ("total_timesteps", "learn"),
        ("buffer_size", "on-policy"),
    ],
)
def test_a_name_of_another_library_is_answered_and_hides_no_setting(name: str, advice: str) -> None:
    with pytest.raises(UsageError, match=f"there is no setting '{name}': .*{advice}"):
        GRPO("CartPole-v1", **{name: 1})
    assert not set(EVERYWHERE) & set(GRPOConfig.model_fields)


def test_trackers_show_its_groups() -> None:
    names = {
        "return_mean": "rollout/return_mean", "approx_kl": "train/approx_kl", "eval_return": "eval/return",
        "time_update": "time/update", "steps_per_second": "time/steps_per_second", "loss": "train/loss",
    }  # fmt: skip
    assert list(tracked(dict.fromkeys(names, 0.0))) == list(names.values())


def test_all_names_and_values_that_are_refused_stand_in_one_message():
    with pytest.raises(UsageError) as refusal:
        GRPO("CartPole-v1", verbose=1, clip_range=0.1, gamma=2, lerning_rate=1)
    first, *others = str(refusal.value).splitlines()
    assert first == "these cannot stay as they are:"
    assert [line.partition(":")[0].partition("=")[0].strip() for line in others] == [
        "there is no setting 'verbose'", "there is no setting 'clip_range'",
        "unknown setting 'lerning_rate'; did you mean 'learning_rate'?", "gamma",
    ]  # fmt: skip


def test_parameters_of_another_agent_bring_its_statistics_along() -> None:
    """As from-stable-baselines3.md says of set_parameters."""
    settings: Any = {"preset": None, "n_envs": 4, "min_steps": 256, "max_steps": 256, "warmup_steps": 64}
    one, other = GRPO("CartPole-v1", seed=1, **settings).learn(600), GRPO("CartPole-v1", seed=2, **settings)
    other.policy.load_state_dict(one.get_parameters()["policy"])
    seen = np.random.default_rng(0).normal(0, 2, (200, 4)).astype(np.float32)
    wanted, _ = one.predict(seen, deterministic=True)
    assert other.predict(seen, deterministic=True)[0].tolist() == wanted.tolist()
    params = [agent.policy.infer(agent.policy.prepare({"flat": seen})) for agent in (one, other)]
    assert np.array_equal(*params)
