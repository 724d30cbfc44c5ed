"""Which run is meant where a path is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from grouprl.runs.nearby import holds_runs


@pytest.mark.parametrize("file", ["config.yaml", "config.json", "adapter_config.json"])
def test_a_run_or_a_model_is_meant_itself_whatever_runs_are_in_its_folder(file: str, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "config.yaml").write_text("env_id: CartPole-v1")
    assert holds_runs(tmp_path) == [tmp_path / "inside"]
    (tmp_path / file).write_text("{}")
    assert holds_runs(tmp_path) == []
