"""Every path is tried against the model's own forward pass, and a slower one takes its place if it differs."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from architectures import (
    EOS,
    MIXED,
    PAD,
    build,
    learned,
    make,
    make_loud,
    naive,
    naive_log_probs,
    random_groups,
    random_weights,
    relative_error,
)
from small_policies import policy
from torch import nn

from grouprl.errors import TrainingError, UsageError
from grouprl.lm.policy.policy import Policy
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.plain import PlainSampler

COMMON: dict[str, Any] = {"vocab_size": 97, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": PAD}
GROUPS = random_groups(*MIXED)


def of_kind(kind: str, **settings: Any) -> Any:
    import transformers

    return make(getattr(transformers, f"{kind}Config")(**{**COMMON, **settings}))


def rwkv() -> Any:
    return of_kind("Rwkv", hidden_size=32, num_hidden_layers=2, attention_hidden_size=32, intermediate_size=48)


def bart() -> Any:
    return of_kind("Bart", d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48,
                   max_position_embeddings=64)  # fmt: skip


def camembert() -> Any:
    return of_kind("Camembert", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                   max_position_embeddings=64, is_decoder=True)  # fmt: skip


def sampled_rightly(of: Policy) -> bool:
    prompts = [[5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15]]
    drawn = of.sample(prompts, 3, torch.Generator().manual_seed(0))
    wanted = [naive_log_probs(of.model, prompts[i // 3], c.ids) for i, c in enumerate(drawn)]
    with torch.no_grad():
        return all(bool((c.logp - w).abs().max() < 1e-4) for c, w in zip(drawn, wanted, strict=True))


def learns_rightly(of: Policy) -> bool:
    weights = random_weights(GROUPS)
    found, wanted = learned(of.log_probs, GROUPS, weights), naive(of.model, GROUPS, weights)
    return bool((found[0] - wanted[0]).abs().max() < 1e-4) and relative_error(found[1], wanted[1]) < 1e-4


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "steps"), [(rwkv, "forward passes"), (bart, "generate by length"), (camembert, "forward passes")]
)
def test_a_model_whose_generate_gives_other_logits_is_sampled_more_slowly(model, steps: str, caplog) -> None:
    with caplog.at_level(logging.WARNING, "grouprl"):
        found = policy(model())
    assert found.sampler.steps == steps
    assert steps in caplog.text
    assert sampled_rightly(found)
    assert learns_rightly(found)


ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "parameters": ("Lora", {"r": 4, "target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]}),
    "DoRA": ("Lora", {"r": 4, "target_modules": ["q_proj", "up_proj"], "use_dora": True}),
    "embeddings": ("Lora", {"r": 4, "target_modules": ["q_proj", "embed_tokens"]}),
    "head": ("Lora", {"r": 4, "target_modules": ["q_proj", "lm_head"]}),
    "biases": ("Lora", {"r": 4, "target_modules": ["q_proj", "v_proj"], "bias": "all"}),
    "AdaLoRA": ("AdaLora", {"init_r": 4, "target_r": 2, "total_step": 9, "target_modules": ["q_proj", "up_proj"]}),
    "IA3": ("IA3", {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_of_many_kinds_learn_and_sample_what_the_model_says(kind: str) -> None:
    import peft

    name, settings = ADAPTERS[kind]
    torch.manual_seed(0)
    model = peft.get_peft_model(
        build("qwen2"), getattr(peft, f"{name}Config")(task_type="CAUSAL_LM", **settings)
    ).eval()
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = policy(model)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    assert learns_rightly(found)
    assert sampled_rightly(found)


@pytest.mark.parametrize("kind", ["PromptTuning", "PrefixTuning", "PromptEncoder"])
def test_adapters_with_virtual_tokens_learn_and_sample_what_the_model_says(kind: str) -> None:
    import peft

    config = getattr(peft, f"{kind}Config")(task_type="CAUSAL_LM", num_virtual_tokens=4)
    torch.manual_seed(0)
    model = peft.get_peft_model(build("llama"), config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.normal_(generator=torch.Generator().manual_seed(len(name)))
    found = policy(model)
    assert not found.packed
    assert sampled_rightly(found)
    assert learns_rightly(found)


def test_forward_passes_end_and_draw_as_generate_does() -> None:
    model = build("qwen2", vocab_size=9, pad_token_id=3)
    sampler = PlainSampler(model, torch.float32, (EOS,), PAD, "forward passes")
    prompts = [[4, 5, 6], [7], [8, 5, 4]]
    drawn = sampler.sample(prompts, 40, SamplingSettings(6), torch.Generator().manual_seed(1))
    assert {c.finished for c in drawn} == {True, False}
    for i, c in enumerate(drawn):
        assert c.finished is (EOS in c.ids)
        assert EOS not in c.ids[:-1]
        assert len(c.ids) == 6 or c.finished
        with torch.no_grad():
            torch.testing.assert_close(c.logp, naive_log_probs(model, prompts[i // 40], c.ids), rtol=0, atol=1e-5)
    greedy = SamplingSettings(6, temperature=0.0)
    by = [PlainSampler(model, torch.float32, (EOS,), PAD, s) for s in ("generate", "forward passes")]
    first, second = ([c.ids for c in s.sample(prompts, 1, greedy, torch.Generator())] for s in by)
    assert first == second


def test_a_cache_that_is_wrong_at_some_length_is_found_when_it_is_used(monkeypatch, caplog) -> None:
    model = build("mamba")
    sampler = policy(model).sampler
    assert sampler.steps == "generate"
    prompts, how = [[5, 6, 7, 8, 9, 10], [11]], SamplingSettings(5)
    wanted = PlainSampler(model, torch.float32, (EOS,), PAD, "forward passes")
    expected = wanted.sample(prompts, 2, how, torch.Generator().manual_seed(3))
    own = model.generate

    def wrong(*args: Any, **kwargs: Any) -> Any:
        processors = [lambda ids, scores: scores * 1.5, *kwargs.pop("logits_processor")]
        return own(*args, logits_processor=processors, **kwargs)

    monkeypatch.setattr(model, "generate", wrong)
    with caplog.at_level(logging.WARNING, "grouprl"):
        found = sampler.sample(prompts, 2, how, torch.Generator().manual_seed(3))
    assert "samples some prompts again" in caplog.text
    assert [c.ids for c in found] == [c.ids for c in expected]


@pytest.mark.parametrize("how", [
    SamplingSettings(6, top_k=3), SamplingSettings(6, top_p=0.8, min_p=0.05, temperature=0.7),
    SamplingSettings(6, repetition_penalty=1.5), SamplingSettings(6, min_new_tokens=4),
    SamplingSettings(6, top_k=4, repetition_penalty=1.5, min_new_tokens=4),
])  # fmt: skip
def test_a_wrong_cache_is_found_with_filters_and_penalties_too(monkeypatch, caplog, how: SamplingSettings) -> None:
    model = build("qwen2", vocab_size=9, pad_token_id=3)
    sampler = PlainSampler(model, torch.float32, (EOS,), PAD)
    prompts, own = [[4, 5, 6, 4, 5, 6], [7]], model.forward
    with caplog.at_level(logging.WARNING, "grouprl"):
        sampler.sample(prompts, 3, how, torch.Generator().manual_seed(3))
        assert not caplog.messages  # nothing is wrong yet

        def wrong(*args: Any, **kwargs: Any) -> Any:
            out = own(*args, **kwargs)
            out.logits = out.logits * (1.5 if kwargs.get("use_cache", True) else 1.0)
            return out

        monkeypatch.setattr(model, "forward", wrong)
        sampler.sample(prompts, 3, how, torch.Generator().manual_seed(3))
    assert "samples some prompts again" in caplog.text


def test_a_model_whose_own_pass_fails_in_the_precision_of_training_is_named_once(caplog) -> None:
    model = build("llama")
    own = model.model.layers[0].mlp.forward

    def forward(x: Any) -> Any:
        if torch.is_autocast_enabled("cpu"):
            raise RuntimeError("no kernel for bfloat16")
        return own(x)

    model.model.layers[0].mlp.forward = forward
    with caplog.at_level(logging.WARNING, "grouprl"):
        policy(model, bf16=True)
        policy(build("llama"), bf16=True)
    (said,) = [message for message in caplog.messages if "own forward pass" in message]
    assert "LlamaForCausalLM cannot run its own forward pass in bfloat16" in said
    assert said.endswith("RuntimeError: no kernel for bfloat16")


def test_log_probabilities_that_no_way_of_decoding_has_are_an_error() -> None:
    # Rotary positions that depend on the length of the sequence: those of early tokens change with later ones.
    rope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, "factor": 4.0,
        "short_factor": [1.0] * 4, "long_factor": [8.0] * 4,
    }  # fmt: skip
    found = policy(build("phi3", rope_parameters=rope, original_max_position_embeddings=16))
    assert sampled_rightly(found)
    with pytest.raises(TrainingError, match="cannot be sampled from at this length"):
        found.sample([list(range(5, 18))], 16, torch.Generator().manual_seed(0))


# --- models and modules that no path may serve in silence -------------------------------------------------------------


def test_a_model_whose_tokens_see_later_ones_is_refused_by_name() -> None:
    model = of_kind("Bert", hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                    max_position_embeddings=64, is_decoder=False)  # fmt: skip
    with pytest.raises(UsageError, match=r"BertLMHeadModel cannot be trained.*see the tokens after them"):
        policy(model)


def test_a_model_that_cannot_be_differentiated_as_it_learns_is_refused_by_name() -> None:
    model = of_kind("Reformer", hidden_size=32, num_attention_heads=2, attention_head_size=16, feed_forward_size=48,
                    attn_layers=["local"], axial_pos_shape=(8, 8), axial_pos_embds_dim=(16, 16), is_decoder=True,
                    local_attn_chunk_length=8, max_position_embeddings=64)  # fmt: skip
    with pytest.raises(UsageError, match=r"ReformerModelWithLMHead cannot be trained"):
        policy(model)


def test_a_hook_on_the_head_is_part_of_the_model() -> None:
    model = build("llama")
    bias = torch.linspace(-2.0, 2.0, 97)
    model.lm_head.register_forward_hook(lambda _, __, out: out + bias)
    found = policy(model)
    assert not found.packed
    assert "head" in found.why_plain
    assert learns_rightly(found)
    assert sampled_rightly(found)


def test_a_cap_on_logits_is_found_though_the_logits_are_small() -> None:
    class Capped(type(build("llama"))):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = 30.0 * torch.tanh(out.logits / 30.0)
            return out

    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-3)
    model.__class__ = Capped
    found = policy(model)
    assert not found.packed
    assert "behind the head" in found.why_plain


def test_hooks_of_parameters_are_run() -> None:
    model = build("llama")
    wanted = model.model.layers[0].mlp.up_proj.weight
    wanted.register_hook(torch.zeros_like)
    found = policy(model)
    assert not found.packed
    learned_gradient = learned(found.log_probs, GROUPS, random_weights(GROUPS))[1]
    assert float(learned_gradient["model.layers.0.mlp.up_proj.weight"].abs().max()) == 0.0
    assert float(learned_gradient["model.layers.0.mlp.down_proj.weight"].abs().max()) > 0.0


def test_pruned_layers_learn_their_own_weights() -> None:
    from torch.nn.utils import prune

    model = build("llama")
    torch.manual_seed(0)
    prune.random_unstructured(model.model.layers[0].mlp.up_proj, "weight", amount=0.5)
    found = policy(model)
    assert learns_rightly(found)
    assert sampled_rightly(found)


def test_a_forward_of_a_layers_own_is_called() -> None:
    model = build("llama")
    layer: nn.Module = model.model.layers[1].mlp.up_proj
    own = layer.forward
    layer.forward = lambda x: 2 * own(x)
    for bf16 in (False, True):
        found = policy(model, bf16=bf16)
        with torch.no_grad():
            wanted = naive(model, GROUPS)[0]
        difference = float((learned(found.log_probs, GROUPS, random_weights(GROUPS))[0] - wanted).abs().max())
        assert difference < (0.3 if bf16 else 1e-4)


def test_hooks_that_are_added_later_are_run_too() -> None:
    found = policy(build("llama"))
    hook = found.model.model.layers[0].mlp.register_forward_hook(lambda _, __, out: 3 * out)
    assert learns_rightly(found)
    assert sampled_rightly(found)
    hook.remove()
    assert learns_rightly(found)
    found.model.lm_head.register_forward_hook(lambda _, __, out: 3 * out)
    with pytest.raises(UsageError, match="head of the model has a hook"):
        learns_rightly(found)


def test_gradient_checkpointing_leaves_the_dropout_of_a_layer_at_rest() -> None:
    found = policy(build("opt", dropout=0.5), gradient_checkpointing=True)
    assert found.packed
    assert learns_rightly(found)


# --- precision --------------------------------------------------------------------------------------------------------


def test_layers_that_need_one_dtype_are_sampled_under_autocast() -> None:
    model = of_kind("JetMoe", hidden_size=32, num_hidden_layers=2, num_key_value_heads=2, kv_channels=8,
                    intermediate_size=48, num_local_experts=4, num_experts_per_tok=2,
                    max_position_embeddings=64)  # fmt: skip
    found = policy(model, bf16=True)
    weights = random_weights(GROUPS)
    logp, gradient = learned(found.log_probs, GROUPS, weights)
    wanted = naive(model, GROUPS, weights)
    assert float((logp - wanted[0]).square().mean().sqrt()) < 0.1
    assert relative_error(gradient, wanted[1]) < 0.2
    assert len(found.sample([[5, 6, 7], [8]], 2, torch.Generator().manual_seed(0))) == 4


# --- memory -----------------------------------------------------------------------------------------------------------


def test_heads_that_differ_from_layer_to_layer_are_counted() -> None:
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING["gemma4_text"](
        **COMMON, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, global_head_dim=16, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"], vocab_size_per_layer_input=97,
        hidden_size_per_layer_input=8, num_kv_shared_layers=0, max_position_embeddings=64,
    )  # fmt: skip
    model = make(config)
    make_loud(model)
    found = policy(model)
    assert found.log_probs.backbone is not None
    assert found.log_probs.backbone.kept == 2 * 2 * (8 + 16)
    assert learns_rightly(found)
    assert sampled_rightly(found)
