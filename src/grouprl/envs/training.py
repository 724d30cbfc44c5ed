"""A run: train an agent and leave a folder anyone understands. What the command line's train and resume do."""

from __future__ import annotations

import faulthandler
import functools
import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from grouprl.doctor import Watch
from grouprl.doctor.report import write_report
from grouprl.envs import loading, presets
from grouprl.envs.config import GRPOConfig, check_names
from grouprl.envs.env_kwargs import to_json
from grouprl.envs.episodes import batch_of
from grouprl.envs.evaluation import Evaluator, evaluate
from grouprl.envs.grpo import GRPO
from grouprl.envs.loop import Metrics
from grouprl.envs.metric_names import tracked
from grouprl.envs.mlp import kernels
from grouprl.envs.rollout import Rollout
from grouprl.envs.vector import reward_threshold
from grouprl.envs.watch import record_episodes
from grouprl.errors import TrainingError, UsageError, shown
from grouprl.importing import load_function
from grouprl.machine.processes import refuse_several_processes
from grouprl.machine.usage import Usage
from grouprl.objective.user_functions import UserFunctions
from grouprl.runs import MetricsLog, RunFolder, make_trackers, read_metrics
from grouprl.runs.episodes import EpisodeLog, Strip, write_html
from grouprl.runs.files import user_path
from grouprl.runs.folder import newest_good
from grouprl.runs.signals import stopping_on_signals
from grouprl.runs.state import taking_up
from grouprl.runs.trackers import check_trackers

_log = logging.getLogger("grouprl")

AVG_REWARD_EPISODES = 20
"""Episodes in ``avg_reward``, the name and the number of the chapter's script."""

EPISODES_KEPT = 12
"""Batches of a run of which some episodes are kept to be looked at."""

LEAST_PATIENCE = 5000
"""Least steps of a greedy episode that is cut for want of an end."""


@dataclass(frozen=True)
class RunSettings:
    """What a run does beside learning.

    Attributes:
        total_timesteps: environment steps to train for.
        eval_every: steps between periodic greedy evaluations (counted from 0); each update at most once.
        eval_episodes: episodes of a periodic evaluation; final_episodes: of the last one.
        checkpoint_every: steps between checkpoints; keep_checkpoints: how many of the newest stay.
        track: ``tensorboard``, ``wandb`` or ``none``.
        video: whether to film one episode at the end.
    """

    total_timesteps: int
    eval_every: int
    eval_episodes: int = 20
    final_episodes: int = 100
    checkpoint_every: int = 100_000
    keep_checkpoints: int = 3
    track: tuple[str, ...] = ("tensorboard",)
    video: bool = True

    def __post_init__(self) -> None:
        for name in (
            "total_timesteps",
            "eval_every",
            "eval_episodes",
            "final_episodes",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} must be at least 1")
        check_trackers(self.track)


@dataclass(frozen=True)
class RunResult:
    """What a finished (or interrupted) run left behind."""

    folder: RunFolder
    agent: GRPO
    summary: dict[str, Any] | None
    notes: list[str]

    @property
    def finished(self) -> bool:
        """False if the run was interrupted and can be resumed."""
        return self.summary is not None


