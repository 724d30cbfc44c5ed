"""Two processes share out environments and gradients, and learn what one does, bit for bit; and fail together."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import env_rank_cases
import pytest
import torch
from env_rank_cases import SAME

from grouprl import GRPO
from grouprl.errors import UsageError
from several import of_two, one_thread


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """A process of several has one thread, and the network that is drawn at first depends on how many draw it."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What two processes gave of all cases, and the folder they did them in."""
    out = tmp_path_factory.mktemp("ranks")
    env_rank_cases.the_run(out / "alone", 1000)
    shutil.copytree(out / "alone", out / "before")
    return out, of_two(Path(env_rank_cases.__file__), out)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize("name", SAME)
def test_two_processes_learn_what_one_does_bit_for_bit(name: str, both: Any) -> None:
    alone = env_rank_cases.run(name)
    assert len(alone["metrics"]) > 1 or "gradients" in name
    for found in both[1]:
        assert json.dumps(found[name]["metrics"]) == json.dumps(alone["metrics"])  # NaN is NaN
        assert same(found[name]["weights"], alone["weights"])


def test_a_run_of_two_processes_is_that_of_one_and_goes_on_with_either_number(both: Any, tmp_path: Path) -> None:
    out, found = both
    straight = env_rank_cases.the_run(tmp_path / "straight", 1500)
    assert same(found[0]["run"], straight)
    assert same(found[1]["run"], straight)
    shutil.copytree(out / "before", tmp_path / "before")
    on = env_rank_cases.the_run(tmp_path / "before", 4000, resume=True)
    assert same(found[0]["on"], on)
    shutil.copytree(out / "run", tmp_path / "chain")
    shutil.copytree(tmp_path / "straight", tmp_path / "one")
    longer = env_rank_cases.the_run(out / "run", 4000, resume=True)
    assert same(longer, env_rank_cases.the_run(tmp_path / "straight", 4000, resume=True))
    # In one chain: by two processes, then by one, and by two again; beside a run of one process.
    for place, steps in (("chain", 2500), ("one", 2500), ("one", 4000)):
        alone = env_rank_cases.the_run(tmp_path / place, steps, resume=True)
    for of_rank in of_two(Path(env_rank_cases.__file__), tmp_path, tmp_path / "chain"):
        assert same(of_rank, alone)
    assert same(found[0]["on"], found[1]["on"])
    names = {path.name for path in (out / "run").iterdir()}
    assert {"config.yaml", "metrics.csv", "summary.json", "model.safetensors"} <= names


def test_what_stops_one_process_stops_all(both: Any) -> None:
    assert [found["stopped at"] for found in both[1]] == [both[1][0]["stopped at"]] * 2
    assert both[1][0]["stopped at"] < 5000


def test_processes_on_several_hosts_exchange_the_same(both: Any) -> None:
    first, second = (found["between hosts"] for found in both[1])
    for found in (first, second):
        assert found["gathered"] == [[0], [1, 1]]
        assert found["any"] == [True]
    assert first["error"] == "rank 1: ValueError: the wheel came off"
    assert second["error"] == "the wheel came off"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("environment", "the wheel came off"),
        ("hanging", "had not ended after 0.5 s, which env_timeout"),
        ("setting", "the ranks have different agents: seed is 0 on rank 0 and 1 on rank 1"),
        ("one environment", "2 processes share out the environments, so each must make its own: pass an id"),
        ("too few", "n_envs=1 leaves rank 1 of 2 without an environment; raise n_envs"),
    ],
)
def test_what_fails_on_one_process_ends_all_with_its_words(name: str, words: str, both: Any) -> None:
    for found in both[1]:
        assert words in found[f"error {name}"]
    if name in ("environment", "hanging"):
        assert "rank 1: " in both[1][0][f"error {name}"]


def test_what_a_launcher_asks_for_beside_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "false")
    words = r"(?s)these cannot.*--use_fsdp .* is not offered for environments; leave it.*--mixed_precision .*=bf16"
    with pytest.raises(UsageError, match=words):
        GRPO("CartPole-v1")
