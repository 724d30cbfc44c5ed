"""The one configuration of the environment arena: frozen and validated, with every default.

What it shares with language models stands in settings/objective.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError, field_validator, model_validator

from grouprl.envs.stable_baselines import EVERYWHERE
from grouprl.errors import refuse
from grouprl.objective import DIVERGENCES, ESTIMATORS
from grouprl.objective.estimators import names as estimator_names
from grouprl.objective.losses import names as loss_names
from grouprl.settings.describe import explain
from grouprl.settings.names import ADVANTAGES_ELSEWHERE, OneOf, unknown_setting
from grouprl.settings.objective import ObjectiveSettings, objective_problems

_ADVANTAGES, _LOSSES = estimator_names(environments=True), loss_names(environments=True)
_ALL = "grouprl settings, and help(GRPOConfig), list them all"
LR_MAX = 1e-2
"""The bound of an adaptive learning rate where no other is given."""
NEEDS_WHOLE_EPISODES = tuple(name for name in _ADVANTAGES if ESTIMATORS[name].whole_samples)


class GRPOConfig(ObjectiveSettings):
    """Every choice of a training run in the environment arena.

    The defaults are the *robust default*: the one configuration meant for an environment nobody tuned.
    Build one with :func:`make_config`, whose errors say what was given, what is allowed and how to fix it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    # --- collection: which steps a batch holds -------------------------------------------------------------------
    n_envs: int = Field(16, ge=1, description="environments stepped side by side")
    vectorization: Literal["auto", "sync", "async", "vector_entry_point", "envpool"] = Field(
        "auto", description="how they are stepped; auto = the environment's own vectorised version, else sync"
    )
    collect: Literal["auto", "segments", "episodes"] = Field(
        "auto",
        description="segments = n_steps per environment; episodes = whole episodes; "
        "auto = until the batch holds min_steps and enough signal",
    )
    n_steps: int = Field(128, ge=1, description="steps per environment and batch, on average (collect=segments)")
    min_steps: int = Field(4096, ge=1, description="least steps per batch (collect=auto or episodes)")
    max_steps: int = Field(16384, ge=1, description="most steps per batch (collect=auto)")
    min_signals: int = Field(
        8,
        ge=0,
        description="complete episodes, or steps with an unusual reward or a termination, that a batch waits for",
    )
    group_size: int | None = Field(
        None, ge=2, description="episodes per group that share one start (the reset seed); needs collect=episodes"
    )
    reset_each_batch: bool = Field(False, description="start every batch from fresh episodes")
    sticky: float = Field(0.9, ge=0, lt=1, description="initial probability of repeating the previous action")
    warmup_steps: int = Field(2048, ge=0, description="random steps that start the observation statistics; counted")

    # --- advantages ----------------------------------------------------------------------------------------------
    advantage: Annotated[str, OneOf(_ADVANTAGES, ADVANTAGES_ELSEWHERE)] = Field(
        "baseline", description="estimator; the table of estimators says what each computes"
    )
    gamma: float = Field(0.99, ge=0, le=1, description="discount")
    gamma_final: float | None = Field(
        None, ge=0, lt=1, description="discount toward which the horizon grows during a call of learn; default: gamma"
    )
    gae_lambda: float = Field(0.95, ge=0, le=1, description="lambda of the generalised advantage on the baseline")
    baseline_features: int = Field(128, ge=1, description="random features of the closed-form baseline")
    baseline_ridge: float = Field(1e-4, gt=0, description="ridge of its regression, relative to each feature's power")
    baseline_sweeps: int = Field(2, ge=1, description="regressions per batch, each on the targets of the last")
    baseline_memory: int = Field(
        0, ge=0, description="steps of earlier batches, whole ones, that its regression sees again; 0 = none"
    )
    baseline_level: bool = Field(
        False, description="set the level and the scale of its values, so that the advantages of a batch have mean 0"
    )
    baseline_pull: float | None = Field(
        None, gt=0, description="for many small batches: weight that pulls each fit to the one before; default: to zero"
    )
    baseline_cosine: bool = Field(
        False, description="random features are cosines, which vary slowly; needs more of them than tanh, such as 1024"
    )
    skip_without_signal: bool = Field(True, description="no update from a batch whose rewards say nothing")

    # --- loss ----------------------------------------------------------------------------------------------------
    loss_type: Annotated[str, OneOf(_LOSSES)] = Field(
        "dapo", description="surrogate and how steps are averaged; the table of losses says what each computes"
    )
    entropy_coef: float = Field(0.01, ge=0, description="weight of the entropy bonus")
    kl_estimator: Annotated[str, OneOf(tuple(DIVERGENCES))] = Field(
        "exact", description="KL(policy || reference) in closed form, KL(reference || policy), or a sampled estimate"
    )
    reference: str = Field("initial", description="old | initial | periodic | the path of a saved model")
    reference_every: int = Field(10, ge=1, description="updates between refreshes of a periodic reference")

    # --- update --------------------------------------------------------------------------------------------------
    reuse: int = Field(
        1, ge=1, le=64, description="batches that an update learns from: the newest, and those before it, weighted"
    )
    epochs: int = Field(10, ge=1, description="passes over a batch")
    minibatch_size: int = Field(256, ge=1, description="steps per gradient step")
    minibatch_remainder: Literal["spread", "keep"] = Field(
        "spread", description="what is left over: spread evenly, or kept as a last small minibatch"
    )
    learning_rate: float = Field(1e-3, gt=0, description="Adam step size (the first one, if it adapts)")
    lr_schedule: Literal["constant", "linear", "adaptive"] = Field(
        "adaptive", description="constant, linear to lr_final, or adapted to keep the KL of an update near kl_target"
    )
    lr_final: float = Field(
        0.02, ge=0, le=1, description="last learning rate as a fraction, if linear; last kl_target as one, if adaptive"
    )
    lr_max: float | None = Field(
        None, gt=0, description="upper bound of an adaptive learning rate; default: 0.01, or learning_rate if higher"
    )
    kl_target: float = Field(
        0.02,
        gt=0,
        description="KL(old || new) per update that an adaptive learning rate aims at; falls to lr_final of it",
    )
    kl_stop: float | None = Field(
        None,
        gt=0,
        description="end the epochs once KL(old || new) exceeds this, undo one beyond four times this; default: none, "
        "or twice kl_target if adaptive",
    )
    max_grad_norm: float = Field(0.5, gt=0, description="bound on the global gradient norm")
    adam_epsilon: float = Field(1e-5, gt=0, description="Adam epsilon")

    # --- policy --------------------------------------------------------------------------------------------------
    hidden_sizes: tuple[int, ...] = Field((64, 64), description="widths of the hidden layers")
    activation: Literal["tanh", "relu"] = Field("tanh", description="their activation")
    hidden_gain: float = Field(math.sqrt(2), gt=0, description="orthogonal gain of the hidden layers")
    output_gain: float = Field(0.01, gt=0, description="orthogonal gain of the last layer")
    log_std_init: float | None = Field(
        None, description="initial log standard deviation of continuous actions; default: -0.5 - log(dimensions) / 2"
    )
    log_std_min: float | None = Field(
        None, description="floor under the log standard deviation of continuous actions; default: none"
    )
    normalize_observations: bool = Field(True, description="running mean and variance, part of the model")
    native: bool = Field(True, description="compiled network, loss and optimizer on CPUs with a C compiler")

    # --- run -----------------------------------------------------------------------------------------------------
    env_timeout: float | None = Field(
        None,
        gt=0,
        le=1e9,
        description="seconds that a step of the environments, or making one, may take, after which the run ends",
    )
    seed: int = Field(0, ge=0, description="of every random stream")
    device: str = Field("cpu", description="torch device of the learner")
    threads: int = Field(2, ge=1, le=64, description="threads a minibatch's gradient is shared among")

    @field_validator("learning_rate", "epsilon", "epsilon_high", mode="before")
    @classmethod
    def _no_schedule(cls, value: Any) -> Any:
        if callable(value):
            raise ValueError(
                "a function is no value here: lr_schedule is 'constant', 'linear' (to lr_final) or 'adaptive', and "
                "bounds of the ratio stay; give the first value as a number"
            )
        return value

    @field_validator("device", mode="before")
    @classmethod
    def _named_device(cls, value: Any) -> Any:
        if value == "auto":
            raise ValueError("there is no choice by itself: 'cpu' is the default, and 'cuda' a GPU")
        return str(value) if type(value).__name__ == "device" else value

    @model_validator(mode="after")
    def _consistent(self) -> GRPOConfig:
        if self.group_size is not None:
            if self.collect == "segments":
                raise ValueError(
                    "group_size needs whole episodes, collect is 'segments'; set collect=episodes or drop group_size"
                )
            if self.n_envs % self.group_size:
                raise ValueError(
                    f"n_envs={self.n_envs} is not a multiple of group_size={self.group_size}; "
                    f"use n_envs={math.ceil(self.n_envs / self.group_size) * self.group_size}"
                )
        if self.advantage in NEEDS_WHOLE_EPISODES and self.collect == "segments":
            raise ValueError(
                f"advantage={self.advantage!r} compares whole episodes but collect is 'segments'; "
                "set collect=episodes, or advantage=baseline or batch_returns"
            )
        if ESTIMATORS[self.advantage].compares and self.group_size is None and self.n_envs < 2:
            raise ValueError(
                f"advantage={self.advantage!r} compares at least 2 episodes but n_envs=1 and there is no group_size; "
                "set n_envs=2 or more"
            )
        if self.gamma_final is not None and self.gamma > self.gamma_final:
            raise ValueError(
                f"gamma_final={self.gamma_final} is below gamma={self.gamma}, and the horizon of a run can only grow; "
                "raise gamma_final, or set it to None (null in a command) for one discount throughout"
            )
        if self.collect == "auto" and not self.whole_episodes and self.max_steps < self.min_steps:
            raise ValueError(
                f"max_steps={self.max_steps} is below min_steps={self.min_steps}; raise one or lower the other"
            )
        if self.reuse > 1 and self.advantage != "baseline":
            raise ValueError(
                f"reuse={self.reuse} needs values of earlier steps, which advantage={self.advantage!r} does not have; "
                "set reuse=1, or advantage=baseline"
            )
        batch = self.n_envs * self.n_steps if self.collect == "segments" else self.min_steps
        if 0 < self.baseline_memory < batch:
            raise ValueError(
                f"baseline_memory={self.baseline_memory} holds no whole batch, which has {batch} steps; set some "
                f"batches, such as {10 * batch}, or 0"
            )
        if self.baseline_pull is not None and (self.baseline_memory or self.baseline_level):
            raise ValueError(
                "baseline_pull keeps what earlier batches said in the weights, and its values are those before the "
                "batch; leave baseline_memory and baseline_level out, or leave baseline_pull out"
            )
        if None not in (self.log_std_init, self.log_std_min) and self.log_std_init < self.log_std_min:  # type: ignore[operator]
            raise ValueError(
                f"log_std_init={self.log_std_init} is below its floor, log_std_min={self.log_std_min}; lower the floor "
                "or raise log_std_init"
            )
        if self.lr_schedule == "adaptive" and self.lr_max is not None and self.learning_rate > self.lr_max:
            raise ValueError(
                f"learning_rate={self.learning_rate} is above lr_max={self.lr_max}, the highest an adaptive rate "
                "may be; raise lr_max, or lower learning_rate"
            )
        if any(width < 1 for width in self.hidden_sizes):
            raise ValueError(f"hidden_sizes={self.hidden_sizes} must be positive widths such as [64, 64]")
        if found := objective_problems(self, self.loss_type, self.advantage):
            raise ValueError("; ".join(found))
        if self.group_size is not None and self.vectorization in ("vector_entry_point", "envpool"):
            raise ValueError(
                f"group_size needs a reset seed for each environment, which vectorization={self.vectorization} cannot "
                "give; use vectorization=sync or async (or drop group_size)"
            )
        return self

    def at(self, progress: float) -> GRPOConfig:
        """These settings for a batch at ``progress`` in [0, 1] of a call of ``learn``: with its own ``gamma``.

        The horizon 1 / (1 - discount) grows geometrically from that of ``gamma`` to that of ``gamma_final``:
        1 - discount = (1 - gamma) ((1 - gamma_final) / (1 - gamma))^progress. A short one is learned from soonest, and
        a long one sees what is decided long before it happens. Source: François-Lavet et al. 2015, arXiv 1512.02011.
        """
        if self.gamma_final is None:
            return self
        first, last = 1.0 - self.gamma, 1.0 - self.gamma_final
        return self.model_copy(update={"gamma": 1.0 - first * (last / first) ** min(max(progress, 0.0), 1.0)})

    @property
    def highest_learning_rate(self) -> float:
        """The bound of an adaptive learning rate: ``lr_max``, or what it is by default."""
        return max(LR_MAX, self.learning_rate) if self.lr_max is None else self.lr_max

    @property
    def whole_episodes(self) -> bool:
        """Whether a batch holds complete episodes only."""
        return self.collect == "episodes" or self.group_size is not None or self.advantage in NEEDS_WHOLE_EPISODES

    @property
    def how_to_vectorize(self) -> str:
        """``vectorization``, but sync for groups: their seeds an environment's own vector version may not take."""
        return "sync" if self.vectorization == "auto" and self.group_size is not None else self.vectorization

    @property
    def how_to_evaluate(self) -> str:
        """How environments of evaluations are made: by EnvPool where it steps those of training, else one by one.

        An environment's own vector version may clip rewards, and evaluations are of raw ones.
        """
        return "envpool" if self.vectorization == "envpool" else "auto"


def check_names(values: Mapping[str, Any]) -> None:
    """Raises UsageError for names that are no settings, each with the closest one that is."""
    refuse(_no_settings(values))


def _no_settings(values: Mapping[str, Any]) -> list[str]:
    """What to say of each name that is no setting."""
    known = GRPOConfig.model_fields
    return [unknown_setting(name, known, lambda: _ALL, EVERYWHERE) for name in values if name not in known]


def make_config(values: Mapping[str, Any]) -> GRPOConfig:
    """Validate ``values`` into a :class:`GRPOConfig`.

    Raises:
        UsageError: unknown names (with the closest known ones), or values that are not allowed; all in one message.
    """
    refused = _no_settings(values)
    try:
        config = GRPOConfig(**{name: value for name, value in values.items() if name in GRPOConfig.model_fields})
    except ValidationError as error:
        refused.append(explain(error, GRPOConfig.model_fields))
    refuse(refused)
    return config
