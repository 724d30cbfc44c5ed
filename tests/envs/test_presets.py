"""Every preset is complete, makes its environment, and steps."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import pytest

from grouprl import GRPO, UsageError
from grouprl.envs import presets
from grouprl.envs.config import GRPOConfig

QUICK: dict[str, Any] = {
    "n_steps": 8,
    "min_steps": 8,
    "max_steps": 64,
    "min_signals": 0,
    "epochs": 1,
    "warmup_steps": 0,
}


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_builds_and_learns_from_a_batch(name: str) -> None:
    preset = presets.load(name)
    quick = {key: value for key, value in QUICK.items() if key != "n_steps" or preset.config.get("n_envs") != 1}
    agent = GRPO(preset.env_id, preset=name, **quick)
    agent.learn(64)
    assert agent.num_timesteps >= 64
    assert agent.config.seed == 0
    agent.close()


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_says_what_it_is_and_what_to_expect(name: str) -> None:
    preset = presets.load(name)
    assert preset.about
    assert preset.total_timesteps > 0
    assert gym.spec(preset.env_id)
    assert set(preset.config) <= set(GRPOConfig.model_fields)
    assert "measured" in preset.expect
    if "mean_return" in preset.expect:
        assert {"seeds", "steps", "lowest_seed", "highest_seed"} <= set(preset.expect)
    else:
        assert preset.expect["measured"].startswith("not measured")


def test_a_preset_holds_only_what_differs_from_the_defaults() -> None:
    defaults = GRPOConfig().model_dump()
    for name in presets.names():
        if name in ("script", "formula"):  # these spell out the chapter's choices
            continue
        for key, value in presets.load(name).config.items():
            assert value != defaults[key], f"{name}: {key}"


def test_the_presets_of_walking_robots_are_those_that_the_docs_make_of_locomotion() -> None:
    common = presets.load("locomotion").config
    falls = {"log_std_init": -0.5, "log_std_min": -0.7, "gamma_final": 0.996}
    assert presets.load("HalfCheetah-v5").config == common
    assert presets.load("Hopper-v5").config == {**common, **falls}
    assert presets.load("Walker2d-v5").config == {**common, "log_std_init": -0.5, "log_std_min": -1.2}


def test_auto_takes_the_preset_named_like_the_environment() -> None:
    assert GRPO("CartPole-v1").config.n_envs == 50
    assert GRPO("CartPole-v1", preset=None).config == GRPOConfig()
    assert GRPO("CartPole-v0").config == GRPOConfig()


def test_settings_win_over_the_preset() -> None:
    assert GRPO("CartPole-v1", n_envs=4).config.n_envs == 4


@pytest.mark.parametrize(
    ("preset", "chosen", "name", "instead"),
    [
        ("CartPole-v1", {"advantage": "outcome"}, "collect", "auto"),
        ("CartPole-v1", {"group_size": 10}, "collect", "auto"),
        ("locomotion", {"advantage": "batch_returns"}, "reuse", 1),
    ],
)
def test_a_chosen_estimator_rules_out_what_a_preset_sets_for_another(
    preset: str, chosen: dict[str, Any], name: str, instead: object
) -> None:
    with pytest.warns(UserWarning, match=f"^{name}=.* of the preset {preset} does not go with {next(iter(chosen))}="):
        config = presets.configure(presets.load(preset), chosen)
    assert getattr(config, name) == instead
    assert config.learning_rate == presets.load(preset).config["learning_rate"]


def test_an_error_in_which_a_preset_has_part_names_it() -> None:
    formula = presets.load("formula")
    with pytest.raises(UsageError, match=r"collect is 'segments'.*; the preset formula sets .*group_size=8.*=default"):
        presets.configure(formula, {"collect": "segments"})
    with pytest.raises(UsageError, match=r"^epsilon=3: .*default 0.2\)$"):
        presets.configure(formula, {"epsilon": 3})


def test_an_unknown_preset_names_the_closest() -> None:
    with pytest.raises(UsageError, match="CartPole-v1"):
        GRPO("CartPole-v1", preset="CartPole-v2")


@pytest.mark.parametrize("preset", [3, True, ["CartPole-v1"]])
def test_a_preset_is_a_name(preset: Any) -> None:
    with pytest.raises(UsageError, match="must be a name, 'auto' or None"):
        GRPO("CartPole-v1", preset=preset)
