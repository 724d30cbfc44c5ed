"""The gradient of a minibatch's loss as one compiled function, where network, actions and loss are of the usual kind.

What autograd makes of some hundred operations is one pass over the rows. It computes what the update loop computes by
itself, from the same settings; a test holds each of the two to the other.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from ctypes import Structure, c_double, c_float, c_int32, c_size_t, c_void_p

import torch
from torch import Tensor

from grouprl.envs.distributions import Categorical, DiagonalGaussian
from grouprl.envs.mlp import MLP, described, kernels
from grouprl.envs.policy import Policy
from grouprl.update import Gradient, UpdateSettings

_SURROGATES = ("clip", "dual_clip", "spo")


class _Objective(Structure):
    _fields_ = [
        ("surrogate", c_int32), ("gaussian", c_int32),
        *((name, c_float) for name in ("low", "high", "dual", "entropy")), ("log_std", c_void_p),
    ]  # fmt: skip


class _Batch(Structure):
    _fields_ = [(name, c_void_p) for name in ("x", "old", "advantages", "actions", "index")]


def fused_gradient(
    policy: Policy,
    settings: UpdateSettings,
    inputs: Mapping[str, Tensor],
    actions: Tensor,
    logp_old: Tensor,
    advantages: Tensor,
) -> Gradient | None:
    """The gradient of any steps of a batch, for :func:`grouprl.update.update`; None where autograd has to do it.

    It is there for the default network on a CPU with one categorical or normal distribution of actions, without
    masks, without images and without a divergence to a reference policy.

    Args:
        policy: its parameters are read where they are, at every call.
        settings: those of the update.
        inputs, actions, logp_old, advantages: the batch, ``[S, ...]``, as the update sees it.
    """
    network, distribution = policy.network, policy.distribution
    gaussian = isinstance(distribution, DiagonalGaussian)
    if (
        not (isinstance(network, MLP) and network.native and (gaussian or isinstance(distribution, Categorical)))
        or list(inputs) != ["flat"]
        or settings.beta > 0
        or any(t.device.type != "cpu" or t.dtype != torch.float32 for t in (inputs["flat"], logp_old, advantages))
        or actions.device.type != "cpu"
        or actions.dtype != (torch.float32 if gaussian else torch.int64)
        or not all(p.requires_grad and p.dtype == torch.float32 and p.is_contiguous() for p in policy.parameters())
    ):
        return None
    parameters = ([policy.log_std] if gaussian else []) + network.in_order
    if [id(p) for p in parameters] != [id(p) for p in policy.parameters()]:
        return None
    size = sum(p.numel() for p in parameters)
    kept = [t.contiguous() for t in (inputs["flat"], logp_old, advantages, actions)]
    x, old, a, chosen = (t.data_ptr() for t in kept)
    objective = _Objective(
        _SURROGATES.index(settings.surrogate), gaussian, settings.clip_low, settings.clip_high, settings.dual_clip,
        settings.entropy_coef, policy.log_std.data_ptr() if gaussian else None,
    )  # fmt: skip
    compiled, net = kernels.functions(), described(network.tanh, network.in_order)

    def gradient(index: Tensor, denominator: int) -> tuple[Tensor, Tensor]:
        assert kept  # read by their addresses
        made, sums = torch.empty(size, dtype=torch.float32, device="cpu"), (c_double * 2)()
        index = index.contiguous()
        batch = _Batch(x, old, a, chosen, index.data_ptr())
        failed = compiled.grouprl_objective(
            ctypes.byref(net), ctypes.byref(objective), ctypes.byref(batch), c_size_t(len(index)),
            c_double(denominator), c_void_p(made.data_ptr()), sums,
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for the gradient of {len(index)} steps")
        entropy = sums[1] if settings.entropy_coef > 0 else 0.0
        return made, torch.tensor([sums[0], 0.0, entropy], dtype=torch.float32, device="cpu")

    return gradient
