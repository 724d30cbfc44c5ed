"""What a run leaves while it goes on and at its end: numbers, checkpoints, episodes, and the result with its pages."""

from __future__ import annotations

import faulthandler
import functools
import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from grouprl.doctor import Watch
from grouprl.doctor.report import write_report
from grouprl.envs.episodes import batch_of
from grouprl.envs.evaluation import Evaluator, evaluate, patience
from grouprl.envs.grpo import GRPO
from grouprl.envs.loop import Metrics
from grouprl.envs.metric_names import tracked
from grouprl.envs.native import kernels
from grouprl.envs.rollout import Rollout
from grouprl.envs.run_settings import RunSettings, default_settings
from grouprl.envs.running_statistics import running_statistics
from grouprl.envs.vector import reward_threshold
from grouprl.envs.watch import record_episodes
from grouprl.errors import TrainingError, UsageError
from grouprl.machine.usage import Usage
from grouprl.runs import MetricsLog, RunFolder, make_trackers, read_metrics
from grouprl.runs.episodes import EpisodeLog, Strip, write_html
from grouprl.runs.metrics import reached
from grouprl.runs.signals import stopping_on_signals

_log = logging.getLogger("grouprl")

AVG_REWARD_EPISODES = 20
"""Episodes in ``avg_reward``, the name and the number of the chapter's script."""

EPISODES_KEPT = 12
"""Batches of a run of which some episodes are kept to be looked at."""


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
    """A callback that evaluates, logs, tracks and writes checkpoints; told of every update.

    Args:
        folder, run, agent: what is recorded where, and how.
        threshold: the mean return that counts as solved, or None.
        stack: closes what is opened here.
        past: what :meth:`checkpoint` wrote down of this very run, which goes on; None for a run that begins.

    Attributes:
        stopped: whether it shall end training after this update. solved_at: steps and seconds, or None.
        result: what the run left, once it has ended.
    """

    def __init__(
        self, folder: RunFolder, run: RunSettings, agent: GRPO, threshold: float | None, stack: ExitStack,
        past: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.run, self.threshold = folder, run, threshold
        self.stopped = False
        self.result: RunResult | None = None
        self.solved_at: tuple[int, float] | None = None
        done = agent.num_timesteps
        self._next_eval = done - done % run.eval_every + run.eval_every
        self._next_checkpoint = done - done % run.checkpoint_every + run.checkpoint_every
        self._next_episodes = 0
        self._checkpoint: Path | None = None
        self._usage = Usage()
        self._watch = Watch(agent.config.model_dump(), language_model=False, goal=threshold)
        self.ranks = agent.loop.ranks
        if past is not None:
            self._next_eval = min(self._next_eval, past["next_eval"])  # sooner where config.yaml has been edited
            self._next_checkpoint = min(self._next_checkpoint, past["next_checkpoint"])
            self.solved_at, self._next_episodes = past["solved_at"], past["next_episodes"]
        if not self.ranks.first:
            return
        how, n_envs = agent.config.how_to_evaluate, min(run.eval_episodes, 20)
        self.evaluator = Evaluator(*agent.where(), n_envs, how, timeout=agent.config.env_timeout)
        stack.callback(self.evaluator.close)
        self.episodes = stack.enter_context(EpisodeLog(folder.episodes_path))
        keep_episodes = functools.partial(self._keep_episodes, agent)
        agent.loop.on_batch.append(keep_episodes)
        stack.callback(agent.loop.on_batch.remove, keep_episodes)
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
        if past is not None:
            self.log.resume(agent.num_timesteps, past["metrics"])
            self.episodes.resume(agent.num_timesteps, past["episodes"])
        elif (kept := running_statistics(self.evaluator.venv)) is not None:
            _log.warning("evaluations, and this run if it is resumed, will show the policy other numbers: %s", kept)

    def _keep_episodes(self, agent: GRPO, rollout: Rollout, advantages: Tensor, gamma: float) -> None:
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
            batch_of(rollout, advantages, baseline, agent.policy, step=step, gamma=gamma, estimator=estimator)
        )

    def __call__(self, agent: GRPO, metrics: Metrics) -> bool:
        step, own = agent.num_timesteps, float("nan")  # the evaluation of this run, and not of a callback before it
        if step >= self._next_eval:
            self._next_eval = step - step % self.run.eval_every + self.run.eval_every
            metrics["eval_return"] = own = self.ranks.once(lambda: self._evaluate(agent))
            if self.solved_at is None and self.threshold is not None and reached(own, self.threshold):
                self.solved_at = (step, agent.train_seconds)
        metrics.setdefault("eval_return", own)
        if self.ranks.first:
            metrics |= self._usage.read()
            self._record(agent, metrics | {"eval_return": own}, step)
        self.stopped = self.ranks.agree(self.stopped)[0]
        if step >= self._next_checkpoint and step < self.run.total_timesteps:
            self._next_checkpoint = step - step % self.run.checkpoint_every + self.run.checkpoint_every
            self.checkpoint(agent, may_restart=True)
        return not self.stopped

    def patience(self, agent: GRPO) -> int | None:
        """See :func:`~grouprl.envs.evaluation.patience`."""
        return patience(agent, self.evaluator.horizon)

    def _evaluate(self, agent: GRPO) -> float:
        self.evaluator.max_steps = self.patience(agent) or self.evaluator.max_steps
        played = self.evaluator.run(agent, self.run.eval_episodes, seed=agent.config.seed + 1)
        return played.summary()["mean_return"]

    def _record(self, agent: GRPO, metrics: Metrics, step: int) -> None:
        self.log.append(metrics)
        self._watch.note(metrics, step / self.run.total_timesteps)
        recent = agent.recent_returns[-AVG_REWARD_EPISODES:]
        script_names = {"avg_reward": float(np.mean(recent))} if recent else {}
        if "kl" in metrics:
            script_names["kl_divergence"] = metrics["kl"] if agent.config.beta > 0 else metrics["approx_kl"]
        shown = {key: value for key, value in (metrics | script_names).items() if np.isfinite(value)}
        for tracker in self.trackers:
            tracker.log(tracked(shown), step)

    def checkpoint(self, agent: GRPO, *, may_restart: bool = False) -> None:
        """Write a checkpoint now and drop the oldest ones."""
        extra = {
            "next_eval": self._next_eval,
            "next_checkpoint": self._next_checkpoint,
            "solved_at": self.solved_at,
            "metrics": self.log.mark() if self.ranks.first else None,
            "next_episodes": self._next_episodes,
            "episodes": self.episodes.mark() if self.ranks.first else None,
        }
        path = self.folder.checkpoint_path(agent.num_timesteps)
        if self._checkpoint is not None and not self._checkpoint.exists():
            _log.warning("%s was deleted or moved since this run wrote it; %s follows", self._checkpoint, path.name)
        agent.checkpoint(path, may_restart=may_restart, extra=extra)
        self._checkpoint = path
        if self.ranks.first:
            self.folder.prune_checkpoints(self.run.keep_checkpoints)
            self.folder.settle()


