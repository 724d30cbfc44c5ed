"""A mixture of experts trains with the loss that balances their load, logged under TRL's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_runs import ROWS, logged, mixture, same, trainer, weights


def test_the_load_is_balanced_by_the_models_coefficient_unless_another_is_given(tmp_path: Path) -> None:
    def run(name: str, coefficient: float, **given: Any) -> Any:
        made = trainer(
            tmp_path / name, model=mixture(coefficient), rows=ROWS[:4], max_steps=3, loss_type="grpo", **given
        )
        made.train()
        return made

    own, told, none = run("own", 0.5), run("told", 0.0, router_aux_loss_coef=0.5), run("none", 0.0)
    assert same(weights(own), weights(told))
    assert not same(weights(own), weights(none))
    assert "aux_loss" not in logged(none)[0]
    first = logged(own)[0]
    assert first["aux_loss"] >= 1.9  # 2, the number of experts of each token, where all is even
    assert first["loss"] == pytest.approx(0.5 * first["aux_loss"], abs=1e-4)  # advantages of a group sum to 0
