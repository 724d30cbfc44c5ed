"""grouprl export, as a person types it, and the server of examples/ that plays what it wrote."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from torch import nn

from command_line import call
from grouprl import GRPO
from grouprl.runs.state import load_state, save_state

EXAMPLE = Path(__file__).parents[1] / "examples/serve_policy.py"
FAST = [
    "--set", "n_envs=4", "--set", "collect=segments", "--set", "n_steps=64", "--set", "epochs=1", "--no-video",
    "--set", "warmup_steps=0", "--set", "eval_episodes=2", "--set", "final_episodes=2", "--preset", "default",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "run"
    assert call("train", "CartPole-v1", "--seed", "1", "--steps", "600", "--out", out, *FAST) == 0
    assert call("export", out) == 0
    return out


def test_a_run_is_exported_into_its_folder_with_its_evaluation(run: Path) -> None:
    folder = run / "export-onnx"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "policy.json", "policy.onnx"]
    card = (folder / "README.md").read_text()
    result = json.loads((run / "summary.json").read_text())["eval"]
    assert f"Mean return {result['mean_return']:.2f} ±" in card
    assert card.startswith("---\nlibrary_name: grouprl\n")
    assert f"{result['mean_return']:.2f} +/- " in card.split("---")[1]


def test_export_says_what_it_did_and_refuses_to_write_over_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("export", run, "--format", "torch") == 0
    said = capsys.readouterr()
    assert "agrees with predict in torch " in said.out
    assert f"wrote {run / 'export-torch/policy.pt2'}; " in said.out
    assert said.err == ""
    assert call("export", run, "--format", "torch") == 2
    assert capsys.readouterr().err == (
        f"error: {run / 'export-torch'} exists already; delete it, or name another folder with --out\n"
    )


def test_a_run_that_replaces_another_does_not_keep_its_export(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "r"
    assert call("train", "CartPole-v1", "--steps", "300", "--out", out, *FAST) == 0
    (out / "export-onnx").mkdir()
    assert call("train", "CartPole-v1", "--steps", "300", "--out", out, "--overwrite", *FAST) == 0
    assert not (out / "export-onnx").exists()


def test_what_cannot_be_exported(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("export", tmp_path / "nothing") == 2
    assert "nothing" in capsys.readouterr().err
    tensors, meta = load_state(run / "model.safetensors")
    older = {key: value for key, value in meta.items() if key != "observation_space"}
    save_state(tmp_path / "older.safetensors", tensors, older)
    assert call("export", tmp_path / "older.safetensors") == 2
    assert "is not a saved environment policy (it lacks observation_space)" in capsys.readouterr().err
    save_state(tmp_path / "newer.safetensors", tensors, meta | {"config": meta["config"] | {"of_tomorrow": 1}})
    assert call("export", tmp_path / "newer.safetensors") == 2
    assert "of_tomorrow" in capsys.readouterr().err
    data = bytearray((run / "model.safetensors").read_bytes())
    data[-9] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(data)
    assert call("export", tmp_path / "damaged.safetensors") == 2
    error = capsys.readouterr().err
    assert "damaged" in error
    assert error.count("\n") == 1
    assert call("export", run, "--format", "tflite") == 2
    assert capsys.readouterr().err == "error: format='tflite'; known: onnx, torch\n"
    assert not list(tmp_path.glob("*export*"))


def test_a_network_of_the_users_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "small_net.py").write_text("from torch import nn\n\n\ndef build(i, o):\n    return nn.Linear(i, o)\n")
    monkeypatch.chdir(tmp_path)
    GRPO("CartPole-v1", preset=None, n_envs=2, network=nn.Linear).save("own")
    assert call("export", "own") == 2
    assert "custom network" in capsys.readouterr().err
    assert call("export", "own", "--network", "small_net:build", "--format", "torch") == 0
    assert (tmp_path / "own-export-torch/policy.pt2").is_file()


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    """Of a server in a process of its own, in which torch and grouprl cannot be imported."""
    blocked = "import sys, runpy; sys.modules.update(torch=None, grouprl=None); sys.argv = sys.argv[1:]; "
    code = blocked + "runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, str(EXAMPLE), str(run / "export-onnx"), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()


def post(address: str, body: Any) -> Any:
    request = urllib.request.Request(address, json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_the_server_plays_as_the_agent_does(run: Path, address: str) -> None:
    agent, env = GRPO.load(run), gym.make("CartPole-v1")
    observation, _ = env.reset(seed=3)
    seen = []
    for _ in range(8):
        action = post(address, {"observation": observation.tolist()})["action"]
        assert action == agent.predict(observation, deterministic=True)[0]
        observation, *_ = env.step(action)
        seen.append(observation)
    wanted = agent.predict(np.stack(seen), deterministic=True)[0].tolist()
    assert post(address, {"observation": np.stack(seen).tolist()}) == {"action": wanted}
    with urllib.request.urlopen(address, timeout=30) as answer:
        assert json.load(answer)["env_id"] == "CartPole-v1"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"obs": [0, 0, 0, 0]}, "give a JSON object with observation"),
        ([0, 0, 0, 0], "give a JSON object with observation"),
        ({"observation": [0, 0, 0]}, r"observation must be numbers of shape [4], or a list of such"),
        ({"observation": ["a", 0, 0, 0]}, r"observation must be numbers of shape [4], or a list of such"),
        ({"observation": [float("nan"), 0, 0, 0]}, "observation must be finite, also as float32"),
        ({"observation": [1e300, 0, 0, 0]}, "observation must be finite, also as float32"),
    ],
)
def test_the_server_refuses_what_is_no_observation(address: str, body: Any, said: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        post(address, body)
    assert caught.value.code == 400
    assert json.load(caught.value)["error"] == said


@pytest.mark.parametrize(
    ("length", "body", "status", "said"),
    [
        ("many", b"{}", 400, "invalid literal"),
        ("-1", b"{}", 413, "a request has at most 16777216 bytes"),
        ("20000000", b"{}", 413, "a request has at most 16777216 bytes"),
        ("50000", b"[" * 50_000, 400, "recursion"),
    ],
)
def test_the_server_answers_a_request_that_is_none(
    address: str, length: str, body: bytes, status: int, said: str
) -> None:
    request = urllib.request.Request(address, body, {"Content-Length": length})
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=10)
    assert caught.value.code == status
    assert said in json.load(caught.value)["error"]
