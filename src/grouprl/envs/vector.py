"""Any environment as a Gymnasium ``VectorEnv``: an id, a callable, an ``Env``, or a ``VectorEnv`` as it is."""

from __future__ import annotations

import contextlib
import difflib
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from grouprl.errors import TrainingError, UsageError
from grouprl.extras import how_to_install
from grouprl.importing import import_here

EnvLike = str | Callable[[], gym.Env[Any, Any]] | gym.Env[Any, Any] | VectorEnv[Any, Any, Any]

EXTRAS = {
    "box2d": ("box2d", "lunarlander", "bipedal"),
    "mujoco": ("mujoco",),
    "toy-text": ("toy_text", "toy-text"),
    "atari": ("ale", "atari"),
}


def make_vector(
    env: EnvLike, n_envs: int, vectorization: str = "auto", env_kwargs: Mapping[str, Any] | None = None, seed: int = 0
) -> VectorEnv[Any, Any, Any]:
    """Build the environments one batch is collected from.

    Args:
        env: a Gymnasium id (``"CartPole-v1"``, ``"module:Env-v0"``, ``"envpool:Pong-v5"``), a callable that returns a
            fresh ``Env``, one ``Env`` (then there is just that one), or a ``VectorEnv`` used as it is.
        n_envs: how many, for ids and callables.
        vectorization: ``auto`` (the environment's own vector entry point, else ``sync``), ``sync``, ``async``,
            ``vector_entry_point`` or ``envpool``.
        env_kwargs: passed to the environment's constructor, for ids.
        seed: only EnvPool needs it at construction.

    Raises:
        UsageError: unknown id, missing extra, or arguments that do not go together.
    """
    kwargs = dict(env_kwargs or {})
    if isinstance(env, str):
        if vectorization == "envpool" or env.startswith("envpool:"):
            return _make_envpool(env.removeprefix("envpool:"), n_envs, kwargs, seed)
        return _make_from_id(env, n_envs, vectorization, kwargs)
    if kwargs:
        raise UsageError(
            f"env_kwargs={kwargs} only goes with an environment id; pass a callable such as lambda: MyEnv(...)"
        )
    if isinstance(env, VectorEnv):
        return env
    if isinstance(env, gym.Env):
        return SyncVectorEnv([lambda: env])
    if callable(env):
        makers = [env] * n_envs
        if vectorization not in ("auto", "sync", "async"):
            raise UsageError(f"vectorization={vectorization} needs an environment id; use auto, sync or async")
        try:
            if vectorization == "async":
                return AsyncVectorEnv(makers)
            made = SyncVectorEnv(makers, copy=False)
        except Exception as error:  # whatever the user's callable raises
            raise UsageError(cannot_make_message(env_name(env), {}, error)) from error
        if len({id(one.unwrapped) for one in made.envs}) < n_envs:
            raise UsageError(
                f"the callable returned the same environment again, and {n_envs} of them are stepped side by side; "
                "return a new one at each call (lambda: MyEnv()), or pass the environment itself"
            )
        return made
    raise UsageError(
        f"cannot make environments from {env!r} ({type(env).__name__}); "
        "pass a Gymnasium id, a callable returning an Env, an Env, or a VectorEnv"
    )


