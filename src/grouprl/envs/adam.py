"""Adam on one flat vector.

PyTorch's optimizers do the same arithmetic, but building one imports its compiler, a second of every process that never
compiles anything; with all parameters in one vector, the update itself is seven operations, or one of compiled code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from ctypes import c_float, c_size_t, c_void_p
from pathlib import Path

import torch
from torch import Tensor, nn

from grouprl.machine.compile import Kernels

kernels = Kernels(Path(__file__).resolve().parent / "native", ("adam.c",))


class Adam:
    """Kingma and Ba 2015, arXiv 1412.6980, algorithm 1.

    Args:
        vector: the parameters, ``[P]``; :meth:`step` reads ``vector.grad``.
        learning_rate: alpha; may be set between steps.
        eps, betas: as in the paper.
        native: compiled code for float32 on CPUs, where there is a compiler.
    """

    def __init__(
        self,
        vector: nn.Parameter,
        learning_rate: float,
        eps: float = 1e-8,
        betas: tuple[float, float] = (0.9, 0.999),
        native: bool = True,
    ) -> None:
        self.vector, self.learning_rate, self.eps, self.betas = vector, learning_rate, eps, betas
        self.first = torch.zeros_like(vector.data)
        self.second = torch.zeros_like(vector.data)
        self.steps = 0
        self.native = native and vector.device.type == "cpu" and vector.dtype == torch.float32 and kernels.available

    @torch.no_grad()
    def step(self) -> None:
        """One step along ``vector.grad``."""
        gradient = self.vector.grad
        assert gradient is not None
        beta1, beta2 = self.betas
        self.steps += 1
        rate = self.learning_rate / (1 - beta1**self.steps)
        scale = 1 / math.sqrt(1 - beta2**self.steps)
        if self.native:
            gradient = gradient.contiguous()
            kernels.functions().grouprl_adam(
                c_size_t(self.vector.numel()),
                *(c_void_p(t.data_ptr()) for t in (self.vector, gradient, self.first, self.second)),
                *(c_float(number) for number in (beta1, beta2, rate, scale, self.eps)),
            )
            return
        self.first.lerp_(gradient, 1 - beta1)
        self.second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        spread = self.second.sqrt().mul_(scale).add_(self.eps)
        self.vector.addcdiv_(self.first, spread, value=-rate)

    def state(self) -> dict[str, Tensor]:
        """The moments ``[P]`` and the number of steps, for a checkpoint."""
        return {"first": self.first, "second": self.second, "steps": torch.tensor(self.steps)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state`."""
        self.first.copy_(state["first"])
        self.second.copy_(state["second"])
        self.steps = int(state["steps"])
