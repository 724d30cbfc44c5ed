"""The learning loop of environments: epochs, minibatches, ratio, clip, KL, gradient clip, early stop.

The loop knows neither environments nor language models. It is given a function that re-evaluates steps under the
current parameters and the numbers that were fixed when the batch was sampled. Every step carries a weight; the loss
of an optimizer step is the weighted sum over its steps, so splitting a minibatch into parts, for memory or for threads,
changes nothing but the order of a sum.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from grouprl.errors import TrainingError
from grouprl.objective import clip_fraction, clipped, dual_clipped, k3, spo

MIN_PART = 2048
"""Rows under which a second thread costs more than it saves (waking one takes tens of microseconds)."""

TOO_FAR = 4.0
"""An epoch that ends at a KL of this many times ``kl_stop`` is undone."""


class Terms(NamedTuple):
    """What the current policy says of ``m`` steps, with gradients; each ``[m]``, the last two may be None."""

    logp: Tensor
    entropy: Tensor | None
    kl: Tensor | None


class Optimizer(Protocol):
    """Whatever steps: :class:`grouprl.envs.adam.Adam`, or any of PyTorch's."""

    def step(self) -> Any:
        """Move the parameters along their gradient."""


Evaluate = Callable[[Tensor], Terms]
"""Maps step indices ``[m]`` (int64) to :class:`Terms` under the current parameters."""


Gradient = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Maps step indices ``[m]`` and a denominator to the gradient ``[P]`` of their share of the loss, and the sums
[surrogate, KL, entropy] over the denominator."""


@dataclass(frozen=True)
class UpdateSettings:
    """How a batch is learned from; field meanings as in the arenas' configurations."""

    epochs: int
    minibatch_size: int
    minibatch_remainder: Literal["spread", "keep"] = "spread"
    surrogate: Literal["clip", "dual_clip", "spo"] = "clip"
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 3.0
    beta: float = 0.0
    entropy_coef: float = 0.0
    max_grad_norm: float = 0.5
    kl_stop: float | None = None
    micro_batch: int = 8192
    """Most steps evaluated at once by one thread."""


@dataclass(frozen=True)
class UpdateStats:
    """What is worth plotting of an update.

    ``policy_loss``, ``entropy`` (0 where it was not asked for), ``grad_norm`` and ``kl``, the divergence to the
    reference policy (0 without one), are means over the optimizer steps. ``approx_kl``, KL(old || new) as k3, and
    ``clip_fraction``, the share of steps whose ratio lies outside the clip range on the side their advantage pushes to,
    are those of the updated policy on a sample of the batch; where its last epoch was undone, those it had ended at.
    """

    policy_loss: float
    kl: float
    entropy: float
    clip_fraction: float
    grad_norm: float
    approx_kl: float
    epochs: int
    optimizer_steps: int


class FlatParameters:
    """All trainable parameters of a module as one vector.

    Each parameter becomes a view of ``vector``, so one fused Adam call and one norm serve any policy.
    """

    def __init__(self, module: nn.Module) -> None:
        self.tensors = [p for p in module.parameters() if p.requires_grad]
        self.vector = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in self.tensors]))
        self.vector.grad = torch.zeros_like(self.vector)
        with torch.no_grad():
            offset = 0
            for p in self.tensors:
                p.data = self.vector.data[offset : offset + p.numel()].view(p.shape)
                offset += p.numel()

    def gradient(self, loss: Tensor) -> Tensor:
        """d loss / d vector, ``[P]``; parameters the loss does not reach get 0. Safe to call from several threads."""
        grads = torch.autograd.grad(loss, self.tensors, allow_unused=True)
        return torch.cat(
            [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(grads, self.tensors, strict=True)]
        )


def minibatches(n: int, size: int, remainder: str, rng: np.random.Generator) -> list[Tensor]:
    """A random partition of ``range(n)`` into minibatches of about (``spread``) or exactly (``keep``) ``size``."""
    order = torch.from_numpy(rng.permutation(n))
    if remainder == "keep":
        return list(torch.split(order, size))
    return list(order.tensor_split(max(1, round(n / size))))


def surrogate_loss(settings: UpdateSettings, logp: Tensor, logp_old: Tensor, advantages: Tensor) -> Tensor:
    """The configured surrogate, per step, ``[m]``."""
    if settings.surrogate == "clip":
        return clipped(logp, logp_old, advantages, settings.clip_low, settings.clip_high)
    if settings.surrogate == "dual_clip":
        return dual_clipped(logp, logp_old, advantages, settings.clip_low, settings.clip_high, settings.dual_clip)
    return spo(logp, logp_old, advantages, settings.clip_high)


