"""The same on a GPU: held to the naive computation there, to the CPU where that is exact, and to itself bit for bit."""

from __future__ import annotations

import copy
import math
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import (
    EOS,
    MIXED,
    PACKED,
    PAD,
    VOCABULARY,
    as_samples,
    build,
    learned,
    make,
    make_log_probs,
    naive,
    naive_log_probs,
    random_groups,
    random_ids,
    random_weights,
    relative_error,
    take_gradient,
)
from peft import LoraConfig, get_peft_model
from small_runs import EVAL_ROWS, REVERSE, ROWS, Heard, Stop, logged, same, trainer, warm, weights, without_times
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from grouprl.lm import GRPOConfig, GRPOTrainer
from grouprl.lm.llama.between_products import BetweenProductsTorch
from grouprl.lm.llama.between_products_triton import BetweenProductsTriton
from grouprl.lm.llama.trial import find_layers
from grouprl.lm.packed.attention import PackedAttention, flash_works
from grouprl.lm.packed.backbone import Backbone, find_backbone
from grouprl.lm.packed.low_precision import LowPrecision, supports_bf16
from grouprl.lm.packed.packing import Group, Pack
from grouprl.lm.policy.log_probs import LogProbs
from grouprl.lm.sample.draw import SamplingSettings, draw, greedy, keep_likely
from grouprl.lm.sample.plain import PlainSampler
from grouprl.lm.sample.rows import Completion
from grouprl.lm.sample.sampler import Sampler
from grouprl.machine.memory import peak_memory_gb
from grouprl.objective import segment_sum

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

NEVER = 10**6
"""An end of sequence that no model says."""
PROMPTS = [random_ids(n, torch.Generator().manual_seed(n)) for n in (5, 1, 9, 3)]
CROWDED = ((6, [40] * 16), (3, [25] * 12))
"""Groups in which every token occurs many times: sums over them would show an order that changes."""


def on_gpu(name: str, **changes: Any) -> Any:
    return build(name, **changes).to("cuda")


def wide(kind: Any = LlamaConfig) -> Any:
    """A model with products large enough for the kernels that real ones get."""
    return make(
        kind(
            vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True,
        )
    ).to("cuda")  # fmt: skip


def packed(
    model: Any, ends: tuple[int, ...] = (EOS,), *, dtype: torch.dtype = torch.float32, **options: Any
) -> Sampler:
    return Sampler(Backbone(model), LowPrecision(model, dtype), ends, **options)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids_of(completions: list[Completion]) -> list[list[int]]:
    return [c.ids for c in completions]


def adapter(**settings: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | settings
    )


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKED)
def test_packed_log_probabilities_and_gradients_are_the_naive_ones(name: str) -> None:
    model, groups = on_gpu(name), random_groups(*MIXED)
    given = random_weights(groups)
    logp, gradient = naive(model, groups, given, 0.7)
    assert find_backbone(model)[1] == ""
    found_logp, found = learned(make_log_probs(model, temperature=0.7, budget=20), groups, given)
    torch.testing.assert_close(found_logp, logp, rtol=0, atol=1e-4)
    assert relative_error(found, gradient) < 1e-3


def test_a_wider_model_has_the_naive_numbers_too() -> None:
    model, groups = wide(), random_groups((12, (20, 9, 30)), (5, (16, 24)), (20, (12,)))
    given = random_weights(groups)
    logp, gradient = naive(model, groups, given)
    found_logp, found = learned(make_log_probs(model), groups, given)
    torch.testing.assert_close(found_logp, logp, rtol=0, atol=1e-4)
    assert relative_error(found, gradient) < 1e-3


def test_the_gpu_gives_what_the_cpu_gives() -> None:
    groups = random_groups(*MIXED)
    given = random_weights(groups)
    logp, gradient = learned(make_log_probs(build("llama")), groups, given)
    found_logp, found = learned(make_log_probs(on_gpu("llama")), groups, given)
    torch.testing.assert_close(found_logp, logp, rtol=0, atol=1e-4)
    assert relative_error({name: g.cpu() for name, g in found.items()}, gradient) < 1e-3


