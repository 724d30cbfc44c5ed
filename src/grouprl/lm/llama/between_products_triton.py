"""The operations of :mod:`grouprl.lm.llama.between_products` as Triton kernels, one for each direction."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from grouprl.lm.llama.between_products import BetweenProductsTorch, Triple, by_halves, rotary
from grouprl.lm.packed.low_precision import add_gradient


def _kernels() -> Any:
    """The module of the kernels; imported late, as importing it needs Triton."""
    return import_module("grouprl.lm.kernels.triton_kernels")


class BetweenProductsTriton(BetweenProductsTorch):
    """In Triton, with FlashAttention, on a GPU."""

    @staticmethod
    def angles(decoder: Any, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`BetweenProducts.angles`: each ``[S, D]``."""
        return rotary(decoder, x, positions)

    def norm(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """See :meth:`BetweenProducts.norm`."""
        h: Tensor = _kernels().add_norm(x, None, self.norms["input"], self._eps("input"), dtype)
        return h

    def post_norm(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`BetweenProducts.post_norm`."""
        to = torch.empty_like(x)
        return to, _kernels().add_norm(x, y, self.norms["post"], self._eps("post"), y.dtype, to)

    def rotate(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> Triple:
        """See :meth:`BetweenProducts.rotate`."""
        heads, *_ = sizes = self.heads
        norms = torch.stack([self.norms["q"], self.norms["k"]]) if "q" in self.norms else None
        eps = 0.0 if norms is None else self._eps("q")
        rotated = _kernels().turn(qkv, cos, sin, norms, eps, sizes)
        return rotated[:, :heads], rotated[:, heads:], self.split(qkv)[2]

    def gate(self, gate_up: Tensor) -> Tensor:
        """See :meth:`BetweenProducts.gate`."""
        m: Tensor = _kernels().gate(gate_up)
        return m

    def gate_gradient(self, gate_up: Tensor, dm: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`BetweenProducts.gate_gradient`."""
        d_gate_up, m = _kernels().gate_gradient(gate_up, dm)
        return d_gate_up, m

    def _rotate_gradient(self, qkv: Tensor, cos: Tensor, sin: Tensor, d: Triple) -> Tensor:
        if "q" in self.norms:
            return super()._rotate_gradient(qkv, *by_halves(cos, sin), d)
        dqkv: Tensor = _kernels().turn_gradient(*d, cos, sin, self.heads)
        return dqkv

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
