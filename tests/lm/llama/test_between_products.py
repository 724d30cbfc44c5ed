"""Layers as fused functions of torch operations, which GPUs run, with a stand-in for the kernels of attention."""

from __future__ import annotations

from typing import Any

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
from peft import LoraConfig, get_peft_model
from stand_in import stand_in
from torch import nn

from grouprl.lm.llama.between_products import BetweenProductsTorch
from grouprl.lm.llama.block import find_llama
from grouprl.lm.llama.layers import LlamaLayers
from grouprl.lm.packed.backbone import find_backbone
from grouprl.lm.packed.low_precision import LowPrecision
from grouprl.lm.policy.log_probs import LogProbs

LLAMAS = ("llama", "qwen2", "qwen3")


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)


def fused(model: nn.Module, *, rounded_once: bool = False, keeping: bool = False) -> LogProbs:
    backbone, why = find_backbone(model)
    assert backbone is not None, why
    llama = find_llama(backbone)
    assert llama is not None
    layers: Any = LlamaLayers(backbone.decoder, llama.specs, torch.float32, BetweenProductsTorch)
    layers._on_cpu = not rounded_once
    layers.keeping = lambda tokens: 10**6 if keeping else 0
    return LogProbs(model, backbone, LowPrecision(model, torch.float32), 0.7, 10**9, layers=layers)


@pytest.mark.parametrize("name", LLAMAS)
@pytest.mark.parametrize("rounded_once", [False, True])
@pytest.mark.parametrize("keeping", [False, True])
def test_they_give_the_naive_log_probabilities_and_gradients(name: str, rounded_once: bool, keeping: bool) -> None:
    model, groups = build(name), random_groups(*MIXED, (9, (1, 1)))
    weights = random_weights(groups)
    wanted = naive(model, groups, weights, 0.7)
    found = learned(fused(model, rounded_once=rounded_once, keeping=keeping), groups, weights)
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=1e-4)
    assert relative_error(found[1], wanted[1]) < 2e-5
    for parameter, gradient in wanted[1].items():
        assert relative_error({"": found[1][parameter]}, {"": gradient}) < 2e-4, parameter


def test_frozen_weights_get_no_gradient_and_the_others_theirs() -> None:
    model, groups = build("qwen3"), random_groups(*MIXED)
    for name, parameter in model.named_parameters():
        parameter.requires_grad = not any(part in name for part in ("embed", "layers.0.mlp", "k_norm", "v_proj"))
    weights = random_weights(groups)
    wanted = naive(model, groups, weights, 0.7)
    found = learned(fused(model, rounded_once=True), groups, weights)
    assert relative_error(found[1], wanted[1]) < 2e-5
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_adapters_are_learned() -> None:
    model = get_peft_model(build("llama"), LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    groups = random_groups(*MIXED)
    weights = random_weights(groups)
    wanted = naive(model, groups, weights, 0.7)
    found = learned(fused(model, rounded_once=True), groups, weights)
    assert relative_error(found[1], wanted[1]) < 2e-5
    assert {name for name in found[1] if "lora_" not in name} == set()


def test_what_is_rounded_once_is_rounded_again_for_other_weights() -> None:
    model, groups = build("llama"), random_groups(*MIXED)
    log_probs, weights = fused(model, rounded_once=True), random_weights(groups)
    learned(log_probs, groups, weights)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    wanted = naive(model, groups, weights, 0.7)
    torch.testing.assert_close(learned(log_probs, groups, weights)[0], wanted[0], rtol=0, atol=1e-4)
