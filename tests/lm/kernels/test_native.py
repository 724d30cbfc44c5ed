"""Compiled code against the naive model and against the torch operations it stands for; and what happens without it."""

from __future__ import annotations

import platform
import shutil
import sys

import pytest
import torch
from architectures import (
    MIXED,
    VOCABULARY,
    as_samples,
    build,
    learned,
    naive,
    naive_log_probs,
    random_groups,
    random_ids,
    random_weights,
    relative_error,
    take_gradient,
)
from torch import Tensor, nn

from grouprl.errors import TrainingError
from grouprl.lm.kernels import compile as native
from grouprl.lm.kernels import head as native_head
from grouprl.lm.kernels.attention import attend
from grouprl.lm.kernels.gradient import weight_gradient
from grouprl.lm.kernels.linear import Linear
from grouprl.lm.llama import layers
from grouprl.lm.llama.trial import find_layers
from grouprl.lm.packed.attention import How, PackedAttention, _Packed
from grouprl.lm.packed.backbone import find_backbone
from grouprl.lm.packed.low_precision import Products
from grouprl.lm.packed.packing import Group, Pack
from grouprl.lm.policy.log_probs import Learner
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.rows import Completion
from grouprl.lm.sample.sampler import Sampler

if sys.platform != "linux" or not (shutil.which("cc") or shutil.which("gcc")):
    pytest.skip("there is no C compiler on this machine", allow_module_level=True)

WIDE = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
"""Sizes that compiled code takes: an odd number of blocks of 16 among them."""
LLAMAS: dict[str, dict] = {
    "llama": WIDE, "qwen2": {k: v for k, v in WIDE.items() if k != "head_dim"}, "qwen3": WIDE,
    "mistral": {**WIDE, "sliding_window": 4},
}  # fmt: skip


def wide(name: str) -> nn.Module:
    return build(name, **LLAMAS[name])


def fused(model: nn.Module, dtype: torch.dtype = torch.float32, temperature: float = 1.0) -> Learner:
    backbone, why = find_backbone(model)
    assert backbone is not None, why
    found = find_layers(backbone, dtype)
    assert found is not None
    return Learner(model, backbone, Products(model, dtype), temperature, 10**9, layers=found)


# --- layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LLAMAS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_fused_layers_give_the_naive_log_probabilities_and_gradients(name: str, temperature: float) -> None:
    model, groups = wide(name), random_groups(*MIXED, (40, (35, 33, 1)))
    model.config.max_position_embeddings = 128
    weights = random_weights(groups)
    wanted = naive(model, groups, weights, temperature)
    found = learned(fused(model, temperature=temperature), groups, weights)
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=1e-4)
    assert relative_error(found[1], wanted[1]) < 2e-5
    for parameter, gradient in wanted[1].items():  # of every parameter, the small ones too
        assert relative_error({"": found[1][parameter]}, {"": gradient}) < 2e-4, parameter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_for_the_backward_pass_changes_no_bit(dtype: torch.dtype, monkeypatch) -> None:
    model, groups = wide("qwen3"), random_groups(*MIXED)
    weights = random_weights(groups)
    learner = fused(model, dtype)
    assert learner.layers is not None
    tokens, found = sum(group.n_inputs for group in groups), []
    one = layers.KEPT_SHARE / learner.layers.keeping(1) / 0.999 * tokens  # as much as one layer of the pack needs
    for n_layers in (0, 1, 10**6):
        monkeypatch.setattr(layers, "KEPT_SHARE", one * n_layers)
        assert learner.layers.keeping(tokens) == pytest.approx(n_layers, rel=0.1)
        found.append(learned(learner, groups, weights))
    for logp, gradients in found[1:]:
        assert torch.equal(found[0][0], logp)
        assert all(torch.equal(gradient, gradients[name]) for name, gradient in found[0][1].items())


def test_fused_layers_learn_from_groups_together_up_to_a_size(monkeypatch) -> None:
    learner = fused(wide("llama"))
    group = ([1, 2, 3, 4, 5], [[6, 7, 8], [9, 10, 11]])  # 9 inputs
    prompts, completions = [group[0]] * 4, group[1] * 4

    def sizes() -> list[int]:
        return [len(part.groups) for part in learner.parts(prompts, completions, [0, 0, 1, 1, 2, 2, 3, 3])]

    assert sizes() == [4]
    monkeypatch.setattr(layers, "TOGETHER", 20)
    monkeypatch.setattr(layers, "KEPT_SHARE", 1e9)
    assert sizes() == [2, 2]
    monkeypatch.setattr(layers, "KEPT_SHARE", 0.0)  # nothing is kept, so nothing is won
    assert sizes() == [4]