@contextmanager
def recording(
    folder: RunFolder, run: RunSettings, agent: GRPO, past: Mapping[str, Any] | None = None
) -> Iterator[Recorder]:
    """Around training: yields the callback that records it, and leaves model, checkpoint and result in the end.

    ``past`` is what a checkpoint holds of this very run, which goes on; a run that begins has none, whatever the agent
    has been through. Ctrl-C and its like end training after the update in progress.

    Raises:
        TrainingError: as raised within, with the last checkpoint named.
    """
    with suppress(Exception):  # a standard error that is no file
        faulthandler.enable()  # an environment that ends the process by a signal is named, with its line
    with ExitStack() as stack:
        usual = reward_threshold(agent.where()[0])
        threshold = agent.loop.ranks.once(lambda: folder.read_config().get("reward_threshold", usual))
        recorder = Recorder(folder, run, agent, threshold, stack, past)

        def stop() -> None:
            recorder.stopped = True

        with stopping_on_signals(stop):
            try:
                yield recorder
            except TrainingError as error:
                last = folder.latest_checkpoint()
                kept = f"the last good checkpoint is {last}" if last else "there is no checkpoint"
                raise TrainingError(f"{error} (after {agent.num_timesteps} steps; {kept})") from error
        agent.save(folder.model_path)
        recorder.checkpoint(agent)
        if recorder.stopped and agent.num_timesteps < run.total_timesteps:
            recorder.result = RunResult(folder, agent, None, [])
        else:
            summary, notes = recorder.ranks.once(lambda: _finish(folder, run, agent, recorder))
            recorder.result = RunResult(folder, agent, summary, notes)


def _finish(folder: RunFolder, run: RunSettings, agent: GRPO, recorder: Recorder) -> tuple[dict[str, Any], list[str]]:
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
        limit = recorder.patience(agent)
        played = evaluate(agent, episodes=run.final_episodes, seed=agent.config.seed + 2, max_steps=limit)
        final = played.summary()
        if played.cut:
            notes.append(
                f"{played.cut} of the last {len(played.returns)} greedy episodes were cut: they had not ended after "
                f"{max(played.lengths)} steps"
            )
        if run.video:
            try:
                notes += record_episodes(agent, folder.video_path, strip=strip)
            except TrainingError as error:  # what was trained is good without a film of it
                notes.append(f"no video: {error}")
        try:
            curve.result()
        except UsageError as error:  # a run too short for one complete episode
            notes.append(f"no curve: {error}")
    summary = {
        "env_id": agent.env_id,
        "seed": agent.config.seed,
        "total_steps": agent.num_timesteps,
        "train_seconds": agent.train_seconds,
        "steps_per_second": (agent.num_timesteps - agent.loop.untimed_steps) / agent.train_seconds,
        "skipped_batches": agent.loop.skipped.total(),
        "reward_threshold": recorder.threshold,
        "solved_at_steps": recorder.solved_at[0] if recorder.solved_at else None,
        "solved_at_seconds": recorder.solved_at[1] if recorder.solved_at else None,
        "eval": final,
    }
    folder.write_summary(summary)
    notes += _leave_pages(folder, strip)
    return summary, notes


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
