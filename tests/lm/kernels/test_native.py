"""Compiled functions against the torch operations that they replace; and what happens without a compiler."""

from __future__ import annotations

import platform
import shutil

import pytest
import torch
from architectures import (
    MIXED,
    build,
    learned,
    naive,
    random_groups,
    random_weights,
    relative_error,
)
from compiled import (
    PROMPTS,
    WIDE,
    check_no_less_exact_than_autocast,
    fused,
    sampled,
    wide,
)
from torch import Tensor, nn

from grouprl.lm.kernels import compile as native
from grouprl.lm.kernels import head as native_head
from grouprl.lm.kernels.attention import attend
from grouprl.lm.kernels.gradient import weight_gradient
from grouprl.lm.kernels.linear import Linear
from grouprl.lm.llama.between_products_c import BetweenProductsC
from grouprl.lm.llama.trial import find_layers
from grouprl.lm.packed.attention import AttentionSpec, PackedAttention
from grouprl.lm.packed.backbone import find_backbone
from grouprl.lm.packed.low_precision import LowPrecision
from grouprl.lm.packed.packing import Group, Pack
from grouprl.lm.packed.rectangles import RectangleAttention
from grouprl.lm.policy.log_probs import LogProbs
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.sampler import Sampler

# --- attention --------------------------------------------------------------------------------------------------------

SHAPES = [((40, (33,) * 8), (41, (2, 60, 30, 1))), ((130, (64,) * 3),), ((1, (5, 2)), (100, ())), ((32, (33, 65)),)]


def differentiated(function, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    out.backward(gradient.to(out.dtype))
    return [out.detach().float(), *(x.grad for x in leaves)]


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("heads", "k_heads", "d", "window"),
    [(9, 3, 64, None), (4, 4, 16, None), (6, 2, 48, 7), (14, 2, 32, 2), (8, 1, 80, 40)],
)
def test_attention_and_its_gradient_are_those_of_torch(
    shape: tuple, heads: int, k_heads: int, d: int, window: int | None
) -> None:
    pack = Pack.of([Group([0] * p, [[0] * c for c in completions]) for p, completions in shape])
    generator = torch.Generator().manual_seed(heads)
    q, k, v, gradient = (
        torch.randn(len(pack.ids), h, d, generator=generator) for h in (heads, k_heads, k_heads, heads)
    )
    how = AttentionSpec(d**-0.5, window, None)

    def by_torch(dtype: torch.dtype) -> list[Tensor]:
        return differentiated(lambda *x: RectangleAttention.apply(*x, pack, how, dtype), q, k, v, gradient)

    def by_us(dtype: torch.dtype) -> list[Tensor]:
        return differentiated(lambda *x: attend(*x, pack.stretches, how.scale, window, dtype), q, k, v, gradient)

    wanted = by_torch(torch.float32)
    for found, one in zip(by_us(torch.float32), wanted, strict=True):
        assert float((found - one).norm()) < 2e-6 * float(one.norm())
    for found, low, one in zip(by_us(torch.bfloat16), by_torch(torch.bfloat16), wanted, strict=True):
        assert float((found - one).norm()) < 1.1 * float((low - one).norm())


