"""From the settings to the loss: which surrogate, and which weight per token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, assert_never

import torch
from torch import Tensor

from grouprl import objective
from grouprl.lm.settings.config import GRPOConfig
from grouprl.lm.settings.user_functions import NOTHING, Custom
from grouprl.objective.packed import segment_ids, segment_sum


def step_weights(config: GRPOConfig, lengths: Tensor, counted: Tensor) -> Tensor:
    """Weight ``[S]`` of each token in the loss of an optimizer step: fixed before any of it is evaluated.

    Args:
        lengths: ``[N]`` of all samples of the step. counted: ``[N]`` bool; others weigh 0 (cut-off completions with
            mask_truncated_completions), and no longer count as tokens, but still as samples.
    """
    of = lengths[counted]
    weights = torch.zeros(int(lengths.sum()))
    if not len(of):
        return weights
    match config.loss_type:
        case "grpo" | "sapo":
            kept = objective.sample_mean(of, n_samples=len(lengths))
        case "dr_grpo":
            kept = objective.constant_length(of, config.max_completion_length, n_samples=len(lengths))
        case "bnpo" | "dapo" | "cispo":
            kept = objective.token_mean(of)
        case other:
            assert_never(other)
    weights[counted[segment_ids(lengths)]] = kept
    return weights


class Fixed(NamedTuple):
    """What is fixed of m tokens before they are evaluated.

    ``logp_old`` None means: the policy itself (on-policy). ``logp_ref`` None: no KL term in the loss.
    """

    advantages: Tensor
    weights: Tensor
    logp_old: Tensor | None
    logp_ref: Tensor | None
    lengths: Tensor


@dataclass
class LossSums:
    """Sums over tokens, for the metrics of an optimizer step; weighted as the loss is where that is said."""

    loss: float = 0.0
    """Weighted."""
    kl: float = 0.0
    entropy: float = 0.0
    low: float = 0.0
    """Ratios cut off below: of tokens, or of completions where each has one ratio."""
    high: float = 0.0
    """Above."""
    tokens: int = 0
    least_low: float = math.inf
    """Share of a completion's ratios cut off below, in the completion with the smallest."""
    most_high: float = 0.0
    """Above, in the one with the largest."""

    def add(self, other: LossSums) -> None:
        """Add another part's sums."""
        for name in ("loss", "kl", "entropy", "low", "high", "tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.least_low = min(self.least_low, other.least_low)
        self.most_high = max(self.most_high, other.most_high)


def token_loss(
    config: GRPOConfig, logp: Tensor, entropy: Tensor, fixed: Fixed, custom: Custom = NOTHING
) -> tuple[Tensor, LossSums]:
    """The loss (a number, to be differentiated) of m tokens of whole samples, and what is worth plotting.

    With logp_old None the ratio is 1 in value and exp(logp - sg(logp)) in gradient. ``custom`` may hold a surrogate
    that takes the place of that of ``loss_type``.
    """
    old = logp.detach() if fixed.logp_old is None else fixed.logp_old
    a = fixed.advantages
    effective = logp
    if config.importance_sampling_level != "token":
        effective = objective.importance_logp(logp, old, fixed.lengths, config.importance_sampling_level)
        a, old = a.to(effective.dtype), old.to(effective.dtype)
    own = custom.surrogate is not None
    losses = custom.losses(effective, old, a) if own else _surrogate(config, effective, old, a)
    if config.off_policy_mask_threshold is not None:
        losses = losses * objective.off_policy_mask(
            logp, old.to(logp.dtype), fixed.advantages, fixed.lengths, config.off_policy_mask_threshold
        )
    divergence = torch.zeros((), device=logp.device)
    if fixed.logp_ref is not None:
        kl = objective.sampled_kl_loss(logp, fixed.logp_ref, config.kl_estimator, fixed.logp_old)
        losses = losses + config.beta * kl
        divergence = kl.detach().sum()
    loss = (fixed.weights * losses).sum()
    with torch.no_grad():
        sums = {"loss": loss, "kl": divergence, "entropy": entropy.sum(), **_cut(config, effective, old, fixed)}
        # Together, as a GPU stops each time it is asked for a number.
        numbers = torch.stack([x.double() for x in sums.values()]).tolist()
    return loss, LossSums(**dict(zip(sums, numbers, strict=True)), tokens=len(logp))


def _surrogate(config: GRPOConfig, logp: Tensor, old: Tensor, a: Tensor) -> Tensor:
    """``[m]`` the loss of each token, as ``loss_type`` says."""
    low, high = config.epsilon, config.clip_high
    match config.loss_type:
        case "cispo":
            return objective.cispo(logp, old, a, cap=high)
        case "sapo":
            return objective.sapo(logp, old, a, config.sapo_temperature_pos, config.sapo_temperature_neg)
        case "grpo" | "bnpo" | "dapo" | "dr_grpo":
            if config.delta is not None:
                return objective.two_sided(logp, old, a, low, high, config.delta)
            return objective.clipped(logp, old, a, low, high)
        case other:
            assert_never(other)


def _cut(config: GRPOConfig, logp: Tensor, old: Tensor, fixed: Fixed) -> dict[str, Tensor]:
    """What the clip cuts off, in the terms of :class:`LossSums`; nothing where the ratio is 1."""
    if fixed.logp_old is None or config.loss_type == "sapo":
        return dict.fromkeys(("low", "high", "least_low", "most_high"), torch.zeros((), device=logp.device))
    rho, a = objective.ratio(logp, old), fixed.advantages
    cap = config.clip_high if config.loss_type == "cispo" else 1 + config.clip_high
    low, high = (
        segment_sum(cut.float(), fixed.lengths) / fixed.lengths
        for cut in ((rho < 1 - config.epsilon) & (a < 0), (rho > cap) & (a > 0))
    )
    per = fixed.lengths if config.importance_sampling_level == "token" else torch.ones_like(fixed.lengths)
    return {"low": (low * per).sum(), "high": (high * per).sum(), "least_low": low.min(), "most_high": high.max()}
