"""A run of grouprl's own, in a process of its own: reads a cell, trains, evaluates, and says what came of it."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grouprl.bench.heard import warnings_heard
from grouprl.errors import GrouprlError, first_line
from grouprl.importing import load_function

if TYPE_CHECKING:
    from grouprl.envs.evaluation import Evaluator
    from grouprl.envs.grpo import GRPO
    from grouprl.lm.train.evaluation import HeldOut

Tell = Callable[[dict[str, Any]], None]


def tell(message: dict[str, Any]) -> None:
    """Print a line that the pool understands."""
    print(json.dumps(message), file=sys.__stdout__, flush=True)


def versions(*packages: str) -> dict[str, str]:
    """Installed versions, and Python's."""
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def returns_of(returns: list[float]) -> dict[str, Any]:
    """What a row says of episodes that were played: each raw return, and their mean."""
    return {"mean": sum(returns) / len(returns), "episodes": len(returns), "returns": returns}


def run_environment(cell: dict[str, Any], point: Tell) -> dict[str, Any]:
    """Train on an environment; evaluate along the way, and at the end greedily and sampled, with raw rewards.

    Args:
        cell: of :class:`~grouprl.bench.cells.Cell`, as plain values. point: is told of each evaluation.
    """
    from grouprl.bench.episodes import AT_ONCE
    from grouprl.doctor import Watch
    from grouprl.envs.evaluation import Evaluator
    from grouprl.envs.grpo import GRPO
    from grouprl.envs.vector import reward_threshold

    functions = {name: load_function(function, cell["folder"] or None) for name, function in cell["functions"].items()}
    agent = GRPO(
        cell["env_id"], preset=cell["preset"], env_kwargs=cell["env_kwargs"], seed=cell["seed"],
        **functions, **cell["settings"],
    )  # fmt: skip
    watch = Watch(agent.config.model_dump(), language_model=False, goal=reward_threshold(cell["env_id"]))
    evaluator = Evaluator(cell["env_id"], cell["env_kwargs"], n_envs=min(AT_ONCE, cell["point_episodes"]))
    every = max(1, cell["steps"] // cell["points"])
    due = every

    def greedy_now() -> float:
        return evaluator.run(agent, cell["point_episodes"], seed=cell["curve_starts"]).summary()["mean_return"]

    def after_update(agent: GRPO, metrics: dict[str, float]) -> None:
        nonlocal due
        evaluated: dict[str, float] = {}
        if agent.num_timesteps >= due:
            evaluated = {"eval_return": evaluate_now(agent, metrics)}
        watch.note({**metrics, **evaluated}, agent.num_timesteps / cell["steps"])

    def evaluate_now(agent: GRPO, metrics: dict[str, float]) -> float:
        nonlocal due
        due = agent.num_timesteps - agent.num_timesteps % every + every
        training = {} if metrics["return_mean"] != metrics["return_mean"] else {"training": metrics["return_mean"]}
        greedy = greedy_now()
        point({"step": agent.num_timesteps, "seconds": agent.train_seconds, "greedy": greedy, **training})
        return greedy

    point({"step": 0, "seconds": 0.0, "greedy": greedy_now()})
    agent.learn(cell["steps"], callback=after_update)
    evaluator.close()
    last = Evaluator(cell["env_id"], cell["env_kwargs"], n_envs=min(AT_ONCE, cell["episodes"]))
    greedy, sampled = (_played(last, agent, cell, deterministic) for deterministic in (True, False))
    last.close()
    return {
        "steps_done": agent.num_timesteps, "train_seconds": agent.train_seconds, "greedy": greedy, "sampled": sampled,
        "parameters": sum(p.numel() for p in agent.policy.parameters()),
        "versions": versions("grouprl", "torch", "numpy", "gymnasium"),
    }  # fmt: skip


def _played(evaluator: Evaluator, agent: GRPO, cell: dict[str, Any], deterministic: bool) -> dict[str, Any]:
    played = evaluator.run(agent, cell["episodes"], deterministic, seed=cell["final_starts"])
    return {**returns_of(played.returns), "cut": played.cut}


def run_language_model(cell: dict[str, Any], point: Tell) -> dict[str, Any]:
    """Train by a recipe; its held-out rows are answered along the way, and at the end greedily and sampled.

    What counts as a return is whether an answer is right: the accuracy of either arena's tables.
    """
    from grouprl.lm.run import training
    from grouprl.lm.run.trained import open_trained
    from grouprl.lm.train.evaluation import evaluate

    def evaluated(step: int, seconds: float, found: HeldOut) -> None:
        point({"step": step, "seconds": seconds, "greedy": found.accuracy, "reward": found.reward})

    for function in cell["functions"].values():
        load_function(function, cell["folder"] or None)  # found from now on, also by the name that the recipe has
    with tempfile.TemporaryDirectory() as folder:
        result = training.train(
            cell["recipe"], Path(folder) / "run", settings={**cell["settings"], **cell["functions"]},
            seed=cell["seed"], steps=cell["steps"], track=("none",), progress_bar=False, evaluated=evaluated,
        )  # fmt: skip
        assert result.summary is not None
        trained = open_trained(result.folder.path, {})
        prompts = trained.setup.read(trained.data.held_out, "the held-out rows")
        greedy, sampled = (
            [float(one) for drawn in evaluate(trained.setup, prompts, greedy=greedily) for one in drawn.solved()]
            for greedily in (True, False)
        )
    return {
        "steps_done": result.steps, "train_seconds": result.summary["train_seconds"],
        "greedy": returns_of(greedy), "sampled": returns_of(sampled),
        "versions": versions("grouprl", "torch", "numpy", "transformers"),
    }  # fmt: skip


def run(cell: dict[str, Any], point: Tell) -> dict[str, Any]:
    """Do a cell of either arena; returns what a row says of it, with what was warned of."""
    do = run_environment if cell["env_id"] is not None else run_language_model
    with warnings_heard() as warned:
        return {**do(cell, point), "warnings": warned}


def main() -> None:
    """Do the cell on standard input."""
    cell = json.loads(sys.stdin.readline())
    sys.stdout = sys.stderr  # what a user's own code prints is no message to the pool
    try:
        result = run(cell, lambda found: tell({"point": found}))
    except Exception as error:
        traceback.print_exc()
        said = str(error) if isinstance(error, GrouprlError) else f"{type(error).__name__}: {first_line(error)}"
        tell({"error": said})
        sys.stderr.flush()
        os._exit(1)
    tell({"result": result})


if __name__ == "__main__":
    main()
