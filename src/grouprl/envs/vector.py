"""Any environment as a Gymnasium ``VectorEnv``: an id, a callable, an ``Env``, or a ``VectorEnv`` as it is."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec, load_env_creator
from gymnasium.vector import SyncVectorEnv, VectorEnv
from gymnasium.wrappers import TimeLimit

from grouprl.envs.batch_checks import check_vector
from grouprl.envs.checked import Checked
from grouprl.envs.closing import close
from grouprl.envs.env_errors import cannot_make_message, missing_extra_message, unknown_id_message
from grouprl.envs.pool import make_envpool
from grouprl.envs.shared import Shared
from grouprl.envs.step_watch import making
from grouprl.envs.workers import Workers, time_limit_in_workers
from grouprl.errors import GrouprlError, UsageError, with_type
from grouprl.importing import import_here
from grouprl.machine.ranks import ALONE, Ranks
from grouprl.runs.time_limit import Expired

EnvLike = str | Callable[[], gym.Env[Any, Any]] | gym.Env[Any, Any] | VectorEnv[Any, Any, Any]

SAME_AS_MAKE = "gymnasium.envs.classic_control."
"""Vector entry points here give the same observations and rewards as their environments one by one."""


def make_vector(
    env: EnvLike,
    n_envs: int,
    vectorization: str = "auto",
    env_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
    timeout: float | None = None,
    ranks: Ranks = ALONE,
) -> VectorEnv[Any, Any, Any]:
    """Build the environments one batch is collected from.

    Args:
        env: a Gymnasium id (``"CartPole-v1"``, ``"module:Env-v0"``, ``"envpool:Pong-v5"``), a callable that returns a
            fresh ``Env``, one ``Env`` (then there is just that one), or a ``VectorEnv`` used as it is.
        n_envs: how many, for ids and callables.
        vectorization: ``auto`` (the vector entry point of Gymnasium's own CartPole, else ``sync``), ``sync``,
            ``async``, ``vector_entry_point`` (of any environment, if it has the same spaces) or ``envpool``.
        env_kwargs: passed to the environment's constructor, for ids.
        seed: only EnvPool needs it at construction.
        timeout: seconds that making one of them may take; default: any time.
        ranks: the processes that the environments are shared out among.

    Raises:
        UsageError: unknown id, missing extra, or arguments that do not go together.
        TrainingError: one took longer than ``timeout``.
    """
    _refuse_foreign(env)
    if ranks.world > 1:
        _check_can_share(env, n_envs, vectorization, ranks)
    made: list[gym.Env[Any, Any]] = []
    kwargs = dict(env_kwargs or {})
    return making(
        env_name(env), lambda: len(made), timeout, lambda: _make(env, n_envs, vectorization, kwargs, seed, made, ranks)
    )


def _make(
    env: EnvLike,
    n_envs: int,
    vectorization: str,
    kwargs: dict[str, Any],
    seed: int,
    made: list[gym.Env[Any, Any]],
    ranks: Ranks,
) -> VectorEnv[Any, Any, Any]:
    """See :func:`make_vector`. Single environments are put into ``made`` as they are made."""
    if isinstance(env, str):
        if vectorization == "envpool" or env.startswith("envpool:"):
            return make_envpool(env.removeprefix("envpool:"), n_envs, kwargs, seed)
        return _make_from_id(env, n_envs, vectorization, kwargs, made, ranks)
    if kwargs:
        raise UsageError(
            f"env_kwargs={with_type(kwargs)} only goes with an environment id; pass a callable such as "
            "lambda: MyEnv(...)"
        )
    if isinstance(env, VectorEnv):
        check_vector(env)
        return env
    if isinstance(env, gym.Env):
        return _side_by_side(lambda: env, 1, "sync", env_name(env), made)
    if callable(env):
        if vectorization not in ("auto", "sync", "async"):
            raise UsageError(f"vectorization={vectorization} needs an environment id; use auto, sync or async")
        return _side_by_side(env, n_envs, vectorization, env_name(env), made, ranks=ranks)
    raise UsageError(_not_an_environment(env))


def _not_an_environment(given: object) -> str:
    several = "; of several callables pass one, and how many in n_envs=" if isinstance(given, list | tuple) else ""
    return (
        f"cannot make environments from {with_type(given)}{several}; "
        "pass a Gymnasium id, a callable returning an Env, an Env, or a VectorEnv"
    )


def _refuse_foreign(env: Any) -> None:
    """Raise UsageError for a vector environment of Stable-Baselines3, which has another interface."""
    if hasattr(env, "step_async") and not isinstance(env, VectorEnv):
        raise UsageError(
            f"{with_type(env)} is a vector environment of Stable-Baselines3; pass the id or the callable that makes "
            f"one environment, and n_envs={getattr(env, 'num_envs', '...')}"
        )


def _check_can_share(env: EnvLike, n_envs: int, vectorization: str, ranks: Ranks) -> None:
    """Raise UsageError if environments cannot be shared out among several processes."""
    if isinstance(env, gym.Env | VectorEnv):
        raise UsageError(
            f"{ranks.world} processes share out the environments, so each must make its own: pass an id, or a callable "
            f"that makes one environment, and n_envs; {with_type(env)} was given on rank {ranks.rank}"
        )
    if vectorization == "envpool" or (isinstance(env, str) and env.startswith("envpool:")):
        raise UsageError(
            f"EnvPool seeds its environments all at once, so {ranks.world} processes cannot share them out; start one "
            "process, or use vectorization=async"
        )
    if n_envs < ranks.world:
        raise UsageError(
            f"n_envs={n_envs} leaves rank {n_envs} of {ranks.world} without an environment; raise n_envs, or start "
            f"at most {n_envs} processes"
        )


def _make_from_id(
    env_id: str,
    n_envs: int,
    vectorization: str,
    kwargs: dict[str, Any],
    made: list[gym.Env[Any, Any]],
    ranks: Ranks,
) -> VectorEnv[Any, Any, Any]:
    spec = find_spec(env_id)
    if vectorization == "vector_entry_point" and spec.vector_entry_point is None:
        raise UsageError(f"{env_id} has no vector entry point; use vectorization=auto, sync or async")
    how = {"disable_env_checker": True, **kwargs}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*out of date.*")
            if vectorization == "vector_entry_point" or (vectorization == "auto" and is_vectorised(env_id, kwargs)):
                venv = gym.make_vec(env_id, num_envs=n_envs, vectorization_mode="vector_entry_point", **kwargs)
                if vectorization == "vector_entry_point":
                    _check_same_environment(env_id, venv, how)
                return venv
            return _side_by_side(lambda: gym.make(env_id, **how), n_envs, vectorization, env_id, made, kwargs, ranks)
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        raise UsageError(missing_extra_message(env_id, str(spec.entry_point), error)) from None
    except GrouprlError:
        raise
    except Exception as error:  # whatever its constructor raises
        raise UsageError(cannot_make_message(env_id, kwargs, error)) from error


def _side_by_side(
    make: Callable[[], gym.Env[Any, Any]],
    n_envs: int,
    vectorization: str,
    name: str,
    made: list[gym.Env[Any, Any]],
    given: Mapping[str, Any] | None = None,
    ranks: Ranks = ALONE,
) -> VectorEnv[Any, Any, Any]:
    """``n_envs`` environments that ``make`` returns, each :class:`Checked`, in all processes together."""
    share = ranks.share(n_envs)

    def maker(number: int) -> Callable[[], gym.Env[Any, Any]]:
        def one() -> gym.Env[Any, Any]:
            env = make()
            made.append(env)
            return Checked(env, number)

        return one

    try:
        makers = [maker(i) for i in share]
        # The collector copies what it keeps.
        venv = Workers(makers) if vectorization == "async" else SyncVectorEnv(makers, copy=False)
    except (gym.error.DependencyNotInstalled, ImportError, GrouprlError, Expired, KeyboardInterrupt):
        _close_all(made)
        raise
    except Exception as error:  # whatever the user's code raises
        _close_all(made)
        raise UsageError(cannot_make_message(name, given or {}, error)) from error
    venv.spec = made[0].spec  # of all of them; workers cannot be asked
    if vectorization == "async":
        made.clear()  # the one that only showed its spaces
    elif len({id(one.unwrapped) for one in made}) < len(share):
        raise UsageError(
            f"the callable returned the same environment again, and {n_envs} of them are stepped side by side; "
            "return a new one at each call (lambda: MyEnv()), or pass the environment itself"
        )
    return venv if ranks.world == 1 else Shared(venv, n_envs, ranks)


def _close_all(envs: list[gym.Env[Any, Any]]) -> None:
    """Close what was made before something failed, as far as it lets itself be closed."""
    for env in envs:
        with contextlib.suppress(Exception):
            env.close()


def _check_same_environment(env_id: str, venv: VectorEnv[Any, Any, Any], kwargs: dict[str, Any]) -> None:
    """Raise UsageError if an environment's own vectorised version is another environment."""
    one = gym.make(env_id, **kwargs)
    same = (one.observation_space, one.action_space) == (venv.single_observation_space, venv.single_action_space)
    spaces = f"{one.observation_space} and {one.action_space}"
    close(one)
    if not same:
        close(venv)
        raise UsageError(
            f"the vector entry point of {env_id} is another environment than gymnasium.make gives: it has the spaces "
            f"{venv.single_observation_space} and {venv.single_action_space}, and not {spaces}; use "
            "vectorization=auto, sync or async, or pass it yourself: GRPO(gymnasium.make_vec(...))"
        )


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


def is_vectorised(env: EnvLike, env_kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether ``env`` is an id whose environment has a vectorised version that is known to be the same environment.

    Those of other packages may show other observations and rewards than ``gymnasium.make``: that of Atari's games
    stacks frames and clips rewards.
    """
    if not isinstance(env, str) or env.startswith("envpool:"):
        return False
    spec = find_spec(env)
    if not str(spec.vector_entry_point).startswith(SAME_AS_MAKE) or spec.additional_wrappers:
        return False
    known = inspect.signature(load_env_creator(str(spec.vector_entry_point))).parameters
    return set(env_kwargs or {}) <= set(known)


def env_name(env: EnvLike) -> str:
    """What to call the environment in files and messages."""
    if isinstance(env, str):
        return env
    spec = getattr(env, "spec", None)
    if spec is not None and getattr(spec, "id", None):
        return str(spec.id)
    return getattr(env, "__name__", type(env).__name__)


def share_environments(one: Any, other: Any) -> bool:
    """Whether two environments, vector environments or wrappers of them step one and the same environment."""

    def parts(env: Any) -> set[int]:
        base = env.unwrapped
        return {id(base), *(id(each.unwrapped) for each in getattr(base, "envs", ()))}

    return bool(parts(one) & parts(other))


def horizon(venv: VectorEnv[Any, Any, Any]) -> int | None:
    """The time limit of one episode in steps, or None if there is none to be known.

    It is looked for in the vector environment and in those that it wraps, then in the first of its environments. If
    these are in processes of their own, they are asked, so ask once and not between steps that are under way.
    """
    return next((int(limit) for limit in _limits(venv) if isinstance(limit, int | np.integer) and limit > 0), None)


def _limits(venv: VectorEnv[Any, Any, Any]) -> Iterator[Any]:
    """Whatever may be the time limit, in the order in which it is believed."""
    layers = [venv]
    while isinstance(inner := getattr(layers[-1], "env", getattr(layers[-1], "own", None)), VectorEnv):
        layers.append(inner)
    if venv.unwrapped not in layers:  # a wrapper that keeps what it wraps under another name
        layers.append(venv.unwrapped)
    yield from (getattr(layer, "max_episode_steps", None) for layer in layers)
    yield from (getattr(layer.spec, "max_episode_steps", None) for layer in layers)
    for layer in layers:
        first = getattr(layer, "envs", [None])[0]
        yield getattr(getattr(first, "spec", None), "max_episode_steps", None)
        while isinstance(first, gym.Wrapper):  # such as a TimeLimit that a user's callable has put around it
            if isinstance(first, TimeLimit):
                yield first._max_episode_steps
            first = first.env
    yield time_limit_in_workers(layers[-1])


def reward_threshold(env: EnvLike) -> float | None:
    """The mean return at which Gymnasium's registry calls the environment solved, or None."""
    if isinstance(env, str):
        try:
            return find_spec(env.removeprefix("envpool:")).reward_threshold
        except UsageError:  # EnvPool knows ids that Gymnasium does not
            return None
    threshold = getattr(getattr(env, "spec", None), "reward_threshold", None)
    return None if threshold is None else float(threshold)
