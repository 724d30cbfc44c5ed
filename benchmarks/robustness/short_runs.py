"""Small runs of both arenas that damage and kills are tried on: how they are made, resumed and compared."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMES = ("time_", "seconds", "per_second", "step_time", "_runtime", "memory", "cpu_wait")


def is_time(name: str) -> bool:
    """Whether a number of this name is another one in each run: a time, or what the process had of the machine."""
    return any(part in name for part in TIMES)


@dataclass(frozen=True)
class Arena:
    """An arena, with a run that takes seconds.

    Attributes:
        train: makes the run in a folder. resume: goes on with it. evaluate: loads what it left, and returns numbers.
        weights: the file that a finished run leaves. checkpoints: names of its checkpoints, as a pattern.
        command: the command line that makes the same run, but for its folder.
    """

    name: str
    train: Callable[[Path], Any]
    resume: Callable[[Path], Any]
    evaluate: Callable[[Path], Any]
    weights: str
    checkpoints: str
    command: tuple[str, ...]


ENV_SETTINGS = {
    "n_envs": 4,
    "collect": "segments",
    "n_steps": 64,
    "minibatch_size": 64,
    "epochs": 2,
    "warmup_steps": 64,
}
ENV_RUN = {"eval_every": 1000, "eval_episodes": 2, "final_episodes": 2, "checkpoint_every": 500, "keep_checkpoints": 9}


def _train_envs(folder: Path) -> Any:
    from grouprl.envs import training

    run = {**ENV_RUN, "video": False, "track": ("none",)}
    return training.train(
        "CartPole-v1", folder, preset=None, steps=2500, seed=3, settings=ENV_SETTINGS, run=run, progress_bar=False
    )


def _resume_envs(folder: Path) -> Any:
    from grouprl.envs import training

    return training.resume(folder, progress_bar=False)


def _evaluate_envs(folder: Path) -> Any:
    from grouprl.envs.evaluation import evaluate
    from grouprl.envs.grpo import GRPO

    return evaluate(GRPO.load(folder), episodes=2, seed=5).summary()


RECIPE = """\
model: tiny
task: reverse
task_options: {length: 3}
form: text
n_train: 24
n_eval: 8
eval_every: 2
warm_start: {steps: 10}
config:
  prompts_per_step: 2
  num_generations: 4
  max_completion_length: 5
  max_steps: 8
  learning_rate: 0.001
  save_steps: 3
  steps_per_generation: 2
  seed: 1
"""


def _train_lm(folder: Path) -> Any:
    import yaml

    from grouprl.lm.run import training
    from grouprl.lm.run.recipe import Recipe

    return training.train(Recipe("small", **yaml.safe_load(RECIPE)), folder, track=("none",), progress_bar=False)


def _resume_lm(folder: Path) -> Any:
    from grouprl.lm.run import training

    return training.resume(folder, progress_bar=False)


def _evaluate_lm(folder: Path) -> Any:
    from grouprl.lm.run import training

    held_out = training.evaluate(folder)
    return {"accuracy": held_out.accuracy, "reward": held_out.reward, "n": held_out.n}


ENVS = Arena(
    "environments", _train_envs, _resume_envs, _evaluate_envs, "model.safetensors", "checkpoints/step_*",
    ("train", "CartPole-v1", "--preset=default", "--seed=3", "--steps=2500", "--no-video", "--track=none", "--quiet",
     *(f"--set={name}={value}" for name, value in (ENV_SETTINGS | ENV_RUN).items())),
)  # fmt: skip
LANGUAGE = Arena(
    "language models", _train_lm, _resume_lm, _evaluate_lm, "model/model.safetensors", "checkpoint-*",
    ("train-lm", "RECIPE", "--track=none", "--quiet"),
)  # fmt: skip
ARENAS = {"envs": ENVS, "lm": LANGUAGE}


def cut(folder: Path, arena: Arena) -> None:
    """Make of a finished run one that was killed on its way: without its results and its last two checkpoints."""
    for path in (folder / "summary.json", folder / arena.weights.split("/")[0], folder / "curve.png"):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in sorted(folder.glob(arena.checkpoints), key=_step)[-2:]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _step(path: Path) -> int:
    return int("".join(filter(str.isdigit, path.stem)))


def results(folder: Path, arena: Arena) -> dict[str, Any]:
    """What two runs that are the same agree in: weights, metrics, transcripts and the summary, times aside."""
    from safetensors.numpy import load_file
    from xxhash import xxh3_64

    weights = load_file(folder / arena.weights)
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [{k: v for k, v in row.items() if not is_time(k)} for row in csv.DictReader(file)]
    transcripts = folder / "transcripts.jsonl"
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "weights": {name: xxh3_64(value.tobytes()).hexdigest() for name, value in sorted(weights.items())},
        "metrics": rows,
        "transcripts": transcripts.read_text() if transcripts.exists() else "",
        "summary": {k: v for k, v in summary.items() if not is_time(k)},
    }


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names of the parts that differ."""
    return [name for name in one if one[name] != other[name]]


def lines(folder: Path) -> list[str]:
    """All files of a folder, as paths within it."""
    return sorted(os.path.relpath(path, folder) for path in folder.rglob("*") if path.is_file())
