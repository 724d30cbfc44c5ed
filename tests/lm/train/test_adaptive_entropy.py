"""Adaptive entropy control: its rule worked out by hand, in the loss of a run, and over a stop."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from small_runs import Stop, logged, same, trainer, weights

from grouprl.errors import UsageError
from grouprl.lm import GRPOConfig
from grouprl.lm.learn.entropy_control import EntropyControl

QUIET = {"entropy_coef": 0.03, "entropy_coef_delta": 0.02, "entropy_coef_min": 0.01, "entropy_coef_max": 0.06}


def test_the_weight_rises_while_the_entropy_is_low_and_falls_otherwise() -> None:
    assert EntropyControl.of(GRPOConfig(entropy_coef=0.1)) is None
    control = EntropyControl.of(GRPOConfig(use_adaptive_entropy=True, entropy_target=0.5, **QUIET))
    assert control is not None
    assert (control.weight, control.applied) == (0.03, 0.0)  # nothing is known yet
    seen = []
    for entropy in (0.5, 0.4, 0.3, 0.6, 0.7, 0.8, 0.9, 0.1):
        control.note(entropy)
        seen.append((round(control.weight, 9), round(control.applied, 9)))
    assert seen == [
        (0.05, 0.05), (0.06, 0.06), (0.06, 0.06), (0.04, 0.0), (0.02, 0.0), (0.01, 0.0), (0.01, 0.0), (0.03, 0.03),
    ]  # fmt: skip
    again = EntropyControl.of(control.config)
    assert again is not None
    again.load(control.state())
    assert again == control
    again.load({"weight": 0.03, "last": None})
    assert math.isinf(again.last)


def test_bounds_that_cross_are_refused() -> None:
    with pytest.raises(UsageError, match=r"entropy_coef_min=0.5 is above entropy_coef_max=0.1"):
        GRPOConfig(entropy_coef_min=0.5, entropy_coef_max=0.1)


@pytest.mark.parametrize("low", [True, False])
def test_the_bonus_is_in_the_loss_after_a_step_of_low_entropy_alone(low: bool, tmp_path: Path) -> None:
    adaptive = {"use_adaptive_entropy": True, "entropy_target": 100.0 if low else 0.0, **QUIET}
    made = trainer(tmp_path / "a", max_steps=4, **adaptive)
    made.train()
    bonus = [entry["policy_loss"] - entry["loss"] for entry in logged(made)]
    entropy = [entry["entropy"] for entry in logged(made)]
    applied = [0.0, 0.05, 0.06, 0.06] if low else [0.0] * 4
    assert bonus == pytest.approx([w * h for w, h in zip(applied, entropy, strict=True)], abs=1e-6)
    after = [0.05, 0.06, 0.06, 0.06] if low else [0.01] * 4
    assert [entry["entropy_coef"] for entry in logged(made)] == pytest.approx(after)
    without = trainer(tmp_path / "b", max_steps=4, use_adaptive_entropy=True, entropy_target=0.0)
    without.train()
    assert same(weights(made), weights(without)) != low


def test_a_run_that_stopped_goes_on_with_the_weight_it_had(tmp_path: Path) -> None:
    settings = {"max_steps": 5, "use_adaptive_entropy": True, "entropy_target": 100.0, "entropy_coef": 0.1}
    straight = trainer(tmp_path / "straight", **settings)
    straight.train()
    trainer(tmp_path / "chain", callbacks=[Stop(2)], save_strategy="steps", save_steps=2, **settings).train()
    on = trainer(tmp_path / "chain", save_strategy="steps", save_steps=2, **settings)
    on.train(resume_from_checkpoint=True)
    assert same(weights(on), weights(straight))
    assert logged(on)[-1]["entropy_coef"] == logged(straight)[-1]["entropy_coef"] == pytest.approx(0.125)
