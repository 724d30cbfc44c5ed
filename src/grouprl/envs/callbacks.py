"""Callbacks for `GRPO.learn`: a whole run folder, or only checkpoints, evaluations, an early end, or videos.

Any function ``callback(agent, metrics)`` is a callback. These are objects because they remember when they are due. Give
several as a list: each sees what those before it have added to ``metrics``. One of them may serve several agents, one
after the other.
"""

from __future__ import annotations

import difflib
import logging
import os
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium.vector import VectorEnv

from grouprl.envs.arguments import real_number, whole_number, yes_or_no
from grouprl.envs.evaluation import Evaluator
from grouprl.envs.grpo import GRPO
from grouprl.envs.loading import chosen_environment
from grouprl.envs.loop import Metrics
from grouprl.envs.metric_names import NOW_AND_THEN
from grouprl.envs.recorder import Recorder, RunResult, recording
from grouprl.envs.run_settings import Beside, as_written, called, plan
from grouprl.envs.vector import EnvLike, share_environments
from grouprl.envs.watch import record_episodes
from grouprl.errors import UsageError, with_type
from grouprl.runs import RunFolder
from grouprl.runs.files import user_path
from grouprl.runs.metrics import reached

_log = logging.getLogger("grouprl")


class _Scheduled:
    """A callback with something to do every so many steps, counted from 0."""

    def __init__(self, every: int) -> None:
        self.every = self._next = whole_number("every", every, least=1)

    @contextmanager
    def around(self, agent: GRPO, end: int) -> Iterator[None]:
        """Around a call of ``learn``: the next time is the first multiple beyond the steps that ``agent`` has done."""
        self._next = self._after(agent.num_timesteps)
        yield

    def _after(self, steps: int) -> int:
        return steps - steps % self.every + self.every

    def _due(self, steps: int) -> bool:
        """Whether it is time; after that, not again before the next multiple."""
        if steps < self._next:
            return False
        self._next = self._after(steps)
        return True


