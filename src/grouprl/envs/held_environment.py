"""The environment that an agent trains on: given, changed, made again after an interruption, closed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import gymnasium as gym
from gymnasium.vector import VectorEnv

from grouprl.envs.collect import Collector
from grouprl.envs.description import Description
from grouprl.envs.env_kwargs import to_json, why_not_again
from grouprl.envs.loop import Loop
from grouprl.envs.vector import EnvLike, env_name, make_vector
from grouprl.envs.workers import check_settled, close_vector, settled
from grouprl.errors import UsageError


class HeldEnvironment:
    """An agent's environment, as it was given and as the vector environment that batches are collected from.

    Args:
        description: of the agent; what it says of the environment is kept current here.
        loop: collects from the environment.

    Attributes:
        given: what the user gave, or None.
        venv: the vector environment made of it, or None.
    """

    def __init__(self, description: Description, loop: Loop) -> None:
        self.description, self.loop = description, loop
        self.given: EnvLike | None = None
        self.venv: VectorEnv[Any, Any, Any] | None = None
        self._interrupted = self._stepped = self._handed_out = False

    @property
    def made_here(self) -> bool:
        """Whether the environments were made here, from an id or a callable; others get them from `hand_out` alone."""
        return not isinstance(self.given, gym.Env | VectorEnv)

    def hold(self, env: EnvLike, venv: VectorEnv[Any, Any, Any]) -> None:
        """Collect from ``venv``, which was made of ``env``, from now on.

        Raises:
            UsageError: the number of environments is no multiple of ``group_size``.
        """
        self._check_groups(venv)
        self.given, self.venv = env, venv
        self._interrupted = self._handed_out = False
        self.loop.attach(venv)

    def _check_groups(self, venv: VectorEnv[Any, Any, Any]) -> None:
        size = self.description.config.group_size
        if size is not None and venv.num_envs % size:
            raise UsageError(
                f"group_size={size} needs a multiple of {size} environments, and {venv.num_envs} were given; pass a "
                "callable, such as GRPO(lambda: MyEnv(), n_envs=16)"
            )

    def set(self, env: EnvLike, env_kwargs: Mapping[str, Any] | None) -> None:
        """See :meth:`grouprl.envs.grpo.GRPO.set_env`."""
        kwargs, config = dict(env_kwargs or {}), self.description.config
        venv = make_vector(
            env, config.n_envs, config.how_to_vectorize, kwargs, config.seed, config.env_timeout, self.loop.ranks
        )
        theirs_to_close = not isinstance(env, gym.Env | VectorEnv)
        for name, ours, theirs in (
            ("observation", self.description.observation_space, venv.single_observation_space),
            ("action", self.description.action_space, venv.single_action_space),
        ):
            if ours != theirs:
                if theirs_to_close:
                    close_vector(venv)
                raise UsageError(f"the new environment's {name} space {theirs} differs from the policy's {ours}; "
                                 "build a new GRPO(env) for it")  # fmt: skip
        self._check_groups(venv)
        if self.venv is not None and self.made_here:
            close_vector(self.venv)
        self.description = replace(
            self.description, env_id=env_name(env), env_kwargs=kwargs, env_lost=why_not_again(env, kwargs)
        )
        self.hold(env, venv)

    def holds(self, env: EnvLike, env_kwargs: Mapping[str, Any] | None) -> bool:
        """Whether ``env`` is the environment already: the same object, or the same id with the same arguments."""
        if not isinstance(env, str):
            return env is self.given
        known = self.description
        if env != known.env_id or known.env_lost:
            return False
        try:
            return to_json(env_kwargs or {}) == to_json(known.env_kwargs)
        except TypeError:  # arguments that cannot be compared
            return False

    def where(self) -> tuple[EnvLike, dict[str, Any]]:
        """See :meth:`grouprl.envs.grpo.GRPO.where`."""
        kwargs = dict(self.description.env_kwargs)
        if self.given is not None:
            return self.given, kwargs
        if self.description.env_lost or not self.description.env_id:
            raise UsageError(
                f"this agent has no environment: {self.description.env_lost or 'its file names none'}; call "
                "agent.set_env(env), or give env to GRPO.load, to evaluate or to from_checkpoint; on the "
                "command line, grouprl evaluate RUN --on module:Env, or train with grouprl train module:Env"
            )
        return self.description.env_id, kwargs

    def ready(self) -> Collector:
        """The collector; makes the environments first where there are none yet, or workers of theirs have ended."""
        if self._interrupted and self.venv is not None:
            if self.made_here and not settled(self.venv):
                close_vector(self.venv, patience=0.0)
                self.venv = None
                self.loop.detach()
            else:
                check_settled(self.venv)
        if self.loop.collector is None:
            env, kwargs = self.where()
            try:
                self.set(env, kwargs)
            except UsageError as error:
                raise UsageError(
                    f"call agent.set_env(env) first: {self.description.env_id!r} cannot be made again ({error})"
                ) from None
        self._interrupted = False
        assert self.loop.collector is not None
        return self.loop.collector

    def hand_out(self) -> VectorEnv[Any, Any, Any] | None:
        """See :meth:`grouprl.envs.grpo.GRPO.get_env`."""
        self._handed_out = True
        return self.venv

    def begin(self) -> None:
        """A call of ``learn`` begins: what the user may have stepped since the call before starts fresh episodes."""
        if self._stepped and (self._handed_out or not self.made_here):
            self.loop.restart_episodes()
        self._stepped = True

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Around an iteration of the loop: whatever is raised there may leave answers of the environment due."""
        try:
            yield
        except BaseException:
            self._interrupted = True
            raise
        collector = self.loop.collector
        if collector is not None and collector.stepper.masks_in_info and not self.description.masks_in_info:
            self.description = replace(self.description, masks_in_info=True)

    def close(self) -> None:
        """See :meth:`grouprl.envs.grpo.GRPO.close`."""
        if self.venv is not None:
            close_vector(self.venv)
            self.venv = None
            self.loop.detach()
            if not self.made_here:
                self.given = None
