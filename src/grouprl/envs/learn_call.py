"""One call of ``GRPO.learn``: batches until so many steps are done, with callbacks and progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from grouprl.envs.stable_baselines import checked_callbacks, says_stop
from grouprl.errors import UsageError
from grouprl.machine.threads import single_threaded_kernels
from grouprl.runs.progress import Progress

if TYPE_CHECKING:
    from grouprl.envs.grpo import GRPO


def train_until(
    agent: GRPO, start: int, end: int, callback: Callable[..., Any] | Sequence[Any] | None, progress_bar: bool | None
) -> None:
    """Train ``agent`` until ``end`` total steps, on schedules that run from ``start`` to ``end``.

    Args:
        agent: what is trained.
        start, end: environment steps, counted from the agent's first.
        callback, progress_bar: as for ``GRPO.learn``; None shows progress if standard error is a terminal.

    Raises:
        UsageError: the agent had a function of its own that is missing, a callback cannot be called, or the agents of
            several processes differ.
        TrainingError: the environment or the numbers failed.
    """
    own, now = agent._held.description, agent.loop.functions
    for name, had, has in (
        ("advantage_function", own.custom_advantage, now.advantage),
        ("surrogate_function", own.custom_surrogate, now.surrogate),
    ):
        if had and has is None:
            raise UsageError(f"this agent was trained with its own {name}; pass {name}=... to load to train on")
    callbacks, ranks = checked_callbacks(callback), agent.loop.ranks
    with ranks.telling():
        _check_alike(agent, end - start)
        agent._held.begin()
        _train(agent, start, end, callbacks, progress_bar if ranks.first else False)


def _check_alike(agent: GRPO, steps: int) -> None:
    """Raises UsageError if the agents of several processes are not the same."""
    if agent.loop.ranks.world > 1:
        about = {"env_id": agent.env_id, "steps": steps, "steps before": agent.num_timesteps}
        versions = {name: version(name) for name in ("grouprl", "torch", "gymnasium", "numpy")}
        weights = {"the sum of the weights": agent.loop.learner.parameters.total()}
        agent.loop.ranks.check_same(
            "agents", about | versions | agent.config.model_dump() | weights,
            "start every rank with the same script, settings and packages",
        )  # fmt: skip


def _train(
    agent: GRPO, start: int, end: int, callbacks: Sequence[Callable[..., Any]], progress_bar: bool | None
) -> None:
    ranks = agent.loop.ranks
    with ExitStack() as stack:
        agent._callbacks = callbacks
        stack.callback(setattr, agent, "_callbacks", ())
        for call in callbacks:
            if hasattr(call, "around"):
                stack.enter_context(call.around(agent, end))
        stack.enter_context(single_threaded_kernels())
        bar = stack.enter_context(Progress(end - start, progress_bar, description=agent.env_id))
        while agent.num_timesteps < end:
            agent.ready()
            with agent._held.stepping():
                metrics = agent.loop.iterate((agent.num_timesteps - start) / (end - start))
            bar.update(agent.num_timesteps - start, episode_return=metrics["return_mean"])
            verdicts = [call(agent, metrics) for call in callbacks]
            if ranks.agree(any(map(says_stop, verdicts)))[0]:
                break