class Run:
    """Leaves a run folder, exactly as ``grouprl train`` does, also for an environment that is given as a callable.

    Metrics, TensorBoard, evaluations, checkpoints, the model, the curve, a video, episodes, the report: all that
    ``docs/environments.md`` lists. Ctrl-C ends training after the update in progress.

    Examples:
        >>> run = Run("runs/mine", eval_every=10_000)  # doctest: +SKIP
        >>> GRPO(lambda: MyEnv(), n_envs=8).learn(200_000, callback=run)  # doctest: +SKIP
        >>> run.result.summary["eval"]["mean_return"]  # doctest: +SKIP

    Args:
        folder: must not exist, or be empty, unless ``overwrite``.
        **settings: fields of :class:`~grouprl.envs.run_settings.RunSettings` but ``total_timesteps``, which ``learn``
            says.

    Attributes:
        result: what the run left, once ``learn`` has ended.
    """

    def __init__(self, folder: str | os.PathLike[str], *, overwrite: bool = False, **settings: Any) -> None:
        if "total_timesteps" in settings:
            raise UsageError("total_timesteps is what learn is called with; leave it out")
        plan(1, settings)  # names and bounds
        self.folder, self.overwrite = user_path(folder).absolute(), yes_or_no("overwrite", overwrite)
        self.settings = settings
        self.result: RunResult | None = None
        self._recorder: Recorder | None = None

    @contextmanager
    def around(self, agent: GRPO, end: int) -> Iterator[None]:
        """Around a call of ``learn`` that goes on until ``end`` steps in all.

        Raises:
            UsageError: the folder holds something; or the environment was given as an object, of which evaluations
                would need another one.
        """
        env, _ = agent.where()
        if isinstance(env, gym.Env | VectorEnv):
            raise UsageError(
                f"a run evaluates on environments of its own, and {agent.env_id} was given as an object; give an id or "
                "a callable: GRPO(lambda: MyEnv(), n_envs=8)"
            )
        settings = plan(end, {"eval_every": max(1, (end - agent.num_timesteps) // 20), **self.settings})
        ranks = agent.loop.ranks
        place = RunFolder(ranks.once(lambda: self.folder))
        ranks.once(lambda: place.check_free(self.overwrite))
        with place.locked() if ranks.first else nullcontext():
            about = as_written(agent, settings, agent.env_id, None, beside=self._beside(agent))
            folder = RunFolder(ranks.once(lambda: RunFolder.create(place.path, about, overwrite=self.overwrite).path))
            in_order = folder.kept_in_order() if ranks.first else nullcontext()
            with in_order, recording(folder, settings, agent) as self._recorder:
                yield
        self.result = self._recorder.result
        for note in self.result.notes if self.result is not None else ():
            _log.warning("%s", note)

    def _beside(self, agent: GRPO) -> Beside:
        """The other callbacks of the list, by name, before and after this one."""
        names = [called(one) for one in agent._callbacks]
        place = next((i for i, one in enumerate(agent._callbacks) if one is self), len(names))  # it may be within one
        return {"before": names[:place], "after": names[place + 1 :]}

    def __call__(self, agent: GRPO, metrics: Metrics) -> bool:
        """Record an update."""
        if self._recorder is None:
            raise UsageError("a Run is given to learn: GRPO(env).learn(n, callback=Run(folder))")
        return self._recorder(agent, metrics)


class Checkpoints(_Scheduled):
    """Writes ``folder/step_N.safetensors`` every so many steps; ``GRPO.from_checkpoint(path, env)`` goes on from one.

    Args:
        every: environment steps. keep: how many of the newest stay.
    """

    def __init__(self, folder: str | os.PathLike[str], every: int, keep: int = 3) -> None:
        super().__init__(every)
        self.folder, self.keep = user_path(folder), whole_number("keep", keep, least=1)
        self.written: list[Path] = []

    def __call__(self, agent: GRPO, metrics: Metrics) -> None:
        """Write one if it is due."""
        if not self._due(agent.num_timesteps):
            return
        path = self.folder / f"step_{agent.num_timesteps:012d}.safetensors"
        agent.checkpoint(path, may_restart=True)
        self.written = [*(old for old in self.written if old != path), path]  # another agent may have come as far
        for old in self.written[: -self.keep]:
            old.unlink(missing_ok=True)
        self.written = self.written[-self.keep :]


class Evaluations(_Scheduled):
    """Plays complete greedy episodes every so many steps, and saves the best policy so far.

    Adds ``eval_return`` to the metrics of the update, for callbacks after it. What it remembers is of one agent: for
    another one it begins anew, and the file ``best`` becomes that agent's.

    Args:
        every: environment steps. episodes: of one evaluation.
        env: where; default: what the agent is trained on, made anew. env_kwargs: for its constructor, for ids; without
            ``env`` for the id that the agent is trained on.
        best: file for the policy with the highest mean return; None: it is not saved.
        max_steps: where to cut an episode that has not ended; default: nowhere if the environment has a time limit,
            else after 100,000 steps, as :func:`~grouprl.envs.evaluation.evaluate` does.

    Attributes:
        history: (steps, mean return) of each evaluation of the agent. best_return: the highest, None before the first.
    """

    def __init__(
        self, every: int, episodes: int = 20, *, env: EnvLike | None = None,
        env_kwargs: Mapping[str, Any] | None = None, best: str | os.PathLike[str] | None = None,
        max_steps: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(every)
        self.max_steps = None if max_steps is None else whole_number("max_steps", max_steps, least=1)
        self.episodes, self.env, self.env_kwargs = whole_number("episodes", episodes, least=1), env, env_kwargs
        self.best = None if best is None else user_path(best)
        self.history: list[tuple[int, float]] = []
        self.best_return: float | None = None
        self._agent: Callable[[], GRPO | None] = lambda: None

    def _begin(self, agent: GRPO) -> None:
        """Forget what was remembered of another agent; a warning says whose policy the file will be."""
        if self._agent() is agent:
            return
        if self.best is not None and self.best_return is not None:
            _log.warning(
                "Evaluations was given to another agent: %s, the best policy of the agent before with a mean return of "
                "%g, gives way to the best one of this agent; to keep both, give each agent an Evaluations with a file "
                "of its own", self.best, self.best_return,
            )  # fmt: skip
        self._agent, self.history, self.best_return = weakref.ref(agent), [], None

    @contextmanager
    def around(self, agent: GRPO, end: int) -> Iterator[None]:
        """Around a call of ``learn``: make the environments, and close them.

        Raises:
            UsageError: there is no environment beside that of training: it was given as an object, and no other one is,
                or this one again; or there are arguments, and the agent was trained on no id.
        """
        env, kwargs, how = chosen_environment(agent, self.env, self.env_kwargs)
        if self.env is None and isinstance(env, gym.Env | VectorEnv):
            raise UsageError(
                f"evaluations need an environment of their own, and {agent.env_id} was given as an object; give "
                "Evaluations(every, env=lambda: MyEnv())"
            )
        training = agent._held.venv
        if isinstance(env, gym.Env | VectorEnv) and training is not None and share_environments(env, training):
            raise UsageError(
                f"Evaluations was given the environment that {agent.env_id} is trained on, and would step it in the "
                "middle of training; give another one, such as Evaluations(every, env=lambda: MyEnv())"
            )
        self._begin(agent)
        n_envs, timeout = min(self.episodes, 20), agent.config.env_timeout
        self._evaluator = Evaluator(env, kwargs, n_envs, how, self.max_steps, timeout)
        try:
            with super().around(agent, end):
                yield
        finally:
            if not isinstance(env, gym.Env | VectorEnv):
                self._evaluator.close()

    def __call__(self, agent: GRPO, metrics: Metrics) -> None:
        """Evaluate if it is due."""
        if not self._due(agent.num_timesteps):
            return
        played = self._evaluator.run(agent, self.episodes, seed=agent.config.seed + 1)
        mean = metrics["eval_return"] = played.summary()["mean_return"]
        self.history.append((agent.num_timesteps, mean))
        if self.best_return is None or mean > self.best_return:
            self.best_return = mean
            if self.best is not None:
                agent.save(self.best)


class StopAtReturn:
    """Ends training once a mean return is reached.

    Args:
        value: the return; a mean that is below it by rounding alone counts.
        metric: where it is read: ``return_mean``, of the last 100 episodes of training, or
            ``eval_return``, which :class:`Evaluations` or :class:`Run` before it in the list give. A metric that a
            callback of your own adds is to be there with every update, NaN where it is not known.
    """

    def __init__(self, value: float, metric: str = "return_mean") -> None:
        if not isinstance(metric, str):
            raise UsageError(f"metric={with_type(metric)} must be the name of a metric, such as 'return_mean'")
        self.value, self.metric = real_number("value", value), metric

    def __call__(self, agent: GRPO, metrics: Metrics) -> bool:
        """False where the return is reached.

        Raises:
            UsageError: there is no such metric.
        """
        if self.metric not in (known := NOW_AND_THEN | metrics.keys()):
            close = difflib.get_close_matches(self.metric, sorted(known), n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(sorted(known))}"
            raise UsageError(f"StopAtReturn: metric={self.metric!r} is no metric of an update; {hint}")
        return not reached(metrics.get(self.metric, float("nan")), self.value)


class Videos(_Scheduled):
    """Films greedy episodes every so many steps, as ``folder/step_N.mp4``.

    Args:
        every: environment steps. episodes: of one video.
    """

    def __init__(self, folder: str | os.PathLike[str], every: int, episodes: int = 1) -> None:
        super().__init__(every)
        self.folder, self.episodes = user_path(folder), whole_number("episodes", episodes, least=1)

    def __call__(self, agent: GRPO, metrics: Metrics) -> None:
        """Film if it is due; a warning says why nothing could be filmed."""
        if self._due(agent.num_timesteps) and agent.loop.ranks.first:
            path = self.folder / f"step_{agent.num_timesteps:012d}.mp4"
            for note in record_episodes(agent, path, self.episodes, seed=agent.config.seed + 1):
                _log.warning("%s", note)
