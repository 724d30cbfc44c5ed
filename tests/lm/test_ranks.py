"""Two processes train as one does: the same completions, gradients, weights and metrics; and fail together."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import rank_cases
from compared import check_learned_alike, furthest
from rank_cases import SAME
from small_runs import warm
from transformers import AutoModelForCausalLM

from several import of_two, one_thread


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """What two processes gave of all cases, and the folder they did them in."""
    out = tmp_path_factory.mktemp("ranks")
    with one_thread():
        rank_cases.resumed(out / "alone", stop=4, resume=False)
    return out, of_two(Path(rank_cases.__file__), out)


@pytest.mark.parametrize("name", SAME)
def test_two_processes_train_as_one_does(name: str, both: Any, tmp_path: Path) -> None:
    first, second = (found[name] for found in both[1])
    alone = rank_cases.run(name, tmp_path, 1)
    assert first["texts"] == second["texts"] == alone["texts"]
    steps = 2 if name == "stop of one" else int(SAME[name].get("max_steps", 4))
    assert len(alone["gradients"]) == steps
    check_learned_alike(alone, first, second)


def test_one_process_alone_writes(both: Any) -> None:
    out, _ = both
    lines = (out / "resumed" / "checkpoint-4" / "trainer_state.json").read_text()
    assert '"global_step": 4' in lines
    assert not list((out / "runs" / "usual").glob("checkpoint-*"))


def test_the_first_process_alone_may_save_the_model(both: Any) -> None:
    saved = AutoModelForCausalLM.from_pretrained(both[0] / "saved" / "model")
    assert furthest(dict(saved.named_parameters()), dict(warm()[0].named_parameters())) == 0


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
    straight = rank_cases.resumed(tmp_path / "straight", stop=None, resume=False)
    shutil.copytree(out / "resumed", tmp_path / "on")
    shutil.copytree(out / "resumed", tmp_path / "chain")
    two_one = rank_cases.resumed(tmp_path / "on", stop=None, resume=True)
    assert rank_cases.resumed(tmp_path / "chain", stop=7, resume=True)["step"] == 7
    chain = of_two(Path(rank_cases.__file__), tmp_path, tmp_path / "chain")  # two, one, and two again
    assert found[0]["stopped"]["step"] == 4
    assert straight["step"] == two_one["step"] == found[0]["on"]["step"] == 9
    for gone_on in (two_one, found[0]["on"], chain[0]):
        assert furthest(gone_on["weights"], straight["weights"]) < 1e-5
    for of_rank, of_other in ((found[0]["on"], found[1]["on"]), chain):
        assert furthest(of_rank["weights"], of_other["weights"]) == 0
