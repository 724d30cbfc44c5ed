"""Compiled decode steps of Llama-shaped models on a CPU: one call per token for all layers and rows."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, c_float, c_int32, c_void_p
from typing import Any

import torch
from torch import Tensor, nn

from grouprl.lm.kernels.attention import attention
from grouprl.lm.kernels.compile import functions
from grouprl.lm.kernels.linear import Linear, LinearStruct
from grouprl.lm.llama.adapters import is_lora, merged_weight
from grouprl.lm.llama.between_products import rotary
from grouprl.lm.llama.between_products_c import BetweenProductsC
from grouprl.lm.packed.attention import UnsupportedError
from grouprl.lm.packed.packing import Pack

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
        *((name, c_int32) for name in ("prompts", "T", "slots", "C")),
        *((name, c_void_p) for name in ("prompt_k", "prompt_v", "own_k", "own_v", "lengths")),
    ]


class _StepStruct(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("rows", "parts", "t")),
        *((name, c_void_p) for name in ("part", "prompt", "row", "slot", "x", "cos", "sin", "logits")),
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


class NativeDecoder:
    """Decodes rows of several prompts, one token per row and step; a :class:`grouprl.lm.sample.sampler.Decoder`.

    Args:
        pack: the P prompts. group_size: rows of each. max_new_tokens: most tokens of a row.
    """

    def __init__(self, model: NativeModel, pack: Pack, group_size: int, max_new_tokens: int) -> None:
        self.model = model
        self.lengths = pack.prompt_lengths
        prompts, rows = len(self.lengths), len(self.lengths) * group_size
        t, c = _up(int(self.lengths.max()), 32), _up(max_new_tokens, _W)
        layers, heads, d = len(model.order), model.k_heads, model.head_dim
        self.prompt_k, self.prompt_v = (
            torch.empty(layers, prompts, heads, t, _up(d, 32), dtype=model.dtype) for _ in range(2)
        )
        # Of what a row never reaches, no page is touched.
        self.own_k, self.own_v = (torch.empty(layers, rows, heads, c, d) for _ in range(2))
        ends = self.lengths.cumsum(0)
        self._places = list(zip((ends - self.lengths).tolist(), ends.tolist(), strict=True))
        self._lengths = self.lengths.int()
        self.cache = _CacheStruct(
            prompts, t, rows, c,
            *(x.data_ptr() for x in (self.prompt_k, self.prompt_v, self.own_k, self.own_v, self._lengths)),
        )  # fmt: skip
        self.slot = torch.arange(rows, dtype=torch.int32)
        self.prompt = torch.arange(prompts).repeat_interleave(group_size)
        self.t = 0
        self._seen: set[int] = set()
        self._arrange()

    def keep(self, module: nn.Module, k: Tensor, v: Tensor) -> None:
        """Store keys and values ``[S, K, D]`` of the prompts for the layer whose attention is ``module``.

        Raises UnsupportedError if they are stored already.
        """
        at = self.model.order[module]
        if at in self._seen:
            raise UnsupportedError(f"{type(module).__name__} attends twice in one pass")
        self._seen.add(at)
        k, v = (x.detach().to(self.model.dtype) for x in (k, v))
        for p, (start, stop) in enumerate(self._places):
            self.model.lib.grouprl_keep(
                int(self.model.low), stop - start, *k.shape[1:], k.stride(0), self.cache.T,
                *(c_void_p(x.data_ptr()) for x in (k[start], v[start], self.prompt_k[at, p], self.prompt_v[at, p])),
            )  # fmt: skip

    def _arrange(self) -> None:
        """Sort the rows by prompt."""
        self._row = torch.argsort(self.prompt, stable=True).int()
        prompts, counts = torch.unique(self.prompt, return_counts=True)
        self._prompt = prompts.int()
        self._part = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()

    def drop(self, finished: Sequence[int]) -> list[int]:
        """Remove the rows ``finished``. Returns for each remaining row its index before."""
        gone = set(finished)
        kept = [row for row in range(len(self.slot)) if row not in gone]
        self.slot, self.prompt = self.slot[kept], self.prompt[kept]
        self._arrange()
        return kept

    def reserve(self) -> bool:
        """False: memory for all tokens is allocated from the beginning, so no tensor ever moves."""
        return False

    def step(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Append one token to each row, ``ids [B]`` at ``positions [B]``; logits ``[B, V]`` float32 of the next one.

        Raises MemoryError if compiled code finds no memory.
        """
        model, rows = self.model, len(ids)
        x = model.decoder.embed_tokens.weight.detach()[ids].float()
        cos, sin = rotary(model.decoder, x, positions)
        logits = torch.empty(rows, model.head.out_features)
        step = _StepStruct(
            rows, len(self._prompt), self.t,
            *(y.data_ptr() for y in (self._part, self._prompt, self._row, self.slot, x, cos, sin, logits)),
        )  # fmt: skip
        if model.lib.grouprl_decode(ctypes.byref(model.struct), ctypes.byref(self.cache), ctypes.byref(step)):
            raise MemoryError(f"no memory for a decode step of {rows} rows")
        self.t += 1
        return logits