def test_a_soft_cap_is_left_to_torch() -> None:
    pack = Pack.of([Group([0] * 5, [[0] * 4])])
    q, k, v = (torch.randn(len(pack.ids), 2, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    how, module = AttentionSpec(0.25, None, 1.0), nn.Module()
    found = PackedAttention(pack, torch.float32).attend(module, q, k, v, how)
    assert torch.equal(found, PackedAttention(pack, torch.float32, native=False).attend(module, q, k, v, how))
    assert not torch.allclose(
        found, PackedAttention(pack, torch.float32).attend(module, q, k, v, AttentionSpec(0.25, None, None))
    )


# --- products of many rows --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize("rows", [0, 1, 31, 32, 33, 170])
@pytest.mark.parametrize(("outs", "k"), [((16,), 32), ((48, 16), 96), ((80, 32, 16), 160)])
@pytest.mark.parametrize("low", [False, True])
def test_products_are_those_of_the_weights_above_one_another(rows: int, outs: tuple, k: int, low: bool) -> None:
    generator = torch.Generator().manual_seed(rows)
    weights = [torch.randn(out, k, generator=generator) for out in outs]
    biases = [torch.randn(outs[0], generator=generator), *(None for _ in outs[1:])]
    dtype = torch.bfloat16 if low else torch.float32
    wide_x = torch.randn(rows, k + 16, generator=generator).to(dtype)
    x, y = wide_x[:, 16:], torch.full((rows, sum(outs) + 16), 7.0)
    wanted = torch.cat([x.double() @ w.to(dtype).double().t() for w in weights], 1)
    linear = Linear(weights, low=low)
    scale = 2e-6 * k**0.5
    torch.testing.assert_close(linear(x).double(), wanted, rtol=scale, atol=5 * scale)
    linear.into(y[:, :-16], x)
    torch.testing.assert_close(y[:, :-16].double(), wanted, rtol=scale, atol=5 * scale)
    linear.into(y[:, :-16], x, add=True)
    torch.testing.assert_close(y[:, :-16].double(), 2 * wanted, rtol=scale, atol=9 * scale)
    assert bool((y[:, -16:] == 7).all())
    wanted[:, : outs[0]] += biases[0].double()
    torch.testing.assert_close(Linear(weights, biases, low=low)(x).double(), wanted, rtol=scale, atol=5 * scale)


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize("rows", [1, 33, 170])
@pytest.mark.parametrize(("outs", "k"), [((32,), 16), ((48, 16), 96), ((80, 32, 16), 176)])
def test_the_way_back_through_weights(rows: int, outs: tuple, k: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weights = [torch.randn(out, k, generator=generator) for out in outs]
    g = torch.randn(rows, sum(outs), generator=generator).bfloat16()
    wanted = g.double() @ torch.cat(weights).bfloat16().double()
    torch.testing.assert_close(Linear.backwards(weights)(g).double(), wanted, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(
        Linear.backwards([w.bfloat16() for w in weights])(g, torch.bfloat16).double(), wanted, rtol=1e-2, atol=0.1
    )


def test_a_head_of_more_tokens_than_are_laid_out_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_head, "_SLAB", 64)
    generator = torch.Generator().manual_seed(0)
    h, weight = torch.randn(37, 96, generator=generator).bfloat16(), torch.randn(160, 96, generator=generator)
    wanted = h.double() @ weight.bfloat16().double().t()
    torch.testing.assert_close(native_head.logits(h, weight).double(), wanted, rtol=1e-2, atol=0.1)
    g = torch.randn(37, 160, generator=generator).bfloat16()
    found = native_head.logits_gradient(g, weight)
    torch.testing.assert_close(found.double(), g.double() @ weight.bfloat16().double(), rtol=1e-5, atol=1e-4)


@pytest.mark.usefixtures("products_by")
def test_a_head_of_whole_blocks_within_a_model_is_no_less_exact_than_autocast(monkeypatch) -> None:
    monkeypatch.setattr(native_head, "_SLAB", 64)
    made = []
    logits = native_head.logits
    monkeypatch.setattr(native_head, "logits", lambda *given: made.append(1) or logits(*given))
    check_no_less_exact_than_autocast(build("llama", **WIDE, vocab_size=160))
    assert bool(made) == native_head.preferred()


# --- gradients of weights ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize("tokens", [1, 2, 33, 320, 321, 700])
@pytest.mark.parametrize(("outs", "ins"), [(16, 16), (48, 80), (160, 32)])
def test_the_gradient_of_a_weight_is_summed_in_full_precision(tokens: int, outs: int, ins: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    both = torch.randn(tokens, outs + 16, generator=generator).bfloat16()
    g, x = both[:, 16:], torch.randn(tokens, ins, generator=generator).bfloat16()
    wanted = g.double().t() @ x.double()
    to = torch.full((outs, ins), 7.0)
    weight_gradient(to, g, x, add=False)
    assert float((to - wanted).norm()) < 1e-6 * float(wanted.norm())
    weight_gradient(to, g, x, add=True)
    assert float((to - 2 * wanted).norm()) < 2e-6 * float(wanted.norm())


# --- a whole model ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("floats")
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_model_samples_and_learns_alike_whatever_a_register_holds(name: str) -> None:
    model = wide(name)
    assert [c.ids for c in sampled(model, "native")] == [c.ids for c in sampled(model, "blocks")]
    groups = random_groups(*MIXED)
    weights = random_weights(groups)
    wanted = naive(model, groups, weights)
    logp, gradient = learned(fused(model), groups, weights)
    assert torch.allclose(logp, wanted[0], atol=1e-5)
    assert relative_error(gradient, wanted[1]) < 1e-5
    assert relative_error(learned(fused(model, torch.bfloat16), groups, weights)[1], wanted[1]) < 0.05


# --- without a compiler -----------------------------------------------------------------------------------------------


def test_without_a_compiler_everything_runs_on_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide("llama")
    with_it = sampled(model, "native")
    groups = random_groups(*MIXED)
    weights = random_weights(groups)
    wanted = learned(fused(model), groups, weights)
    monkeypatch.setattr(native.kernels, "_found", "there is no C compiler")
    backbone, _ = find_backbone(model)
    assert backbone is not None
    assert find_layers(backbone, torch.float32) is None
    sampler = Sampler(backbone, LowPrecision(model, torch.float32), [1, 2])
    assert (sampler.steps, sampler.why) == ("blocks", "there is no C compiler")
    found = sampler.sample(PROMPTS, 6, SamplingSettings(40), torch.Generator().manual_seed(0))
    assert [c.ids for c in found] == [c.ids for c in with_it]
    logp, gradient = learned(LogProbs(model, backbone, LowPrecision(model, torch.float32), 1.0, 10**9), groups, weights)
    assert torch.allclose(logp, wanted[0], atol=1e-5)
    assert relative_error(gradient, wanted[1]) < 1e-5


@pytest.mark.parametrize("flags", ["-march=x86-64-v3", "-march=x86-64-v4", "-march=cooperlake"])
def test_every_variant_of_the_inner_product_compiles_without_a_warning(flags: str, tmp_path) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("variants of another processor")
    strict = ["-O1", "-fopenmp", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unused-function", "-Wno-psabi", flags]
    native.kernels._compile([shutil.which("cc") or "gcc"], strict, tmp_path / "kernels.so")
    assert (tmp_path / "kernels.so").stat().st_size > 10_000


def test_a_matrix_unit_that_is_not_granted_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    built, asked = native.kernels._built, []

    class Refusing:
        @staticmethod
        def grouprl_start() -> int:
            return 1

    def refuse_once(compiler: list[str], flags: tuple[str, ...]) -> object:
        asked.append(flags)
        return Refusing if len(asked) == 1 else built(compiler, flags)

    monkeypatch.setattr(native.kernels, "_built", refuse_once)
    monkeypatch.setattr(native.kernels, "_found", native.kernels._load())
    model = wide("llama")
    found, wanted = sampled(model, "native"), sampled(model, "blocks")
    assert [c.ids for c in found] == [c.ids for c in wanted]
    groups = random_groups(*MIXED)
    weights = random_weights(groups)
    low = learned(fused(model, torch.bfloat16), groups, weights)
    assert relative_error(low[1], naive(model, groups, weights)[1]) < 0.05
    assert "-mno-amx-tile" in asked[1]


# --- values far out ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_far_below_zero_is_shut(dtype: torch.dtype) -> None:
    layer = BetweenProductsC.__new__(BetweenProductsC)
    gates = torch.tensor([[-89.0, -90.0, -200.0, -1e4, -1e30, -88.0, 0.0, 1.0, 200.0, 1e4] + [0.0] * 6]).to(dtype)
    found = layer.gate(torch.cat([gates, torch.ones_like(gates)], 1))
    torch.testing.assert_close(found, nn.functional.silu(gates), rtol=1e-2, atol=1e-6)


def test_what_is_no_number_stays_so() -> None:
    logits = torch.zeros(3, 40)
    logits[1, 7] = float("nan")
    logp, entropy, _ = native_head.softmax(logits, torch.tensor([0, 0, 7]), 1.0, learning=False)
    assert logp.isnan().tolist() == entropy.isnan().tolist() == [False, True, False]
    q, k, v = torch.randn(3, 12, 1, 16).unbind(0)
    k[3, 0, 2] = float("nan")
    pack = Pack.of([Group([0] * 8, [[0] * 5])])
    out = attend(q, k, v, pack.stretches, 0.25, None, torch.float32)
    assert out.isnan().all((1, 2)).tolist() == [False] * 3 + [True] * 9
