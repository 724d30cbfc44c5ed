"""A policy in a folder of its own: what is in it does what the agent does, and what cannot be exported is refused."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from gymnasium import spaces
from policies_to_export import BOX, CASES, agent_for
from torch import nn

from grouprl import GRPO
from grouprl.envs import exported
from grouprl.envs.exported import export_policy
from grouprl.envs.likely_observations import assembled, draw_masks, draw_observations
from grouprl.envs.space_json import space_from_json
from grouprl.errors import TrainingError, UsageError


def played(folder: Path, arrays: list[Any]) -> Any:
    """The actions of an exported policy, by what its folder says of it."""
    about = json.loads((folder / "policy.json").read_text())
    if about["format"] == "torch":
        return torch.export.load(folder / about["file"]).module()(*map(torch.from_numpy, arrays))[0].numpy()
    session = onnxruntime.InferenceSession(folder / about["file"])
    names = [one["name"] for one in about["inputs"]]
    return session.run(["action"], dict(zip(names, arrays, strict=True)))[0]


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("relu", "own double")])
def test_onnx_runtime_acts_as_the_agent_does(name: str, tmp_path: Path) -> None:
    agent = agent_for(name)
    made = export_policy(agent, tmp_path / "out")
    assert made.checked.startswith("ONNX Runtime ")
    assert made.difference <= 1e-5
    assert agent.masks_in_info == name.startswith("masked ")
    arrays = draw_observations(agent.policy, agent.actions, 40, seed=9)
    observations = assembled(agent.observation_space, arrays)
    masks = draw_masks(agent.actions, 40, seed=9) if agent.masks_in_info else None
    wanted, _ = agent.predict(observations, deterministic=True, action_masks=masks)
    found = played(tmp_path / "out", arrays if masks is None else [*arrays, masks])
    assert found.dtype == wanted.dtype == agent.action_space.dtype
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    assert agent.action_space.contains(found[0] if found.shape[1:] else agent.action_space.dtype.type(found[0]))
    if masks is not None:
        everything, _ = agent.predict(observations, deterministic=True, action_masks=np.ones_like(masks))
        assert not np.array_equal(found, everything)  # the masks matter


@pytest.mark.parametrize("name", ["nested", "masked in info"])
def test_a_program_of_torch_acts_as_the_agent_does(name: str, tmp_path: Path) -> None:
    agent = agent_for(name)
    made = export_policy(agent, tmp_path / "out", "torch")
    assert made.file.name == "policy.pt2"
    arrays = draw_observations(agent.policy, agent.actions, 40, seed=9)
    masks = draw_masks(agent.actions, 40, seed=9) if agent.masks_in_info else None
    wanted, _ = agent.predict(assembled(agent.observation_space, arrays), deterministic=True, action_masks=masks)
    np.testing.assert_array_equal(played(tmp_path / "out", arrays if masks is None else [*arrays, masks]), wanted)


@pytest.mark.parametrize("format", ["onnx", "torch"])
def test_the_model_card_loads_the_policy_and_tells_no_secret_and_no_path(format: str, tmp_path: Path) -> None:
    agent = GRPO("CartPole-v1", preset=None, n_envs=2, seed=4, env_kwargs={"sutton_barto_reward": True})
    out = tmp_path / "out"
    export_policy(agent, out, format)
    card = (out / "README.md").read_text()
    code = re.search(r"```python\n(.*?)```", card, re.DOTALL)
    assert code is not None
    done = subprocess.run([sys.executable, "-c", code[1]], cwd=out, capture_output=True, text=True, check=True)
    assert int(done.stdout) == agent.predict(np.zeros(4), deterministic=True)[0]
    for said in ("CartPole-v1", "sutton_barto_reward", "`n_envs`", "grouprl", "There is none in this run"):
        assert said in card
    assert all(str(Path(exported.__file__).parent).encode() not in file.read_bytes() for file in out.iterdir())
    about = json.loads((out / "policy.json").read_text())
    assert space_from_json(about["observation_space"]) == agent.observation_space
    assert about["inputs"] == [{"name": "observation", "shape": ["batch", 4], "dtype": "float32"}]


def test_secrets_among_arguments_stay_out_of_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = agent_for("box")
    monkeypatch.setattr(GRPO, "env_kwargs", {"api_key": "abcdefgh12345678", "speed": 3})
    monkeypatch.setattr(GRPO, "env_lost", "")
    export_policy(agent, tmp_path / "out", "torch")
    card = (tmp_path / "out/README.md").read_text()
    assert '"speed": 3' in card
    assert "abcdefgh12345678" not in card


class Branching(nn.Module):
    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.layer = nn.Linear(n_in, n_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out if float(out.abs().sum()) < 1e9 else -out


def own(network: Any) -> GRPO:
    CASES["tried"] = (BOX, spaces.Discrete(2), {"network": network})
    try:
        return agent_for("tried", steps=0)
    finally:
        del CASES["tried"]


def test_a_network_that_branches_on_values_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"your network cannot be exported: .*data-dependent") as caught:
        export_policy(own(Branching), tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_what_differs_from_predict_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = agent_for("box")
    shift = agent.policy.normalisation()
    monkeypatch.setattr(agent.policy, "normalisation", lambda: (shift[0] + 0.01, *shift[1:]))
    with pytest.raises(TrainingError, match=r"differs from predict by \d\.\de-0[1-4], more than 1e-05"):
        export_policy(agent, tmp_path / "out", "torch")
    assert not any(tmp_path.iterdir())


def test_bad_input(tmp_path: Path) -> None:
    agent = own(nn.Linear)
    (tmp_path / "there").mkdir()
    (tmp_path / "there/file").touch()
    with pytest.raises(UsageError, match="there exists already; delete it, or name another folder with --out"):
        export_policy(agent, tmp_path / "there", "torch")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    with pytest.raises(UsageError, match="format='onxx'; known: onnx, torch"):
        export_policy(agent, tmp_path / "out", "onxx")
    with torch.no_grad():
        next(agent.policy.parameters())[0, 0] = float("nan")
    with pytest.raises(TrainingError, match=r"not finite|NaN"):
        export_policy(agent, tmp_path / "out", "torch")


def test_without_onnx_runtime_it_says_so_and_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exported, "find_spec", lambda name: None)
    made = export_policy(own(nn.Linear), tmp_path / "out")
    assert made.checked.startswith("torch ")
    assert re.search(r"not tried in ONNX Runtime, which is not installed; .*pip install .*\[export\]", made.notes[0])
