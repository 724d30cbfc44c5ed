"""What lies between the products of a Llama-shaped layer on a GPU, a kernel each way."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from grouprl.lm.llama.between_products import TorchParts, Triple, by_halves, rotary
from grouprl.lm.packed.low_precision import add_gradient


def _kernels() -> Any:
    """The kernels, once something wants them: to import them needs Triton."""
    return import_module("grouprl.lm.kernels.triton_kernels")


class KernelParts(TorchParts):
    """By Triton, attention by FlashAttention."""

    @staticmethod
    def angles(decoder: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Parts.angles`: each ``[S, D]``."""
        return rotary(decoder, x, positions)

    def norm(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """See :meth:`Parts.norm`."""
        h: Tensor = _kernels().add_norm(x, None, self.norms["input"], self._eps("input"), dtype)
        return h

    def post_norm(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Parts.post_norm`."""
        to = torch.empty_like(x)
        return to, _kernels().add_norm(x, y, self.norms["post"], self._eps("post"), y.dtype, to)

    def rotate(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> Triple:
        """See :meth:`Parts.rotate`."""
        heads, *_ = sizes = self.heads
        norms = torch.stack([self.norms["q"], self.norms["k"]]) if "q" in self.norms else None
        eps = 0.0 if norms is None else self._eps("q")
        turned = _kernels().turn(qkv, cos, sin, norms, eps, sizes)
        return turned[:, :heads], turned[:, heads:], self.split(qkv)[2]

    def gate(self, gate_up: Tensor) -> Tensor:
        """See :meth:`Parts.gate`."""
        m: Tensor = _kernels().gate(gate_up)
        return m

    def gate_gradient(self, gate_up: Tensor, dm: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`Parts.gate_gradient`."""
        made: tuple[Tensor, Tensor] = _kernels().gate_gradient(gate_up, dm)
        return made

    def _turned_back(self, qkv: Tensor, cos: Tensor, sin: Tensor, d: Triple) -> Tensor:
        if "q" in self.norms:
            return super()._turned_back(qkv, *by_halves(cos, sin), d)
        made: Tensor = _kernels().turn_gradient(*d, cos, sin, self.heads)
        return made

    def _through_norm(self, name: str, norm: Any, x: Tensor, dh: Tensor, g: Tensor, g_low: Tensor) -> Tensor:
        learned = norm.weight.requires_grad
        h: Tensor
        h, dw = _kernels().norm_gradient(x, dh, self.norms[name], norm.variance_epsilon, g, g_low, learned)
        if learned:
            add_gradient(norm.weight, dw)
        return h

    def _eps(self, name: str) -> float:
        a = self.module.self_attn
        norms = {"input": self.module.input_layernorm, "post": self.module.post_attention_layernorm}
        eps: float = (norms.get(name) or a.q_norm).variance_epsilon
        return eps
