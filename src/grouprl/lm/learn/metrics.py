"""What is worth plotting of an optimizer step: sums over its tokens, and their means in TRL's names."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from grouprl.objective import LOSSES, Fixed, LossTerms, Objective
from grouprl.objective.packed import segment_sum


@dataclass
class StepSums:
    """Sums over the tokens of some parts of an optimizer step."""

    loss: float = 0.0
    """Weighted as the loss is; the others are not weighted."""
    kl: float = 0.0
    entropy: float = 0.0
    low: float = 0.0
    """Ratios cut off below: of tokens, or of turns or completions where each has one ratio."""
    high: float = 0.0
    """Above."""
    tokens: int = 0
    least_low: float = math.inf
    """Share of a completion's ratios cut off below, in the completion with the smallest; of a turn's if it has one."""
    most_high: float = 0.0
    """Above, in the one with the largest."""
    bonus: float = 0.0
    """Of the entropy, weighted as it is in the loss."""
    chosen_entropy: float = 0.0
    """Of the tokens of the entropy bonus, each divided by how many they are in the whole step."""
    balance: float = 0.0
    """The loss that balances the load of experts, not weighted."""

    def add(self, other: StepSums) -> None:
        """Add another part's sums."""
        for name in ("loss", "bonus", "chosen_entropy", "balance", "kl", "entropy", "low", "high", "tokens"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.least_low = min(self.least_low, other.least_low)
        self.most_high = max(self.most_high, other.most_high)


@torch.no_grad()
def sums_of(objective: Objective, terms: LossTerms, entropy: Tensor, fixed: Fixed) -> StepSums:
    """The sums of one part.

    Args:
        terms: what :func:`grouprl.objective.policy_loss` gave for its m tokens, from what is ``fixed`` of them.
        entropy: ``[m]``.
    """
    lengths = fixed.turns if objective.importance_sampling_level == "turn" else fixed.lengths
    assert lengths is not None
    zero = torch.zeros((), device=terms.loss.device)
    found = {
        "loss": terms.loss, "bonus": zero if terms.bonus is None else terms.bonus,
        "chosen_entropy": zero if fixed.entropy_weights is None else (fixed.entropy_weights * entropy).sum(),
        "kl": zero if terms.kl is None else terms.kl.sum(), "entropy": entropy.sum(),
    }  # fmt: skip
    if terms.cut is None:
        found |= dict.fromkeys(("low", "high", "least_low", "most_high"), zero)
    else:
        low, high = (segment_sum(cut.float(), lengths) / lengths for cut in terms.cut)
        per = lengths if objective.importance_sampling_level == "token" else torch.ones_like(lengths)
        found |= {"low": (low * per).sum(), "high": (high * per).sum(), "least_low": low.min(), "most_high": high.max()}
    # Together, as a GPU stops each time it is asked for a number.
    numbers = torch.stack([x.double() for x in found.values()]).tolist()
    return StepSums(**dict(zip(found, numbers, strict=True)), tokens=len(entropy))


def cut_metrics(objective: Objective, sums: StepSums, n: int, *, all_active: bool) -> dict[str, float]:
    """Shares of ratios that the loss bounds, of all ``n`` that count: samples without advantage are not bounded.

    Args:
        all_active: whether no sample that counts was left out of the sums.
    """
    loss = LOSSES[objective.loss_type]
    if not n or loss.cut is None or objective.surrogate_function is not None:
        return {}
    low, high = sums.low / n, sums.high / n
    if loss.cap:
        return {f"{objective.loss_type}_clip_ratio": high}
    return {
        "clip_ratio/low_mean": low, "clip_ratio/low_min": sums.least_low if all_active else 0.0,
        "clip_ratio/high_mean": high, "clip_ratio/high_max": sums.most_high, "clip_ratio/region_mean": low + high,
    }  # fmt: skip
