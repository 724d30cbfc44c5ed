"""The language-model head, fused with the softmax over the vocabulary.

The tensor of logits ``[m, V]`` exists once, in low precision. Probabilities overwrite it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from grouprl.lm.kernels import head as native
from grouprl.lm.kernels import triton_head as gpu
from grouprl.lm.packed.experts import Routed
from grouprl.lm.packed.low_precision import LowPrecision, add_gradient, add_product, add_rows

_ROWS = 16
"""The number of rows whose float32 logits are in memory at once on a CPU. They stay in the processor's cache."""


class TokenTerms(NamedTuple):
    """Numbers of each of m predicted tokens.

    Attributes:
        logp: ``[m]`` float32, the log-probability of the token in nats. It carries a gradient.
        entropy: ``[m]`` float32, the entropy in nats of the distribution of the token. It carries a gradient where that
            was asked for.
        routed: what the routers of a mixture of experts did with the tokens that were read, where that is asked for.
    """

    logp: Tensor
    entropy: Tensor
    routed: Routed | None = None


def log_probs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, precision: LowPrecision,
    by_entropy: bool = False,
) -> TokenTerms:  # fmt: skip
    """Log-probabilities of targets, and entropies, under softmax((hidden weight^T + bias) / temperature).

    The backward pass adds the gradients of ``weight`` and ``bias`` to their ``.grad`` and returns the gradient of
    ``hidden`` to autograd.

    Args:
        hidden: ``[m, d]``, the last hidden states.
        weight: ``[V, d]``, the weight of the head.
        bias: ``[V]``, the bias of the head, or None.
        targets: ``[m]`` int64, the token ids.
        temperature: a positive number that divides the logits.
        precision: the precision of matrix products. The softmax always runs in float32.
        by_entropy: whether entropies carry a gradient too. The backward pass then reads the probabilities once more.
    """
    logp, entropy = _LogProb.apply(  # type: ignore[no-untyped-call]
        hidden, weight, bias, targets, temperature, precision, torch.is_grad_enabled(), by_entropy
    )
    return TokenTerms(logp, entropy)


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        precision: LowPrecision,
        learning: bool,
        by_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        low = h.detach().to(precision.dtype)
        compiled = precision.native and native.can_do_logits(low, weight, bias)
        w = weight.detach() if compiled else precision.weight(weight)
        if compiled:
            z = native.logits(low, w)
        else:
            z = F.linear(low, w, None if bias is None else bias.detach().to(precision.dtype))
        there = gpu.softmax_there(z.device, z.dtype, _softmax) if precision.native and z.is_cuda else None
        if precision.native and native.can_do_softmax(z):
            logp, entropy, others = native.softmax(z, targets, temperature, learning=learning)
        elif there is not None:
            logp, entropy, others = there(z, targets, temperature, learning=learning)
        else:
            logp, entropy, others = _softmax(z, targets, temperature, learning)
        ctx.save_for_backward(low, z, targets, others, *((logp, entropy) if by_entropy else ()))
        ctx.weight, ctx.bias, ctx.temperature, ctx.dtype = weight, bias, temperature, h.dtype
        ctx.w, ctx.native, ctx.compiled = w, precision.native, compiled
        if not by_entropy:
            ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, of_entropy: Tensor) -> tuple[Tensor | None, ...]:
        h, p, targets, others, *values = ctx.saved_tensors
        scale = gradient.float() / ctx.temperature  # [m]
        at_target = scale * others
        if values:
            logp, entropy = values
            by = of_entropy.float() / ctx.temperature
            at_target = at_target - by * (1.0 - others) * (logp + entropy)
            p = _pull(p, scale, by, entropy)
            scale = torch.ones_like(scale)
        dh = None
        if ctx.needs_input_grad[0]:
            dh = native.logits_gradient(p, ctx.w) if ctx.compiled else torch.mm(p, ctx.w).float()
            dh.mul_(-scale[:, None]).addcmul_(at_target[:, None], ctx.w[targets].to(p.dtype).float())
            dh = dh.to(ctx.dtype)
        weight, bias = ctx.weight, ctx.bias
        if weight.requires_grad:
            scaled = h.float() * -scale[:, None]
            add_product(weight, p, scaled.to(p.dtype), ctx.native)
            add_rows(weight.grad, targets, (at_target[:, None] * h).to(weight.dtype))
        if bias is not None and bias.requires_grad:
            add_gradient(bias, (p.t() @ (-scale).to(p.dtype)[:, None])[:, 0])
            add_rows(bias.grad, targets, at_target.to(bias.dtype))
        return dh, *[None] * 7


def _pull(p: Tensor, scale: Tensor, by: Tensor, entropy: Tensor) -> Tensor:
    """What a gradient through log-probabilities and entropies takes from each logit, beside that of the target.

    The entropy H of p has the derivative -p_j (log p_j + H) by the logit j.

    Args:
        p: ``[m, V]`` probabilities, 0 at the targets. scale, by: ``[m]`` the gradients of log-probability and entropy.

    Returns:
        ``[m, V]`` of the type of p: p_j (scale + by (log p_j + H)).
    """
    out = torch.empty_like(p)
    rows = _ROWS if p.device.type == "cpu" else 1024
    for some in range(0, len(p), rows):
        at = slice(some, some + rows)
        x = p[at].float()
        out[at] = x * (scale[at] + by[at] * entropy[at])[:, None] + by[at][:, None] * torch.xlogy(x, x)
    return out


def _softmax(z: Tensor, targets: Tensor, temperature: float, learning: bool) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`grouprl.lm.kernels.head.softmax` in torch operations."""
    logp, entropy, others = (torch.empty(len(targets), dtype=torch.float32, device=z.device) for _ in range(3))
    for start in range(0, len(targets), _ROWS if z.device.type == "cpu" else 1024):
        rows = slice(start, start + (_ROWS if z.device.type == "cpu" else 1024))
        x = z[rows].float()
        if temperature != 1.0:
            x.div_(temperature)
        t = targets[rows, None]
        x.sub_(x.amax(-1, keepdim=True))
        at_target = x.gather(1, t)[:, 0]
        e = x.exp()
        total = e.sum(-1)
        logp[rows] = at_target - total.log()
        entropy[rows] = total.log() - torch.linalg.vecdot(e, x) / total
        if learning:
            # 1 - p of the target is stored apart in float32: if p is near 1, low precision would round 1 - p to 0.
            e.scatter_(1, t, 0.0)
            others[rows] = e.sum(-1) / total
            torch.mul(e, (1.0 / total)[:, None], out=x)
            z[rows] = x
    return logp, entropy, others
