"""Compiled decode steps against the torch operations that they replace."""

from __future__ import annotations

import pytest
import torch
from architectures import (
    naive_log_probs,
)
from compiled import (
    LLAMAS,
    PROMPTS,
    sampled,
    wide,
)

from grouprl.lm.packed.backbone import find_backbone
from grouprl.lm.packed.low_precision import LowPrecision
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.sampler import Sampler


@pytest.mark.parametrize("name", LLAMAS)
def test_compiled_steps_sample_the_same_tokens(name: str) -> None:
    model = wide(name)
    found, wanted = sampled(model, "native"), sampled(model, "blocks")
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
    assert [c.ids for c in found] == [c.ids for c in sampled(model, "blocks")]
    with model.disable_adapter():
        without = sampled(model, "native")
    assert [c.ids for c in without] != [c.ids for c in found]
    assert [c.ids for c in without] == [c.ids for c in sampled(wide("llama"), "blocks")]


def test_a_layer_with_another_adapter_is_left_to_torch() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(wide("llama"), LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    backbone, why = find_backbone(model)
    assert backbone is not None, why
    assert Sampler(backbone, LowPrecision(model, torch.float32), [1]).steps == "blocks"


def test_changed_weights_are_sampled_from() -> None:
    model = wide("llama")
    backbone, _ = find_backbone(model)
    assert backbone is not None
    sampler = Sampler(backbone, LowPrecision(model, torch.float32), [10**6])
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
