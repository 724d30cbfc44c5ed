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
from grouprl.lm.llama.adapters import is_lora, with_added
from grouprl.lm.llama.between_products import rotary
from grouprl.lm.llama.between_products_c import NativeParts
from grouprl.lm.packed.attention import UnsupportedError
from grouprl.lm.packed.packing import Pack

_W = 16
"""Floats of a vector: tokens of a block of keys."""


class _Layer(Structure):
    _fields_ = [
        ("norm1", c_void_p), ("norm2", c_void_p), ("q_norm", c_void_p), ("k_norm", c_void_p),
        *((name, LinearStruct) for name in ("qkv", "o", "gate_up", "down")),
        ("scale", c_float), ("window", c_int32),
    ]  # fmt: skip


class _Model(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("layers", "width", "heads", "k_heads", "head_dim", "inner", "low")),
        ("eps", c_float), ("norm", c_void_p), ("head", LinearStruct), ("layer", POINTER(_Layer)),
    ]  # fmt: skip


class _Cache(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("prompts", "T", "slots", "C")),
        *((name, c_void_p) for name in ("prompt_k", "prompt_v", "own_k", "own_v", "lengths")),
    ]


class _Step(Structure):
    _fields_ = [
        *((name, c_int32) for name in ("rows", "parts", "t")),
        *((name, c_void_p) for name in ("part", "prompt", "row", "slot", "x", "cos", "sin", "logits")),
    ]


def supported(decoder: Any, head: Any) -> bool:
    """Whether the compiled step can run, on this machine, a decoder that :mod:`grouprl.lm.llama.block` knows."""
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
    """The weights of a Llama-shaped model, laid out; for as long as the model's own do not change.

    Args:
        decoder, head: the model; :func:`supported` must hold. ways: what each layer asks of attention.
        low: round weights and activations to bfloat16 for products, otherwise they run in float32.
    """

    def __init__(self, decoder: Any, head: Any, ways: Sequence[Any], low: bool) -> None:
        self.lib, self.decoder, self.head, self.low = functions(), decoder, head, low
        self.dtype = torch.bfloat16 if low else torch.float32
        self._kept: list[Tensor] = []
        self.parts = [NativeParts.of(layer, how) for layer, how in zip(decoder.layers, ways, strict=True)]
        self._head = self._linear(head)
        self.linears: list[tuple[Linear, Linear, Linear, Linear]] = []
        """Of each layer: queries, keys and values; output; gate and up, in turns; down."""
        layers = []
        for parts in self.parts:
            a, mlp = parts.module.self_attn, parts.module.mlp
            norms = [parts.norms.get(name) for name in ("input", "post", "q", "k")]
            linears = (
                self._linear(a.q_proj, a.k_proj, a.v_proj), self._linear(a.o_proj),
                self._linear(mlp.gate_proj, mlp.up_proj, turns=True), self._linear(mlp.down_proj),
            )  # fmt: skip
            self.linears.append(linears)
            layers.append(_Layer(
                *(None if norm is None else norm.data_ptr() for norm in norms), *(linear.struct for linear in linears),
                parts.how.scale, parts.how.window or 0,
            ))  # fmt: skip
        first = decoder.layers[0]
        a = first.self_attn
        self.k_heads, self.head_dim = a.k_proj.out_features // a.head_dim, a.head_dim
        self._layers = (_Layer * len(layers))(*layers)
        self.order = {layer.self_attn: i for i, layer in enumerate(decoder.layers)}
        self.struct = _Model(
            len(layers), decoder.norm.weight.numel(), a.q_proj.out_features // a.head_dim, self.k_heads, a.head_dim,
            first.mlp.gate_proj.out_features, low, decoder.norm.variance_epsilon, self._vector(decoder.norm.weight),
            self._head.struct, self._layers,
        )  # fmt: skip

    def _vector(self, x: Tensor) -> int:
        self._kept.append(x.detach().float().contiguous())
        return self._kept[-1].data_ptr()

    def _linear(self, *parts: Any, turns: bool = False) -> Linear:
        return Linear([with_added(part) for part in parts], [part.bias for part in parts], low=self.low, turns=turns)

    def read(self, pack: Pack, keep: Callable[[nn.Module, Tensor, Tensor], None]) -> Tensor:
        """Last hidden states ``[S, d]`` of a pack of prompts; ``keep`` is given each layer's keys and values."""
        x = self.decoder.embed_tokens.weight.detach()[pack.ids].float()
        cos, sin = rotary(self.decoder, x, pack.positions)
        for parts, (qkv, o, gate_up, down) in zip(self.parts, self.linears, strict=True):
            q, k, v = parts.rotate(qkv(parts.norm(x, self.dtype), self.dtype), cos, sin)
            keep(parts.module.self_attn, k, v)
            out = torch.empty(q.shape, dtype=self.dtype)
            attention(q, k, v, pack.stretches, parts.how.scale, parts.how.window, {"out": out})
            x, h = parts.post_norm(x, o(out.flatten(1), self.dtype))
            x = x + down(gate_up(h, self.dtype, gated=True))
        hidden: Tensor = self.decoder.norm(x)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """``[n, V]`` float32 of hidden states ``[n, d]``."""
        return self._head(hidden)


class NativeDecoder:
    """Rows of some prompts, token by token. The shape of :class:`grouprl.lm.sample.torch_decoder.TorchDecoder`."""

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
        self.cache = _Cache(
            prompts, t, rows, c,
            *(x.data_ptr() for x in (self.prompt_k, self.prompt_v, self.own_k, self.own_v, self._lengths)),
        )  # fmt: skip
        self.slot = torch.arange(rows, dtype=torch.int32)
        self.prompt = torch.arange(prompts).repeat_interleave(group_size)
        self.t = 0
        self._seen: set[int] = set()
        self._arrange()

    def keep(self, module: nn.Module, k: Tensor, v: Tensor) -> None:
        """Store a layer's keys and values ``[S, K, D]`` of the prompts: the ``keep`` of a PackedAttention."""
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
        """Order the rows by prompt."""
        self._row = torch.argsort(self.prompt, stable=True).int()
        prompts, counts = torch.unique(self.prompt, return_counts=True)
        self._prompt = prompts.int()
        self._part = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()

    def drop(self, finished: Sequence[int]) -> list[int]:
        """Remove rows. Returns for each remaining row which one it was before."""
        gone = set(finished)
        kept = [row for row in range(len(self.slot)) if row not in gone]
        self.slot, self.prompt = self.slot[kept], self.prompt[kept]
        self._arrange()
        return kept

    def reserve(self) -> bool:
        """There is room for all tokens from the beginning: nothing moves."""
        return False

    def step(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits ``[B, V]`` behind one new token of each row, ``ids [B]`` at ``positions [B]``."""
        model, rows = self.model, len(ids)
        x = model.decoder.embed_tokens.weight.detach()[ids].float()
        cos, sin = rotary(model.decoder, x, positions)
        logits = torch.empty(rows, model.head.out_features)
        step = _Step(
            rows, len(self._prompt), self.t,
            *(y.data_ptr() for y in (self._part, self._prompt, self._row, self.slot, x, cos, sin, logits)),
        )  # fmt: skip
        if model.lib.grouprl_decode(ctypes.byref(model.struct), ctypes.byref(self.cache), ctypes.byref(step)):
            raise MemoryError(f"no memory for a decode step of {rows} rows")
        self.t += 1
        return logits
