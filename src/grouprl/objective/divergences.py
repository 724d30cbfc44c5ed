"""Kullback-Leibler divergences per step [S]: exact where the action space allows, estimated from samples elsewhere."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from grouprl.errors import UsageError
from grouprl.objective.surrogates import ratio


def _check_same_shape(a_name: str, a: Tensor, b_name: str, b: Tensor) -> None:
    if a.shape != b.shape:
        raise UsageError(f"{a_name} has shape {list(a.shape)} and {b_name} {list(b.shape)}; they must be the same.")


def _expected_difference(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q), 0 where p = 0: masked actions have log p = -inf or near it, and 0 * inf is NaN."""
    possible = log_p.detach().exp() > 0
    safe_p, safe_q = torch.where(possible, log_p, 0.0), torch.where(possible, log_q, 0.0)
    return torch.where(possible, safe_p.exp() * (safe_p - safe_q), 0.0)


def categorical_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """[S]: KL(p || q) = sum_a p_a (log p_a - log q_a) from logits [S, K], in at least float32.

    Actions masked by a very negative or infinite logit in p contribute 0. Raises UsageError if the shapes differ.
    """
    _check_same_shape("logits_p", logits_p, "logits_q", logits_q)
    log_p = torch.log_softmax(logits_p, -1, dtype=_at_least_float32(logits_p))
    log_q = torch.log_softmax(logits_q, -1, dtype=_at_least_float32(logits_q))
    return _expected_difference(log_p, log_q).sum(-1)


def gaussian_kl(mean_p: Tensor, log_std_p: Tensor, mean_q: Tensor, log_std_q: Tensor) -> Tensor:
    """[S]: KL(p || q) of diagonal Gaussians, summed over actions; means [S, A], log standard deviations [S, A] or [A].

    Per action: log(sigma_q / sigma_p) + (sigma_p^2 + (mu_p - mu_q)^2) / (2 sigma_q^2) - 1/2.
    Raises UsageError if the means differ in shape.
    """
    _check_same_shape("mean_p", mean_p, "mean_q", mean_q)
    log_scale = log_std_p - log_std_q
    distance = (mean_p - mean_q) * (-log_std_q).exp()
    return (0.5 * ((2.0 * log_scale).exp() + distance.square() - 1.0) - log_scale).sum(-1)


def bernoulli_kl(logits_p: Tensor, logits_q: Tensor) -> Tensor:
    """[S]: KL(p || q) of independent Bernoullis given by logits [S, A], summed over A. UsageError if shapes differ."""
    _check_same_shape("logits_p", logits_p, "logits_q", logits_q)
    on = _expected_difference(logsigmoid(logits_p), logsigmoid(logits_q))
    off = _expected_difference(logsigmoid(-logits_p), logsigmoid(-logits_q))
    return (on + off).sum(-1)


def k1(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """[S]: logp - logp_ref; its mean over samples of pi is KL(pi || ref), single values may be negative."""
    _check_same_shape("logp", logp, "logp_ref", logp_ref)
    return logp - logp_ref


def k2(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """[S]: (logp - logp_ref)^2 / 2; never negative, biased at second order."""
    return 0.5 * k1(logp, logp_ref).square()


def k3(logp: Tensor, logp_ref: Tensor) -> Tensor:
    """[S]: exp(-d) + d - 1, d = logp - logp_ref; never negative and unbiased. The exponential is capped at exp(20)."""
    d = k1(logp, logp_ref)
    # exp(-d) is itself a ratio, of ref to pi, and so shares the guard of ratios against overflow.
    return ratio(-d, torch.zeros_like(d)) + d - 1.0


class Divergence(NamedTuple):
    """A way to measure how far the policy is from the reference, as the setting `kl_estimator` names it.

    Attributes:
        about: what it computes, for people.
        value: (logp, logp_ref) -> [S], the estimate from sampled actions as a number to look at; None where the
            divergence is exact: it then comes from the distributions of the action space.
        loss: (rho, logp, logp_ref, logp_old) -> [S], the same as a loss whose gradient is right; see
            `sampled_kl_loss`.
    """

    about: str
    value: Callable[[Tensor, Tensor], Tensor] | None = None
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None


DIVERGENCES: dict[str, Divergence] = {
    "exact": Divergence("KL(policy || reference) in closed form"),
    "exact_forward": Divergence("KL(reference || policy) in closed form"),
    "k1": Divergence(
        "KL(policy || reference) from sampled actions: the log-ratio; unbiased, noisy",
        k1, lambda rho, logp, ref, old: rho * k1(logp, ref).detach(),
    ),
    "k2": Divergence(
        "KL(policy || reference) from sampled actions: half the squared log-ratio; biased, never negative",
        k2, lambda rho, logp, ref, old: rho.detach() * k2(logp, ref),
    ),
    # rho exp(-d) is ref / old: written so, no large exp(-d) meets a small rho.
    "k3": Divergence(
        "KL(policy || reference) from sampled actions: unbiased and never negative",
        k3, lambda rho, logp, ref, old: rho * (k1(logp, ref) - 1.0) + ratio(ref, old),
    ),
}  # fmt: skip
"""Every divergence a configuration can name."""

SAMPLED_DIVERGENCES = tuple(name for name, entry in DIVERGENCES.items() if entry.value is not None)


def sampled_kl_loss(logp: Tensor, logp_ref: Tensor, estimator: str, logp_old: Tensor | None = None) -> Tensor:
    """[S]: an estimate of KL(pi || ref) whose *gradient*, too, is that of KL(pi || ref).

    The estimators above are right as values but not as losses: the sampled actions depend on pi as well. Differentiated
    as they stand on samples of pi, k1 has a gradient of mean zero and k3 that of the forward KL(ref || pi); k2 alone is
    right. So every estimator here has the gradient of the true one, d E_pi[d] = E_pi[d grad logp] per step:
        k1: rho * sg(d)       k2: sg(rho) * d^2 / 2       k3: rho * (exp(-d) + d - 1)
    with a live rho = exp(logp - sg(logp_old)), logp_old from the policy that drew the samples (default: logp itself, so
    rho = 1 in value). All three have the gradient rho d grad logp and differ in value only; k1 with a live d would add
    rho grad logp, of mean zero: noise and nothing else. Sources: the estimators, J. Schulman 2020, "Approximating KL
    divergence"; their gradients, arXiv 2512.21852; rho * k3, DeepSeek-V3.2, 2512.02556, equation 7.
    Raises UsageError on differing shapes or an estimator that is not in SAMPLED_DIVERGENCES.
    """
    _check_same_shape("logp", logp, "logp_ref", logp_ref)
    entry = DIVERGENCES.get(estimator)
    if entry is None or entry.loss is None:
        raise UsageError(f"estimator must be {' or '.join(SAMPLED_DIVERGENCES)}, got {estimator!r}.")
    logp_old = (logp if logp_old is None else logp_old).detach()
    return entry.loss(ratio(logp, logp_old), logp, logp_ref.detach(), logp_old)


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
