"""A launcher that started several processes is refused at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from grouprl import GRPO
from grouprl.envs import training
from grouprl.errors import UsageError
from grouprl.lm import GRPOTrainer
from grouprl.lm.run import training as lm_training
from grouprl.machine.processes import refuse_several_processes


@pytest.mark.parametrize("name", ["WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_several_processes_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "2")
    with pytest.raises(UsageError, match=rf"2 processes were started \({name}=2\).*without torchrun.*unset {name}"):
        refuse_several_processes()


@pytest.mark.parametrize("value", ["", "1", " 1 ", "many"])
def test_one_process_is_not(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", value)
    refuse_several_processes()


def test_whatever_trains_refuses_them_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    agent = GRPO("CartPole-v1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    folder = tmp_path / "run"
    for call in (
        lambda: agent.learn(1),
        lambda: training.train("CartPole-v1", folder),
        lambda: training.resume(folder),
        lambda: lm_training.train("tiny", folder),
        lambda: lm_training.resume(folder),
        lambda: GRPOTrainer(model=None, reward_funcs=[]),
    ):
        with pytest.raises(UsageError, match="WORLD_SIZE=2"):
            call()
    assert not folder.exists()
