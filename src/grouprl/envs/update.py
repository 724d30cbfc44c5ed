"""The learning loop of environments: epochs, minibatches, gradient steps, early stop.

The loop knows no environment. It is given a batch: a function that evaluates any of its steps under the current
parameters, and the numbers that were fixed when it was sampled. What is minimised is
:func:`grouprl.objective.policy_loss`; learning/gradient_step.py moves the parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from grouprl.errors import TrainingError
from grouprl.learning.gradient_step import Optimizer, gradient_step
from grouprl.learning.parameters import TrainedParameters
from grouprl.machine.ranks import ALONE, Ranks
from grouprl.objective import Fixed, Objective, k3, policy_loss

MIN_PART = 2048
"""Rows under which a second thread costs more than it saves (waking one takes tens of microseconds)."""

UNDO_EPOCH_ABOVE = 4.0
"""An epoch that ends at a KL of this many times ``kl_stop`` is undone."""

_ADVICE = (
    "rewards or observations are probably too large: scale the reward, keep normalize_observations on, or lower "
    "learning_rate"
)


class Terms(NamedTuple):
    """What the current policy says of ``m`` steps, with gradients, and the reference; each ``[m]``.

    ``entropy`` is None without a bonus. ``kl`` is an exact divergence to the reference, ``logp_ref`` what a sampled one
    is made of; at most one of them is given.
    """

    logp: Tensor
    entropy: Tensor | None = None
    kl: Tensor | None = None
    logp_ref: Tensor | None = None


Evaluate = Callable[[Tensor], Terms]
"""Maps step indices ``[m]`` (int64) to :class:`Terms` under the current parameters."""


Gradient = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Maps step indices ``[m]`` and a denominator to the gradient ``[P]`` of their share of the loss, and the sums
[surrogate, KL] over the denominator."""


@dataclass(frozen=True)
class Batch:
    """``S`` steps to learn from.

    Attributes:
        evaluate: the current policy's view of any of them.
        logp_old: log-probabilities under the policy that sampled the steps, ``[S]``.
        advantages: ``[S]``, fixed for the whole update.
        weights: ``[S]`` with mean 1: relative weight of a step, or None if all are equal. A minibatch of m steps weighs
            its steps ``weights / m``, fixed before any of it is evaluated.
        gradient_of: gives the gradient in the place of autograd through ``evaluate``; all weights are then equal.
    """

    evaluate: Evaluate
    logp_old: Tensor
    advantages: Tensor
    weights: Tensor | None = None
    gradient_of: Gradient | None = None


@dataclass(frozen=True)
class UpdateSettings:
    """How a batch is learned from; field meanings as in :class:`grouprl.envs.config.GRPOConfig`."""

    epochs: int
    minibatch_size: int
    minibatch_remainder: Literal["spread", "keep"] = "spread"
    objective: Objective = field(default_factory=Objective)
    max_grad_norm: float = 0.5
    kl_stop: float | None = None
    micro_batch: int = 8192
    """Most steps evaluated at once by one thread."""


@dataclass(frozen=True)
class UpdateStats:
    """What is worth plotting of an update.

    ``policy_loss``, ``grad_norm`` and ``kl``, the divergence to the reference policy (0 without one), are means over
    the optimizer steps. ``approx_kl``, KL(old || new) as k3, and ``clip_fraction``, the share of steps that the loss
    bounds (0 for a loss that bounds none), are those of the updated policy on a sample of the batch;
    where its last epoch was undone, those it had ended at.
    """

    policy_loss: float
    kl: float
    clip_fraction: float
    grad_norm: float
    approx_kl: float
    epochs: int
    optimizer_steps: int
    undone: bool = False
    """Whether the parameters are those of before: the first epoch was undone."""


def minibatches(n: int, size: int, remainder: str, rng: np.random.Generator) -> list[Tensor]:
    """A random partition of ``range(n)`` into minibatches of about (``spread``) or exactly (``keep``) ``size``."""
    order = torch.from_numpy(rng.permutation(n))
    if remainder == "keep":
        return list(torch.split(order, size))
    return list(order.tensor_split(max(1, round(n / size))))


