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
from grouprl.errors import GrouprlError, error_text
from grouprl.importing import load_function, look_in

if TYPE_CHECKING:
    from grouprl.envs.evaluation import Evaluation, Evaluator
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
    from grouprl.bench.clock import TrainingClock
    from grouprl.bench.episodes import AT_ONCE
    from grouprl.bench.noise import noisy_maker
    from grouprl.doctor import Watch
    from grouprl.envs.evaluation import Evaluator
    from grouprl.envs.grpo import GRPO
    from grouprl.envs.vector import reward_threshold

    functions: dict[str, Any] = {name: load_function(function) for name, function in cell["functions"].items()}
    environment: dict[str, Any] = {"env": cell["env_id"], "env_kwargs": cell["env_kwargs"]}
    if sigma := cell.get("reward_noise", 0.0):
        environment = {"env": noisy_maker(cell["env_id"], cell["env_kwargs"], sigma, cell["seed"])}
    agent = GRPO(**environment, preset=cell["preset"], seed=cell["seed"], **functions, **cell["settings"])
    how = agent.config.how_to_evaluate
    watch = Watch(agent.config.model_dump(), language_model=False, goal=reward_threshold(cell["env_id"]))

    def evaluator_of(episodes: int) -> Evaluator:
        n_envs, timeout = min(AT_ONCE, episodes), agent.config.env_timeout
        return Evaluator(cell["env_id"], cell["env_kwargs"], n_envs, how, timeout=timeout)

    evaluator = evaluator_of(cell["point_episodes"])
    every = max(1, cell["steps"] // cell["points"])
    due = every
    moved: list[float] = []

    def greedy_now() -> float:
        with clock.paused():
            played = _played(evaluator, agent, cell["point_episodes"], cell["curve_starts"])
            return played.summary()["mean_return"]

    def after_update(agent: GRPO, metrics: dict[str, float]) -> None:
        nonlocal due
        if "approx_kl" in metrics:  # it is not in those of a batch that was skipped
            moved.append(metrics["approx_kl"])
        evaluated: dict[str, float] = {}
        if agent.num_timesteps >= due:
            evaluated = {"eval_return": evaluate_now(agent, metrics)}
        with clock.paused():
            watch.note({**metrics, **evaluated}, agent.num_timesteps / cell["steps"])

    def evaluate_now(agent: GRPO, metrics: dict[str, float]) -> float:
        nonlocal due
        due = agent.num_timesteps - agent.num_timesteps % every + every
        training = {} if metrics["return_mean"] != metrics["return_mean"] else {"training": metrics["return_mean"]}
        spent = {"seconds": agent.train_seconds, "cpu_seconds": clock.cpu_seconds}
        greedy = greedy_now()
        point({"step": agent.num_timesteps, **spent, "greedy": greedy, **training})
        return greedy

    clock = TrainingClock()
    point({"step": 0, "seconds": 0.0, "cpu_seconds": 0.0, "greedy": greedy_now()})
    clock = TrainingClock()
    agent.learn(cell["steps"], callback=after_update)
    spent = {"train_seconds": agent.train_seconds, "train_cpu_seconds": clock.cpu_seconds}
    evaluator.close()
    last = evaluator_of(cell["episodes"])
    ended = [
        _played(last, agent, cell["episodes"], cell["final_starts"], deterministic) for deterministic in (True, False)
    ]
    last.close()
    greedy, sampled = ({**returns_of(played.returns), "cut": played.cut} for played in ended)
    return {
        "steps_done": agent.num_timesteps, **spent, "greedy": greedy, "sampled": sampled,
        "parameters": sum(p.numel() for p in agent.policy.parameters()), "approx_kl": moved,
        "versions": versions("grouprl", "torch", "numpy", "gymnasium"),
    }  # fmt: skip


def _played(evaluator: Evaluator, agent: GRPO, episodes: int, starts: int, deterministic: bool = True) -> Evaluation:
    """Play episodes, of which none goes on for ever; a warning says where some were cut.

    A benchmark plays many of them, so that episodes count as endless soon where training has seen none end.
    """
    from grouprl.bench.episodes import say_cut
    from grouprl.envs.evaluation import LEAST_PATIENCE, patience

    if evaluator.horizon is None:
        evaluator.max_steps = patience(agent, None) or LEAST_PATIENCE
    played = evaluator.run(agent, episodes, deterministic, seed=starts)
    if played.cut:
        say_cut(evaluator.max_steps)
    return played


def run_language_model(cell: dict[str, Any], point: Tell) -> dict[str, Any]:
    """Train by a recipe; its held-out rows are answered along the way, and at the end greedily and sampled.

    What counts as a return is whether an answer is right: the accuracy of either arena's tables.
    """
    from grouprl.lm.run import training
    from grouprl.lm.run.trained import open_trained
    from grouprl.lm.train.evaluation import evaluate

    def evaluated(step: int, seconds: float, found: HeldOut) -> None:
        point({"step": step, "seconds": seconds, "greedy": found.accuracy, "reward": found.reward})

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
    look_in(cell.get("folder") or None)
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
        said = str(error) if isinstance(error, GrouprlError) else error_text(error)
        tell({"error": said})
        sys.stderr.flush()
        os._exit(1)
    tell({"result": result})


if __name__ == "__main__":
    main()
