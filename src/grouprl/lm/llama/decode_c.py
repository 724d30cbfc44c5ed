"""Compiled decode steps of Llama-shaped models on a CPU: one call for all layers and rows."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_void_p
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grouprl.lm.kernels.attention import attention
from grouprl.lm.kernels.compile import functions
from grouprl.lm.kernels.linear import Linear, LinearStruct
from grouprl.lm.llama.adapters import is_lora, merged_weight
from grouprl.lm.llama.between_products import rotary
from grouprl.lm.llama.between_products_c import BetweenProductsC
from grouprl.lm.packed.attention import UnsupportedError
from grouprl.lm.packed.packing import Group, Pack

_W = 16
"""Floats of a vector: tokens of a block of keys."""


class _LayerStruct(Structure):
    _fields_ = [
        ("norm1", c_void_p), ("norm2", c_void_p), ("q_norm", c_void_p), ("k_norm", c_void_p),
        *((name, LinearStruct) for name in ("qkv", "o", "gate_up", "down")),
        ("scale", c_float), ("window", c_int32),
    ]  # fmt: skip


class _ModelStruct(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("layers", "width", "heads", "k_heads", "head_dim", "inner", "low")),
        ("eps", c_float), ("norm", c_void_p), ("head", LinearStruct), ("layer", POINTER(_LayerStruct)),
    ]  # fmt: skip


class _CacheStruct(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("slots", "C", "longest")),
        *((name, c_void_p) for name in ("lengths", "prompt_k", "prompt_v", "own_k", "own_v")),
    ]


class _StepStruct(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("rows", "parts", "outputs")),
        *((name, c_void_p) for name in ("part", "prompt", "row", "slot", "at", "output", "x", "cos", "sin", "logits")),
    ]


def can_decode_in_c(decoder: Any, head: Any) -> bool:
    """Whether compiled code can run a decoder that :mod:`grouprl.lm.llama.block` accepts: CPU, SiLU, fitting sizes."""
    gates = [m for layer in decoder.layers for m in (layer.mlp.gate_proj, layer.mlp.up_proj)]
    others = [m for layer in decoder.layers for m in (
        layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.self_attn.o_proj,
        layer.mlp.down_proj,
    )]  # fmt: skip
    return (
        type(head) is nn.Linear
        and all(type(m) is nn.Linear or is_lora(m) for m in [*gates, *others])
        and all(m.weight.device.type == "cpu" and m.in_features % 32 == 0 for m in [*gates, *others, head])
        and all(m.out_features % _W == 0 for m in [*gates, *others])
        and all(m.bias is None for m in gates)
        and all(type(layer.mlp.act_fn).__name__ in ("SiLU", "SiLUActivation") for layer in decoder.layers)
        and all(layer.self_attn.head_dim % _W == 0 for layer in decoder.layers)
    )


def _up(n: int, to: int) -> int:
    return -(-n // to) * to


class NativeModel:
    """A copy of a Llama-shaped model's weights in the layout of compiled products; valid until its weights change.

    Args:
        decoder, head: the model, for which :func:`can_decode_in_c` holds.
        specs: scale and window of attention in each layer.
        low: whether products run in bfloat16, with weights and activations rounded to it, or in float32.
    """

    def __init__(self, decoder: Any, head: Any, specs: Sequence[Any], low: bool) -> None:
        self.lib, self.decoder, self.head, self.low = functions(), decoder, head, low
        self.dtype = torch.bfloat16 if low else torch.float32
        self._kept: list[Tensor] = []
        self.between = [BetweenProductsC.of(layer, spec) for layer, spec in zip(decoder.layers, specs, strict=True)]
        self._head = self._linear(head)
        self.linears: list[tuple[Linear, Linear, Linear, Linear]] = []
        """For each layer the products of q, k and v; of the output; of gate and up, their rows interleaved; of down."""
        layers = []
        for between in self.between:
            a, mlp = between.module.self_attn, between.module.mlp
            norms = [between.norms.get(name) for name in ("input", "post", "q", "k")]
            linears = (
                self._linear(a.q_proj, a.k_proj, a.v_proj), self._linear(a.o_proj),
                self._linear(mlp.gate_proj, mlp.up_proj, turns=True), self._linear(mlp.down_proj),
            )  # fmt: skip
            self.linears.append(linears)
            layers.append(_LayerStruct(
                *(None if norm is None else norm.data_ptr() for norm in norms), *(linear.struct for linear in linears),
                between.spec.scale, between.spec.window or 0,
            ))  # fmt: skip
        first = decoder.layers[0]
        a = first.self_attn
        self.k_heads, self.head_dim = a.k_proj.out_features // a.head_dim, a.head_dim
        self._layers = (_LayerStruct * len(layers))(*layers)
        self.order = {layer.self_attn: i for i, layer in enumerate(decoder.layers)}
        self.struct = _ModelStruct(
            len(layers), decoder.norm.weight.numel(), a.q_proj.out_features // a.head_dim, self.k_heads, a.head_dim,
            first.mlp.gate_proj.out_features, low, decoder.norm.variance_epsilon, self._vector(decoder.norm.weight),
            self._head.struct, self._layers,
        )  # fmt: skip

    def _vector(self, x: Tensor) -> int:
        self._kept.append(x.detach().float().contiguous())
        return self._kept[-1].data_ptr()

    def _linear(self, *linears: Any, turns: bool = False) -> Linear:
        return Linear(
            [merged_weight(linear) for linear in linears],
            [linear.bias for linear in linears],
            low=self.low,
            turns=turns,
        )

    def read(self, pack: Pack, keep: Callable[[nn.Module, Tensor, Tensor], None]) -> Tensor:
        """Last hidden states ``[S, d]`` float32 of a pack of prompts.

        Args:
            keep: called for each layer with its attention module and its keys and values ``[S, K, D]``.
        """
        x = self.decoder.embed_tokens.weight.detach()[pack.ids].float()
        cos, sin = rotary(self.decoder, x, pack.positions)
        for between, (qkv, o, gate_up, down) in zip(self.between, self.linears, strict=True):
            q, k, v = between.rotate(qkv(between.norm(x, self.dtype), self.dtype), cos, sin)
            keep(between.module.self_attn, k, v)
            out = torch.empty(q.shape, dtype=self.dtype)
            attention(q, k, v, pack.stretches, between.spec.scale, between.spec.window, {"out": out})
            x, h = between.post_norm(x, o(out.flatten(1), self.dtype))
            x = x + down(gate_up(h, self.dtype, gated=True))
        hidden: Tensor = self.decoder.norm(x)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[n, V]`` float32 of hidden states ``[n, d]``."""
        return self._head(hidden)