def update(
    batch: Batch,
    parameters: TrainedParameters,
    optimizer: Optimizer,
    settings: UpdateSettings,
    rng: np.random.Generator,
    pool: Executor | None = None,
    threads: int = 1,
    ranks: Ranks = ALONE,
) -> UpdateStats:
    """Learn from one batch.

    Args:
        parameters: the policy's; ``optimizer.step()`` must move them along ``parameters.gradient``.
        rng: the stream that shuffles.
        pool, threads: a minibatch's gradient is the sum of ``threads`` parts, summed in a fixed order; the pool says
            which threads compute them, and changes no number.
        ranks: the processes that share these parts out among them; their number changes no bit.

    With ``kl_stop`` an epoch that ends beyond it is the last. One that ends ``UNDO_EPOCH_ABOVE`` times beyond is
    undone, as the line search of TRPO (1502.05477, appendix C) refuses a step that leaves the trust region: what a
    policy that is all but deterministic loses in one epoch, no reward may ever show it again.

    Raises:
        TrainingError: there is no step, or loss or gradient is not finite, which leaves the parameters as they were
            after the step before; or the parameters are not, which leaves them as they were before the batch.
    """
    n = batch.logp_old.shape[0]
    if n == 0:
        raise TrainingError("the batch holds no step to learn from; collect more steps, or lower sticky")
    probe = torch.from_numpy(rng.permutation(n)[:2048]).to(batch.logp_old.device)
    totals = torch.zeros(2, device=batch.logp_old.device, dtype=torch.float32)
    whole = parameters.values()
    steps, epoch = 0, 0
    norm_total = approx_kl = cut_share = 0.0
    undone = False
    for epoch in range(1, settings.epochs + 1):
        before = None if settings.kl_stop is None else parameters.values()
        for index in minibatches(n, settings.minibatch_size, settings.minibatch_remainder, rng):
            parts = gradients(batch, parameters, index, settings, totals, pool, threads, ranks)
            norm_total += gradient_step(
                parameters, optimizer, parts, settings.max_grad_norm, where=f" in epoch {epoch}", advice=_ADVICE
            )
            steps += 1
        if epoch == settings.epochs or settings.kl_stop is not None:
            approx_kl, cut_share = _moved(batch, probe, settings)
            if settings.kl_stop is not None and not approx_kl <= settings.kl_stop:  # nor is it nan
                _check_parameters(parameters, whole, steps)
                if before is not None and not approx_kl <= UNDO_EPOCH_ABOVE * settings.kl_stop:
                    parameters.load(before)
                    undone = epoch == 1
                break
    _check_parameters(parameters, whole, steps)
    policy_loss_mean, kl = (totals / steps).tolist()
    return UpdateStats(policy_loss_mean, kl, cut_share, norm_total / steps, approx_kl, epoch, steps, undone)


def _check_parameters(parameters: TrainedParameters, before: Tensor, steps: int) -> None:
    """Raise TrainingError if the parameters are not finite after ``steps``; they are set to ``before [P]`` then."""
    if not bool(torch.isfinite(parameters.values()).all()):
        parameters.load(before)
        raise TrainingError(f"parameters are not finite after {steps} gradient steps on a batch; {_ADVICE}")


@torch.no_grad()
def _moved(batch: Batch, probe: Tensor, settings: UpdateSettings) -> tuple[float, float]:
    """KL(old || new) on the steps ``probe [m]``, and the share of them that the loss bounds."""
    logp = torch.cat([batch.evaluate(part).logp for part in torch.split(probe, settings.micro_batch)])
    old = batch.logp_old[probe]
    terms = policy_loss(settings.objective, logp, Fixed(batch.advantages[probe], 1.0, old))
    cut = 0.0 if terms.cut is None else float((terms.cut[0] | terms.cut[1]).float().mean())
    return float(k3(old, logp).mean()), cut


def gradients(
    batch: Batch,
    parameters: TrainedParameters,
    index: Tensor,
    settings: UpdateSettings,
    totals: Tensor,
    pool: Executor | None,
    threads: int,
    ranks: Ranks,
) -> Iterator[Tensor]:
    """The gradients ``[P]`` of the parts of one minibatch; their sums [surrogate, KL] are added to ``totals``."""
    denominator, index = index.shape[0], index.to(batch.logp_old.device)

    def part(rows: Tensor) -> tuple[Tensor, Tensor]:
        if batch.gradient_of is not None:
            return batch.gradient_of(rows, denominator)
        return _by_autograd(batch, parameters, rows, denominator, settings)

    n_parts = min(threads, max(1, denominator // MIN_PART)) if pool is not None else 1
    pieces = index.tensor_split(n_parts) if n_parts > 1 else (index,)
    shared = ranks if n_parts > 1 else ALONE
    own = [pieces[i] for i in shared.share(n_parts)]
    waiting = [pool.submit(part, rows) for rows in own[1:]] if pool is not None else []
    found = [*map(part, own[:1]), *(other.result() for other in waiting)]
    for of_rank in shared.gather(found):
        for gradient, sums in of_rank:
            totals += sums
            yield gradient


def _by_autograd(
    batch: Batch, parameters: TrainedParameters, rows: Tensor, denominator: int, settings: UpdateSettings
) -> tuple[Tensor, Tensor]:
    """Gradient ``[P]`` and sums [surrogate, KL] of the steps ``rows [m]``, a micro-batch at a time."""
    gradient: Tensor | None = None
    sums = torch.zeros(2, device=batch.logp_old.device, dtype=torch.float32)
    for i in rows.tensor_split(-(-len(rows) // settings.micro_batch)):
        terms = batch.evaluate(i)
        share: Tensor | float = 1.0 / denominator
        if batch.weights is not None:
            share = batch.weights.index_select(0, i) / denominator
        fixed = Fixed(batch.advantages.index_select(0, i), share, batch.logp_old.index_select(0, i), terms.logp_ref)
        found = policy_loss(settings.objective, terms.logp, fixed, entropy=terms.entropy, kl=terms.kl, count_cut=False)
        sums[0] += (share * found.surrogate).sum()
        if found.kl is not None:
            sums[1] += (share * found.kl).sum()
        if not math.isfinite(float(found.loss.detach())):
            raise TrainingError(f"the loss is {float(found.loss.detach())}; {_ADVICE}")
        g = parameters.gradient_of(found.loss)
        gradient = g if gradient is None else gradient.add_(g)
    assert gradient is not None
    return gradient, sums