def by_autocast(model: Any, groups: list[Group], given: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """What :func:`naive` gives, with the products in bfloat16."""
    with torch.autocast("cuda", torch.bfloat16):
        logp = torch.cat([naive_log_probs(model, g.prompt, c) for g in groups for c in g.completions])
    (given.to("cuda") * logp).sum().backward()
    return logp.detach().cpu(), take_gradient(model)


def test_low_precision_is_no_less_exact_than_autocast() -> None:
    model, groups = wide(), random_groups((12, (20, 9, 30)), (5, (16, 24)), (20, (12,)))
    given = random_weights(groups)
    logp, gradient = naive(model, groups, given)
    autocast_logp, found = by_autocast(model, groups, given)
    autocast_error = relative_error(found, gradient)
    our_logp, our_gradient = learned(make_log_probs(model, dtype=torch.bfloat16), groups, given)
    assert 1e-3 < autocast_error < 0.2  # there is something to compare with
    assert relative_error(our_gradient, gradient) <= 1.25 * autocast_error
    assert float((our_logp - logp).norm()) <= 1.25 * float((autocast_logp - logp).norm())


KINDS = [BetweenProductsTriton, BetweenProductsTorch] if util.find_spec("triton") else [BetweenProductsTorch]


def fused(model: Any, kind: Any = None) -> LogProbs:
    """With the layers as fused functions, in bfloat16."""
    backbone, why = find_backbone(model)
    assert backbone is not None, why
    layers = find_layers(backbone, torch.bfloat16)
    assert layers is not None
    assert layers.operations is KINDS[0]
    layers.operations = kind or layers.operations
    return LogProbs(model, backbone, LowPrecision(model, torch.bfloat16), 1.0, 10**9, layers=layers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keeping", [True, False])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("norms", [False, True])
def test_fused_layers_are_no_less_exact_than_autocast(
    keeping: bool, frozen: bool, norms: bool, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wide(Qwen3Config if norms else LlamaConfig)
    groups = random_groups((12, (20, 9, 30)), (5, (16, 1, 24)), (20, (12,)), (7, (1,)))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not (frozen and any(part in name for part in ("embed", "layers.0.mlp", "v_proj")))
    given = random_weights(groups)
    logp, gradient = naive(model, groups, given)
    autocast_logp, found = by_autocast(model, groups, given)
    autocast_error = relative_error(found, gradient)
    log_probs = fused(model, kind)
    monkeypatch.setattr(log_probs.layers, "keeping", lambda tokens: 100 if keeping else 0)
    runs = [learned(log_probs, groups, given) for _ in range(3)]
    assert relative_error(runs[0][1], gradient) <= 1.25 * autocast_error
    assert float((runs[0][0] - logp).norm()) <= 1.25 * float((autocast_logp - logp).norm())
    for again_logp, again in runs[1:]:  # the same every time, bit for bit
        assert torch.equal(again_logp, runs[0][0])
        assert [key for key in again if not torch.equal(again[key], runs[0][1][key])] == []
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_training_uses_fused_layers_and_flash_attention(name: str) -> None:
    model = on_gpu(name)
    assert fused(model).layers is not None
    assert flash_works(torch.device("cuda", 0), torch.bfloat16, 4, 2, 64)
    assert find_layers(Backbone(model), torch.float32) is None
    assert find_layers(Backbone(on_gpu("gemma3")), torch.bfloat16) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "phi"])
def test_the_gradient_is_the_same_every_time_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    model, groups = on_gpu(name), random_groups(*CROWDED)
    log_probs, given = make_log_probs(model, dtype=dtype), random_weights(groups)
    logp, gradient = learned(log_probs, groups, given)
    for _ in range(4):
        again_logp, again = learned(log_probs, groups, given)
        assert torch.equal(again_logp, logp)
        assert [key for key in gradient if not torch.equal(again[key], gradient[key])] == []


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_gradient_checkpointing_changes_no_number(name: str) -> None:
    model, groups = on_gpu(name), random_groups(*MIXED)
    given = random_weights(groups)
    logp, gradient = learned(make_log_probs(model, budget=20), groups, given)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    passes: list[int] = []
    handle = model.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    log_probs = make_log_probs(model, budget=20)
    found_logp, found = learned(log_probs, groups, given)
    handle.remove()
    assert len(passes) == 2 * len(log_probs.micro_batches(*as_samples(groups)[:3]))  # everything was run again
    torch.testing.assert_close(found_logp, logp, rtol=0, atol=2e-5)
    assert relative_error(found, gradient) < 5e-6


def test_sums_over_samples_are_the_same_every_time_and_those_of_the_cpu() -> None:
    lengths = torch.tensor([5000, 0, 3000])
    x = torch.randn(8000, generator=seeded(), dtype=torch.float64)
    found = [segment_sum(x.cuda(), lengths.cuda()) for _ in range(5)]
    assert all(torch.equal(other, found[0]) for other in found)
    torch.testing.assert_close(found[0].cpu(), segment_sum(x, lengths))


def test_attention_asks_for_no_compiler() -> None:
    model, (group,) = on_gpu("llama", hidden_size=64), random_groups((5, (4, 1)))
    backbone, pack = Backbone(model), Pack.of([group], "cuda")
    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        patched.setattr("grouprl.lm.packed.attention.available", lambda: pytest.fail("asked"))
        with backbone.following(PackedAttention(pack)):
            assert backbone.hidden(pack.ids, pack.positions).device.type == "cuda"


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PACKED)
def test_the_likeliest_tokens_are_those_of_generate(name: str) -> None:
    model = on_gpu(name)
    found = packed(model).sample(PROMPTS, 2, SamplingSettings(10, temperature=0.0), seeded())
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([prompt], device="cuda")
        wanted = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10, eos_token_id=EOS,
            pad_token_id=PAD,
        )[0, len(prompt) :].tolist()  # fmt: skip
        assert found[2 * i].ids == found[2 * i + 1].ids == wanted


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recorded_log_probabilities_are_those_of_the_learner(name: str, dtype: torch.dtype) -> None:
    model = on_gpu(name)
    found = packed(model, dtype=dtype).sample(PROMPTS, 3, SamplingSettings(9, temperature=0.6), seeded())
    groups = [Group(p, ids_of(found)[3 * i : 3 * i + 3]) for i, p in enumerate(PROMPTS)]
    prompts, completions, group, lengths = as_samples(groups)
    log_probs = make_log_probs(model, temperature=0.6, dtype=dtype)
    by_learner = log_probs.without_gradient(log_probs.micro_batches(prompts, completions, group), lengths)
    difference = (torch.cat([c.logp for c in found]) - by_learner).abs()
    assert float(difference.max()) < 1e-4 if dtype == torch.float32 else float(difference.mean()) < 0.05


