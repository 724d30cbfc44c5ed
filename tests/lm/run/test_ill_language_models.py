"""Real runs of a tiny language model, each made ill in one way: the doctor names it, and the run says it meanwhile."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from typing import Any

import pytest

from busy_core import shared_core
from grouprl.doctor import examine
from grouprl.lm.run import training
from grouprl.lm.run.recipe import Recipe
from own_process import in_a_process_of_its_own


def nothing(completions: list[Any], **columns: Any) -> list[float]:
    """A reward that no completion gets."""
    return [0.0] * len(completions)


def one(completions: list[Any], **columns: Any) -> list[float]:
    """A reward that every completion gets."""
    return [1.0] * len(completions)


def longer(completions: list[Any], **columns: Any) -> list[float]:
    """The longer the better."""
    return [float(len(completion)) for completion in completions]


def half(completions: list[Any], **columns: Any) -> list[float]:
    """Half a point for each `a` at the beginning: a task that is never solved, and that one answer is best for."""
    return [0.5 * completion.startswith("aaa") + 0.1 * completion.count("a") / 5 for completion in completions]


CALLS: list[int] = []


def late(completions: list[Any], **columns: Any) -> list[float]:
    """Nothing for twelve steps, and then something that the model is torn away by."""
    CALLS.append(len(completions))
    return half(completions) if len(CALLS) > 13 else nothing(completions)


KEPT: list[Any] = []


def keeping(completions: list[Any], **columns: Any) -> list[float]:
    """Keeps 12 MB a step, of new memory: NumPy would take what earlier tests have freed."""
    KEPT.append(mmap.mmap(-1, 12 << 20))
    KEPT[-1].write(b"1" * (12 << 20))
    return [float(completion.count("a")) for completion in completions]


def names(
    folder: Path, reward: str | None = None, warm: int = 10, n_train: int = 64, every: int = 0, **config: Any
) -> set[str]:
    settings = {
        "prompts_per_step": 2, "num_generations": 4, "max_completion_length": 5, "max_steps": 12, "seed": 1,
        "learning_rate": 1e-3, "save_strategy": "no",
    } | config  # fmt: skip
    recipe = Recipe(
        "ill", model="tiny", task="reverse", task_options={"length": 3}, form="text", n_train=n_train, n_eval=8,
        eval_every=every, warm_start={"steps": warm}, reward=reward, config=settings,
    )  # fmt: skip
    training.train(recipe, folder, track=("none",), progress_bar=False)
    return {one.name for one in examine(folder) if one.ill}


HERE = "test_ill_language_models"
CASES: dict[str, dict[str, Any]] = {
    "no-signal": {"reward": f"{HERE}:nothing"},
    "all-truncated": {"max_completion_length": 2},
    "duplicates": {"reward": f"{HERE}:nothing", "temperature": 0.001, "warm": 40},
    "learning-rate-below-precision": {"master_dtype": "bfloat16", "learning_rate": 1e-6},
    "reward-flat": {"learning_rate": 1e-12, "max_steps": 40},
    "entropy-gone": {"reward": f"{HERE}:half", "beta": 1e-3, "learning_rate": 0.1, "max_steps": 24},
    "kl-spike": {"reward": f"{HERE}:late", "beta": 1e-3, "learning_rate": 0.1, "max_steps": 24},
    "all-clipped": {
        "reward": f"{HERE}:longer",
        "learning_rate": 3e-3,
        "num_iterations": 8,
        "epsilon": 1e-6,
        "max_steps": 32,
        "max_completion_length": 20,
        "warm": 60,
        "importance_sampling_level": "sequence",
    },
    "learning-rate-spent": {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": 4}, "max_steps": 20},
    "memory-grows": {"reward": f"{HERE}:keeping", "max_steps": 40},
    "evaluation-below-training": {"n_train": 2, "warm": 60, "every": 4, "max_steps": 40, "num_generations": 16},
    "reward-with-length": {
        "reward": f"{HERE}:longer",
        "max_steps": 40,
        "max_completion_length": 40,
        "warm": 60,
        "learning_rate": 3e-4,
    },
}


@pytest.mark.parametrize("illness", CASES)
def test_a_run_made_ill_is_found_to_be_ill_in_that_way(
    illness: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    CALLS.clear()
    if illness == "memory-grows":  # by a share of what the process holds
        found = in_a_process_of_its_own(tmp_path, names, tmp_path / "r", **CASES[illness])
    else:
        found = names(tmp_path / "r", **CASES[illness])
    assert illness in found
    if illness in ("no-signal", "all-truncated", "duplicates", "learning-rate-below-precision"):
        said = [record.message for record in caplog.records if record.message.startswith(f"doctor, {illness}:")]
        assert len(said) == 1


def test_a_reward_that_is_always_1_is_no_success(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert "no-signal" in names(tmp_path / "r", f"{HERE}:one")
    (said,) = [record.message for record in caplog.records if record.message.startswith("doctor, no-signal:")]
    assert "(mean reward 1), and no weight has moved since the run began" in said


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts how long a thread waits")
def test_a_run_beside_others_on_its_core_is_told_that_the_machine_is_busy(tmp_path: Path) -> None:
    with shared_core():
        assert "machine-busy" not in names(tmp_path / "r")  # a remark: nothing is wrong with what it learned
    assert "machine-busy" in {one.name for one in examine(tmp_path / "r")}