def update(
    evaluate: Evaluate,
    parameters: FlatParameters,
    optimizer: Optimizer,
    logp_old: Tensor,
    advantages: Tensor,
    weights: Tensor | None,
    settings: UpdateSettings,
    rng: np.random.Generator,
    pool: ThreadPoolExecutor | None = None,
    threads: int = 1,
    gradient_of: Gradient | None = None,
) -> UpdateStats:
    """Learn from one batch of ``S`` steps.

    Args:
        evaluate: the current policy's view of any steps.
        parameters: the policy's; ``optimizer.step()`` must move ``parameters.vector`` along its ``grad``.
        logp_old: log-probabilities under the policy that sampled the steps, ``[S]``.
        advantages: ``[S]``, fixed for the whole update.
        weights: ``[S]`` with mean 1: relative weight of a step, or None if all are equal. A minibatch of m steps weighs
            its steps ``weights / m``, fixed before any of it is evaluated.
        settings: see :class:`UpdateSettings`.
        rng: the stream that shuffles.
        pool, threads: a minibatch's gradient is the sum of ``threads`` parts, summed in a fixed order.
        gradient_of: gives the gradient in the place of autograd through ``evaluate``; all weights are then equal.

    With ``kl_stop`` an epoch that ends beyond it is the last. One that ends ``TOO_FAR`` times beyond is undone, as the
    line search of TRPO (1502.05477, appendix C) refuses a step that leaves the trust region: what a policy that is all
    but deterministic loses in one epoch, no reward may ever show it again.

    Raises:
        TrainingError: there is no step, or the gradient is not finite; the parameters are left as they were before.
    """
    n = logp_old.shape[0]
    if n == 0:
        raise TrainingError("the batch holds no step to learn from; collect more steps, or lower sticky")
    probe = torch.from_numpy(rng.permutation(n)[:2048]).to(logp_old.device)
    totals = torch.zeros(3, device=logp_old.device)
    steps = 0
    norm_total = 0.0
    epoch = 0
    approx_kl = clip = 0.0
    for epoch in range(1, settings.epochs + 1):
        before = None if settings.kl_stop is None else parameters.vector.detach().clone()
        for index in minibatches(n, settings.minibatch_size, settings.minibatch_remainder, rng):
            gradient, sums = _gradient(
                evaluate, parameters, index, logp_old, advantages, weights, settings, pool, threads, gradient_of
            )
            norm = float(gradient.norm())
            if not np.isfinite(norm):
                raise TrainingError(
                    f"the gradient is not finite (norm {norm}) in epoch {epoch}; rewards or observations are probably "
                    "too large: scale the reward, keep normalize_observations on, or lower learning_rate"
                )
            if norm > settings.max_grad_norm:
                gradient.mul_(settings.max_grad_norm / (norm + 1e-6))
            parameters.vector.grad = gradient
            optimizer.step()
            totals += sums
            norm_total += norm
            steps += 1
        if epoch == settings.epochs or settings.kl_stop is not None:
            with torch.no_grad():
                logp, old = evaluate(probe).logp, logp_old[probe]
                approx_kl = float(k3(old, logp).mean())
                outside = clip_fraction(logp, old, advantages[probe], settings.clip_low, settings.clip_high)
                clip = float(outside.float().mean())
            if settings.kl_stop is not None and not approx_kl <= settings.kl_stop:  # nor is it nan
                if before is not None and not approx_kl <= TOO_FAR * settings.kl_stop:
                    parameters.vector.data.copy_(before)
                break
    policy_loss, kl, entropy = (totals / steps).tolist()
    return UpdateStats(policy_loss, kl, entropy, clip, norm_total / steps, approx_kl, epoch, steps)


def _gradient(
    evaluate: Evaluate,
    parameters: FlatParameters,
    index: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
    weights: Tensor | None,
    settings: UpdateSettings,
    pool: ThreadPoolExecutor | None,
    threads: int,
    gradient_of: Gradient | None,
) -> tuple[Tensor, Tensor]:
    """Gradient ``[P]`` of one minibatch's loss and the sums [policy loss, kl, entropy]."""
    denominator, index = index.shape[0], index.to(logp_old.device)

    def part(rows: Tensor) -> tuple[Tensor, Tensor]:
        if gradient_of is not None:
            return gradient_of(rows, denominator)
        gradient: Tensor | None = None
        nothing = torch.zeros((), device=logp_old.device)
        sums: Tensor | None = None
        for i in rows.tensor_split(-(-len(rows) // settings.micro_batch)):
            terms = evaluate(i)
            weight = None if weights is None else weights.index_select(0, i)

            def total(losses: Tensor, weight: Tensor | None = weight) -> Tensor:
                return (losses if weight is None else weight * losses).sum() / denominator

            old, a = logp_old.index_select(0, i), advantages.index_select(0, i)
            loss = policy_loss = total(surrogate_loss(settings, terms.logp, old, a))
            kl = entropy = nothing
            if terms.kl is not None and settings.beta > 0:
                kl = total(terms.kl)
                loss = loss + settings.beta * kl
            if terms.entropy is not None:
                entropy = total(terms.entropy)
                if settings.entropy_coef > 0:
                    loss = loss - settings.entropy_coef * entropy
            s = torch.stack([policy_loss.detach(), kl.detach(), entropy.detach()])
            g = parameters.gradient(loss)
            gradient, sums = (g, s) if gradient is None or sums is None else (gradient.add_(g), sums.add_(s))
        assert gradient is not None
        assert sums is not None
        return gradient, sums

    n_parts = min(threads, max(1, denominator // MIN_PART)) if pool is not None else 1
    if n_parts == 1:
        return part(index)
    assert pool is not None
    parts = index.tensor_split(n_parts)
    waiting = [pool.submit(part, rows) for rows in parts[1:]]
    gradient, sums = part(parts[0])
    for other in waiting:  # always in the same order: the sum of floats depends on it
        g, s = other.result()
        gradient.add_(g)
        sums.add_(s)
    return gradient, sums
