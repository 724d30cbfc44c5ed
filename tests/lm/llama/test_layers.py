"""Fused layers against the naive model, and their adapters."""

from __future__ import annotations

import pytest
import torch
from architectures import (
    EPISODES,
    MIXED,
    as_samples,
    build,
    learned,
    naive,
    random_episodes,
    random_groups,
    random_weights,
    relative_error,
)
from compiled import (
    LLAMAS,
    WIDE,
    adapted,
    check_no_less_exact_than_autocast,
    fused,
    wide,
)

from grouprl.errors import TrainingError
from grouprl.lm.llama import layers
from grouprl.lm.llama.trial import find_layers
from grouprl.lm.packed.backbone import find_backbone
from grouprl.lm.packed.low_precision import LowPrecision
from grouprl.lm.sample.sampler import Sampler


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


@pytest.mark.parametrize("name", LLAMAS)
def test_fused_layers_give_the_naive_numbers_of_the_turns_of_episodes(name: str) -> None:
    model, groups = wide(name), random_episodes(*EPISODES, (21, ((17, 5, 18), (3, 30, 2, 4, 1))))
    weights = random_weights(groups)
    wanted = naive(model, groups, weights, 0.7)
    found = learned(fused(model, temperature=0.7), groups, weights)
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=1e-4)
    assert relative_error(found[1], wanted[1]) < 2e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_for_the_backward_pass_changes_no_bit(dtype: torch.dtype, monkeypatch) -> None:
    model, groups = wide("qwen3"), random_groups(*MIXED)
    weights = random_weights(groups)
    log_probs = fused(model, dtype)
    assert log_probs.layers is not None
    tokens, found = sum(group.n_inputs for group in groups), []
    one = layers.KEPT_SHARE / log_probs.layers.keeping(1) / 0.999 * tokens  # as much as one layer of the pack needs
    for n_layers in (0, 1, 10**6):
        monkeypatch.setattr(layers, "KEPT_SHARE", one * n_layers)
        assert log_probs.layers.keeping(tokens) == pytest.approx(n_layers, rel=0.1)
        found.append(learned(log_probs, groups, weights))
    for logp, gradients in found[1:]:
        assert torch.equal(found[0][0], logp)
        assert all(torch.equal(gradient, gradients[name]) for name, gradient in found[0][1].items())


def test_fused_layers_learn_from_groups_together_up_to_a_size(monkeypatch) -> None:
    log_probs = fused(wide("llama"))
    group = ([1, 2, 3, 4, 5], [[6, 7, 8], [9, 10, 11]])  # 9 inputs
    prompts, completions = [group[0]] * 4, group[1] * 4

    def sizes() -> list[int]:
        return [len(part.groups) for part in log_probs.micro_batches(prompts, completions, [0, 0, 1, 1, 2, 2, 3, 3])]

    assert sizes() == [4]
    monkeypatch.setattr(layers, "PACK_TOKENS", 20)
    monkeypatch.setattr(layers, "KEPT_SHARE", 1e9)
    assert sizes() == [2, 2]
    monkeypatch.setattr(layers, "KEPT_SHARE", 0.0)  # nothing is kept, so nothing is won
    assert sizes() == [4]


@pytest.mark.usefixtures("products_by")
@pytest.mark.parametrize("name", LLAMAS)
def test_fused_layers_in_low_precision_are_no_less_exact_than_autocast(name: str) -> None:
    check_no_less_exact_than_autocast(wide(name))


@pytest.mark.parametrize("settings", [{}, {"r": 16, "target_modules": "all-linear"}, {"bias": "lora_only"}])
@pytest.mark.parametrize("name", LLAMAS)
def test_fused_layers_give_the_naive_gradients_of_adapters(name: str, settings: dict) -> None:
    model, groups = adapted(name, **settings), random_groups(*MIXED)
    weights = random_weights(groups)
    wanted = naive(model, groups, weights)
    log_probs = fused(model)
    found = learned(log_probs, groups, weights)
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=1e-4)
    assert {key for key in found[1] if "lora" in key}
    for parameter, gradient in wanted[1].items():
        assert relative_error({"": found[1][parameter]}, {"": gradient}) < 2e-4, parameter
    prompts, completions, group, lengths = as_samples(groups)
    with model.disable_adapter():
        without = log_probs.without_gradient(log_probs.micro_batches(prompts, completions, group), lengths)
        torch.testing.assert_close(without, naive(model, groups, None)[0], rtol=0, atol=1e-4)
    assert float((without - found[0]).abs().max()) > 1e-2


def test_adapters_in_low_precision_are_no_less_exact_than_autocast() -> None:
    check_no_less_exact_than_autocast(adapted("llama", r=16))


def test_adapters_merged_meanwhile_are_added_once() -> None:
    model, groups = adapted("llama"), random_groups(*MIXED)
    log_probs = fused(model)
    prompts, completions, group, lengths = as_samples(groups)
    before = log_probs.without_gradient(log_probs.micro_batches(prompts, completions, group), lengths)
    model.merge_adapter()
    after = log_probs.without_gradient(log_probs.micro_batches(prompts, completions, group), lengths)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    with model.disable_adapter(), pytest.raises(TrainingError, match="unmerge_adapter"):
        log_probs.without_gradient(log_probs.micro_batches(prompts, completions, group), lengths)


def test_a_trial_with_new_adapters_gives_them_something_to_do_and_takes_it_back(monkeypatch) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(wide("llama"), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    assert fused(model)
    empty = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    assert len(empty) > 1
    assert not any(parameter.any() for parameter in empty)
    monkeypatch.setattr(layers, "active_adapters", lambda part: ())  # a forward that adds nothing is found out
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
    assert Sampler(backbone, LowPrecision(backbone.model, torch.float32), [1]).steps == "blocks"
