"""Two processes train as one does: the same completions, gradients, weights and metrics; and fail together."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import rank_cases
import torch
from rank_cases import SAME

from several import of_two


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What two processes gave of all cases, and the folder they did them in."""
    out = tmp_path_factory.mktemp("ranks")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rank_cases.resumed(out / "alone", stop=4, resume=False)
    torch.set_num_threads(threads)
    return out, of_two(Path(rank_cases.__file__), out)


@pytest.mark.parametrize("name", SAME)
def test_two_processes_train_as_one_does(name: str, both: Any, tmp_path: Path) -> None:
    first, second = (found[name] for found in both[1])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = rank_cases.run(name, tmp_path, 1)
    torch.set_num_threads(threads)
    assert first["texts"] == second["texts"] == alone["texts"]
    assert len(alone["gradients"]) == len(first["gradients"]) == (2 if name == "stop of one" else alone_steps(name))
    own = alone["gradients"][0]
    assert float((first["gradients"][0] - own).norm()) <= 1e-6 * float(own.norm())
    for weight, value in alone["weights"].items():
        assert torch.equal(first["weights"][weight], second["weights"][weight])
        assert float((first["weights"][weight] - value).abs().max()) < 1e-5
    assert without_wall(first["log"]) == without_wall(second["log"])
    for ours, theirs in zip(alone["log"], first["log"], strict=True):
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert math.isclose(value, theirs[key], rel_tol=1e-4, abs_tol=2e-5), key


def alone_steps(name: str) -> int:
    return int(SAME[name].get("max_steps", 4))


def without_wall(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in entry.items() if "runtime" not in key} for entry in log]


def test_one_process_alone_writes(both: Any) -> None:
    out, _ = both
    lines = (out / "resumed" / "checkpoint-4" / "trainer_state.json").read_text()
    assert '"global_step": 4' in lines
    assert not list((out / "runs" / "usual").glob("checkpoint-*"))


ERRORS = {
    "reward": ("TrainingError", "TrainingError", "the judge is out"),
    "gradient": ("TrainingError", "TrainingError", "not finite"),
    "callback": ("TrainingError: step 1: rank 1: KeyError: ", "KeyError", "of a callback"),
    "setting": (
        "UsageError",
        "UsageError",
        "learning_rate is 0.001 on rank 0 and 0.002 on rank 1; start",
    ),
    "seed": ("UsageError", "UsageError", "seed is 0 on rank 0 and 1 on rank 1"),
    "data": ("UsageError", "UsageError", "30 on rank 0 and 31 on rank 1"),
    "model": ("UsageError", "UsageError", "the ranks have different models"),
    "groups": ("UsageError", "UsageError", "prompts_per_step=3 cannot be shared out to 2 processes; set it to 2 or 4"),
    "folder": ("UsageError", "UsageError: rank 0: ", "file"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_fails_on_one_process_ends_all_with_its_words(name: str, both: Any) -> None:
    first, second, words = ERRORS[name]
    said = [found[f"error {name}"] for found in both[1]]
    assert said[0].startswith(first)
    assert said[1].startswith(second)
    assert all(words in text for text in said), said
    if name in ("reward", "gradient"):
        assert "rank 1: " in said[0]


def test_a_run_goes_on_with_another_number_of_processes(both: Any, tmp_path: Path) -> None:
    """Two processes, then one; one, then two; two, one and two; within a generation that was sampled by the others."""
    out, found = both
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    straight = rank_cases.resumed(tmp_path / "straight", stop=None, resume=False)
    shutil.copytree(out / "resumed", tmp_path / "on")
    shutil.copytree(out / "resumed", tmp_path / "chain")
    two_one = rank_cases.resumed(tmp_path / "on", stop=None, resume=True)
    assert rank_cases.resumed(tmp_path / "chain", stop=7, resume=True)["step"] == 7
    torch.set_num_threads(threads)
    chain = of_two(Path(rank_cases.__file__), tmp_path, tmp_path / "chain")  # two, one, and two again
    assert found[0]["stopped"]["step"] == 4
    assert straight["step"] == two_one["step"] == found[0]["on"]["step"] == 9
    for name, value in straight["weights"].items():
        assert float((two_one["weights"][name] - value).abs().max()) < 1e-5
        assert float((found[0]["on"]["weights"][name] - value).abs().max()) < 1e-5
        assert torch.equal(found[0]["on"]["weights"][name], found[1]["on"]["weights"][name])
        assert float((chain[0]["weights"][name] - value).abs().max()) < 1e-5
        assert torch.equal(chain[0]["weights"][name], chain[1]["weights"][name])
