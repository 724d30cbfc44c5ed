"""GRPO for Gymnasium environments, in the shape Stable-Baselines3 made familiar. No critic network anywhere."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import Space
from gymnasium.vector import VectorEnv
from torch import nn

from grouprl.envs import checkpoint, copies, loading, presets
from grouprl.envs.acting import chosen_action
from grouprl.envs.action_codec import ActionCodec
from grouprl.envs.arguments import whole_number
from grouprl.envs.collect import Collector
from grouprl.envs.config import GRPOConfig
from grouprl.envs.description import Description
from grouprl.envs.env_kwargs import why_not_again
from grouprl.envs.export import export_module
from grouprl.envs.finite import check_policy
from grouprl.envs.held_environment import HeldEnvironment
from grouprl.envs.learn_call import train_until
from grouprl.envs.loop import Loop, Metrics, Seeds
from grouprl.envs.model_file import model_file, offering_another
from grouprl.envs.policy import Network, Policy, check_device
from grouprl.envs.sizes import least_bytes
from grouprl.envs.spaces import ObservationCodec
from grouprl.envs.stable_baselines import (
    missing_attribute,
    refuse_arguments,
    refuse_positional,
)
from grouprl.envs.unread import OF_LOADED, RULES
from grouprl.envs.vector import EnvLike, env_name, make_vector
from grouprl.envs.workers import close_vector
from grouprl.errors import UsageError
from grouprl.machine.accelerate_launch import refuse_all_of_it
from grouprl.machine.ranks import Ranks, join
from grouprl.machine.room import check_room
from grouprl.objective.user_functions import TensorFunction, UserFunctions
from grouprl.runs.files import user_path
from grouprl.runs.state import load_state, save_state
from grouprl.settings.unread import Unread, without_effect

Callback = Callable[["GRPO", Metrics], bool | None]
"""Told of every update, with the agent and the named values; returning False stops training."""


def _met(config: GRPOConfig) -> Ranks:
    """The processes that train together."""
    refuse_all_of_it("environments")
    return join(gpu=config.device.startswith("cuda"))


_making_a_policy = threading.Lock()


class GRPO:
    """Group Relative Policy Optimization on a Gymnasium environment.

    Examples:
        >>> agent = GRPO("CartPole-v1", seed=1).learn(100_000)  # doctest: +SKIP
        >>> action, _ = agent.predict(observation, deterministic=True)  # doctest: +SKIP

    Args:
        env: a Gymnasium id, a callable returning an ``Env``, an ``Env``, or a ``VectorEnv``.
        preset: ``"auto"`` takes the preset named like the environment, if there is one; a name takes that preset;
            None takes the robust default.
        env_kwargs: passed to the environment's constructor (ids only).
        network: builds the policy's network from (inputs, outputs); default: an MLP of ``hidden_sizes``.
        advantage_function: an estimator of your own, in the place of ``advantage``:
            ``(rewards [S], lengths [N], group [N]) -> [S]`` for N samples of S steps in all, as the functions of
            :mod:`grouprl.objective`. They are used as they are returned; :func:`grouprl.objective.standardise` centres
            and scales. It may ask for more by the names of further arguments: ``observations``, ``values``,
            ``states``, ``gamma``, ``terminated``, ``truncated``, ``elapsed``, ``trainable``
            (:func:`grouprl.envs.estimate.offers`). If it
            compares whole episodes, set ``collect="episodes"`` or ``group_size``.
        surrogate_function: a loss of your own per step, in the place of the surrogate of ``loss_type``:
            ``(logp [m], logp_old [m], advantages [m]) -> [m]``, differentiable in ``logp``. Both:
            :mod:`grouprl.objective.user_functions`.
        **settings: any field of :class:`~grouprl.envs.config.GRPOConfig`; they win over the preset's.

    Raises:
        UsageError: unknown setting or environment, a space that is not supported, a missing extra.
    """

    def __init__(
        self,
        env: EnvLike,
        *misplaced: Any,
        preset: str | None = "auto",
        env_kwargs: Mapping[str, Any] | None = None,
        network: Network | None = None,
        advantage_function: TensorFunction | None = None,
        surrogate_function: TensorFunction | None = None,
        **settings: Any,
    ) -> None:
        refuse_positional(env, misplaced)
        functions = UserFunctions(advantage_function, surrogate_function)
        if network is not None and not callable(network):
            raise UsageError(f"network={network!r} must be a callable (inputs, outputs) -> torch.nn.Module, or None")
        chosen = presets.resolve(env_name(env), preset)
        config = presets.configure(chosen, settings)
        kwargs = {**(chosen.env_kwargs if chosen and isinstance(env, str) else {}), **(env_kwargs or {})}
        check_room(least_bytes(config))
        env_seed = int(np.random.SeedSequence(config.seed).generate_state(1)[0] >> 1)
        venv = make_vector(
            env, config.n_envs, config.how_to_vectorize, kwargs, env_seed, config.env_timeout, _met(config)
        )
        description = Description(
            config=config,
            observation_space=venv.single_observation_space,
            action_space=venv.single_action_space,
            env_id=env_name(env),
            env_kwargs=kwargs,
            env_lost=why_not_again(env, kwargs),
            custom_network=network is not None,
            custom_advantage=advantage_function is not None,
            custom_surrogate=surrogate_function is not None,
        )
        try:
            self._assemble(description, network, functions)
            self._held.hold(env, venv)
        except BaseException:
            if not isinstance(env, gym.Env | VectorEnv):
                close_vector(venv)
            raise
        if chosen is not None and not isinstance(env, str):
            presets.warn_of_another_environment(chosen, venv.spec)
        self._warn_of_unread(RULES, settings)

    @torch.inference_mode(False)
    @torch.enable_grad()
    def _assemble(self, description: Description, network: Network | None, functions: UserFunctions) -> None:
        """Make all parts of the agent, with an untrained policy and no environment yet."""
        config, self._network = description.config, network
        check_device(config.device)
        init, act, shuffle, starts, predict = np.random.SeedSequence(config.seed).spawn(5)
        self.actions = ActionCodec(description.action_space)
        self.observations = ObservationCodec(description.observation_space, mask_size=self.actions.mask_size)
        pixels = sum(math.prod(shape) for shape in self.observations.images.values())
        check_room(least_bytes(config, self.observations.n_flat or 1, self.observations.n_flat + pixels))
        # Agents may be made in several threads, which share torch's generator.
        with _making_a_policy, torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(init.generate_state(1)[0]))
            self.policy = Policy(self.observations, self.actions, config, network).to(config.device)
        self.policy.eval()  # dropout in a user's network would make the ratio differ from 1 before any update
        self.loop = Loop(
            self.policy, self.actions, config, Seeds(act, shuffle, starts), functions,
            n_steps=description.num_timesteps, ranks=_met(config),
        )  # fmt: skip
        self._held = HeldEnvironment(description, self.loop)
        self._predict_rng = np.random.default_rng(predict)
        self.extra: dict[str, Any] = {}
        self._callbacks: Sequence[Callback] = ()
        """Those of the present call of :meth:`learn`, in their order."""

    def _warn_of_unread(self, rules: Sequence[Unread], given: Collection[str]) -> None:
        """Warn, in the name of the caller's caller, of each of the settings ``given`` that nothing reads."""
        own = self._held.description
        about = {
            "fits_baseline": self.loop.baseline is not None, "continuous": self.policy.gaussian,
            "own_network": own.custom_network, "own_advantage": own.custom_advantage,
            "own_surrogate": own.custom_surrogate, "one_object": not self._held.made_here,
            "one_environment": self.n_envs == 1, "begun": self.num_timesteps > 0,
        }  # fmt: skip
        for said in without_effect(rules, self.config, given, about):
            warnings.warn(said, stacklevel=3)
        if "n_envs" in given and self.config.n_envs != self.n_envs:
            warnings.warn(
                f"n_envs={self.config.n_envs} has no effect: the environment given holds {self.n_envs}", stacklevel=3
            )

    @property
    def config(self) -> GRPOConfig:
        """Every setting; fixed from the start."""
        return self._held.description.config

    @property
    def observation_space(self) -> Space[Any]:
        """The observation space of one environment."""
        return self._held.description.observation_space

    @property
    def action_space(self) -> Space[Any]:
        """The action space of one environment."""
        return self._held.description.action_space

    @property
    def env_id(self) -> str:
        """What the environment is called in files and messages."""
        return self._held.description.env_id

    @property
    def env_kwargs(self) -> dict[str, Any]:
        """The arguments of the environment's constructor."""
        return dict(self._held.description.env_kwargs)

    @property
    def env_lost(self) -> str:
        """Why the environment cannot be made again from a file of this agent, or "" if it can."""
        return self._held.description.env_lost

    @property
    def masks_in_info(self) -> bool:
        """Whether the environment of training named the valid actions, and not in the observation."""
        return self._held.description.masks_in_info

    @property
    def num_timesteps(self) -> int:
        """Environment steps of training so far."""
        return self.loop.n_steps

    @property
    def train_seconds(self) -> float:
        """Seconds of collecting and learning so far."""
        return self.loop.seconds

    @property
    def recent_returns(self) -> list[float]:
        """Returns of the last training episodes, at most 100, the newest last."""
        return list(self.loop.recent_returns)

    @property
    def n_envs(self) -> int:
        """Environments stepped side by side."""
        return self.config.n_envs if self._held.venv is None else self._held.venv.num_envs

    @property
    def device(self) -> torch.device:
        """The device of the policy."""
        return torch.device(self.config.device)

    def get_parameters(self) -> dict[str, dict[str, torch.Tensor]]:
        """``{"policy": tensors}`` by name, those of the normalisation among them; they are the policy's own."""
        return {"policy": self.policy.state_dict()}

    def __getattr__(self, name: str) -> Any:
        """Raises AttributeError with what to use instead, for a name of Stable-Baselines3 or of a setting."""
        raise AttributeError(missing_attribute(name, GRPOConfig.model_fields))

    # --- environment -------------------------------------------------------------------------------------------------
    def where(self) -> tuple[EnvLike, dict[str, Any]]:
        """The environment as it was given, or as a loaded agent's file says, and the arguments of its constructor.

        Raises:
            UsageError: there is none: the agent was loaded, and no file can hold the environment it was trained on.
        """
        return self._held.where()

    def set_env(self, env: EnvLike, env_kwargs: Mapping[str, Any] | None = None) -> None:
        """Train on another environment with the same spaces from now on; its next batch starts with fresh episodes.

        Nothing is learned any more from earlier batches, as ``baseline_memory`` and ``reuse`` have them. Returns and
        lengths of earlier episodes no longer count in :attr:`recent_returns` and in metrics, unless this is the same
        environment again: the same object, or the same id with the same arguments.

        Raises:
            UsageError: its spaces differ from those the policy was built for.
        """
        another = not self._held.holds(env, env_kwargs)
        self._held.set(env, env_kwargs)
        self.loop.forget_batches()
        if another:
            self.loop.forget_episodes()

    def get_env(self) -> VectorEnv[Any, Any, Any] | None:
        """The vector environment batches are collected from, or None after :meth:`load` without one.

        Whoever has it may step it: from then on each call of :meth:`learn` begins with fresh episodes.
        """
        return self._held.hand_out()

    def restart_episodes(self) -> None:
        """Begin the next batch with fresh episodes, as it must where someone else has stepped the environment."""
        self.loop.restart_episodes()

    @property
    def env(self) -> EnvLike | None:
        """The environment as it was given."""
        return self._held.given

    def ready(self) -> Collector:
        """The collector; makes the environments first where there are none yet, or workers of theirs have ended."""
        return self._held.ready()

    # --- training ----------------------------------------------------------------------------------------------------
    def learn(
        self,
        total_timesteps: int,
        callback: Callback | Sequence[Callback] | None = None,
        progress_bar: bool = False,
        **unknown: Any,
    ) -> GRPO:
        """Train for ``total_timesteps`` environment steps (the last batch may go over) and return ``self``.

        An ``Env`` or a ``VectorEnv`` that was given, or that :meth:`get_env` has handed out, may have been stepped by
        others in the meantime: each call begins with fresh episodes there. After an exception the next call does so
        too, whatever was given.

        Args:
            total_timesteps: steps of this call, over all environments; warm-up steps count.
            callback: called as ``callback(agent, metrics)`` after every update; returning False stops training, and so
                does what is false as a number. None and anything else goes on. A list calls each.
                :mod:`grouprl.envs.callbacks` has some, among them one that leaves a run folder. A callback may have a
                method ``around(agent, end)``, a context manager that is entered before the first batch of a call.
            progress_bar: show return, steps per second and time left.

        Raises:
            UsageError: ``total_timesteps`` is no whole number of at least 1; a callback cannot be called with (agent,
                metrics), or would not run when it is.
            TrainingError: the environment failed or a number stopped being finite; the parameters stay as they were
                after the last good gradient step.

        Warns RuntimeWarning if no batch moved a parameter; the metric ``skipped_batches`` counts those that did not.
        """
        refuse_arguments("learn", list(unknown))
        if not isinstance(progress_bar, bool | None):
            raise UsageError(f"progress_bar={progress_bar!r} must be True or False")
        total_timesteps = whole_number("total_timesteps", total_timesteps, least=1)
        start, skipped, batches = self.num_timesteps, self.loop.skipped.copy(), self.loop.batches
        train_until(self, start, start + total_timesteps, callback, progress_bar)
        if self.loop.batches > batches and self.loop.skipped.total() - skipped.total() == self.loop.batches - batches:
            warnings.warn(str(self.loop.say_skipped(skipped, batches)), RuntimeWarning, stacklevel=2)
        return self

    # --- acting ------------------------------------------------------------------------------------------------------
    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = False,
        action_masks: Any = None,
    ) -> tuple[Any, Any]:
        """The policy's action for one observation or a batch of them.

        Args:
            observation: as the environment gives it, or a batch of ``n`` along a first axis.
            state, episode_start: accepted for Stable-Baselines3's interface; the policy has no memory.
            deterministic: the most likely action instead of a sample.
            action_masks: valid actions, for spaces that can be masked: one mask, or one for each observation, as an
                array, a list or a tensor of zeros and ones. Where the observation holds the mask it is not needed.

        Returns:
            The action (or ``n`` of them), ready for ``env.step``, and ``state``.

        Raises:
            UsageError: the observation does not fit the observation space, or is not finite; the mask does not fit the
                action space, or leaves no action; or it is missing, and the environment of training named valid actions
                in ``info``.
            TrainingError: the policy's parameters are not finite.
        """
        action = chosen_action(
            self.policy, self.actions, observation, self._predict_rng, deterministic, action_masks, self.masks_in_info
        )
        return action, state

    def export_module(self, actions: bool = True) -> nn.Module:
        """The policy as one module of plain layers on the CPU, to be exported: see :mod:`grouprl.envs.export`.

        It takes observations as the environment gives them, in a batch, and includes their normalisation. Later
        training does not change it.

        Args:
            actions: it returns the most likely action of each observation, as ``env.step`` wants it; else the
                parameters ``[m, K]`` of the distribution of actions.
        """
        return export_module(self.policy, self.actions, actions)

    # --- saving ------------------------------------------------------------------------------------------------------
    def describe(self, kind: str) -> dict[str, Any]:
        """What a saved file of ``kind`` "model" or "checkpoint" says of itself, as JSON."""
        return replace(self._held.description, num_timesteps=self.num_timesteps).to_json(kind)

    def save(self, path: str | Path) -> Path:
        """Write the policy, its normalisation statistics, spaces and configuration to ``path`` (``.safetensors``).

        Returns the path written, with the suffix added where it was missing. Of several processes the first writes.

        Raises TrainingError, and leaves an older file as it is, if a number of the policy is not finite.
        """
        check_policy(self.policy)
        path = user_path(path)
        if path.name in ("", ".."):
            raise UsageError(f"{path} is a folder; name the file in it that the model goes to")
        if path.suffix != ".safetensors":
            path = path.with_name(path.name + ".safetensors")
        if self.loop.ranks.first:
            save_state(path, self.policy.state_dict(), self.describe("model"))
        return path

    @classmethod
    def load(
        cls, path: str | Path, env: EnvLike | None = None, *, env_kwargs: Mapping[str, Any] | None = None,
        network: Network | None = None, advantage_function: TensorFunction | None = None,
        surrogate_function: TensorFunction | None = None, **settings: Any,
    ) -> GRPO:  # fmt: skip
        """Read what :meth:`save` wrote, from that file or from a run folder.

        Args:
            path: the file (suffix optional) or the run folder.
            env: environment to go on training in; without it the saved id is made on the first ``learn``. An agent that
                was trained on something else than an id needs it. env_kwargs: for its constructor, for ids.
            network, advantage_function, surrogate_function: the same as at construction, where there was one; without
                the functions the agent acts but does not train.
            **settings: override saved settings of training. A warning names one that has no effect.

        Raises:
            UsageError: no such file, a foreign or damaged one (DamagedFileError), or an environment with other spaces;
                or a setting with which the weights do not fit or make another policy, such as ``hidden_sizes``,
                ``activation`` or ``normalize_observations``.
        """
        path = model_file(user_path(path))
        functions = UserFunctions(advantage_function, surrogate_function)
        with offering_another(path):
            tensors, meta = load_state(path)
            agent = loading.from_model(cls, path, tensors, meta, network, functions, settings)
            changed = loading.changed_settings(path, meta, agent.config) if settings else []
        if env is not None or env_kwargs is not None:
            loading.set_environment(agent, env, env_kwargs)
        agent._warn_of_unread((*RULES, *OF_LOADED), changed)
        return agent

    def checkpoint(
        self, path: str | Path, *, may_restart: bool = False, extra: Mapping[str, Any] | None = None
    ) -> None:
        """Write everything a resumed run needs to go on exactly: see :mod:`grouprl.envs.checkpoint`.

        Args:
            path: the file, ``.safetensors``.
            may_restart: the checkpoint is taken on schedule and may begin fresh episodes.
            extra: JSON that :meth:`from_checkpoint` gives back as ``agent.extra``.
        """
        self.ready()
        checkpoint.write(user_path(path), self.loop, may_restart, self.describe("checkpoint"), extra or {})

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, env: EnvLike | None = None, *, env_kwargs: Mapping[str, Any] | None = None,
        network: Network | None = None, advantage_function: TensorFunction | None = None,
        surrogate_function: TensorFunction | None = None,
    ) -> GRPO:  # fmt: skip
        """Read what :meth:`checkpoint` wrote, ready for ``learn`` to go on.

        A call of ``learn`` begins its schedules anew (``lr_schedule``, ``sticky``, ``gamma_final``). A run folder keeps
        its plan, and :func:`grouprl.envs.training.resume` goes on as if the run had never stopped.

        Raises:
            UsageError: not a checkpoint, or a damaged one (DamagedFileError).
        """
        path, functions = user_path(path), UserFunctions(advantage_function, surrogate_function)
        with offering_another(path):
            return loading.from_checkpoint(cls, path, env, env_kwargs, network, functions)

    def close(self) -> None:
        """Close the environments. Those made here are made again when they are needed; others must be set again."""
        self._held.close()

    # --- copies ------------------------------------------------------------------------------------------------------
    def __getstate__(self) -> dict[str, Any]:
        """What pickle writes; an ``Env`` or a ``VectorEnv`` must be set again (:mod:`grouprl.envs.copies`)."""
        return copies.picklable(copies.state_of(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`__getstate__`."""
        copies.restore(self, state)

    def __deepcopy__(self, memo: dict[int, Any]) -> GRPO:
        """An agent of its own, on environments of its own; an ``Env`` or a ``VectorEnv`` must be set again."""
        twin = type(self).__new__(type(self))
        copies.restore(twin, copies.state_of(self))
        return twin

    def __copy__(self) -> GRPO:
        """As a deep copy, because two agents that share parameters would disturb each other."""
        return self.__deepcopy__({})