@pytest.mark.parametrize("kind", ["packed", "plain"])
def test_pairs_of_tokens_come_as_often_as_the_softmax_says(kind: str) -> None:
    model = on_gpu("qwen2", vocab_size=9, pad_token_id=3)
    n, prompt = 4000, [4, 5, 6]
    sampler: Any = packed(model, (NEVER,)) if kind == "packed" else PlainSampler(model, torch.float32, (NEVER,), PAD)
    count = torch.zeros(9, 9)
    for c in sampler.sample([prompt], n, SamplingSettings(2), seeded(3)):
        count[c.ids[0], c.ids[1]] += 1
    with torch.no_grad():
        pairs = [[a, b] for a in range(9) for b in range(9)]
        logp = torch.stack([naive_log_probs(model, prompt, pair).sum() for pair in pairs])
        expected = n * logp.exp().view(9, 9).cpu()
    common = expected >= 5
    observed = torch.cat([count[common], count[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    degrees = len(wanted) - 1
    bound = degrees * (1 - 2 / (9 * degrees) + 3.09 * math.sqrt(2 / (9 * degrees))) ** 3  # exceeded once in 1000 times
    assert degrees > 15
    assert float(((observed - wanted).square() / wanted).sum()) < bound


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_rows_that_have_ended_change_nothing_for_those_that_go_on(name: str) -> None:
    """The same draws where nothing ends: each completion is a beginning of its unending counterpart."""
    model = on_gpu(name)
    ends = tuple(range(0, VOCABULARY, 9))
    how = SamplingSettings(20, temperature=1.4)
    found = packed(model, ends).sample(PROMPTS, 6, how, seeded(2))
    unending = packed(model, (NEVER,)).sample(PROMPTS, 6, how, seeded(2))
    assert len({len(c.ids) for c in found}) > 5
    for c, more in zip(found, unending, strict=True):
        assert c.ids == more.ids[: len(c.ids)]
        torch.testing.assert_close(c.logp, more.logp[: len(c.ids)], rtol=0, atol=1e-4)
        assert c.finished is (c.ids[-1] in ends)
        assert not set(c.ids[:-1]) & set(ends)
        assert c.logp.device.type == "cpu"


@pytest.mark.parametrize(("waiting", "few"), [(0.0, 0), (0.5, 3), (1.0, 64)])
@pytest.mark.parametrize("recorded", [True, False])
def test_when_rows_leave_does_not_matter(
    waiting: float, few: int, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ends = on_gpu("llama"), tuple(range(0, VOCABULARY, 9))
    how = SamplingSettings(20, temperature=1.4)
    wanted = packed(model, ends).sample(PROMPTS, 6, how, seeded(2))
    for name, value in (
        ("DROP_ABOVE_SHARE", waiting),
        ("DROP_RECORDED_ABOVE_SHARE", waiting),
        ("NEVER_DROP_BELOW", few),
    ):
        monkeypatch.setattr(f"grouprl.lm.sample.sampler.{name}", value)
    sampler = packed(model, ends)
    sampler.recorder = sampler.recorder if recorded else None
    found = sampler.sample(PROMPTS, 6, how, seeded(2))
    assert ids_of(found) == ids_of(wanted)
    assert [c.finished for c in found] == [c.finished for c in wanted]


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_recorded_and_give_what_steps_give(name: str, dtype: torch.dtype) -> None:
    model, how = on_gpu(name), SamplingSettings(20, temperature=1.4)
    sampler = packed(model, tuple(range(0, VOCABULARY, 9)), dtype=dtype)
    assert sampler.why == ""
    assert sampler.recorder is not None
    found = [sampler.sample(PROMPTS, 6, how, seeded(2)) for _ in range(2)]
    sampler.recorder = None
    wanted = sampler.sample(PROMPTS, 6, how, seeded(2))
    assert all(torch.equal(a.logp, b.logp) for a, b in zip(*found, strict=True))
    for completions in found:
        assert ids_of(completions) == ids_of(wanted)
        for c, d in zip(completions, wanted, strict=True):
            # a recording has a workspace of its own, for which a product may be split in another way
            torch.testing.assert_close(c.logp, d.logp, rtol=0, atol=1e-4 if dtype == torch.float32 else 0.05)


def test_a_capture_that_fails_leaves_everything_as_it_was() -> None:
    def adjust(logits: Tensor, rows: Tensor, step: Tensor) -> Tensor:
        return logits + 0.0 * int(step)

    model, how = on_gpu("llama"), SamplingSettings(12)
    sampler = packed(model)
    recorder: Any = sampler.recorder
    record, recorded = recorder.record, []
    recorder.record = lambda work: recorded.append(record(work)) or recorded[-1]
    wanted = sampler.sample(PROMPTS, 2, how, seeded())
    assert len(recorded) == 1
    for n in (2, 3):
        assert ids_of(sampler.sample(PROMPTS, 2, how, seeded(), adjust)) == ids_of(wanted)
        assert len(sampler._unrecorded) == 1
        assert sampler.why != ""
        torch.rand(3, device="cuda")
        torch.nn.functional.dropout(torch.ones(3, device="cuda"))
        torch.cuda.empty_cache()
        again = sampler.sample(PROMPTS, 2, how, seeded())
        assert len(recorded) == n
        assert all(torch.equal(a.logp, b.logp) for a, b in zip(again, wanted, strict=True))


def test_a_cache_that_grows_is_recorded_again() -> None:
    model, how = on_gpu("llama", max_position_embeddings=700), SamplingSettings(600)
    sampler = packed(model, (NEVER,))
    found = sampler.sample(PROMPTS, 2, how, seeded())
    assert sampler.recorder is not None
    sampler.recorder = None
    assert ids_of(found) == ids_of(sampler.sample(PROMPTS, 2, how, seeded()))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_llama_shaped_models_decode_without_their_modules_and_the_same(name: str) -> None:
    model, how = on_gpu(name), SamplingSettings(12)
    blocks = packed(model)
    assert blocks.steps == "blocks"
    assert blocks.why == ""
    modules = packed(model, steps="modules")
    assert ids_of(blocks.sample(PROMPTS, 4, how, seeded())) == ids_of(modules.sample(PROMPTS, 4, how, seeded()))


@pytest.mark.skipif(util.find_spec("triton") is None, reason="there is no Triton")
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_llama_shaped_models_decode_by_kernels_in_low_precision(name: str) -> None:
    model, how = on_gpu(name), SamplingSettings(40)
    sampler = packed(model, (NEVER,), dtype=torch.bfloat16)
    assert (sampler.steps, sampler.why) == ("native", "")
    for prompt, i in zip(PROMPTS, range(0, 12, 3), strict=True):
        for c in sampler.sample(PROMPTS, 3, how, seeded())[i : i + 3]:
            with torch.no_grad():
                wanted = naive_log_probs(model, prompt, c.ids).cpu()
            assert float((c.logp - wanted).abs().mean()) < 0.05
            assert float((c.logp - wanted).abs().max()) < 0.3


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_long_completions_and_adapters_decode_by_kernels(base: torch.dtype) -> None:
    model = get_peft_model(wide().to(base), adapter())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    sampler = packed(model, (NEVER,), dtype=torch.bfloat16)
    assert sampler.steps == ("native" if util.find_spec("triton") else "blocks")
    found = sampler.sample(PROMPTS, 4, SamplingSettings(400), seeded())
    groups = [Group(p, ids_of(found)[4 * i : 4 * i + 4]) for i, p in enumerate(PROMPTS)]
    prompts, completions, group, lengths = as_samples(groups)
    log_probs = make_log_probs(model, dtype=torch.bfloat16)
    by_learner = log_probs.without_gradient(log_probs.micro_batches(prompts, completions, group), lengths)
    limit = 0.05 if base == torch.float32 else 0.1
    assert float((torch.cat([c.logp for c in found]) - by_learner).abs().mean()) < limit


def test_draws_and_filters_are_those_of_the_cpu() -> None:
    logits = 3 * torch.randn(64, 1000, generator=seeded())
    uniform = torch.rand(64, generator=seeded(1))
    for given in ({}, {"top_k": 7}, {"top_p": 0.7}, {"min_p": 0.1}):
        how = SamplingSettings(1, **given)
        kept = keep_likely(logits.clone(), how)
        kept_there = keep_likely(logits.cuda(), how)
        assert torch.equal(kept_there.cpu(), kept)
        ids, logp = draw(kept, uniform)
        ids_there, logp_there = draw(kept_there, uniform.cuda())
        assert torch.equal(ids_there.cpu(), ids)
        torch.testing.assert_close(logp_there.cpu(), logp, rtol=0, atol=1e-5)
    assert torch.equal(greedy(logits.cuda())[0].cpu(), greedy(logits)[0])


def test_every_setting_of_sampling_runs() -> None:
    how = SamplingSettings(
        12, temperature=0.8, top_k=9, top_p=0.9, min_p=0.05, repetition_penalty=1.5, min_new_tokens=4
    )
    found = packed(on_gpu("llama"), tuple(range(90))).sample(PROMPTS, 4, how, seeded())
    assert min(len(c.ids) for c in found) >= 5
    assert all(torch.isfinite(c.logp).all() for c in found)


def test_logits_can_be_adjusted_completion_by_completion() -> None:
    def adjust(logits: Tensor, rows: Tensor, step: Tensor) -> Tensor:
        said = torch.where(rows == step, EOS, 10 + rows)
        return torch.full_like(logits, -math.inf).scatter_(1, said[:, None], 0.0)

    found = packed(on_gpu("llama")).sample(PROMPTS, 2, SamplingSettings(20), seeded(), adjust)
    assert ids_of(found) == [[10 + i] * i + [EOS] for i in range(8)]
    assert all(c.finished for c in found)


# --- training ---------------------------------------------------------------------------------------------------------


def test_training_is_on_the_gpu_in_low_precision_unless_told_otherwise(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    assert made.policy.device.type == "cuda"
    assert made.policy.packed
    assert made.policy.precision.dtype == (torch.bfloat16 if supports_bf16(torch.device("cuda")) else torch.float32)
    assert {p.dtype for p in made.model.parameters()} == {torch.float32}
    assert made.optimizer.defaults["fused"] is True
    assert trainer(tmp_path, use_cpu=True).policy.device.type == "cpu"


@pytest.mark.parametrize("bf16", [True, False])
def test_sixty_steps_raise_the_reward_clearly(tmp_path: Path, bf16: bool) -> None:
    made = trainer(tmp_path, prompts_per_step=8, num_generations=8, max_steps=60, learning_rate=1e-3, adam_beta2=0.99,
                   lr_scheduler_type="constant", bf16=bf16)  # fmt: skip
    made.train()
    rewards = [entry["reward"] for entry in logged(made)]
    assert sum(rewards[-10:]) / 10 > sum(rewards[:5]) / 5 + 0.15
    assert all(math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"]) for entry in logged(made))
    assert 0 < peak_memory_gb(made.policy.device) < 2
    assert made.evaluate(eval_dataset=EVAL_ROWS, greedy=True)["eval_reward"] > 0


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("lora", [False, True])
def test_the_divergence_begins_at_0(tmp_path: Path, bf16: bool, lora: bool) -> None:
    given = {"peft_config": adapter()} if lora else {}
    made = trainer(tmp_path, beta=0.1, bf16=bf16, max_steps=3, learning_rate=1e-2, **given)
    made.train()
    divergence = [entry["kl"] for entry in logged(made)]
    assert divergence[0] == 0.0
    assert divergence[-1] > 0.0


RESUMED: dict[str, dict[str, Any]] = {
    "usual": {},
    "float32": {"bf16": False},
    "half a generation": {"steps_per_generation": 3, "num_iterations": 2, "max_steps": 8},
    "reference": {"beta": 0.2, "sync_ref_model": True, "ref_model_sync_steps": 2},
    "ratios of completions": {"importance_sampling_level": "sequence", "num_iterations": 2, "steps_per_generation": 2},
    "adapter with dropout": {"peft_config": adapter(lora_dropout=0.5), "disable_dropout": False},
    "checkpointing": {"gradient_checkpointing": True},
    "master bfloat16": {"low": True},
    "plain": {"attention": "plain"},
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_training_equals_one_that_never_stopped_bit_for_bit(tmp_path: Path, name: str) -> None:
    def made(folder: str, callbacks: list[Any]) -> GRPOTrainer:
        given = copy.deepcopy(RESUMED[name])
        if given.pop("low", False):
            model, tokenizer = warm()
            given["model"] = (model.to(torch.bfloat16), tokenizer)
        return trainer(tmp_path / folder, callbacks=callbacks, **given)

    heard, again = Heard(), Heard()
    heard.trainer = straight = made("a", [heard])
    straight.train()
    made("b", [Stop(3)]).train()
    torch.rand(3, device="cuda")  # the stream that dropout draws from is not where it was
    again.trainer = resumed = made("b", [again])
    resumed.train(resume_from_checkpoint=True)
    assert heard.texts[3:] == again.texts
    assert without_times(logged(straight)) == without_times(logged(resumed))
    assert same(weights(straight), weights(resumed))


def test_an_adapter_alone_is_trained_saved_and_loaded(tmp_path: Path) -> None:
    model, tokenizer = warm()
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    settings: dict[str, Any] = {
        "output_dir": tmp_path / "out", "prompts_per_step": 2, "num_generations": 4, "max_completion_length": 4,
        "max_steps": 3, "learning_rate": 1e-2, "report_to": [], "save_strategy": "no", "bf16": False,
    }  # fmt: skip
    made = GRPOTrainer(str(tmp_path / "base"), REVERSE.reward, GRPOConfig(**settings), ROWS, peft_config=adapter())
    before = weights(made)
    made.train()
    after = weights(made)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    made.save_model(tmp_path / "adapter")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").to("cuda")
    ids = torch.arange(12, device="cuda")[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, made.model(ids).logits)


def test_master_weights_may_be_bfloat16(tmp_path: Path) -> None:
    model, tokenizer = warm()
    made = trainer(tmp_path, model=(model.to(torch.bfloat16), tokenizer), learning_rate=1e-2)
    before = weights(made)
    made.train()
    after = weights(made)
    assert {value.dtype for value in after.values()} == {torch.bfloat16}
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert all(math.isfinite(entry["grad_norm"]) for entry in logged(made))


def test_a_saved_model_is_loaded_by_the_library_on_any_device(tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=1)
    made.train()
    made.save_model(tmp_path / "model")
    for folder in (tmp_path / "model", tmp_path / "run" / "checkpoint-2"):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert same(dict(loaded.named_parameters()), {name: value.cpu() for name, value in weights(made).items()})


def test_an_optimizer_made_before_the_model_moved_trains_it(tmp_path: Path) -> None:
    model, tokenizer = warm()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    made = trainer(tmp_path, model=(model, tokenizer), optimizers=(optimizer, None), max_steps=2)
    before = weights(made)
    made.train()
    after = weights(made)
    assert all(not torch.equal(before[name], after[name]) for name in before)


# --- environments -----------------------------------------------------------------------------------------------------


def test_an_environment_is_learned_and_its_policy_saved_and_loaded(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium")
    import numpy as np

    from grouprl import GRPO

    returns: list[float] = []
    agent = GRPO("CartPole-v1", device="cuda", seed=0)
    assert agent.policy.mean.device.type == "cuda"
    agent.learn(24_000, callback=lambda _, metrics: returns.append(metrics["return_mean"]))
    assert returns[-1] > returns[0] + 50
    agent.save(tmp_path / "cartpole")
    observations = np.random.default_rng(0).normal(size=(32, 4)).astype(np.float32)
    wanted, _ = agent.predict(observations, deterministic=True)
    for device in ("cuda", "cpu"):
        loaded = GRPO.load(tmp_path / "cartpole", device=device)
        assert loaded.policy.mean.device.type == device
        assert np.array_equal(loaded.predict(observations, deterministic=True)[0], wanted)
    agent.close()