class NativeCache:
    """The keys and values of prompts and of rows, each in a slot, and the steps that append tokens to rows.

    What a step computes of a token depends on the tokens before it in its row alone, bit for bit.

    Args:
        model: the model. slots: the most rows. most: the most tokens of a row, its prompt aside.
    """

    def __init__(self, model: NativeModel, slots: int, most: int) -> None:
        self.model, self._slots, self._most = model, slots, _up(most, _W)
        # Of what a row never reaches, no page is touched.
        self._own = [torch.empty(len(model.order), slots, model.k_heads, self._most, model.head_dim) for _ in range(2)]
        self._prompts: dict[int, tuple[Tensor, Tensor, int]] = {}
        self._struct: _CacheStruct | None = None
        self._pointed_to: Any = None

    def read(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], Tensor]:
        """Read prompts. Returns a number for each of the P prompts, and the logits ``[P, V]`` of the token after it."""
        pack = Pack.of([Group(prompt, ()) for prompt in prompts])
        numbers, keep = self.room_for(pack)
        hidden = self.model.read(pack, keep)
        return numbers, self.model.logits(hidden[pack.prompt_lengths.cumsum(0) - 1])

    def room_for(self, pack: Pack) -> tuple[list[int], Callable[[nn.Module, Tensor, Tensor], None]]:
        """Make room for prompts. Returns their numbers, and what stores their keys and values ``[S, K, D]`` of a layer.

        It raises UnsupportedError if they are stored already.
        """
        model, seen = self.model, set[int]()
        first = max(self._prompts, default=-1) + 1
        lengths = pack.prompt_lengths.tolist()
        numbers = list(range(first, first + len(lengths)))
        for number, n in zip(numbers, lengths, strict=True):
            shape = len(model.order), model.k_heads, _up(n, 32), _up(model.head_dim, 32)
            self._prompts[number] = (*(torch.empty(shape, dtype=model.dtype) for _ in range(2)), n)
        self._struct = None

        def keep(module: nn.Module, k: Tensor, v: Tensor) -> None:
            layer, start = model.order[module], 0
            if layer in seen:
                raise UnsupportedError(f"{type(module).__name__} attends twice in one pass")
            seen.add(layer)
            k, v = (x.detach().to(model.dtype) for x in (k, v))
            for number in numbers:
                to_k, to_v, n = self._prompts[number]
                tensors = (k[start], v[start], to_k[layer], to_v[layer])
                model.lib.grouprl_keep(
                    int(model.low), n, *k.shape[1:], k.stride(0), *(c_void_p(x.data_ptr()) for x in tensors)
                )
                start += n

        return numbers, keep

    def forget(self, number: int) -> None:
        """Release a prompt."""
        del self._prompts[number]
        self._struct = None

    def _as_struct(self) -> _CacheStruct:
        if self._struct is None:
            count = max(self._prompts, default=-1) + 1
            lengths, k, v = (c_int32 * count)(), (c_void_p * count)(), (c_void_p * count)()
            for number, (keys, values, n) in self._prompts.items():
                lengths[number], k[number], v[number] = n, keys.data_ptr(), values.data_ptr()
            self._pointed_to = lengths, k, v
            self._struct = _CacheStruct(
                self._slots, self._most, max(lengths, default=0), *(ctypes.addressof(x) for x in self._pointed_to),
                *(x.data_ptr() for x in self._own),
            )  # fmt: skip
        return self._struct

    def step(self, ids: Tensor, positions: Tensor, where: Where, at: Tensor, outputs: Tensor | None = None) -> Tensor:
        """Append S tokens to rows. Tokens of the same row stand one after the other.

        Args:
            ids: ``[S]`` token ids.
            positions: ``[S]`` the position of each in its sequence.
            where: the slots and prompts of the tokens.
            at: ``[S]`` int32, how many own tokens the row has before each.
            outputs: ``[n]`` int32, the tokens after which logits are wanted, by default all.

        Returns:
            Logits ``[n, V]`` float32.

        Raises:
            MemoryError: compiled code finds no memory.
        """
        model, rows = self.model, len(ids)
        x = model.decoder.embed_tokens.weight.detach()[ids].float()
        cos, sin = rotary(model.decoder, x, positions)
        wanted = rows if outputs is None else len(outputs)
        logits = torch.empty(wanted, model.head.out_features)
        tensors = (where.part, where.prompt, where.row, where.slot, at, outputs, x, cos, sin, logits)
        step = _StepStruct(
            rows, len(where.prompt), wanted, *(None if y is None else y.data_ptr() for y in tensors)
        )  # fmt: skip
        if model.lib.grouprl_decode(ctypes.byref(model.struct), ctypes.byref(self._as_struct()), ctypes.byref(step)):
            raise MemoryError(f"no memory for a decode step of {rows} rows")
        return logits


