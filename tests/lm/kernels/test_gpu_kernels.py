"""Triton's kernels against torch: on a GPU, or with TRITON_INTERPRET=1 in the environment by its interpreter."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from architectures import MIXED, build, learned, naive, random_groups, random_weights, relative_error
from stand_in import stand_in
from torch import Tensor

pytest.importorskip("triton", reason="there is no Triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("there is no GPU", allow_module_level=True)

from grouprl.lm.kernels import triton_kernels as kernels  # noqa: E402
from grouprl.lm.llama.between_products_triton import BetweenProductsTriton  # noqa: E402
from grouprl.lm.llama.block import JoinedProducts, find_llama  # noqa: E402
from grouprl.lm.llama.decode_triton import TritonBlocks, can_decode_in_triton  # noqa: E402
from grouprl.lm.llama.layers import LlamaLayers  # noqa: E402
from grouprl.lm.packed.attention import PackedAttention  # noqa: E402
from grouprl.lm.packed.backbone import Backbone  # noqa: E402
from grouprl.lm.packed.head import _softmax  # noqa: E402
from grouprl.lm.packed.low_precision import LowPrecision  # noqa: E402
from grouprl.lm.packed.packing import Group, Pack  # noqa: E402
from grouprl.lm.policy.log_probs import LogProbs  # noqa: E402
from grouprl.lm.sample.torch_decoder import TorchDecoder  # noqa: E402

DEVICE = "cpu" if INTERPRETED else "cuda"
SLACK = 1 if INTERPRETED else 4
LOW = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter computes with numpy, which has no bfloat16


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("width", [16, 96, 576, 1000])
@pytest.mark.parametrize("adding", [False, True])
def test_sums_and_their_norms(width: int, adding: bool) -> None:
    x, weight = random(5, width), random(width, seed=1)
    y = random(5, width, dtype=LOW, seed=2) if adding else None
    total = x if y is None else x + y
    found = kernels.add_norm(x, y, weight, 1e-5, LOW)
    assert found.dtype == LOW
    assert error(found, F.rms_norm(total, (width,), weight, 1e-5)) < 5e-3
    assert torch.equal(x, total)


@pytest.mark.parametrize("heads", [(6, 2, 16), (4, 4, 20), (3, 1, 64)])
@pytest.mark.parametrize("normed", [False, True])
def test_queries_and_keys_are_turned_and_keys_and_values_kept(heads: tuple[int, int, int], normed: bool) -> None:
    h, k, d = heads
    qkv, own, at = random(5, (h + 2 * k) * d, dtype=LOW), random(2, 7, k, 12, d, dtype=LOW), torch.tensor([9])
    cos, sin = random(5, d, seed=1), random(5, d, seed=2)
    norms = random(2, d, seed=3) if normed else None
    q, keys, values = torch.split(qkv.view(5, -1, d).float(), [h, k, k], 1)
    if norms is not None:
        q, keys = F.rms_norm(q, (d,), norms[0], 1e-6), F.rms_norm(keys, (d,), norms[1], 1e-6)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    wanted = own.clone()
    wanted[0, :5, :, 9], wanted[1, :5, :, 9] = turned(keys).to(LOW), values.to(LOW)
    kernels.turn_and_keep(qkv, cos, sin, norms, 1e-6, own, at.to(DEVICE), heads)
    assert error(qkv.view(5, -1, d)[:, :h], turned(q)) < 5e-3
    assert error(own, wanted) < 1e-3
    rest = torch.arange(12) != 9
    assert torch.equal(own[..., rest, :], wanted[..., rest, :])


@pytest.mark.parametrize("heads", [(6, 2, 16), (4, 4, 24), (3, 1, 64)])
@pytest.mark.parametrize("window", [None, 1, 5, 70, 1000])
@pytest.mark.parametrize("t", [0, 5, 149])
def test_attention_over_prompt_and_own_past(heads: tuple[int, int, int], window: int | None, t: int) -> None:
    h, k, d = heads
    lengths, prompt = [3, 130, 64], [1, 0, 2, 1, 2]
    qkv, own = random(5, (h + 2 * k) * d, dtype=LOW), random(2, 6, k, 152, d, dtype=LOW)
    own[..., t + 1 :, :] = torch.nan  # what lies ahead is not looked at
    keys, values = (random(3 * k, 136, d, dtype=LOW, seed=seed) for seed in (1, 2))
    wanted = []
    for row, p in enumerate(prompt):
        n = lengths[p]
        near = slice(0 if window is None else max(0, n + t + 1 - window), None)
        rows = slice(p * k, (p + 1) * k)
        key = torch.cat([keys[rows, :n], own[0, row, :, : t + 1]], 1)[:, near].float().repeat_interleave(h // k, 0)
        value = torch.cat([values[rows, :n], own[1, row, :, : t + 1]], 1)[:, near].float().repeat_interleave(h // k, 0)
        q = qkv.view(5, -1, d)[row, :h].float()
        p_of_key = (0.3 * torch.einsum("hd,hnd->hn", q, key)).softmax(-1)
        wanted.append(torch.einsum("hn,hnd->hd", p_of_key, value).flatten())
    at, rows_of = torch.tensor([t], device=DEVICE), torch.tensor(prompt, device=DEVICE)
    of_row = torch.tensor(lengths, device=DEVICE)[rows_of]
    found = kernels.attend(qkv, keys, values, own, rows_of, of_row, at, 0.3, window, heads)
    assert error(found, torch.stack(wanted)) < 5e-3


@pytest.mark.parametrize("width", [16, 576])
@pytest.mark.parametrize("learned", [False, True])
def test_the_gradient_of_a_norm(width: int, learned: bool) -> None:
    rows = 1500  # more than there are partial sums
    x, weight, g = random(rows, width), random(width, seed=1), random(rows, width, seed=2)
    dh, g_low = random(rows, width, dtype=LOW, seed=3), torch.empty(rows, width, dtype=LOW, device=DEVICE)
    given = [t.clone().requires_grad_() for t in (x, weight)]
    h = F.rms_norm(given[0], (width,), given[1], 1e-5)
    dx, dw = torch.autograd.grad(h, given, dh.float())
    wanted = g + dx
    found, of_weight = kernels.norm_gradient(x, dh, weight, 1e-5, g, g_low, learned)
    assert error(found, h.detach()) < 5e-3
    assert error(g, wanted) < 1e-5
    assert error(g_low, wanted) < 5e-3
    assert (of_weight is not None) is learned
    if of_weight is not None:
        assert error(of_weight, dw) < 1e-5


@pytest.mark.parametrize("heads", [(6, 2, 16), (4, 4, 24), (3, 1, 64)])
def test_turning_back_is_the_gradient_of_turning(heads: tuple[int, int, int]) -> None:
    h, k, d = heads
    qkv = random(7, (h + 2 * k) * d, dtype=LOW)
    cos, sin = random(7, d, seed=1), random(7, d, seed=2)

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]

    given = qkv.float().requires_grad_()
    q, keys, values = torch.split(given.view(7, -1, d), [h, k, k], 1)
    found = kernels.turn(qkv, cos, sin, None, 0.0, heads)
    wanted = torch.cat([turned(q), turned(keys)], 1)
    assert error(found, wanted.detach()) < 5e-3
    d_all = random(7, h + 2 * k, d, dtype=LOW, seed=3)
    (of_qkv,) = torch.autograd.grad(torch.cat([wanted, values], 1), given, d_all.float())
    dq, dk, dv = torch.split(d_all, [h, k, k], 1)
    assert error(kernels.turn_gradient(dq, dk, dv, cos, sin, heads), of_qkv) < 5e-3


@pytest.mark.parametrize("width", [48, 1500])
def test_the_gradient_of_gates(width: int) -> None:
    gate_up, dm = random(5, 2 * width, dtype=LOW), random(5, width, dtype=LOW, seed=1)
    given = gate_up.float().requires_grad_()
    gate, up = given.chunk(2, -1)
    m = F.silu(gate) * up
    (wanted,) = torch.autograd.grad(m, given, dm.float())
    made, again = kernels.gate_gradient(gate_up, dm)
    assert error(made, wanted) < 5e-3
    assert error(again, m.detach()) < 5e-3


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("keeping", [False, True])
def test_fused_layers_of_kernels_have_the_naive_gradients(
    name: str, keeping: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if INTERPRETED:
        stand_in(monkeypatch)
    model, groups = build(name).to(DEVICE), random_groups(*MIXED, (9, (1, 1)))
    weights = random_weights(groups)
    wanted = naive(model, groups, weights)
    backbone = Backbone(model)
    llama = find_llama(backbone)
    assert llama is not None
    layers: Any = LlamaLayers(backbone.decoder, llama.specs, LOW, BetweenProductsTriton)
    layers.keeping = lambda tokens: 10**6 if keeping else 0
    found = learned(LogProbs(model, backbone, LowPrecision(model, LOW), 1.0, 10**9, layers=layers), groups, weights)
    assert float((found[0] - wanted[0]).abs().max()) < 0.05 * SLACK
    for parameter, gradient in wanted[1].items():
        assert relative_error({"": found[1][parameter]}, {"": gradient}) < 0.06 * SLACK, parameter
    assert relative_error(found[1], wanted[1]) < 0.02 * SLACK


@pytest.mark.parametrize("width", [48, 1500])
def test_gates(width: int) -> None:
    gate_up = random(5, 2 * width, dtype=LOW)
    gate, up = gate_up.float().chunk(2, -1)
    assert error(kernels.gate(gate_up), F.silu(gate) * up) < 5e-3


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_a_step_gives_what_torch_operations_give(name: str) -> None:
    backbone = Backbone(build(name).to(DEVICE))
    precision, llama = LowPrecision(backbone.model, LOW), find_llama(backbone)
    assert llama is not None
    assert can_decode_in_triton(llama, LOW)
    assert not can_decode_in_triton(llama, torch.float32)
    pack = Pack.of([Group([5, 6, 7, 1, 3, 2], ()), Group([8, 2], ())], DEVICE)
    joined = JoinedProducts(llama, precision)
    with torch.no_grad(), precision.sampling(without=joined.linears):
        found = []
        for way in (TritonBlocks(llama, joined, LOW), llama):

            def hidden(ids: Tensor, positions: Tensor, plan: Any, way: Any = way) -> Tensor:
                more = () if isinstance(way, TritonBlocks) else (joined,)
                return way.hidden(ids, positions, plan, *more)

            decoder = TorchDecoder(hidden, backbone.head, pack, 2, 6, LOW)
            decoder.plan.dtype = LOW
            reading = PackedAttention(pack, LOW, decoder.keep, native=False)
            logits = [backbone.head(hidden(pack.ids, pack.positions, reading)).float()]
            for i in range(6):
                decoder.reserve()
                logits.append(decoder.step(torch.tensor([3, 4, 5, i], device=DEVICE), decoder.plan.length_of_row + i))
                if i == 3:
                    assert decoder.drop([0]) == [3, 1, 2]
                    decoder.drop([])
                    break
            found.append(torch.cat(logits))
    assert error(*found) < 0.02


@pytest.mark.parametrize("width", [97, 5000])
@pytest.mark.parametrize("learning", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_softmax_of_the_head(width: int, learning: bool, temperature: float) -> None:
    z = 4 * random(6, width, dtype=LOW)
    z[1, 3], z[2, 5] = 60.0, -60.0
    z[3, : width // 2] = -float("inf")
    targets = torch.tensor([0, 3, 5, width - 1, 7, 2], device=DEVICE)
    copy, before = z.clone(), z.clone()
    wanted = _softmax(copy, targets, temperature, learning)
    found = kernels.softmax(z, targets, temperature, learning=learning)
    for mine, its in list(zip(found, wanted, strict=True))[: 3 if learning else 2]:
        keep = torch.isfinite(its)  # the entropy beside an impossible token is not there
        torch.testing.assert_close(mine[keep], its[keep], rtol=1e-5, atol=1e-5)
    if learning:
        assert error(z, copy) < 5e-3
    else:
        assert torch.equal(z, before)
