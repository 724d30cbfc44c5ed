"""Whether batches say something: how far the gradients of two halves of a batch agree.

Updates from pure noise go nowhere in particular and so move a policy by little, which an adaptive learning rate takes
for a reason to step further. Halves that share no episode share no noise either: the cosine of their gradients is about
0 where rewards are noise, and near 1 where all episodes say the same.
"""

from __future__ import annotations

from concurrent.futures import Executor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from grouprl.envs.update import Batch, UpdateSettings, gradients
from grouprl.learning.parameters import TrainedParameters
from grouprl.machine.ranks import ALONE, Ranks

ENOUGH = 0.2
"""The agreement from which on a learning rate may rise. Noise has 0 to 0.15, most batches that teach 0.4 to 0.9."""
KEPT = 0.7
"""The share of the running mean that a batch leaves of those before it."""


def about_rewards(settings: UpdateSettings) -> UpdateSettings:
    """These settings with what rewards alone say in the loss: a bonus for entropy is the same in both halves."""
    return replace(settings, objective=replace(settings.objective, beta=0.0, entropy_coef=0.0))


def halves(lengths: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Every other episode, and the rest.

    Args:
        lengths: steps of the episodes, or of their parts, of a batch, ``[N]``, whose sum is S.
        rows: which of the S steps are learned from, ``[m]``.

    Returns:
        The places among ``rows`` of the steps of either half, together ``[m]``. One of them may be empty.
    """
    half = (torch.arange(len(lengths)) % 2).repeat_interleave(lengths)[rows]
    return torch.nonzero(half == 0)[:, 0], torch.nonzero(half == 1)[:, 0]


def agreement(
    batch: Batch,
    parameters: TrainedParameters,
    parts: tuple[Tensor, Tensor],
    settings: UpdateSettings,
    pool: Executor | None = None,
    threads: int = 1,
    ranks: Ranks = ALONE,
) -> float:
    """The cosine of the gradients of two parts of a batch, in [-1, 1]; 0 where either has none.

    Related: the noise scale of McCandlish et al. 2018 (1812.06162), which compares the norms of such gradients.

    Args:
        parts: indices of steps, ``[m]`` each, none of them empty. Others: as of :func:`grouprl.envs.update.update`.
    """
    totals = torch.zeros(2, device=batch.logp_old.device)
    first, second = (
        torch.stack([*gradients(batch, parameters, part, settings, totals, pool, threads, ranks)]).sum(0)
        for part in parts
    )
    norms = float(first.norm()) * float(second.norm())
    return float(first @ second) / norms if norms > 0 else 0.0


@dataclass
class Agreement:
    """The running mean of agreements, with weights that fall by :data:`KEPT` from batch to batch.

    Attributes:
        total, weight: their weighted sum, and the sum of the weights. last: the newest batch's, or None if it had none.
    """

    total: float = 0.0
    weight: float = 0.0
    last: float | None = None

    def note(self, found: float | None) -> None:
        """Count the agreement of one more batch; None where it has no two halves, which counts as nothing."""
        self.last = found
        if found is None:
            return
        self.total = KEPT * self.total + (1 - KEPT) * found
        self.weight = KEPT * self.weight + (1 - KEPT)

    @property
    def enough(self) -> bool:
        """Whether a learning rate may rise: batches agree, or nothing is known of them."""
        return self.weight == 0 or self.total >= ENOUGH * self.weight