def check_no_less_exact_than_autocast(model: nn.Module) -> None:
    """Fused layers with bfloat16 products beside the model under autocast, both against float32."""
    groups = random_groups((12, (20, 9, 30)), (5, (16, 24)), (20, (12,)))
    weights = random_weights(groups)
    logp, gradient = naive(model, groups, weights)
    with torch.autocast("cpu", torch.bfloat16):
        parts = [naive_log_probs(model, g.prompt, c) for g in groups for c in g.completions]
    (weights * torch.cat(parts)).sum().backward()
    autocast_error = relative_error(take_gradient(model), gradient)
    found = learned(fused(model, torch.bfloat16), groups, weights)
    assert autocast_error > 1e-3  # there is something to compare with
    assert relative_error(found[1], gradient) <= 1.25 * autocast_error
    assert float((found[0] - logp).norm()) <= 1.25 * float((torch.cat(parts).detach() - logp).norm())


@pytest.fixture(params=[False, True], ids=["torch's products", "compiled products"])
def products_by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Products of many rows by torch or by compiled code, whichever this processor prefers."""
    for module in (layers, native_head):
        monkeypatch.setattr(module, "preferred", lambda: request.param)
    return bool(request.param)


@pytest.mark.usefixtures("products_by")
@pytest.mark.parametrize("name", LLAMAS)
def test_fused_layers_in_low_precision_are_no_less_exact_than_autocast(name: str) -> None:
    check_no_less_exact_than_autocast(wide(name))


def adapted(name: str, **settings) -> nn.Module:
    """A model with low-rank adapters that do something."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]} | settings
    model = get_peft_model(wide(name), LoraConfig(**settings))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("settings", [{}, {"r": 16, "target_modules": "all-linear"}, {"bias": "lora_only"}])
@pytest.mark.parametrize("name", LLAMAS)
def test_fused_layers_give_the_naive_gradients_of_adapters(name: str, settings: dict) -> None:
    model, groups = adapted(name, **settings), random_groups(*MIXED)
    weights = random_weights(groups)
    wanted = naive(model, groups, weights)
    learner = fused(model)
    found = learned(learner, groups, weights)
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=1e-4)
    assert {key for key in found[1] if "lora" in key}
    for parameter, gradient in wanted[1].items():
        assert relative_error({"": found[1][parameter]}, {"": gradient}) < 2e-4, parameter
    prompts, completions, group, lengths = as_samples(groups)
    with model.disable_adapter():
        without = learner.log_probs(learner.parts(prompts, completions, group), lengths)
        torch.testing.assert_close(without, naive(model, groups, None)[0], rtol=0, atol=1e-4)
    assert float((without - found[0]).abs().max()) > 1e-2


def test_adapters_in_low_precision_are_no_less_exact_than_autocast() -> None:
    check_no_less_exact_than_autocast(adapted("llama", r=16))


def test_adapters_merged_meanwhile_are_added_once() -> None:
    model, groups = adapted("llama"), random_groups(*MIXED)
    learner = fused(model)
    prompts, completions, group, lengths = as_samples(groups)
    before = learner.log_probs(learner.parts(prompts, completions, group), lengths)
    model.merge_adapter()
    after = learner.log_probs(learner.parts(prompts, completions, group), lengths)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    with model.disable_adapter(), pytest.raises(TrainingError, match="unmerge_adapter"):
        learner.log_probs(learner.parts(prompts, completions, group), lengths)


