"""Which of Stable-Baselines3's settings SBX's PPO takes, and on which environments it is run."""

from __future__ import annotations

from typing import Any

import pytest
from made_rows import BENCHMARKS

import sbx_ppo
import zoo_ppo
from grouprl.bench import plan

OF_THE_WORKER = ("n_envs", "normalize")
"""Settings that no model gets: the worker makes environments of them."""


def for_the_model(subject: str) -> dict[str, Any]:
    return {name: value for name, value in zoo_ppo.SETTINGS[subject].items() if name not in OF_THE_WORKER}


def test_sbx_runs_where_rl_zoo_has_settings_that_it_takes_and_nowhere_else() -> None:
    cells = plan.read(BENCHMARKS / "evidence.yaml").cells
    subjects = {cell.subject for cell in cells if cell.method == "sbx-ppo"}
    assert subjects == {subject for subject in zoo_ppo.SETTINGS if not sbx_ppo.refused(for_the_model(subject))}


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"learning_rate": 1e-3, "policy_kwargs": {"net_arch": [8], "ortho_init": False}}, []),
        ({"use_sde": True, "gamma": 0.9, "sde_sample_freq": 4}, ["use_sde", "sde_sample_freq"]),
        ({"clip_range_vf": 0.2}, ["clip_range_vf"]),  # it is stored, and nothing reads it
        ({"target_kl": 0.01}, ["target_kl"]),  # it changes the learning rate, and ends no update
        ({"policy_kwargs": {"optimizer_class": None}}, ["policy_kwargs.optimizer_class"]),
        ({"policy_kwargs": {"ortho_init": True}}, ["policy_kwargs.ortho_init"]),
    ],
)
def test_what_sbx_would_do_in_another_way_is_refused(settings: dict[str, Any], names: list[str]) -> None:
    assert sbx_ppo.refused(settings) == names


def test_a_model_with_a_setting_that_sbx_does_not_have_is_an_error_that_names_it() -> None:
    with pytest.raises(ValueError, match="does with use_sde, sde_sample_freq; leave"):
        sbx_ppo.make("MlpPolicy", None, **for_the_model("Pendulum-v1"))
