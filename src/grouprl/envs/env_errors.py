"""What to say of an environment that does not exist, cannot be made, or failed."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym

from grouprl.errors import TrainingError, error_text, first_line, shown
from grouprl.extras import how_to_install

EXTRAS = {
    "box2d": ("box2d", "lunarlander", "bipedal"),
    "mujoco": ("mujoco",),
    "toy-text": ("toy_text", "toy-text"),
    "atari": ("ale", "atari"),
}

DIED = "its worker process died; what it printed before says why"


def unknown_id_message(env_id: str, error: Exception) -> str:
    """What to say of an id Gymnasium does not know."""
    if isinstance(error, ImportError):
        return (
            f"cannot import the module named in {shown(env_id)}: {first_line(error)}; it is looked for in {Path.cwd()} "
            "and among the installed packages"
        )
    package, _, name = env_id.rpartition(":")
    if package:
        return (
            f"{package} was imported, but it registers no environment {shown(name)} and has no class of that name; if "
            f"{package} registers its environments through a function, call that first and use Python: "
            "GRPO(lambda: gymnasium.make(...))"
        )
    if name.startswith("ALE/") and not any(known.startswith("ALE/") for known in gym.registry):
        return f"{shown(env_id)} needs packages that are not installed; run: {how_to_install('atari')}"
    file = Path(name) if name.endswith(".py") else Path(f"{name}.py")
    if file.is_file():
        module = ".".join(file.with_suffix("").parts)
        return f"{shown(env_id)} is a file here; name the class of the environment in it: {module}:MyEnv"
    close = difflib.get_close_matches(name, list(gym.registry), n=3)
    hint = (
        f"did you mean {' or '.join(close)}?" if close else "gymnasium.pprint_registry() lists the ids installed here."
    )
    return (
        f"no environment {shown(env_id)} is registered; {hint} "
        "An environment of another package needs that package's name in front: 'package:Env-v0'."
    )


def missing_extra_message(env_id: str, entry_point: str, error: Exception) -> str:
    """What to say of an environment whose dependencies are not installed."""
    text = f"{entry_point} {error}".lower()
    for extra, marks in EXTRAS.items():
        if any(mark in text for mark in marks):
            return f"{env_id} needs packages that are not installed; run: {how_to_install(extra)}"
    return f"{env_id} needs packages that are not installed: {error}"


def cannot_make_message(name: str, given: Mapping[str, Any], error: Exception) -> str:
    """What to say of an environment whose constructor failed."""
    arguments = f" with {shown(dict(given), 200)}" if given else ""
    return (
        f"{name} cannot be made{arguments}: {error_text(error)}. "
        "It must be a gymnasium.Env with an observation_space and an action_space; constructor arguments go in "
        "env_kwargs (--env KEY=VALUE) for an id, or into a callable such as lambda: MyEnv(size=3)"
    )


def environment_error(error: BaseException, when: str, number: int | None = None) -> TrainingError:
    """Name the environment, the moment and the cause of an exception that came out of an environment.

    Args:
        error: what was raised.
        when: the moment, such as "in step".
        number: the environment's, if the exception surely is one of its own code; None where a vector environment
            raised, which may mean that a worker process died.
    """
    text, cause = first_line(error), error_text(error)
    inside = number is not None
    if "unexpected keyword argument 'seed'" in text or "unexpected keyword argument 'options'" in text:
        hint = "reset must take both: def reset(self, *, seed=None, options=None)"
    elif "array element with a sequence" in text:
        hint = "a reward must be one number; make it one with gymnasium.wrappers.TransformReward"
    elif "values to unpack" in text and not inside:
        hint = "reset must return (observation, info), step (observation, reward, terminated, truncated, info)"
    elif "Output array is the wrong shape" in text or "must have the same shape" in text:
        hint = "an observation has another shape than the observation_space says"
    elif not inside and isinstance(error, EOFError | BrokenPipeError | ConnectionError):
        hint = DIED
    elif isinstance(error, gym.error.AlreadyPendingCallError | gym.error.NoAsyncCallError):
        hint = "a call before was interrupted, and its answers are still due; make the vector environment anew"
    elif isinstance(error, gym.error.ClosedEnvironmentError):
        hint = "it has been closed; make it anew and call agent.set_env(env)"
    else:
        hint = f"the fault is inside the environment{_place(error)}; GROUPRL_TRACEBACK=1 shows how it came there"
    return TrainingError(
        f"{'the environment' if number is None else f'environment {number}'} failed {when}: {cause}; {hint}"
    )


def _place(error: BaseException) -> str:
    """Where the exception was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    if frames and "gymnasium/vector" in Path(frames[-1].filename).as_posix():  # it came from a worker process
        return ""
    return f", at line {frames[-1].lineno} of {frames[-1].filename}" if frames else ""
