"""Models of sizes that compiled code takes. Test modules that import this are skipped where there is no C compiler."""

from __future__ import annotations

import shutil
import sys

import pytest
import torch
from architectures import (
    VOCABULARY,
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
from torch import nn

from grouprl.lm.llama.trial import find_layers
from grouprl.lm.packed.backbone import find_backbone
from grouprl.lm.packed.low_precision import LowPrecision
from grouprl.lm.policy.log_probs import LogProbs
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.rows import Completion
from grouprl.lm.sample.sampler import Sampler

if sys.platform != "linux" or not (shutil.which("cc") or shutil.which("gcc")):
    pytest.skip("there is no C compiler on this machine", allow_module_level=True)

assert VOCABULARY % 16, "the head's last block of outputs is not full"

WIDE = {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16}
"""Sizes that compiled code takes: an odd number of blocks of 16 among them."""
LLAMAS: dict[str, dict] = {
    "llama": WIDE, "qwen2": {k: v for k, v in WIDE.items() if k != "head_dim"}, "qwen3": WIDE,
    "mistral": {**WIDE, "sliding_window": 4},
}  # fmt: skip


def wide(name: str) -> nn.Module:
    return build(name, **LLAMAS[name])


def fused(model: nn.Module, dtype: torch.dtype = torch.float32, temperature: float = 1.0) -> LogProbs:
    backbone, why = find_backbone(model)
    assert backbone is not None, why
    found = find_layers(backbone, dtype)
    assert found is not None
    return LogProbs(model, backbone, LowPrecision(model, dtype), temperature, 10**9, layers=found)


PROMPTS = [random_ids(n, torch.Generator().manual_seed(n)) for n in (5, 1, 19, 3)]


def sampled(model: nn.Module, steps: str, dtype: torch.dtype = torch.float32, n: int = 40) -> list[Completion]:
    backbone, why = find_backbone(model)
    assert backbone is not None, why
    sampler = Sampler(backbone, LowPrecision(model, dtype), [1, 2], steps=steps)  # type: ignore[arg-type]
    assert sampler.steps == steps
    # 6 rows of each prompt: more than 16 rows in all, and they leave one by one.
    return sampler.sample(PROMPTS, 6, SamplingSettings(n), torch.Generator().manual_seed(0))


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