def test_a_trial_with_new_adapters_gives_them_something_to_do_and_takes_it_back(monkeypatch) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(wide("llama"), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    assert fused(model)
    empty = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    assert len(empty) > 1
    assert not any(parameter.any() for parameter in empty)
    monkeypatch.setattr(layers, "added", lambda part: ())  # a forward that adds nothing is found out
    backbone, why = find_backbone(model)
    assert backbone is not None, why
    assert find_layers(backbone, torch.float32) is None


@pytest.mark.parametrize("name", LLAMAS)
def test_a_model_in_low_precision_is_packed_and_has_fused_layers(name: str) -> None:
    model = wide(name).to(torch.bfloat16)
    for module in model.modules():  # as from_pretrained leaves it: rotary frequencies stay in full precision
        if hasattr(module, "inv_freq"):
            module.inv_freq = module.inv_freq.float()
    fused(model, torch.bfloat16)


def test_frozen_weights_get_no_gradient_and_the_others_theirs() -> None:
    model, groups = wide("qwen3"), random_groups(*MIXED)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not any(part in name for part in ("embed", "layers.0.mlp", "k_norm", "v_proj"))
    weights = random_weights(groups)
    wanted = naive(model, groups, weights)
    found = learned(fused(model), groups, weights)
    assert relative_error(found[1], wanted[1]) < 2e-5
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("name", ["smollm3", "phi", "gemma", "gpt2"])
def test_models_that_compute_something_else_have_no_fused_layers(name: str) -> None:
    changes = WIDE if name != "gpt2" else {}
    backbone, why = find_backbone(build(name, **changes))
    assert backbone is not None, why
    assert find_layers(backbone, torch.float32) is None


def test_sizes_that_do_not_fit_leave_the_torch_operations() -> None:
    backbone, _ = find_backbone(build("llama"))
    assert backbone is not None
    assert find_layers(backbone, torch.float32) is None
    assert Sampler(backbone, Products(backbone.model, torch.float32), [1]).steps == "lean"


# --- decode steps -----------------------------------------------------------------------------------------------------

PROMPTS = [random_ids(n, torch.Generator().manual_seed(n)) for n in (5, 1, 19, 3)]


def sampled(model: nn.Module, steps: str, dtype: torch.dtype = torch.float32, n: int = 40) -> list[Completion]:
    backbone, why = find_backbone(model)
    assert backbone is not None, why
    sampler = Sampler(backbone, Products(model, dtype), [1, 2], steps=steps)  # type: ignore[arg-type]
    assert sampler.steps == steps
    # 6 rows of each prompt: more than 16 rows in all, and they leave one by one.
    return sampler.sample(PROMPTS, 6, SamplingSettings(n), torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", LLAMAS)
def test_compiled_steps_sample_the_same_tokens(name: str) -> None:
    model = wide(name)
    found, wanted = sampled(model, "native"), sampled(model, "lean")
    assert [c.ids for c in found] == [c.ids for c in wanted]
    assert len({len(c.ids) for c in found}) > 5
    for one, other in zip(found, wanted, strict=True):
        assert torch.allclose(one.logp, other.logp, atol=5e-5)


@pytest.mark.parametrize("name", LLAMAS)
def test_log_probabilities_in_low_precision_are_near_those_of_the_model(name: str) -> None:
    model = wide(name)
    errors = []
    for i, completion in enumerate(sampled(model, "native", torch.bfloat16)):
        with torch.no_grad():
            wanted = naive_log_probs(model, PROMPTS[i // 6], completion.ids)
        errors.append((completion.logp - wanted).abs())
    assert 1e-4 < float(torch.cat(errors).mean()) < 0.05


def test_adapters_are_part_of_the_weights() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(wide("llama"), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    found = sampled(model, "native")
    assert [c.ids for c in found] == [c.ids for c in sampled(model, "lean")]
    with model.disable_adapter():
        without = sampled(model, "native")
    assert [c.ids for c in without] != [c.ids for c in found]
    assert [c.ids for c in without] == [c.ids for c in sampled(wide("llama"), "lean")]


def test_a_layer_with_another_adapter_is_left_to_torch() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(wide("llama"), LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    backbone, why = find_backbone(model)
    assert backbone is not None, why
    assert Sampler(backbone, Products(model, torch.float32), [1]).steps == "lean"


def test_changed_weights_are_sampled_from() -> None:
    model = wide("llama")
    backbone, _ = find_backbone(model)
    assert backbone is not None
    sampler = Sampler(backbone, Products(model, torch.float32), [10**6])
    how = SamplingSettings(5, temperature=0.0)
    before = sampler.sample([[5, 6]], 1, how, torch.Generator())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.neg_()
    after = sampler.sample([[5, 6]], 1, how, torch.Generator())
    assert before[0].ids != after[0].ids
    with torch.no_grad():
        wanted = naive_log_probs(model, [5, 6], after[0].ids)
    assert torch.allclose(after[0].logp, wanted, atol=1e-4)


# --- attention --------------------------------------------------------------------------------------------------------

SHAPES = [((40, (33,) * 8), (41, (2, 60, 30, 1))), ((130, (64,) * 3),), ((1, (5, 2)), (100, ())), ((32, (33, 65)),)]


def differentiated(function, q: Tensor, k: Tensor, v: Tensor, gradient: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out = function(*leaves)
    out.backward(gradient.to(out.dtype))
    return [out.detach().float(), *(x.grad for x in leaves)]


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
    how = How(d**-0.5, window, None)

    def by_torch(dtype: torch.dtype) -> list[Tensor]:
        return differentiated(lambda *x: _Packed.apply(*x, pack, how, dtype), q, k, v, gradient)

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
    how, module = How(0.25, None, 1.0), nn.Module()
    found = PackedAttention(pack, torch.float32).attend(module, q, k, v, how)
    assert torch.equal(found, PackedAttention(pack, torch.float32, native=False).attend(module, q, k, v, how))
    assert not torch.allclose(
        found, PackedAttention(pack, torch.float32).attend(module, q, k, v, How(0.25, None, None))
    )


# --- products of many rows --------------------------------------------------------------------------------------------


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
    sampler = Sampler(backbone, Products(model, torch.float32), [1, 2])
    assert (sampler.steps, sampler.why) == ("lean", "there is no C compiler")
    found = sampler.sample(PROMPTS, 6, SamplingSettings(40), torch.Generator().manual_seed(0))
    assert [c.ids for c in found] == [c.ids for c in with_it]
    logp, gradient = learned(Learner(model, backbone, Products(model, torch.float32), 1.0, 10**9), groups, weights)
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
    found, wanted = sampled(model, "native"), sampled(model, "lean")
    assert [c.ids for c in found] == [c.ids for c in wanted]
    groups = random_groups(*MIXED)
    weights = random_weights(groups)
    low = learned(fused(model, torch.bfloat16), groups, weights)
    assert relative_error(low[1], naive(model, groups, weights)[1]) < 0.05
    assert "-mno-amx-tile" in asked[1]


assert VOCABULARY % 16, "the head's last block of outputs is not full"
