"""What a network of the user's own must be able to do, tried once when the policy is made."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from grouprl.errors import UsageError, error_text

ROWS = 4


def check_network(network: object, n_inputs: int, n_outputs: int) -> nn.Module:
    """``network``, in evaluation mode, if it maps ``[m, n_inputs]`` to ``[m, n_outputs]``, each row by itself.

    Raises:
        UsageError: it does not, or not to finite numbers, its parameters are not all float32 or all float64, or its
            outputs give them no gradient.

    Warns UserWarning of layers that behave otherwise in training, where they will not.
    """
    if not isinstance(network, nn.Module):
        raise UsageError(f"network=... returned {type(network).__name__}; it must return a torch.nn.Module")
    network.eval()
    dtype = dtype_of(network)
    x = torch.linspace(-1, 1, ROWS * n_inputs, dtype=dtype).view(n_inputs, ROWS).t().contiguous()
    device = next((p.device for p in network.parameters()), torch.device("cpu"))
    first = _run(network, x.to(device), n_inputs, n_outputs)
    if any(p.requires_grad for p in network.parameters()) and not first.requires_grad:
        raise UsageError(
            "no gradient comes from the network's outputs to its parameters, so it would never learn: take no_grad, "
            "detach, .data or NumPy out of its forward"
        )
    out, again = first.detach().cpu(), _run(network, x.to(device), n_inputs, n_outputs).detach().cpu()
    alone = torch.cat([_run(network, row.to(device), n_inputs, n_outputs).detach().cpu() for row in torch.split(x, 1)])
    if not bool(torch.isfinite(out).all()):
        raise UsageError("the network's outputs are not finite for inputs from -1 to 1; begin with smaller weights")
    if not torch.allclose(out, again, rtol=1e-3, atol=1e-5):
        raise UsageError(
            "the network gives other outputs for the same inputs in evaluation mode; it must draw no random numbers "
            "there: the policy draws the actions"
        )
    if not torch.allclose(out, alone, rtol=1e-2, atol=1e-4):
        raise UsageError(
            "the network gives an observation other outputs alone than beside others; each row must be computed by "
            "itself: use LayerNorm or GroupNorm in the place of statistics of the batch"
        )
    _warn_of_modes(network)
    return network


def dtype_of(network: nn.Module) -> torch.dtype:
    """The dtype of the network's parameters, float32 where it has none.

    Raises:
        UsageError: they are not all float32 or all float64.
    """
    dtypes = {p.dtype for p in network.parameters()} or {torch.float32}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        raise UsageError(
            f"the network's parameters are {', '.join(sorted(map(str, dtypes)))}; they must be all float32 or all "
            "float64: call .float() on it"
        )
    return next(iter(dtypes))


@torch.enable_grad()
def _run(network: nn.Module, x: Tensor, n_inputs: int, n_outputs: int) -> Tensor:
    shape = [len(x), n_inputs]
    try:
        out = network(x.clone())
    except Exception as error:  # whatever the user's network raises
        raise UsageError(
            f"the network cannot take observations of shape {shape} ({error_text(error)}); "
            f"network=... must build one for {n_inputs} inputs and {n_outputs} outputs"
        ) from error
    wanted = [len(x), n_outputs]
    if not isinstance(out, Tensor) or list(out.shape) != wanted or not out.is_floating_point():
        given = f"{list(out.shape)} of {out.dtype}" if isinstance(out, Tensor) else type(out).__name__
        raise UsageError(
            f"the network returns {given} for observations of shape {shape}; it must return {wanted} numbers: "
            "network=... is called with (inputs, outputs), and outputs is the width of its last layer"
        )
    return out


def _warn_of_modes(network: nn.Module) -> None:
    norm = any(isinstance(m, _BatchNorm) for m in network.modules())
    dropout = any(isinstance(m, _DropoutNd) and m.p > 0 for m in network.modules())
    if norm or dropout:
        what = " and ".join(["dropout is off"] * dropout + ["batch norm keeps the statistics it began with"] * norm)
        warnings.warn(
            f"the network stays in evaluation mode, in training too: {what}. The policy that learns must be the one "
            "that acts" + ("; use LayerNorm instead" if norm else ""),
            UserWarning,
            stacklevel=6,
        )
