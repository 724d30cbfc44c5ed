"""Earlier batches in an update: what the policy of an update or two ago did is all but what today's would do.

Three batches with the noise of one gradient each give a gradient with less of it. A step of an earlier batch weighs as
much as today's policy prefers its action, w = min(pi_k / pi_then, 2). Its advantage is that of today's baseline. The
clip is around today's policy: w min(rho A, clip(rho) A) with rho = pi / pi_k, so that no step leads further away than
one that is new. Source: GePPO, Queeney et al. 2021, arXiv 2111.00072.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from grouprl import objective
from grouprl.envs.baseline_memory import parts_of
from grouprl.envs.config import GRPOConfig
from grouprl.envs.distributions import Distribution
from grouprl.envs.policy import Policy
from grouprl.envs.rollout import Rollout

LARGEST_WEIGHT = 2.0

Arrays = Mapping[str, np.ndarray]
Values = Callable[[Mapping[str, Tensor], Tensor], Tensor]
"""From prepared inputs, each ``[m, ...]``, and the steps since the start of the episode ``[m]`` to values ``[m]``."""


@dataclass(frozen=True)
class Earlier:
    """What is kept of a rollout of ``S`` steps in ``N`` samples; but for the observations, as there.

    Attributes:
        seen: observations at each step, each ``[S, ...]``, before normalisation; last: after each sample, ``[N, ...]``.
    """

    seen: Arrays
    last: Arrays
    actions: Tensor
    behaviour: Tensor
    mask: Tensor | None
    trainable: Tensor
    rewards: Tensor
    elapsed: Tensor
    last_elapsed: Tensor
    lengths: Tensor
    terminated: Tensor

    @classmethod
    def of(cls, rollout: Rollout) -> Earlier:
        """What to keep of a rollout."""
        seen = {key: value.numpy() for key, value in rollout.inputs.items()}
        last = {key: value.numpy() for key, value in rollout.last_inputs.items()}
        if rollout.observed is not None:
            assert rollout.last_observed is not None
            seen["flat"], last["flat"] = rollout.observed, rollout.last_observed
        return cls(seen, last, **{name: getattr(rollout, name) for name in _TENSORS})

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        found = {f"seen.{key}": torch.from_numpy(value) for key, value in self.seen.items()}
        found |= {f"last.{key}": torch.from_numpy(value) for key, value in self.last.items()}
        return found | {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> Earlier:
        """The inverse of :meth:`state`."""
        seen, last = ({k: v.numpy() for k, v in parts_of(state, f"{part}.").items()} for part in ("seen", "last"))
        tensors = {name: state.get(name) if name == "mask" else state[name] for name in _TENSORS}
        return cls(seen, last, **tensors)  # type: ignore[arg-type]


_TENSORS = tuple(f.name for f in fields(Earlier) if f.name not in ("seen", "last"))


@dataclass(frozen=True)
class Joined:
    """The steps of several batches as :class:`~grouprl.envs.learner.Learner` takes them, as in a rollout.

    Its ``behaviour`` is today's policy everywhere: the ratio and the clip are around it.
    """

    observed: np.ndarray | None
    inputs: Mapping[str, Tensor]
    actions: Tensor
    behaviour: Tensor
    mask: Tensor | None
    trainable: Tensor
    lengths: Tensor

    @property
    def n_steps(self) -> int:
        """Steps of all batches."""
        return len(self.trainable)


class Reuse:
    """Keeps the ``batches - 1`` rollouts before the newest, and joins them to it."""

    def __init__(self, batches: int) -> None:
        self._kept: deque[Earlier] = deque(maxlen=batches - 1)

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget them."""
        self._kept.clear()

    @torch.no_grad()
    def join(
        self, rollout: Rollout, raw: Tensor, policy: Policy, values: Values, config: GRPOConfig
    ) -> tuple[Joined, Tensor, dict[str, float]]:
        """What an update learns from, the newest steps first, their advantages, and what is worth logging.

        The rollout is kept for the updates to come.

        Args:
            rollout: collected by ``policy`` as it is. raw: its advantages ``[S]``, neither centred nor scaled.
            values: those of today's baseline.

        Returns:
            The steps; advantages, weighted, centred and scaled over all trainable steps; ``reuse_effective``, the
            effective sample size of the earlier ones as a share of them.
        """
        parts = [Joined(**{f.name: getattr(rollout, f.name) for f in fields(Joined)})]
        advantages, weights = [raw], [torch.ones_like(raw)]
        for old in reversed(self._kept):
            seen, last = (_tensors(policy.prepare(observed)) for observed in (old.seen, old.last))
            now = _parameters(policy, seen, old.mask)
            distribution: Distribution = policy.distribution
            logp, logp_then = (distribution.log_prob(params, old.actions) for params in (now, old.behaviour))
            weights.append(objective.importance_weights(logp, logp_then, LARGEST_WEIGHT))
            after = torch.where(old.terminated, 0.0, values(last, old.last_elapsed))
            of_steps = values(seen, old.elapsed)
            advantages.append(
                objective.gae(old.rewards, of_steps, after, old.lengths, config.gamma, config.gae_lambda).to(raw)
            )
            parts.append(Joined(old.seen.get("flat"), seen, old.actions, now, old.mask, old.trainable, old.lengths))
        self._kept.append(Earlier.of(rollout))
        joined, w = _join(parts, with_observed=config.beta > 0), torch.cat(weights)
        reused = w[rollout.n_steps :][joined.trainable[rollout.n_steps :]]
        share = objective.effective_share(reused) if len(reused) else float("nan")
        made = objective.standardise_weighted(torch.cat(advantages), w, joined.trainable)
        return joined, made, {"reuse_effective": share}

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {f"{i}.{name}": value for i, old in enumerate(self._kept) for name, value in old.state().items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state`. Raises KeyError for what it cannot have given."""
        kept: list[Earlier] = []
        while found := parts_of(state, f"{len(kept)}."):
            kept.append(Earlier.from_state(found))
        self.clear()
        self._kept.extend(kept)


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {key: torch.from_numpy(value) for key, value in arrays.items()}


def _parameters(policy: Policy, inputs: Mapping[str, Tensor], mask: Tensor | None) -> Tensor:
    """Parameters ``[S, K]`` of what the policy would do, as it gives them when it acts."""
    params = torch.from_numpy(policy.infer({key: value.numpy() for key, value in inputs.items()}))
    return params if mask is None else policy.distribution.apply_mask(params, mask)


def _join(parts: list[Joined], *, with_observed: bool) -> Joined:
    """All steps as one; what was observed only for a reference policy, which alone reads it."""
    masks = [part.mask for part in parts]
    if any(mask is not None for mask in masks):  # where the environment named none, all actions are allowed
        width = next(mask.shape[1:] for mask in masks if mask is not None)
        masks = [torch.ones(p.n_steps, *width, dtype=torch.bool) if p.mask is None else p.mask for p in parts]
    observed = [part.observed for part in parts if with_observed and part.observed is not None]
    return Joined(
        np.concatenate(observed) if observed else None,
        {key: torch.cat([part.inputs[key] for part in parts]) for key in parts[0].inputs},
        torch.cat([part.actions for part in parts]),
        torch.cat([part.behaviour for part in parts]),
        None if masks[0] is None else torch.cat([mask for mask in masks if mask is not None]),
        torch.cat([part.trainable for part in parts]),
        torch.cat([part.lengths for part in parts]),
    )
