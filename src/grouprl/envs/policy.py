"""The policy: observation normalisation, a small network, and the parameters of an action distribution.

There is no value head: nothing in this file estimates a return.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from grouprl.envs.action_codec import ActionCodec
from grouprl.envs.config import GRPOConfig
from grouprl.envs.distributions import DiagonalGaussian
from grouprl.envs.mlp import MLP
from grouprl.envs.native import kernels
from grouprl.envs.own_network import check_network, dtype_of
from grouprl.envs.spaces import ObservationCodec
from grouprl.errors import UsageError

Network = Callable[[int, int], nn.Module]
"""Builds a network from (inputs, outputs): takes ``[m, inputs]`` to ``[m, outputs]``."""

CLIP_OBSERVATION = 10.0
OBSERVED_COLUMNS = 1024
ACTING_ROWS = 1024
"""Rows that act at once on a CPU. What is made and freed between what a batch keeps would leave holes in the heap."""


def check_device(device: str) -> None:
    """Raise UsageError if torch cannot put tensors on ``device``."""
    try:
        torch.zeros(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        reason = str(error).splitlines()[0]
        raise UsageError(f"device={device!r} cannot be used ({reason}); use device=cpu") from None


class ImageEncoder(nn.Module):
    """Small CNN: ``[m, C, H, W]`` of 0..255 to ``[m, 128]``; three convolutions, pooling to 4 x 4, one linear layer."""

    n_outputs = 128

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 16, 5, stride=2, padding=2, dtype=torch.float32),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1, dtype=torch.float32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1, dtype=torch.float32),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(32 * 16, self.n_outputs, dtype=torch.float32),
            nn.ReLU(),
        )
        for layer in self.body:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.orthogonal_(layer.weight, np.sqrt(2))
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        layer = self.body[0]
        assert isinstance(layer, nn.Conv2d)
        out: Tensor = self.body(x.to(layer.weight.dtype) / 255.0)
        return out


class Policy(nn.Module):
    """pi(a | o): maps prepared inputs to the parameters ``[m, K]`` of the action distribution.

    ``inputs`` are what :class:`~grouprl.envs.spaces.ObservationCodec` encodes, after :meth:`prepare`. The
    normalisation statistics are buffers of the model: saved with it, and frozen unless :meth:`observe` is called.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(
        self, observations: ObservationCodec, actions: ActionCodec, config: GRPOConfig, network: Network | None = None
    ) -> None:
        super().__init__()
        self.observations = observations
        self.distribution = actions.distribution
        self.native = config.native and kernels.available  # asked here, so that what compiles is not the training
        self.gaussian = isinstance(self.distribution, DiagonalGaussian)
        n_out = self.distribution.n if isinstance(self.distribution, DiagonalGaussian) else self.distribution.n_params
        self.encoders = nn.ModuleList(ImageEncoder(shape[0]) for shape in observations.images.values())
        n_in = observations.n_flat + ImageEncoder.n_outputs * len(self.encoders)
        self.network = (
            MLP(
                n_in,
                n_out,
                config.hidden_sizes,
                config.activation,
                config.hidden_gain,
                config.output_gain,
                config.native,
            )
            if network is None
            else check_network(network(n_in, n_out), n_in, n_out)
        )
        dtype = dtype_of(self.network)
        self._double = dtype == torch.float64  # what goes in and comes out is float32 all the same
        self.encoders.to(dtype)
        if self.gaussian:
            # The same length of the noise vector whatever the number of dimensions.
            start = -0.5 - 0.5 * math.log(n_out) if config.log_std_init is None else config.log_std_init
            start = start if config.log_std_min is None else max(start, config.log_std_min)
            self.log_std = nn.Parameter(torch.full((n_out,), start, dtype=dtype))
        self.normalize = config.normalize_observations and bool(observations.normalise.any())
        self._rescale = config.normalize_observations and bool((self.normalize | (observations.scale != 1)).any())
        d = observations.n_flat
        self.register_buffer("mean", torch.zeros(d, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(d, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.refresh()

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        """As every module's; the normalisation follows the statistics that were loaded."""
        found = super().load_state_dict(*arguments, **options)
        self.refresh()
        return found

    # --- normalisation -------------------------------------------------------------------------------------------
    def predict(self, *_: Any, **__: Any) -> NoReturn:
        """Raises UsageError: the agent predicts, because it knows the random stream and the masks."""
        raise UsageError("the policy has no predict of its own; call agent.predict(observation)")

    @np.errstate(all="ignore")
    def refresh(self) -> None:
        """Recompute what :meth:`prepare` uses from the buffers."""
        real = self.observations.normalise
        self._shift = np.where(real, self.mean.cpu().numpy(), 0.0).astype(np.float32)
        deviation = np.sqrt(self.variance.cpu().numpy() + 1e-8)
        self._bound = np.where(real, np.float32(CLIP_OBSERVATION), np.float32(np.inf))
        self._scale = np.where(real, 1.0 / deviation, self.observations.scale).astype(np.float32)

    @np.errstate(all="ignore")
    def observe(self, flat: np.ndarray) -> None:
        """Merge the rows of ``flat [m, D]`` (raw) into the running mean and variance (Chan et al. 1979)."""
        if not self.normalize or len(flat) == 0:
            return
        n = float(self.count)
        m = len(flat)
        # Some columns at a time: NumPy makes float64 of all that it is given.
        parts = [flat[:, i : i + OBSERVED_COLUMNS] for i in range(0, flat.shape[1], OBSERVED_COLUMNS)]
        mean = torch.from_numpy(np.concatenate([x.mean(0, dtype=np.float64) for x in parts])).to(self.mean)
        variance = torch.from_numpy(np.concatenate([x.var(0, dtype=np.float64) for x in parts])).to(self.mean)
        delta = mean - self.mean
        self.mean += delta * (m / (n + m))
        self.variance.mul_(n / (n + m)).add_(variance * (m / (n + m)) + delta**2 * (n * m / (n + m) ** 2))
        self.count += m
        self.refresh()

    @np.errstate(all="ignore")
    def prepare(self, encoded: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Normalise the flat part with the current statistics; images pass through."""
        inputs = dict(encoded)
        if self._rescale and "flat" in inputs:
            flat = inputs["flat"] - self._shift
            flat *= self._scale
            inputs["flat"] = np.clip(flat, -self._bound, self._bound, out=flat)
        return inputs

    def normalisation(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What :meth:`prepare` subtracts, multiplies by and clips to, each ``[D]`` of float32."""
        if not self._rescale:
            ones = np.ones(len(self._shift), np.float32)
            return 0 * ones, ones, np.inf * ones
        return self._shift, self._scale, self._bound

    # --- network -------------------------------------------------------------------------------------------------
    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Distribution parameters ``[m, K]`` for ``m`` prepared inputs."""
        out = self.outputs(inputs)
        return torch.cat([out, self.log_std.to(out).expand_as(out)], 1) if self.gaussian else out

    def outputs(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the network gives for ``m`` prepared inputs: :meth:`forward` without standard deviations."""
        parts = [inputs["flat"]] if "flat" in inputs else []
        parts += [encoder(inputs[key]) for key, encoder in zip(self.observations.images, self.encoders, strict=True)]
        x = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        out: Tensor = self.network(x.double() if self._double else x)
        return out.float() if self._double else out

    def infer(self, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """:meth:`forward` for acting: numpy in, numpy out, no gradient."""
        return self.inference()(inputs)

    def inference(self) -> Callable[[Mapping[str, np.ndarray]], np.ndarray]:
        """:meth:`infer` made ready for many calls, none of which may come after a change of the parameters."""
        log_std = self.log_std.detach().cpu().numpy() if self.gaussian else None
        network = self.network.inference() if isinstance(self.network, MLP) else None
        device = self.mean.device

        def infer(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
            if network is not None and list(inputs) == ["flat"]:
                out = network(inputs["flat"])
                return out if log_std is None else np.concatenate([out, np.broadcast_to(log_std, out.shape)], 1)
            with torch.no_grad():  # not inference mode, in which a network could not differentiate inside itself
                # A copy, because the network may change its inputs in place.
                tensors = {k: torch.from_numpy(np.array(value, order="C")).to(device) for k, value in inputs.items()}
                n = max(1, len(next(iter(tensors.values()))))
                size = ACTING_ROWS if device.type == "cpu" else n
                parts = [{k: x[i : i + size] for k, x in tensors.items()} for i in range(0, n, size)]
                return torch.cat([self.forward(part).cpu() for part in parts]).numpy()

        return infer
