"""A policy as one module of plain layers that needs nothing of grouprl: for TorchScript, ONNX or torch.export.

It takes observations as the environment gives them, in a batch. Where the observation is one array it is called with
that, ``[m, ...]``; where it is a Dict or Tuple, with a list of its leaves, in the order of ``module.leaves``. Numbers
are converted to float32, integers to what the policy reads of them, and normalised; images are read as they are. A mask
in the observation is heard; one in ``info`` is not, but by :func:`deployed`, which takes it as a further input.
"""

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from grouprl.envs.action_codec import ActionCodec
from grouprl.envs.distributions import (
    MASKED_LOGIT,
    Categorical,
    DiagonalGaussian,
    IndependentBernoulli,
    MultiCategorical,
)
from grouprl.envs.mlp import MLP
from grouprl.envs.policy import Policy


class _Numbers(nn.Module):
    """A leaf of numbers: ``[m, ...]`` to ``[m, D]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1).float() if x.dim() > 1 else x.unsqueeze(1).float()


class _OneHots(nn.Module):
    """A leaf of integers: ``[m, ...]`` to the one-hot of each, side by side, ``[m, D]``."""

    lowest: Tensor

    def __init__(self, lowest: list[int], sizes: list[int]) -> None:
        super().__init__()
        self.register_buffer("lowest", torch.tensor(lowest, dtype=torch.int64))
        self.sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        index = x.reshape(x.shape[0], -1).long() - self.lowest
        parts = [one_hot(index[:, i], size).float() for i, size in enumerate(self.sizes)]
        return torch.cat(parts, 1)


class _Image(nn.Module):
    """A leaf that is an image: ``[m, ...]`` to what a small CNN makes of it, ``[m, 128]``."""

    def __init__(self, layout: str, body: nn.Module) -> None:
        super().__init__()
        self.layout, self.body = layout, body

    def forward(self, x: Tensor) -> Tensor:
        if self.layout == "FHWC":
            x = x.permute(0, 1, 4, 2, 3).flatten(1, 2)
        elif self.layout == "FCHW":
            x = x.flatten(1, 2)
        elif self.layout == "HWC":
            x = x.permute(0, 3, 1, 2)
        elif self.layout == "HW":
            x = x.unsqueeze(1)
        out: Tensor = self.body(x.float() / 255.0)
        return out


class _Read(nn.Module):
    """Leaves to the inputs of the network ``[m, n]``: flat ones normalised, then images."""

    flat_places: list[int]
    image_places: list[int]
    shift: Tensor
    scale: Tensor
    bound: Tensor

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        observations = policy.observations
        numbers, images = observations.flat_leaves, observations.image_leaves
        self.flat_places, self.image_places = [n for n, _ in numbers], [n for n, _ in images]
        self.flat = nn.ModuleList(_Numbers() if values is None else _OneHots(*values) for _, values in numbers)
        bodies = [copy.deepcopy(encoder).cpu().float().get_submodule("body") for encoder in policy.encoders]
        self.images = nn.ModuleList(_Image(layout, body) for (_, layout), body in zip(images, bodies, strict=True))
        for name, values in zip(("shift", "scale", "bound"), policy.normalisation(), strict=True):
            self.register_buffer(name, torch.tensor(values))

    def forward(self, leaves: list[Tensor]) -> Tensor:
        found: list[Tensor] = []
        for i, reader in enumerate(self.flat):
            found.append(reader(leaves[self.flat_places[i]]))
        if len(found) > 0:
            flat = (torch.cat(found, 1) - self.shift) * self.scale
            found = [torch.maximum(torch.minimum(flat, self.bound), -self.bound)]
        for i, reader in enumerate(self.images):
            found.append(reader(leaves[self.image_places[i]]))
        return torch.cat(found, 1)


class _Network(nn.Module):
    """Inputs ``[m, n]`` to parameters ``[m, K]`` of the distribution."""

    log_std: Tensor

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        network = copy.deepcopy(policy.network).cpu().eval()
        self.network: nn.Module = network.float()
        if isinstance(network, MLP):
            layers: list[nn.Module] = []
            for layer in network.layers:
                layers += [layer, nn.Tanh() if network.tanh else nn.ReLU()]
            self.network = nn.Sequential(*layers[:-1])
        self.gaussian = policy.gaussian
        log_std = policy.log_std.detach().float().cpu().clone() if policy.gaussian else torch.zeros(0)
        self.register_buffer("log_std", log_std)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(x)
        return torch.cat([out, self.log_std.expand_as(out)], 1) if self.gaussian else out


class _Parameters(nn.Module):
    """The parameters themselves."""

    def forward(self, params: Tensor) -> Tensor:
        return params


class _OneOf(nn.Module):
    """The most likely choice of each component, ``[m, ...]``."""

    start: Tensor

    def __init__(self, nvec: list[int], start: Tensor, shape: list[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.nvec, self.shape, self.dtype = nvec, [-1, *shape], dtype
        self.register_buffer("start", start.reshape(-1))

    def forward(self, params: Tensor) -> Tensor:
        parts = torch.split(params, self.nvec, 1)
        chosen = torch.stack([part.argmax(1) for part in parts], 1) + self.start
        return chosen.reshape(self.shape).to(self.dtype)


class _Switches(nn.Module):
    """What is more likely on than off, ``[m, ...]`` of 0 and 1."""

    def __init__(self, shape: list[int], dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype = [-1, *shape], dtype

    def forward(self, params: Tensor) -> Tensor:
        return (params > 0).reshape(self.shape).to(self.dtype)


class _Means(nn.Module):
    """The means, in the unit of the action space and within its bounds, ``[m, ...]``."""

    low: Tensor
    high: Tensor
    middle: Tensor
    half_range: Tensor

    def __init__(self, codec: ActionCodec) -> None:
        super().__init__()
        for name, values in zip(("low", "high", "middle", "half_range"), codec.affine(), strict=True):
            self.register_buffer(name, torch.tensor(values))
        self.shape, self.dtype = [-1, *(codec.space.shape or ())], torch_dtype(codec.space.dtype)

    def forward(self, params: Tensor) -> Tensor:
        mean = params[:, : self.low.shape[0]].to(self.low.dtype)
        actions = torch.minimum(torch.maximum(mean * self.half_range + self.middle, self.low), self.high)
        return actions.reshape(self.shape).to(self.dtype)


class _Whole(nn.Module):
    """Leaves of a batch of observations to actions or parameters."""

    def __init__(self, policy: Policy, codec: ActionCodec, actions: bool) -> None:
        super().__init__()
        self.leaves = policy.observations.leaf_names
        self.mask_place, self.masked = policy.observations.mask_place, MASKED_LOGIT
        self.read, self.network = _Read(policy), _Network(policy)
        self.act = _actions(codec) if actions else _Parameters()

    def forward(self, leaves: list[Tensor]) -> Tensor:
        params: Tensor = self.network(self.read(leaves))
        if self.mask_place >= 0:
            params = params.masked_fill(leaves[self.mask_place].flatten(1) == 0, self.masked)
        out: Tensor = self.act(params)
        return out


class _OfOne(nn.Module):
    """An observation that is one array, ``[m, ...]``, to actions or parameters."""

    def __init__(self, whole: _Whole) -> None:
        super().__init__()
        self.leaves, self.whole = whole.leaves, whole

    def forward(self, observation: Tensor) -> Tensor:
        out: Tensor = self.whole([observation])
        return out


class _Deployed(nn.Module):
    """Inputs one by one to actions and the parameters of their distribution, masked."""

    def __init__(self, policy: Policy, codec: ActionCodec, mask: bool) -> None:
        super().__init__()
        self.whole, self.act, self.mask = _Whole(policy, codec, False), _actions(codec), mask

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        leaves = list(inputs)
        mask = leaves.pop() if self.mask else None
        params: Tensor = self.whole(leaves)
        if mask is not None:
            params = params.masked_fill(mask.flatten(1) == 0, self.whole.masked)
        return self.act(params), params


def torch_dtype(dtype: np.dtype[Any] | None) -> torch.dtype:
    """Torch's name for a type of NumPy's. Raises TypeError if it has none."""
    return torch.from_numpy(np.zeros(0, dtype)).dtype


def _actions(codec: ActionCodec) -> nn.Module:
    space, distribution = codec.space, codec.distribution
    shape, dtype = list(space.shape or ()), torch_dtype(codec.space.dtype)
    if isinstance(distribution, DiagonalGaussian):
        return _Means(codec)
    if isinstance(distribution, IndependentBernoulli):
        return _Switches(shape, dtype)
    nvec = list(distribution.nvec) if isinstance(distribution, MultiCategorical) else [distribution.n]
    assert isinstance(distribution, Categorical | MultiCategorical)
    return _OneOf(nvec, torch.as_tensor(space.start, dtype=torch.int64), shape, dtype)  # type: ignore[attr-defined]


def export_module(policy: Policy, codec: ActionCodec, actions: bool = True) -> nn.Module:
    """A module that does what ``policy`` does, from raw observations to actions of the space of ``codec``.

    Args:
        policy: what it is made of; it keeps no tie to it. codec: of the action space.
        actions: most likely actions, or parameters ``[m, K]`` of their distribution.
    """
    whole = _Whole(policy, codec, actions)
    return _frozen(_OfOne(whole) if len(whole.leaves) == 1 else whole)


def deployed(policy: Policy, codec: ActionCodec, *, mask: bool) -> nn.Module:
    """A module of the leaves of a batch of observations, one argument each, to ``(actions, parameters [m, K])``.

    Args:
        policy: what it is made of; it keeps no tie to it. codec: of the action space.
        mask: it takes one more argument in the end, ``[m, K]``: what is not 0 is allowed.
    """
    return _frozen(_Deployed(policy, codec, mask))


def _frozen(module: nn.Module) -> nn.Module:
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module.cpu().eval()
