"""Watching a policy: one episode as a video file, or live in a window."""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv

from grouprl.envs.checked import Checked
from grouprl.envs.closing import close
from grouprl.envs.env_errors import cannot_make_message, environment_error, missing_extra_message, unknown_id_message
from grouprl.envs.grpo import GRPO
from grouprl.envs.step_watch import StepWatch, making
from grouprl.envs.vector import env_name, find_spec
from grouprl.errors import GrouprlError, TrainingError, UsageError, error_text, first_line
from grouprl.machine.threads import single_threaded_kernels
from grouprl.runs.episodes import Strip

MAX_FRAMES = 2000
DEFAULT_FPS = 30


def has_screen() -> bool:
    """Whether a window could be shown here."""
    return sys.platform in ("win32", "darwin") or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def make_rendering(agent: GRPO, render_mode: str) -> gym.Env[Any, Any]:
    """One environment like the agent's, that renders in ``render_mode``, whatever that of training does.

    Raises:
        UsageError: it cannot be made again, or does not render in that mode.
    """
    given, kwargs = agent.where()
    if not isinstance(given, str):
        return _from_callable(given, render_mode)
    env_id = given.removeprefix("envpool:")
    if not has_screen():
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # else pygame complains about the missing screen
    find_spec(env_id)  # imports the module that registers it
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*render_mode.*")  # it is said below
            env = gym.make(env_id, **{**kwargs, "render_mode": render_mode})
    except gym.error.DependencyNotInstalled as error:
        raise UsageError(missing_extra_message(env_id, str(gym.spec(env_id).entry_point), error)) from None
    except (gym.error.Error, ImportError) as error:
        raise UsageError(unknown_id_message(env_id, error)) from None
    except Exception as error:  # whatever its constructor raises
        raise UsageError(f"{env_id} cannot render with render_mode={render_mode!r}: {first_line(error)}") from error
    if env.render_mode != render_mode:
        close(env)
        raise UsageError(
            f"{env_id} does not support render_mode={render_mode!r}; it offers {env.metadata.get('render_modes')}"
        )
    return env


def _from_callable(make: Any, render_mode: str) -> gym.Env[Any, Any]:
    """What a callable makes, if that renders."""
    if isinstance(make, gym.Env | VectorEnv):
        raise UsageError(
            f"{env_name(make)} was given as an object, and another one is needed to be watched; give an id or a "
            "callable"
        )
    try:
        env: gym.Env[Any, Any] = make()
    except Exception as error:
        raise UsageError(cannot_make_message(env_name(make), {}, error)) from error
    if env.render_mode != render_mode:
        close(env)
        raise UsageError(
            f"what {env_name(make)} makes has render_mode={env.render_mode!r}, and {render_mode!r} is needed; let it "
            f"make its environment so, such as lambda: MyEnv(render_mode={render_mode!r})"
        )
    return env


def play_episode(agent: GRPO, env: gym.Env[Any, Any], seed: int, deterministic: bool = True) -> Iterator[float]:
    """Play one episode and yield the return so far after each step."""
    total = 0.0
    try:
        env = Checked(env)
        everything = np.ones(agent.actions.mask_size, bool) if agent.masks_in_info else None
        watch = StepWatch(env, lambda: 0, agent.config.env_timeout)
        observation, info = watch.run(lambda: env.reset(seed=seed))
        for _ in range(100_000):
            mask = info.get("action_mask", everything)
            action, _ = agent.predict(observation, deterministic=deterministic, action_masks=mask)
            observation, reward, terminated, truncated, info = watch.run(functools.partial(env.step, action))
            total += float(reward)
            yield total
            if terminated or truncated:
                return
    except GrouprlError:
        raise
    except Exception as error:
        raise environment_error(error, "while playing") from error


def _picture(env: gym.Env[Any, Any], name: str) -> Any:
    """What ``env`` renders. Raises UsageError where rendering fails."""
    try:
        return env.render()
    except Exception as error:  # whatever the user's code raises, or Gymnasium where it has no such method
        raise UsageError(f"{name} cannot render: {error_text(error)}") from error


def record_episodes(
    agent: GRPO, path: Path, episodes: int = 1, seed: int = 0, deterministic: bool = True, *, strip: Strip | None = None
) -> list[str]:
    """Film episodes into one video; returns notes for the user: why there is no film, or that it was cut.

    ``strip`` keeps some of the pictures.

    Raises:
        TrainingError: the environment failed, or the disk is full; a video already at ``path`` stays.
    """
    from grouprl.runs.video import write_video

    try:
        make = functools.partial(make_rendering, agent, "rgb_array")
        env = making(agent.env_id, lambda: 0, agent.config.env_timeout, make)
    except (UsageError, TrainingError) as error:
        return [f"no video: {error}"]
    notes: list[str] = []

    def frames() -> Iterator[np.ndarray[Any, Any]]:
        count = 0
        for episode in range(episodes):
            for _ in play_episode(agent, env, seed + episode, deterministic):
                frame = _picture(env, agent.env_id)
                if not isinstance(frame, np.ndarray) or frame.ndim != 3:
                    raise UsageError(f"{agent.env_id} renders {type(frame).__name__}, not pictures")
                if strip is not None:
                    strip.offer(frame)
                yield frame
                count += 1
                if count == MAX_FRAMES * episodes:
                    notes.append(f"the video ends after {count} steps")
                    return

    try:
        with single_threaded_kernels():
            write_video(frames(), path, float(env.metadata.get("render_fps") or DEFAULT_FPS))
    except UsageError as error:
        return [f"no video: {error}"]
    finally:
        with suppress(Exception):  # some renderers fail on closing what they never opened
            env.close()
    return notes
