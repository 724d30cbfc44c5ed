"""Linear layers whose weights are laid out for compiled products and rounded to the dtype of products."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, c_int32, c_void_p

import torch
from torch import Tensor

from grouprl.lm.kernels.compile import available, functions

BLOCK = 16
"""The number of outputs in a block of a weight."""
_STORE, _ADD, _GATE = range(3)


class LinearStruct(Structure):
    """The argument of compiled code. It points into the tensors of a :class:`Linear`, which must stay alive."""

    _fields_ = [("weight", c_void_p), ("bias", c_void_p), ("k", c_int32), ("out", c_int32)]


class Linear:
    """A linear layer with one or several weights, stacked along their outputs.

    The constructor copies the weights, so later changes of the weights have no effect.

    Args:
        weights: tensors ``[out_i, k]``. k must be a multiple of 32, and every out_i but the last one of 16. ``out`` is
            the sum of all out_i.
        biases: for each weight its bias ``[out_i]`` or None. An empty sequence means no biases.
        low: whether products run in bfloat16. Otherwise they run in float32.
        turns: whether the blocks of the weights alternate: the first block of each weight, then the second of each, and
            so on. The weights must have the same size then.

    Raises:
        UnavailableError: there is no compiled code.
    """

    def __init__(
        self, weights: Sequence[Tensor], biases: Sequence[Tensor | None] = (), *, low: bool, turns: bool = False
    ) -> None:
        outs, k = [len(w) for w in weights], weights[0].shape[1]
        assert not k % (2 * BLOCK)
        assert not any(out % BLOCK for out in outs[:-1])
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
            pairs = zip(biases, outs, strict=True)
            bias = torch.cat([torch.zeros(out) if b is None else b.detach().float() for b, out in pairs])
        self._set(packed, bias, k, sum(outs))

    @classmethod
    def backwards(cls, weights: Sequence[Tensor]) -> Linear:
        """Build the layer that maps the gradient of the outputs to the gradient of the inputs, in bfloat16.

        Args:
            weights: tensors ``[out_i, k]``. The sum of all out_i must be a multiple of 32.

        Raises:
            UnavailableError: there is no compiled code.
        """
        outs, k = [len(w) for w in weights], weights[0].shape[1]
        packed, at = cls._room(sum(outs) * k, low=True), 0
        for w, out in zip(weights, outs, strict=True):
            w = _readable(w)
            functions().grouprl_pack_turned(_at(w), _is_low(w), out, k, at, sum(outs), _at(packed))
            at += out
        linear = cls.__new__(cls)
        linear._set(packed, None, sum(outs), k)
        return linear

    @staticmethod
    def _room(n: int, low: bool) -> Tensor:
        return torch.empty(n, dtype=torch.bfloat16 if low else torch.float32)

    def _set(self, packed: Tensor, bias: Tensor | None, k: int, out: int) -> None:
        self._kept = packed, bias
        self.low = packed.dtype == torch.bfloat16
        self.struct = LinearStruct(packed.data_ptr(), None if bias is None else bias.data_ptr(), k, out)

    def __call__(self, x: Tensor, dtype: torch.dtype = torch.float32, *, gated: bool = False) -> Tensor:
        """Multiply ``x`` by the weights and add the biases.

        Args:
            x: ``[..., k]``.
            dtype: the dtype of the result. bfloat16 needs a multiple of 16 outputs.
            gated: whether to return silu(gate) * up. The weights must be gate and up with alternating blocks then.

        Returns:
            ``[..., out]``, or ``[..., out / 2]`` if gated.

        Raises:
            MemoryError: there is not enough memory.
        """
        out = self.struct.out // 2 if gated else self.struct.out
        x = x.detach()
        y = x.new_empty(*x.shape[:-1], out, dtype=dtype)
        self._run(x.reshape(-1, self.struct.k), y.view(-1, out), _GATE if gated else _STORE)
        return y

    def into(self, y: Tensor, x: Tensor, *, add: bool = False) -> None:
        """Multiply ``x`` by the weights, add the biases and write the result to ``y``.

        Args:
            y: ``[m, out]``, with contiguous rows.
            x: ``[m, k]``.
            add: whether to add the result to ``y``, which must be float32 then.

        Raises:
            MemoryError: there is not enough memory.
        """
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
    """Whether bfloat16 products of many rows are faster here than in torch.

    They are on processors that have vector instructions for bfloat16 and no matrix unit.
    """
    return available() and bool(functions().grouprl_vectors())


def _readable(w: Tensor) -> Tensor:
    """Convert a weight to a form that compiled code can read: contiguous float32 or bfloat16."""
    w = w.detach()
    return (w if w.dtype in (torch.float32, torch.bfloat16) else w.float()).contiguous()


def _at(x: Tensor) -> c_void_p:
    return c_void_p(x.data_ptr())


def _is_low(x: Tensor) -> int:
    return int(x.dtype == torch.bfloat16)
