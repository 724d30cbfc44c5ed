"""Settings that cannot fit into this machine are one error, before anything is made."""

from __future__ import annotations

from typing import Any

import pytest

from grouprl import GRPO, UsageError
from grouprl.lm import GRPOConfig
from grouprl.lm.settings.batch_plan import batch_plan, least_bytes
from grouprl.machine import room


@pytest.mark.parametrize(
    "settings",
    [
        {"n_envs": 10**9},
        {"n_envs": 10**18},
        {"hidden_sizes": [10**9]},
        {"hidden_sizes": [10**6, 10**6]},
        {"baseline_features": 10**9},
        {"min_steps": 10**12, "max_steps": 10**12},
        {"n_steps": 10**12, "collect": "segments"},
    ],
)
def test_an_agent_of_a_size_that_no_machine_has_is_one_line(settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"needs at least [\d,e+]+ [GTP]B of memory, and this machine has") as refused:
        GRPO("CartPole-v1", preset="default", **settings)
    assert any(name in str(refused.value) for name in settings)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_generations": 10**9, "prompts_per_step": 1},
        {"num_generations": 8, "prompts_per_step": 10**9},
        {"max_completion_length": 10**12},
        {"num_generations_eval": 10**9},
        {"num_generations": 8, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 10**9},
    ],
)
def test_a_generation_of_a_size_that_no_machine_has_is_one_line(settings: dict[str, Any]) -> None:
    config = GRPOConfig(use_cpu=True, **settings).in_use()
    with pytest.raises(UsageError, match=r"needs at least [\d,e+]+ [GTP]B of memory, and this machine has"):
        room.check_room(least_bytes(config, batch_plan(config)))


def test_what_fits_is_allowed_and_what_is_just_too_large_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "memory_of_machine", lambda: 4 * 10**9)
    room.check_room({"a=1": 4e9, "b=2": 1.0})
    with pytest.raises(UsageError, match=r"^a=1 needs at least 5 GB of memory, and this machine has 4 GB; set less$"):
        room.check_room({"a=1": 5e9, "b=2": 4.5e9})
    monkeypatch.setattr(room, "memory_of_machine", lambda: None)
    room.check_room({"a=1": 1e30})


def test_a_container_has_what_it_is_given(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "max").write_text("max\n")
    (tmp_path / "limit").write_text("1000000\n")
    monkeypatch.setattr(room, "_LIMITS", (str(tmp_path / "max"), str(tmp_path / "none"), str(tmp_path / "limit")))
    assert room.memory_of_machine() == 1000000
