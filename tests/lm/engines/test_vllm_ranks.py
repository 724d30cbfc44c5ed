"""Two processes sample by vLLM as one does, with whole and with sharded weights, and fail together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import small_agents
import torch
import vllm_rank_cases
from vllm_rank_cases import AGENTS, REAL, SAME, STEPS, play
from vllm_stand_in import OwnEngine, StandIn

from several import of_two


@pytest.fixture(scope="module")
def server() -> Iterator[StandIn]:
    with closing(StandIn()) as made:
        yield made


@pytest.fixture(scope="module")
def of_agents() -> Iterator[StandIn]:
    with closing(StandIn(small_agents.model())) as made:
        with torch.no_grad():
            made.model.get_input_embeddings().weight.mul_(0.5)
        yield made


@pytest.fixture(scope="module")
def both(
    server: StandIn, of_agents: StandIn, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """What two processes gave of all cases, and what the server was asked meanwhile."""
    found = of_two(Path(vllm_rank_cases.__file__), tmp_path_factory.mktemp("ranks"), server.url, of_agents.url)
    return found, {"loads": server.loads, "asked": len(server.asked)}


def alone(name: str, folder: Path, url: str | None, do: Any = vllm_rank_cases.run) -> dict[str, Any]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return do(name, folder, url)  # type: ignore[no-any-return]
    finally:
        torch.set_num_threads(threads)


def check_same(one: dict[str, Any], first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first["texts"] == second["texts"] == one["texts"]
    for weight, value in one["weights"].items():
        assert torch.equal(first["weights"][weight], second["weights"][weight])
        assert float((first["weights"][weight] - value).detach().abs().max()) < 1e-5
    for ours, theirs in zip(one["log"], first["log"], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert math.isclose(value, theirs[key], rel_tol=1e-4, abs_tol=2e-5), key
    assert all(entry["sampling/sampling_logp_difference/max"] < 1e-4 for entry in first["log"] if "loss" in entry)


@pytest.mark.parametrize("name", SAME)
def test_two_processes_ask_one_server_as_one_does(name: str, both: Any, server: StandIn, tmp_path: Path) -> None:
    first, second = (found[f"server, {name}"] for found in both[0])
    check_same(alone(name, tmp_path, server.url), first, second)


@pytest.mark.parametrize("name", SAME)
def test_two_processes_with_a_vllm_each_sample_as_one_does(
    name: str, both: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grouprl.lm.engines.sampler.ColocatedEngine", OwnEngine)
    first, second = (found[f"own, {name}"] for found in both[0])
    check_same(alone(name, tmp_path, None), first, second)


@pytest.mark.parametrize("name", AGENTS)
def test_two_processes_play_episodes_with_one_server_as_one_does(
    name: str, both: Any, of_agents: StandIn, tmp_path: Path
) -> None:
    first, second = (found[f"server, {name}"] for found in both[0])
    check_same(alone(name, tmp_path, of_agents.url, play), first, second)


@pytest.mark.parametrize("name", AGENTS)
def test_two_processes_play_episodes_with_a_vllm_each_as_one_does(
    name: str, both: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grouprl.lm.engines.sampler.ColocatedEngine", OwnEngine)
    first, second = (found[f"own, {name}"] for found in both[0])
    check_same(alone(name, tmp_path, None, play), first, second)
    if name == "three groups":
        assert {len(spans) for spans in first["texts"][1]} != {1}


def test_the_server_gets_the_weights_once_and_each_row_from_one_process(both: Any) -> None:
    rows = sum(4 * SAME[name].get("prompts_per_step", 2) * STEPS for name in SAME)
    evaluations = 2  # of four completions of the one prompt, after two steps and at the end
    trials, failed = 4 * 2, 4  # of each process when a trainer is made
    assert both[1]["loads"] == len(SAME) * (1 + STEPS) + evaluations + failed + 1
    assert (
        both[1]["asked"] == rows + 4 * evaluations + trials * (len(SAME) + failed) + 4
    )  # of the process that reaches it


def test_what_fails_on_one_process_ends_all_with_its_words(both: Any, server: StandIn) -> None:
    first, second = both[0]
    assert "rank 1: " in first["error unanswered"]
    for name in ("unwritable", "unwritable, sharded"):
        assert "rank 0: " in second[f"error {name}"]
        assert all(
            f"cannot write the weights for the vLLM server at {server.url}" in f[f"error {name}"] for f in both[0]
        )
    assert all("does not answer: " in found["error unanswered"] for found in both[0])


def test_vllm_is_not_asked_where_the_others_do_not_hand_over_the_weights(both: Any) -> None:
    for found in both[0]:
        assert "UsageError: use_vllm=True: the 2 processes hand over the weights together" in found["error in between"]


def test_a_real_vllm_in_each_of_two_processes_samples_as_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    found = of_two(Path(vllm_rank_cases.__file__), tmp_path, "", "")
    for name in REAL:
        first, second = (each[f"own, {name}"] for each in found)
        check_same(alone(name, tmp_path / name, None), first, second)
