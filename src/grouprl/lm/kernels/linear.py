"""Linear layers laid out for compiled products, rounded on the way."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, c_int32, c_void_p

import torch
from torch import Tensor

from grouprl.lm.kernels.compile import available, functions

BLOCK = 16
"""Outputs of a block of a weight."""
_STORE, _ADD, _GATE = range(3)


class LinearStruct(Structure):
    """What compiled code takes; its addresses are those of a :class:`Linear`, which must stay."""

    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("k", c_int32), ("out", c_int32)]


class Linear:
    """Weights ``[out, k]`` above one another, laid out; as they are now.

    Args:
        weights: k is a multiple of 32.
        biases: one for each weight or None, all None if there are none.
        low: products run in bfloat16, otherwise in float32.
        turns: the weights, equally large, take turns: a block of each.
    """

    def __init__(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor | None] = (), *, low: bool, turns: bool = False
    ) -> None:
        outs, k = [len(w) for w in weights], weights[0].shape[1]
        blocks = [-(-out // BLOCK) for out in outs]
        packed = self._room(sum(blocks) * BLOCK * k, low)
        first = 0
        for i, (w, count) in enumerate(zip(weights, blocks, strict=True)):
            w = _readable(w)
            start, stride = (i, len(weights)) if turns else (first, 1)
            functions().grouprl_pack(_at(w), _is_low(w), int(low), outs[i], k, _at(packed), start, stride)
            first += count
        bias = None
        if any(b is not None for b in biases):
            found = zip(biases, outs, strict=True)
            bias = torch.cat([torch.zeros(out) if b is None else b.detach().float() for b, out in found])
        self._set(packed, bias, k, sum(outs))

    @classmethod
    def backwards(cls, weights: Sequence[Tensor]) -> Linear:
        """From the gradient of the outputs to that of the inputs, in bfloat16; outputs are a multiple of 32 in all."""
        outs, k = [len(w) for w in weights], weights[0].shape[1]
        packed, at = cls._room(sum(outs) * k, low=True), 0
        for w, out in zip(weights, outs, strict=True):
            w = _readable(w)
            functions().grouprl_pack_turned(_at(w), _is_low(w), out, k, at, sum(outs), _at(packed))
            at += out
        made = cls.__new__(cls)
        made._set(packed, None, sum(outs), k)
        return made

    @staticmethod
    def _room(n: int, low: bool) -> Tensor:
        return torch.empty(n, dtype=torch.bfloat16 if low else torch.float32)

    def _set(self, packed: Tensor, bias: Tensor | None, k: int, out: int) -> None:
        self._kept = packed, bias
        self.low = packed.dtype == torch.bfloat16
        self.struct = LinearStruct(packed.data_ptr(), None if bias is None else bias.data_ptr(), k, out)

    def __call__(self, x: Tensor, dtype: torch.dtype = torch.float32, *, gated: bool = False) -> Tensor:
        """``x [..., k]`` times the weights: ``[..., out]`` in ``dtype``; bfloat16 needs a multiple of 16 outputs.

        With ``gated`` the weights are those of gate and up, in turns, and what comes back silu(gate) * up.
        """
        out = self.struct.out // 2 if gated else self.struct.out
        x = x.detach()
        y = x.new_empty(*x.shape[:-1], out, dtype=dtype)
        self._run(x.reshape(-1, self.struct.k), y.view(-1, out), _GATE if gated else _STORE)
        return y

    def into(self, y: Tensor, x: Tensor, *, add: bool = False) -> None:
        """Write ``x [m, k]`` times the weights to ``y [m, out]``, or ``add`` it to what float32 is there."""
        assert y.shape == (len(x), self.struct.out)
        assert y.stride(1) == 1
        assert y.dtype == torch.float32 or not add
        self._run(x.detach(), y, _ADD if add else _STORE)

    def _run(self, x: Tensor, y: Tensor, what: int) -> None:
        x = x if x.dtype == torch.bfloat16 else x.float()
        x = x if x.stride(1) == 1 else x.contiguous()
        if functions().grouprl_linear(
            int(self.low), len(x), _at(x), _is_low(x), x.stride(0), ctypes.byref(self.struct), _at(y), _is_low(y),
            y.stride(0), what,
        ):  # fmt: skip
            raise MemoryError(f"no memory for the product of {tuple(x.shape)} with a weight of {self.struct.out} rows")


def preferred() -> bool:
    """Whether bfloat16 products of many rows are better done here than by torch: without a matrix unit they are."""
    return available() and bool(functions().grouprl_vectors())


def _readable(w: Tensor) -> Tensor:
    """As compiled code reads it: float32 or bfloat16, row after row."""
    w = w.detach()
    return (w if w.dtype in (torch.float32, torch.bfloat16) else w.float()).contiguous()


def _at(x: Tensor) -> c_void_p:
    return c_void_p(x.data_ptr())


def _is_low(x: Tensor) -> int:
    return int(x.dtype == torch.bfloat16)