def _make_from_id(env_id: str, n_envs: int, vectorization: str, kwargs: dict[str, Any]) -> VectorEnv[Any, Any, Any]:
    given = dict(kwargs)
    mode = None if vectorization == "auto" else vectorization
    vector_kwargs: dict[str, Any] = {}
    spec = find_spec(env_id)
    if mode is None:
        mode = "vector_entry_point" if is_vectorised(env_id) else "sync"
    if mode == "vector_entry_point" and spec.vector_entry_point is None:
        raise UsageError(f"{env_id} has no vector entry point; use vectorization=auto, sync or async")
    if mode == "sync":
        vector_kwargs["copy"] = False  # the collector copies what it keeps
    if mode in ("sync", "async"):
        kwargs.setdefault("disable_env_checker", True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*out of date.*")
            return gym.make_vec(env_id, num_envs=n_envs, vectorization_mode=mode, vector_kwargs=vector_kwargs, **kwargs)
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        raise UsageError(missing_extra_message(env_id, str(spec.entry_point), error)) from None
    except Exception as error:  # whatever its constructor raises
        raise UsageError(cannot_make_message(env_id, given, error)) from error


def find_spec(env_id: str) -> EnvSpec:
    """The registered specification of ``"Env-v0"`` or ``"module:Env-v0"`` (the module is imported first).

    The module may be installed, or a file in the current directory. A class or function of that name in the module is
    registered, if nothing else is: ``"my_file:MyEnv"`` needs no registration.

    Raises:
        UsageError: no such module or id, with the closest ids.
    """
    package, _, name = env_id.rpartition(":")
    try:
        if package:
            module = import_here(package)
            if name not in gym.registry and callable(getattr(module, name, None)):
                gym.register(name, entry_point=getattr(module, name))
        return gym.spec(name)
    except (gym.error.Error, ImportError) as error:
        raise UsageError(unknown_id_message(env_id, error)) from None


def is_vectorised(env: EnvLike) -> bool:
    """Whether ``env`` is an id whose environment brings a vectorised version of its own, which ``auto`` uses."""
    if not isinstance(env, str) or env.startswith("envpool:"):
        return False
    spec = find_spec(env)
    return spec.vector_entry_point is not None and not spec.additional_wrappers


def _make_envpool(env_id: str, n_envs: int, kwargs: dict[str, Any], seed: int) -> VectorEnv[Any, Any, Any]:
    try:
        import envpool
    except ImportError:
        raise UsageError(f"EnvPool is not installed; run: {how_to_install('envpool')}") from None
    if env_id not in envpool.list_all_envs():
        close = difflib.get_close_matches(env_id, envpool.list_all_envs(), n=3)
        raise UsageError(f"EnvPool has no environment {env_id!r}; close names: {', '.join(close) or 'none'}")
    return EnvPoolVector(envpool.make(env_id, env_type="gymnasium", num_envs=n_envs, seed=seed, **kwargs), env_id)


class EnvPoolVector(VectorEnv[Any, Any, Any]):
    """EnvPool behind Gymnasium's ``VectorEnv``: a NEXT_STEP environment that is seeded once, at construction."""

    def __init__(self, pool: Any, env_id: str) -> None:
        self.pool = pool
        self.num_envs = int(pool.config["num_envs"])
        self.single_observation_space = pool.observation_space
        self.single_action_space = pool.action_space
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, self.num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, self.num_envs)
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.env_id = env_id
        self.max_episode_steps = pool.spec.config.max_episode_steps

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        if isinstance(seed, list):
            raise ValueError("EnvPool seeds its environments once, when it makes them")
        obs, info = self.pool.reset()
        return obs, {k: v for k, v in info.items() if k == "action_mask"}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        if np.issubdtype(actions.dtype, np.integer):
            actions = actions.astype(np.int32)
        obs, reward, terminated, truncated, info = self.pool.step(actions)
        return obs, reward, terminated, truncated, {k: v for k, v in info.items() if k == "action_mask"}

    def close_extras(self, **kwargs: Any) -> None:
        self.pool.close()


def close_vector(venv: VectorEnv[Any, Any, Any], patience: float = 5.0) -> None:
    """Close ``venv``; workers that are dead, or busy for longer than ``patience`` seconds, stop nobody.

    Gymnasium's own ``close`` waits for an answer of each worker, and fails or hangs where one of them died.
    """
    if not isinstance(venv, AsyncVectorEnv):
        venv.close()
    elif not venv.closed:
        for pipe in filter(None, venv.parent_pipes):
            with contextlib.suppress(OSError):
                pipe.send(("close", None))
        deadline = time.monotonic() + patience
        for process, pipe in zip(venv.processes, venv.parent_pipes, strict=True):
            while process.is_alive() and time.monotonic() < deadline:
                process.join(0.01)
                with contextlib.suppress(OSError, EOFError):
                    while pipe is not None and pipe.poll():  # a worker that cannot get rid of a result reads nothing
                        pipe.recv()
            process.kill()
            process.join()
            if pipe is not None:
                pipe.close()
        venv.closed = True