class Recorder:
    """A callback that evaluates, logs, tracks and writes checkpoints; told of every update."""

    def __init__(
        self, folder: RunFolder, run: RunSettings, agent: GRPO, threshold: float | None, stack: ExitStack
    ) -> None:
        self.folder, self.run, self.threshold = folder, run, threshold
        self.stopped = False
        self.solved_at: tuple[int, float] | None = None
        self._next_eval = run.eval_every
        self._next_checkpoint = run.checkpoint_every
        self._checkpoint: Path | None = None
        self._usage = Usage()
        self._watch = Watch(agent.config.model_dump(), language_model=False, goal=threshold)
        self.evaluator = Evaluator(*agent.where(), n_envs=min(run.eval_episodes, 20))
        stack.callback(self.evaluator.close)
        self.episodes = stack.enter_context(EpisodeLog(folder.episodes_path))
        self._next_episodes = 0
        agent.loop.on_batch = lambda rollout, advantages: self._keep_episodes(agent, rollout, advantages)
        stack.callback(setattr, agent.loop, "on_batch", None)
        self.log = stack.enter_context(MetricsLog(folder.metrics_path))
        self.trackers = make_trackers(
            run.track,
            tensorboard_folder=folder.tensorboard_path,
            wandb_folder=folder.path,
            name=folder.path.name,
            config=folder.read_config(),
        )
        for tracker in self.trackers:
            stack.callback(tracker.close)
        self._restore(agent)

    def _restore(self, agent: GRPO) -> None:
        """Take up where the checkpoint the agent came from left off; nothing to do for a new agent."""
        if not agent.extra:
            return
        self._next_eval, self._next_checkpoint = agent.extra["next_eval"], agent.extra["next_checkpoint"]
        self.solved_at = agent.extra["solved_at"]
        self.log.resume(agent.num_timesteps, agent.extra["metrics"])
        self._next_episodes = agent.extra["next_episodes"]
        self.episodes.resume(agent.num_timesteps, agent.extra["episodes"])

    def _keep_episodes(self, agent: GRPO, rollout: Rollout, advantages: Tensor) -> None:
        """Keep some episodes of a batch that is learned from, where they are due."""
        step, config = agent.num_timesteps, agent.config
        if step < self._next_episodes:
            return
        every = max(1, self.run.total_timesteps // EPISODES_KEPT)
        self._next_episodes = step - step % every + every
        baseline, estimator = agent.loop.baseline, config.advantage
        if agent.loop.functions.advantage is not None:
            baseline, estimator = None, "a function of your own"
        self.episodes.append(
            batch_of(rollout, advantages, baseline, agent.policy, step=step, gamma=config.gamma, estimator=estimator)
        )

    def __call__(self, agent: GRPO, metrics: Metrics) -> bool:
        step = agent.num_timesteps
        if step >= self._next_eval:
            self._next_eval = step - step % self.run.eval_every + self.run.eval_every
            self.evaluator.max_steps = _patience(agent) or self.evaluator.max_steps
            mean = self.evaluator.run(agent, self.run.eval_episodes, seed=agent.config.seed + 1).summary()[
                "mean_return"
            ]
            metrics["eval_return"] = mean
            if self.solved_at is None and self.threshold is not None and mean >= self.threshold:
                self.solved_at = (step, agent.train_seconds)
        else:
            metrics["eval_return"] = float("nan")
        metrics |= self._usage.read()
        self.log.append(metrics)
        self._watch.note(metrics, step / self.run.total_timesteps)
        recent = agent.recent_returns[-AVG_REWARD_EPISODES:]
        script_names = {"avg_reward": float(np.mean(recent))} if recent else {}
        if "kl" in metrics:
            script_names["kl_divergence"] = metrics["kl"] if agent.config.beta > 0 else metrics["approx_kl"]
        shown = {key: value for key, value in (metrics | script_names).items() if np.isfinite(value)}
        for tracker in self.trackers:
            tracker.log(tracked(shown), step)
        if step >= self._next_checkpoint and step < self.run.total_timesteps:
            self._next_checkpoint = step - step % self.run.checkpoint_every + self.run.checkpoint_every
            self.checkpoint(agent, may_restart=True)
        return not self.stopped

    def checkpoint(self, agent: GRPO, *, may_restart: bool = False) -> None:
        """Write a checkpoint now and drop the oldest ones."""
        extra = {
            "next_eval": self._next_eval,
            "next_checkpoint": self._next_checkpoint,
            "solved_at": self.solved_at,
            "metrics": self.log.mark(),
            "next_episodes": self._next_episodes,
            "episodes": self.episodes.mark(),
        }
        path = self.folder.checkpoint_path(agent.num_timesteps)
        if self._checkpoint is not None and not self._checkpoint.exists():
            _log.warning("%s was deleted or moved since this run wrote it; %s follows", self._checkpoint, path.name)
        agent.checkpoint(path, may_restart=may_restart, extra=extra)
        self._checkpoint = path
        self.folder.prune_checkpoints(self.run.keep_checkpoints)
        self.folder.settle()


def train(
    env_id: str,
    out: str | os.PathLike[str],
    *,
    preset: str | None = "auto",
    steps: int | None = None,
    seed: int | None = None,
    settings: Mapping[str, Any] | None = None,
    env_kwargs: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress_bar: bool | None = None,
    announce: Callable[[RunFolder], None] | None = None,
) -> RunResult:
    """Train on ``env_id`` and leave a run folder at ``out``.

    Args:
        env_id: a Gymnasium id.
        out: the run folder; must not exist, or be empty, unless ``overwrite``.
        preset: as for :class:`~grouprl.envs.grpo.GRPO`.
        steps: environment steps; default: the preset's, or 500,000.
        seed: overrides the configuration's.
        settings: fields of :class:`~grouprl.envs.config.GRPOConfig`; ``advantage_function`` and ``surrogate_function``
            too, as ``module:function``.
        env_kwargs: for the environment's constructor.
        run: fields of :class:`RunSettings`.
        progress_bar: True, False, or None for "if standard error is a terminal".
        announce: called with the run folder once everything asked for is known to be possible.

    Raises:
        UsageError: something asked for is not possible; nothing is left behind.
        TrainingError: the environment or the numbers failed; the last checkpoint stays and can be resumed. Nothing is
            left behind if no update was done.
    """
    refuse_several_processes()
    chosen = presets.resolve(env_id, preset)
    values, functions = _split_functions(settings or {})
    check_names(values)
    if seed is not None:
        values["seed"] = seed
    run_settings = _run_settings(_defaults_of_a_run(chosen, steps) | dict(run or {}))
    RunFolder(user_path(out).absolute()).check_free(overwrite)
    with RunFolder(user_path(out).absolute()).locked():
        agent = GRPO(env_id, preset=preset, env_kwargs=env_kwargs, **_loaded(functions), **values)
        if agent.env_lost:
            agent.close()
            raise UsageError(
                f"a run must be able to make its environment again: {agent.env_lost}; register an id whose entry point "
                "makes that argument itself, or train from Python with GRPO(...).learn"
            )
        folder = RunFolder.create(out, _as_written(env_id, chosen, agent, run_settings, functions), overwrite=overwrite)
        if announce is not None:
            announce(folder)
        with folder.kept_in_order():
            return _run(folder, run_settings, agent, progress_bar)


def _defaults_of_a_run(preset: presets.Preset | None, steps: int | None) -> dict[str, Any]:
    """Fields of :class:`RunSettings` where nothing else is asked for."""
    total = steps if steps is not None else preset.total_timesteps if preset else 500_000
    return {
        "total_timesteps": total,
        "eval_every": (preset.eval_every if preset else None) or max(1, total // 20),
        "checkpoint_every": max(1, total // 10),
    }


def _run_settings(values: Mapping[str, Any]) -> RunSettings:
    try:
        return RunSettings(**values)
    except TypeError as error:
        raise UsageError(f"{error}; known run settings: {', '.join(RunSettings.__dataclass_fields__)}") from None


FUNCTIONS = ("advantage_function", "surrogate_function")
"""What a run takes as ``module:function``, in the place of settings."""


def _split_functions(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Settings of the configuration, and the functions of a user's own by name. Raises UsageError for no name."""
    functions = {name: settings[name] for name in FUNCTIONS if settings.get(name) is not None}
    for name, function in functions.items():
        if not isinstance(function, str):
            raise UsageError(
                f"{name}={shown(function)}: a run must find it again, so give its name as text, module:function; "
                f"GRPO(env, {name}=...) takes the function itself"
            )
    return {name: value for name, value in settings.items() if name not in FUNCTIONS}, functions


def _loaded(functions: Mapping[str, str]) -> dict[str, Callable[..., Any]]:
    """The functions themselves. Raises UsageError if there is no such module or function."""
    return {name: load_function(function) for name, function in functions.items()}


def _as_written(
    env_id: str, preset: presets.Preset | None, agent: GRPO, run: RunSettings, functions: Mapping[str, str]
) -> dict[str, Any]:
    """What config.yaml says of a run: enough to do it again."""
    return {
        "grouprl": version("grouprl"),
        "env_id": env_id,
        "preset": preset.name if preset else None,
        "seed": agent.config.seed,
        "env_kwargs": to_json(agent.env_kwargs),
        "run": {**run.__dict__, "track": list(run.track)},
        "config": agent.config.model_dump(mode="json"),
        **({"functions": dict(functions)} if functions else {}),
    }


def resume(path: str | os.PathLike[str], *, steps: int | None = None, progress_bar: bool | None = None) -> RunResult:
    """Go on with an interrupted run, from its newest checkpoint, exactly as if it had not stopped.

    A run that was stopped after its last update and before it left its summary is finished.

    Args:
        path: the run folder.
        steps: a new total number of steps, to make a finished run longer (its schedules then differ from those of a run
            planned that long).

    Raises:
        UsageError: no run folder, no readable checkpoint, a run that is already finished or that another process
            works on.
    """
    refuse_several_processes()
    folder = RunFolder.open(path)
    with folder.locked():
        return _resume(folder, steps, progress_bar)


def _resume(folder: RunFolder, steps: int | None, progress_bar: bool | None) -> RunResult:
    config = folder.read_config()
    try:
        options = (
            config["run"]
            | {"track": tuple(config["run"]["track"])}
            | ({} if steps is None else {"total_timesteps": steps})
        )
        run_settings = RunSettings(**options)
        functions = _loaded(_split_functions({**config.get("functions", {})})[1])
    except (KeyError, TypeError) as error:
        raise UsageError(f"{folder.config_path} is not the configuration of an environment run ({error})") from None
    found = newest_good(folder.checkpoints(), functools.partial(_agent_of, functions=functions))
    if found is None:
        raise UsageError(f"{folder.path} holds no checkpoint that can be used; train anew with another --out")
    agent = found[1]
    if agent.num_timesteps >= run_settings.total_timesteps and folder.is_finished():
        raise UsageError(
            f"{folder.path} has done all of its {run_settings.total_timesteps} steps; give a larger total with --steps"
        )
    folder.reopen(None if steps is None else config | {"run": config["run"] | {"total_timesteps": steps}})
    return _run(folder, run_settings, agent, progress_bar)


def _agent_of(path: Path, functions: Mapping[str, Callable[..., Any]]) -> GRPO:
    """The agent of a run, as a checkpoint has it. Raises DamagedFileError, or UsageError for its environment."""
    agent = loading.from_checkpoint(GRPO, path, functions=UserFunctions(*map(functions.get, FUNCTIONS)))
    with taking_up(path):
        extra = agent.extra
        solved = extra["solved_at"]
        agent.extra = {
            "next_eval": int(extra["next_eval"]),
            "next_checkpoint": int(extra["next_checkpoint"]),
            "solved_at": None if solved is None else (int(solved[0]), float(solved[1])),
            "metrics": extra.get("metrics"),
            "next_episodes": int(extra.get("next_episodes", 0)),
            "episodes": extra.get("episodes"),
        }
    return agent


def _run(folder: RunFolder, run: RunSettings, agent: GRPO, progress_bar: bool | None) -> RunResult:
    with suppress(Exception):  # a standard error that is no file
        faulthandler.enable()  # an environment that ends the process by a signal is named, with its line
    with ExitStack() as stack:
        stack.callback(agent.close)
        recorder = Recorder(folder, run, agent, reward_threshold(agent.env_id), stack)

        def stop() -> None:
            recorder.stopped = True

        with stopping_on_signals(stop):
            try:
                agent._learn(0, run.total_timesteps, recorder, progress_bar)
            except TrainingError as error:
                last = folder.latest_checkpoint()
                kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint"
                raise TrainingError(f"{error} (after {agent.num_timesteps} steps; {kept})") from error
        agent.save(folder.model_path)
        recorder.checkpoint(agent)
        if recorder.stopped and agent.num_timesteps < run.total_timesteps:
            return RunResult(folder, agent, None, [])
        return _finish(folder, run, agent, recorder)


def _patience(agent: GRPO) -> int | None:
    """Steps after which a greedy episode is taken for one that never ends, by those of training; None: as usual."""
    lengths = agent.loop.recent_lengths
    return max(LEAST_PATIENCE, 10 * max(lengths)) if lengths else None


def _finish(folder: RunFolder, run: RunSettings, agent: GRPO, recorder: Recorder) -> RunResult:
    """Evaluate, and leave summary, curve and video."""
    from grouprl.runs.plots import plot_run

    notes: list[str] = []
    strip = Strip()
    if agent.config.native and kernels.why_not:
        notes.append(f"trained without compiled code, more slowly and with other digits: {kernels.why_not}")
    if (skipped := agent.loop.say_skipped()) is not None:
        notes.append(skipped)
    with ThreadPoolExecutor(1) as pool:
        curve = pool.submit(plot_run, folder, threshold=recorder.threshold)
        played = evaluate(agent, episodes=run.final_episodes, seed=agent.config.seed + 2, max_steps=_patience(agent))
        final = played.summary()
        if played.cut:
            notes.append(
                f"{played.cut} of the last {len(played.returns)} greedy episodes were cut: they had not ended after "
                f"{max(played.lengths)} steps"
            )
        if run.video:
            notes += record_episodes(agent, folder.video_path, strip=strip)
        try:
            curve.result()
        except UsageError as error:  # a run too short for one complete episode
            notes.append(f"no curve: {error}")
    summary = {
        "env_id": agent.env_id,
        "seed": agent.config.seed,
        "total_steps": agent.num_timesteps,
        "train_seconds": agent.train_seconds,
        "steps_per_second": agent.num_timesteps / agent.train_seconds,
        "skipped_batches": agent.loop.skipped.total(),
        "reward_threshold": recorder.threshold,
        "solved_at_steps": recorder.solved_at[0] if recorder.solved_at else None,
        "solved_at_seconds": recorder.solved_at[1] if recorder.solved_at else None,
        "eval": final,
    }
    folder.write_summary(summary)
    notes += _leave_pages(folder, strip)
    return RunResult(folder, agent, summary, notes)


def _leave_pages(folder: RunFolder, strip: Strip) -> list[str]:
    """Write episodes.html and report.html; returns notes on what could not be made."""
    notes = []
    metrics = read_metrics(folder.metrics_path)
    curve = dict(zip(metrics["step"].astype(int).tolist(), metrics["return_mean"].tolist(), strict=True))
    try:
        title = f"{folder.read_config()['env_id']}: {folder.path.name}"
        write_html(folder.episodes_path, folder.episodes_page, title, curve=curve, film=strip.pictures)
    except UsageError as error:  # a run that has learned from no batch
        notes.append(f"no page of episodes: {error}")
    write_report(folder.path, default_settings())
    return notes


def default_settings() -> dict[str, Any]:
    """Every setting of learning and its default, as config.yaml holds them."""
    return GRPOConfig().model_dump(mode="json")
