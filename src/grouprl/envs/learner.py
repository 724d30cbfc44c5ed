"""What turns a rollout and its advantages into better parameters: optimizer, learning-rate rule, reference policy."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from grouprl.envs.adam import Adam
from grouprl.envs.agreement import Agreement, about_rewards, agreement, halves
from grouprl.envs.config import GRPOConfig
from grouprl.envs.fused import fused_gradient
from grouprl.envs.model_file import load_policy, model_file
from grouprl.envs.policy import Policy
from grouprl.envs.update import Batch, Terms, UpdateSettings, UpdateStats, update
from grouprl.errors import UsageError
from grouprl.learning.parameters import TrainedParameters
from grouprl.machine.busy import AtOnce, Busy
from grouprl.machine.ranks import ALONE, Ranks
from grouprl.objective import LOSSES, Objective
from grouprl.objective.losses import mean_over_steps
from grouprl.objective.packed import segment_sum
from grouprl.objective.user_functions import TensorFunction
from grouprl.runs.files import user_path


class Steps(Protocol):
    """``S`` steps to learn from, packed: a :class:`~grouprl.envs.rollout.Rollout`, or several, and what is asked."""

    @property
    def observed(self) -> np.ndarray | None: ...
    @property
    def inputs(self) -> Mapping[str, Tensor]: ...
    @property
    def actions(self) -> Tensor: ...
    @property
    def behaviour(self) -> Tensor: ...
    @property
    def mask(self) -> Tensor | None: ...
    @property
    def trainable(self) -> Tensor: ...
    @property
    def lengths(self) -> Tensor: ...
    @property
    def n_steps(self) -> int: ...


LR_MIN = 1e-4
LR_STEP = 1.5
IMAGE_MICRO_BATCH = 512
IMAGE_PIXELS = 4 * 84 * 84
"""Numbers of an image up to which that many are differentiated at once; of larger ones fewer."""


def _micro_batch(policy: Policy) -> int:
    """Steps that one thread evaluates at once."""
    pixels = sum(math.prod(shape) for shape in policy.observations.images.values())
    if not pixels:
        return UpdateSettings.micro_batch
    return max(1, IMAGE_MICRO_BATCH * IMAGE_PIXELS // max(IMAGE_PIXELS, pixels))


class Learner:
    """Owns the policy's parameters and how they change."""

    def __init__(
        self,
        policy: Policy,
        config: GRPOConfig,
        rng: np.random.Generator,
        surrogate_function: TensorFunction | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        if surrogate_function is None and LOSSES[config.loss_type].probabilities and policy.gaussian:
            raise UsageError(
                f"loss_type={config.loss_type!r} needs the probability of each action, and actions of a Box have only "
                "densities; use loss_type=dapo or spo"
            )
        self.policy, self.config, self.rng, self.ranks = policy, config, rng, ranks
        self.parameters = TrainedParameters(policy)
        floors = [(policy.log_std, config.log_std_min)] if policy.gaussian and config.log_std_min is not None else []
        self.optimizer = Adam(
            self.parameters, config.learning_rate, config.adam_epsilon, native=config.native, floors=floors
        )
        self.learning_rate = config.learning_rate
        self.agreement = Agreement()
        self.updates = 0
        self.reference: Policy | None = None
        if config.beta > 0 and config.reference != "old":
            self.reference = copy.deepcopy(policy)
        self.pool = ThreadPoolExecutor(config.threads - 1) if config.threads > 1 else None
        self._alone, self._busy = AtOnce(), Busy(lambda: config.threads)
        c = config
        self.settings = UpdateSettings(
            epochs=c.epochs,
            minibatch_size=c.minibatch_size,
            minibatch_remainder=c.minibatch_remainder,
            objective=Objective.of(c, surrogate_function),
            max_grad_norm=c.max_grad_norm,
            kl_stop=2 * c.kl_target if c.lr_schedule == "adaptive" and c.kl_stop is None else c.kl_stop,
            micro_batch=_micro_batch(policy),
        )

    @torch.inference_mode(False)
    @torch.enable_grad()  # whoever switched gradients off, a script or an environment
    def learn(self, rollout: Steps, advantages: Tensor, progress: float) -> UpdateStats:
        """One update of the policy from one batch; ``progress`` in [0, 1] drives the schedules."""
        keep = torch.nonzero(rollout.trainable)[:, 0]
        every = len(keep) == rollout.n_steps
        device = self.policy.mean.device

        def rows(x: Tensor) -> Tensor:
            return (x if every else x[keep]).to(device)

        inputs = {key: rows(value) for key, value in rollout.inputs.items()}
        actions, behaviour = rows(rollout.actions), rows(rollout.behaviour)
        mask = None if rollout.mask is None else rows(rollout.mask)
        distribution = self.policy.distribution
        logp_old = distribution.log_prob(behaviour, actions)
        observed = rollout.observed if self.reference is not None else None  # nobody else asks
        if observed is not None and not every:
            observed = observed[keep.numpy()]
        reference = self._reference_params(observed, inputs, behaviour, mask)
        kl_kind, entropy_coef = self.config.kl_estimator, self.config.entropy_coef

        def evaluate(index: Tensor) -> Terms:
            params = self.policy({key: value.index_select(0, index) for key, value in inputs.items()})
            if mask is not None:
                params = distribution.apply_mask(params, mask.index_select(0, index))
            chosen = actions.index_select(0, index)
            logp = distribution.log_prob(params, chosen)
            kl = logp_ref = None
            if reference is not None:
                other = reference.index_select(0, index)
                if kl_kind == "exact":
                    kl = distribution.kl(params, other)
                elif kl_kind == "exact_forward":
                    kl = distribution.kl(other, params)
                else:
                    logp_ref = distribution.log_prob(other, chosen)
            return Terms(logp, distribution.entropy(params) if entropy_coef > 0 else None, kl, logp_ref)

        self.optimizer.learning_rate = self.rate(progress)
        advantages = rows(advantages)
        weights = self._weights(rollout, keep)

        def batch_for(settings: UpdateSettings) -> Batch:
            gradient_of = None
            if mask is None and weights is None:
                gradient_of = fused_gradient(self.policy, settings, inputs, actions, logp_old, advantages)
            return Batch(evaluate, logp_old, advantages, weights, gradient_of)

        pool = self._alone if self.pool is not None and self._busy() else self.pool
        who = (pool, self.config.threads, self.ranks)
        if self.config.lr_schedule == "adaptive":
            parts, plain = halves(rollout.lengths, keep), about_rewards(self.settings)
            two = all(map(len, parts))
            self.agreement.note(agreement(batch_for(plain), self.parameters, parts, plain, *who) if two else None)
        stats = update(batch_for(self.settings), self.parameters, self.optimizer, self.settings, self.rng, *who)
        self._adapt(stats.approx_kl, progress)
        self.updates += 1
        if self.config.reference == "periodic" and self.updates % self.config.reference_every == 0:
            self.refresh_reference()
        return stats

    def _weights(self, rollout: Steps, keep: Tensor) -> Tensor | None:
        """Weights ``[m]`` with mean 1 of the steps learned from, or None where the loss gives all the same."""
        objective = self.settings.objective
        if LOSSES[objective.loss_type].weights is mean_over_steps:
            return None
        steps = torch.zeros(rollout.n_steps, dtype=torch.int64)
        steps[keep] = 1
        lengths = segment_sum(steps, rollout.lengths)
        lengths = lengths[lengths > 0]
        if not len(lengths):
            return None
        weights = LOSSES[objective.loss_type].weights(objective, lengths, len(lengths))
        return (weights * len(weights)).to(self.policy.mean.device)

    def refresh_reference(self) -> None:
        """Make the current policy the reference policy."""
        if self.reference is not None:
            self.reference.load_state_dict(self.policy.state_dict())

    def _reference_params(
        self, observed: np.ndarray | None, inputs: Mapping[str, Tensor], behaviour: Tensor, mask: Tensor | None
    ) -> Tensor | None:
        """Distribution parameters ``[S, K]`` of the reference policy, or None without a KL term.

        It sees what was ``observed [S, D]`` under statistics of its own; other ``inputs`` have none.
        """
        if self.config.beta == 0:
            return None
        if self.reference is None:
            return behaviour
        if (
            self.updates == 0
        ):  # not earlier: a policy loaded to act needs no reference, and warm-up has set the statistics
            if self.config.reference in ("initial", "periodic"):
                self.refresh_reference()
            elif model_file(user_path(self.config.reference)).exists():
                load_policy(self.reference, user_path(self.config.reference), self.config)
            else:
                raise UsageError(
                    f"reference={self.config.reference!r} is neither old, initial, periodic nor a saved model; "
                    "give one of those words, a run folder or a .safetensors file"
                )
        with torch.no_grad():
            prepared = dict(inputs)
            if observed is not None:
                flat = self.reference.prepare({"flat": observed})["flat"]
                prepared["flat"] = torch.from_numpy(flat).to(inputs["flat"].device)
            parts = torch.split(torch.arange(behaviour.shape[0]), self.settings.micro_batch)
            params = torch.cat([self.reference({key: value[i] for key, value in prepared.items()}) for i in parts])
            return params if mask is None else self.policy.distribution.apply_mask(params, mask)

    def rate(self, progress: float) -> float:
        """The learning rate of an update at ``progress``."""
        if self.config.lr_schedule == "linear":
            return self.config.learning_rate * max(1.0 - progress, self.config.lr_final)
        return self.learning_rate

    def _adapt(self, approx_kl: float, progress: float) -> None:
        """Keep an update's KL near a target that shrinks over the run (1707.06347, section 4, on the step size).

        The rate rises only where halves of recent batches agree: else noise alone would make it rise.
        """
        if self.config.lr_schedule != "adaptive":
            return
        target = self.config.kl_target * max(1.0 - progress, self.config.lr_final)
        if approx_kl > LR_STEP * target:
            self.learning_rate = max(self.learning_rate / LR_STEP, min(LR_MIN, self.config.learning_rate))
        elif approx_kl < target / LR_STEP and self.agreement.enough:
            self.learning_rate = min(self.learning_rate * LR_STEP, self.config.highest_learning_rate)

    # --- state -------------------------------------------------------------------------------------------------------
    def state(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        """Everything a resumed run needs besides the policy: tensors and plain values."""
        tensors: dict[str, Tensor] = {}
        for key, value in self.optimizer.state().items():
            tensors[f"optimizer.{key}"] = value
        if self.reference is not None:
            tensors |= {f"reference.{key}": value for key, value in self.reference.state_dict().items()}
        return tensors, {
            "learning_rate": self.learning_rate, "updates": self.updates,
            "agreement": [self.agreement.total, self.agreement.weight],
        }  # fmt: skip

    def load(self, tensors: Mapping[str, Tensor], values: Mapping[str, object]) -> None:
        """The inverse of :meth:`state`; the policy must have been loaded before."""
        self.optimizer.load({k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")})
        if self.reference is not None:
            prefix = "reference."
            self.reference.load_state_dict(
                {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            )
        self.learning_rate = float(values["learning_rate"])  # type: ignore[arg-type]
        self.updates = int(values["updates"])  # type: ignore[call-overload]
        self.agreement = Agreement(*values["agreement"])  # type: ignore[misc]