def autoreset_mode(venv: VectorEnv[Any, Any, Any]) -> AutoresetMode:
    """The environment's autoreset mode; NEXT_STEP, Gymnasium's default, where its metadata does not say."""
    mode = (venv.metadata or {}).get("autoreset_mode", AutoresetMode.NEXT_STEP)
    return mode if isinstance(mode, AutoresetMode) else AutoresetMode(mode)


def env_name(env: EnvLike) -> str:
    """What to call the environment in files and messages."""
    if isinstance(env, str):
        return env
    spec = getattr(env, "spec", None)
    if spec is not None and getattr(spec, "id", None):
        return str(spec.id)
    return getattr(env, "__name__", type(env).__name__)


def horizon(venv: VectorEnv[Any, Any, Any]) -> int | None:
    """The time limit of one episode in steps, or None if there is none to be known."""
    for source in (venv, getattr(venv, "spec", None), getattr(getattr(venv, "envs", [None])[0], "spec", None)):
        limit = getattr(source, "max_episode_steps", None)
        if isinstance(limit, int | np.integer) and limit > 0:
            return int(limit)
    return None


def reward_threshold(env: EnvLike) -> float | None:
    """The mean return at which Gymnasium's registry calls the environment solved, or None."""
    if isinstance(env, str):
        try:
            return find_spec(env.removeprefix("envpool:")).reward_threshold
        except UsageError:  # EnvPool knows ids that Gymnasium does not
            return None
    threshold = getattr(getattr(env, "spec", None), "reward_threshold", None)
    return None if threshold is None else float(threshold)


def unknown_id_message(env_id: str, error: Exception) -> str:
    """What to say of an id Gymnasium does not know."""
    if isinstance(error, ImportError):
        return (
            f"cannot import the module named in {env_id!r}: {error}; it is looked for in {Path.cwd()} and among the "
            "installed packages"
        )
    package, _, name = env_id.rpartition(":")
    if package:
        return (
            f"{package} was imported, but it registers no environment {name!r} and has no class of that name; if "
            f"{package} registers its environments through a function, call that first and use Python: "
            "GRPO(lambda: gymnasium.make(...))"
        )
    close = difflib.get_close_matches(name, list(gym.registry), n=3)
    hint = (
        f"did you mean {' or '.join(close)}?" if close else "gymnasium.pprint_registry() lists the ids installed here."
    )
    return (
        f"no environment {env_id!r} is registered; {hint} "
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
    arguments = f" with {dict(given)}" if given else ""
    return (
        f"{name} cannot be made{arguments}: {type(error).__name__}: {str(error).strip() or 'no message'}. "
        "It must be a gymnasium.Env with an observation_space and an action_space; constructor arguments go in "
        "env_kwargs (--env KEY=VALUE) for an id, or into a callable such as lambda: MyEnv(size=3)"
    )


def environment_error(error: Exception, when: str) -> TrainingError:
    """Name the environment, the moment and the cause of an exception raised inside an environment."""
    text = str(error).strip().rstrip(".")
    cause = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if "array element with a sequence" in text:
        hint = "a reward must be one number; make it one with gymnasium.wrappers.TransformReward"
    elif "values to unpack" in text:
        hint = "reset must return (observation, info), step (observation, reward, terminated, truncated, info)"
    else:
        hint = "the fault is inside the environment, or its worker process died; GROUPRL_TRACEBACK=1 shows where"
    return TrainingError(f"the environment failed {when}: {cause}; {hint}")