class Where(NamedTuple):
    """Where the S tokens of a step belong, sorted by prompt for compiled code. All tensors are int32.

    Attributes:
        slot: ``[S]`` the slot of each token's row.
        row: ``[S]`` the tokens, sorted by prompt. part: where the tokens of each prompt begin there, and S at the end.
        prompt: the number of each of those prompts.
    """

    slot: Tensor
    row: Tensor
    part: Tensor
    prompt: Tensor

    @classmethod
    def of(cls, slot: Tensor, prompt: Tensor) -> Where:
        """From the slot ``[S]`` and the prompt ``[S]`` of each token."""
        prompts, counts = torch.unique(prompt, return_counts=True)
        part = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        return cls(slot.int(), torch.argsort(prompt, stable=True).int(), part.int(), prompts.int())


class NativeDecoder:
    """Decodes rows of several prompts, one token per row and step; a :class:`grouprl.lm.sample.decode_steps.Decoder`.

    Args:
        pack: the P prompts. group_size: rows of each. max_new_tokens: most tokens of a row.
    """

    def __init__(self, model: NativeModel, pack: Pack, group_size: int, max_new_tokens: int) -> None:
        self.lengths = pack.prompt_lengths
        rows = len(self.lengths) * group_size
        self.cache = NativeCache(model, rows, max_new_tokens)
        numbers, self.keep = self.cache.room_for(pack)
        self._slot, self._prompt = torch.arange(rows), torch.tensor(numbers).repeat_interleave(group_size)
        self._where = Where.of(self._slot, self._prompt)
        self._at = torch.zeros(rows, dtype=torch.int32)

    def drop(self, finished: Sequence[int]) -> list[int]:
        """Remove the rows ``finished``. Returns for each remaining row its index before."""
        gone = set(finished)
        kept = [row for row in range(len(self._slot)) if row not in gone]
        self._slot, self._prompt, self._at = self._slot[kept], self._prompt[kept], self._at[kept]
        self._where = Where.of(self._slot, self._prompt)
        return kept

    def reserve(self) -> bool:
        """False: memory for all tokens is allocated from the beginning, so no tensor ever moves."""
        return False

    def step(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Append one token to each row, ``ids [B]`` at ``positions [B]``; logits ``[B, V]`` float32 of the next one.

        Raises MemoryError if compiled code finds no memory.
        """
        logits = self.cache.step(ids, positions, self._where, self._at)
        self._at += 1
        return logits
