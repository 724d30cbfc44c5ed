"""Two processes play the same episodes as one, and learn the same from them; what fails in one ends both."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import agent_rank_cases
import pytest
from agent_rank_cases import SAME
from compared import check_learned_alike, furthest

from several import of_two, one_thread


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What two processes gave of all cases, and the folder they did them in."""
    out = tmp_path_factory.mktemp("ranks")
    with one_thread():
        agent_rank_cases.resumed(out / "alone", stop=3, resume=False)
    return out, of_two(Path(agent_rank_cases.__file__), out)


@pytest.mark.parametrize("name", SAME)
def test_two_processes_play_and_learn_as_one_does(name: str, both: Any, tmp_path: Path) -> None:
    first, second = (found[name] for found in both[1])
    alone = agent_rank_cases.run(name, tmp_path)
    for what in ("completions", "messages", "columns"):
        assert first[what] == second[what] == alone[what]
    assert float(alone["gradients"][0].norm()) > 0.1
    assert len(alone["gradients"]) >= 3
    check_learned_alike(alone, first, second)


ERRORS = {
    "answer": "rank 1: step 1: the environment Fails raised ValueError: the board is gone in turn",
    "begin": "rank 1: step 1: the environment CannotBegin raised ValueError: no board when it began start",
    "function": "rank 1: step 1: rollout_func raised ValueError: the server is down",
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_fails_in_an_episode_of_one_process_ends_all_with_its_words(name: str, both: Any) -> None:
    first, second = (found[f"error {name}"] for found in both[1])
    assert first.startswith(f"TrainingError: {ERRORS[name]}")
    assert second.startswith(f"TrainingError: {ERRORS[name].removeprefix('rank 1: ')}")


def test_processes_that_cannot_play_together_say_why(both: Any) -> None:
    for found in both[1]:
        assert "cannot be sent to the other ranks" in found["error state"]
        assert "let states of turns" in found["error state"]
        assert "the ranks have different data or models: acting is" in found["error described"]
        assert found["error nothing"] == "nothing was raised"


def test_a_run_of_an_agent_goes_on_with_another_number_of_processes(both: Any, tmp_path: Path) -> None:
    out, found = both
    straight = agent_rank_cases.resumed(tmp_path / "straight", stop=None, resume=False)
    shutil.copytree(out / "resumed", tmp_path / "on")
    two_one = agent_rank_cases.resumed(tmp_path / "on", stop=None, resume=True)
    assert found[0]["stopped"]["step"] == 3
    assert straight["step"] == two_one["step"] == found[0]["on"]["step"] == 6
    for gone_on in (two_one, found[0]["on"]):
        assert furthest(gone_on["weights"], straight["weights"]) < 1e-5
