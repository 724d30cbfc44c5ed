"""The gradient of a minibatch's loss as one compiled function, where actions and loss are of the usual kind.

What autograd makes of some hundred operations is one pass over the rows. It computes what the update loop computes by
itself, from the same settings; a test holds each of the two to the other.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import Structure, c_double, c_float, c_int32, c_size_t, c_void_p
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grouprl.envs.distributions import Categorical, DiagonalGaussian
from grouprl.envs.mlp import MLP, described
from grouprl.envs.native import kernels
from grouprl.envs.policy import Policy
from grouprl.envs.update import Gradient, UpdateSettings
from grouprl.objective import Objective

_CLIP, _DUAL_CLIP, _SPO = range(3)
"""What compiled code calls the surrogates it knows."""


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
    """The gradient of any steps of a batch, for :func:`grouprl.envs.update.update`; None where autograd has to do it.

    It is there on a CPU for one categorical or normal distribution of actions and the losses dapo and spo, without
    masks and without a divergence to a reference policy: for the default network as a whole, for any other from its
    outputs on.

    Args:
        policy: its parameters are read where they are, at every call.
        settings: those of the update.
        inputs, actions, logp_old, advantages: the batch, ``[S, ...]``, as the update sees it.
    """
    distribution = policy.distribution
    gaussian = isinstance(distribution, DiagonalGaussian)
    if (
        not (policy.native and (gaussian or isinstance(distribution, Categorical)))
        or (kind := _surrogate(settings.objective)) is None
        or settings.objective.beta > 0
        or any(t.device.type != "cpu" or t.dtype != torch.float32 for t in (logp_old, advantages))
        or actions.device.type != "cpu"
        or actions.dtype != (torch.float32 if gaussian else torch.int64)
        or not all(p.requires_grad and p.dtype == torch.float32 for p in policy.parameters())
    ):
        return None
    o = settings.objective
    objective = _Objective(
        kind, gaussian, o.epsilon, o.high, o.delta or 0.0, o.entropy_coef,
        policy.log_std.data_ptr() if gaussian else None,
    )  # fmt: skip
    batch = _Steps(actions.contiguous(), logp_old.contiguous(), advantages.contiguous())
    network = policy.network
    if isinstance(network, MLP) and network.native and list(inputs) == ["flat"]:
        parameters = ([policy.log_std] if gaussian else []) + network.in_order
        x = inputs["flat"]
        if x.dtype == torch.float32 and [id(p) for p in parameters] == [id(p) for p in policy.parameters()]:
            return _default_network_gradient(network, parameters, objective, batch, x.contiguous())
    return _outputs_gradient(policy, settings, objective, batch, inputs)


def _surrogate(objective: Objective) -> int | None:
    """The number of the surrogate for compiled code; None where autograd has to do it."""
    if objective.surrogate_function is not None or objective.loss_type not in ("dapo", "spo"):
        return None
    if objective.loss_type == "spo":
        return _SPO
    return _CLIP if objective.delta is None else _DUAL_CLIP


@dataclass(frozen=True)
class _Steps:
    """What compiled code reads by addresses, and so must stay: of all steps of a batch."""

    actions: Tensor
    logp_old: Tensor
    advantages: Tensor

    def at(self, index: Tensor, x: Tensor | None = None) -> Any:
        """The steps at ``index [m]``, contiguous, as compiled code takes them; it must stay as well."""
        rows = None if x is None else x.data_ptr()
        return _Batch(
            rows, self.logp_old.data_ptr(), self.advantages.data_ptr(), self.actions.data_ptr(), index.data_ptr()
        )


def _default_network_gradient(
    network: MLP, parameters: Sequence[Tensor], objective: Any, batch: _Steps, x: Tensor
) -> Gradient:
    """The gradient by ``parameters`` in one call, from inputs ``x [S, n_inputs]``."""
    compiled, net = kernels.functions(), described(network.tanh, network.in_order)
    size = sum(p.numel() for p in parameters)

    def gradient(index: Tensor, denominator: int) -> tuple[Tensor, Tensor]:
        made, sums = torch.empty(size, dtype=torch.float32, device="cpu"), (c_double * 2)()
        index = index.contiguous()
        failed = compiled.grouprl_objective(
            ctypes.byref(net), ctypes.byref(objective), ctypes.byref(batch.at(index, x)), c_size_t(len(index)),
            c_double(denominator), c_void_p(made.data_ptr()), sums,
        )  # fmt: skip
        if failed:
            raise MemoryError(f"no memory for the gradient of {len(index)} steps")
        return made, _logged(sums)

    return gradient


def _outputs_gradient(
    policy: Policy, settings: UpdateSettings, objective: Any, batch: _Steps, inputs: Mapping[str, Tensor]
) -> Gradient:
    """The gradient by the policy's parameters: autograd's through the network, compiled code's through the rest."""
    compiled, parameters = kernels.functions(), list(policy.parameters())
    learned = [p for p in parameters if not (policy.gaussian and p is policy.log_std)]

    def gradient(index: Tensor, denominator: int) -> tuple[Tensor, Tensor]:
        total, logged = None, torch.zeros(2, dtype=torch.float32, device="cpu")
        for i in index.tensor_split(-(-len(index) // settings.micro_batch)):
            rows, sums = i.contiguous(), (c_double * 2)()
            out = policy.outputs({key: value.index_select(0, rows) for key, value in inputs.items()})
            z = out.detach().to(torch.float32, copy=True).contiguous()
            d_log_std = torch.zeros(z.shape[1] if policy.gaussian else 0, dtype=torch.float32, device="cpu")
            failed = compiled.grouprl_objective_of(
                ctypes.byref(objective), ctypes.byref(batch.at(rows)), c_size_t(len(rows)), c_int32(z.shape[1]),
                c_double(denominator), c_void_p(z.data_ptr()), c_void_p(d_log_std.data_ptr()), sums,
            )  # fmt: skip
            if failed:
                raise MemoryError(f"no memory for the gradient of {len(rows)} steps")
            reached = learned if out.requires_grad else []  # not where a network's outputs are constant
            found = iter(torch.autograd.grad(out, reached, z.to(out.dtype), allow_unused=True) if reached else ())
            made = [d_log_std if policy.gaussian and p is policy.log_std else next(found, None) for p in parameters]
            flat = torch.cat([
                p.new_zeros(p.numel()) if g is None else g.reshape(-1) for p, g in zip(parameters, made, strict=True)
            ])  # fmt: skip
            total = flat if total is None else total.add_(flat)
            logged += _logged(sums)
        assert total is not None
        return total, logged

    return gradient


def _logged(sums: Any) -> Tensor:
    """Policy loss and divergence, as the update loop adds them up."""
    return torch.tensor([sums[0], 0.0], dtype=torch.float32, device="cpu")
