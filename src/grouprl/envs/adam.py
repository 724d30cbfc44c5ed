"""Adam on one gradient of all parameters.

PyTorch's optimizers do the same arithmetic, but building one imports its compiler, a second of every process that never
compiles anything; with gradient and moments in one vector each, the update is seven operations, or one of compiled
code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from ctypes import c_float, c_size_t, c_void_p

import torch
from torch import Tensor

from grouprl.envs.native import kernels
from grouprl.learning.parameters import TrainedParameters


class Adam:
    """Kingma and Ba 2015, arXiv 1412.6980, algorithm 1.

    Args:
        parameters: what :meth:`step` moves along ``parameters.gradient``, of one dtype.
        learning_rate: alpha; may be set between steps.
        eps, betas: as in the paper.
        native: compiled code for float32 on CPUs, where there is a compiler.
        floors: parameters that no step takes below a number.

    Attributes:
        first, second: the moments ``[P]`` of all parameters, end to end.
    """

    def __init__(
        self,
        parameters: TrainedParameters,
        learning_rate: float,
        eps: float = 1e-8,
        betas: tuple[float, float] = (0.9, 0.999),
        native: bool = True,
        floors: Sequence[tuple[Tensor, float]] = (),
    ) -> None:
        self.parameters, self.learning_rate, self.eps, self.betas = parameters, learning_rate, eps, betas
        self.floors = tuple(floors)
        self.first = parameters.values().zero_()
        self.second = torch.zeros_like(self.first)
        self.steps = 0
        plain = self.first.device.type == "cpu" and self.first.dtype == torch.float32
        self.native = native and plain and kernels.available
        tensors = parameters.tensors
        self._sizes = (c_size_t * len(tensors))(*(p.numel() for p in tensors))

    @torch.no_grad()
    def step(self) -> None:
        """One step along the gradient, and back to the floors where it went below."""
        self._step()
        self.raise_to_floors()

    @torch.no_grad()
    def raise_to_floors(self) -> None:
        """Lift what lies below its floor, as weights that were loaded may."""
        for parameter, least in self.floors:
            parameter.clamp_(min=least)

    def _step(self) -> None:
        tensors, gradient = self.parameters.tensors, self.parameters.gradient
        beta1, beta2 = self.betas
        self.steps += 1
        rate = self.learning_rate / (1 - beta1**self.steps)
        scale = 1 / math.sqrt(1 - beta2**self.steps)
        if self.native:
            gradient = gradient.contiguous()
            kernels.functions().grouprl_adam(
                c_size_t(len(tensors)), self._sizes, (c_void_p * len(tensors))(*(p.data_ptr() for p in tensors)),
                *(c_void_p(t.data_ptr()) for t in (gradient, self.first, self.second)),
                *(c_float(number) for number in (beta1, beta2, rate, scale, self.eps)),
            )  # fmt: skip
            return
        self.first.lerp_(gradient, 1 - beta1)
        self.second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        spread = self.second.sqrt().mul_(scale).add_(self.eps)
        torch._foreach_add_([*tensors], self.parameters.split(self.first / spread), alpha=-rate)

    def state(self) -> dict[str, Tensor]:
        """The moments ``[P]`` and the number of steps, for a checkpoint."""
        return {"first": self.first, "second": self.second, "steps": torch.tensor(self.steps)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state`. Raises ValueError for a number of steps that cannot be."""
        if int(state["steps"]) < 0:
            raise ValueError(f"the optimizer took {int(state['steps'])} steps")
        self.first.copy_(state["first"])
        self.second.copy_(state["second"])
        self.steps = int(state["steps"])
