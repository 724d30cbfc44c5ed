"""The decode step of LlamaBlocks gives what the model's own modules give, or is not used."""

from __future__ import annotations

import pytest
import torch
from architectures import PACKED, build, make
from torch import nn

from grouprl.lm.llama.block import JoinedProducts, find_llama
from grouprl.lm.packed.attention import PackedAttention
from grouprl.lm.packed.backbone import find_backbone
from grouprl.lm.packed.low_precision import LowPrecision
from grouprl.lm.packed.packing import Group, Pack
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.rows import Completion
from grouprl.lm.sample.sampler import Sampler

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]


def sampled(model: nn.Module, blocks: bool, dtype: torch.dtype = torch.float32) -> tuple[bool, list[Completion]]:
    backbone, why = find_backbone(model)
    assert backbone is not None, why
    sampler = Sampler(backbone, LowPrecision(model, dtype), [1], steps="blocks" if blocks else "modules")
    settings = SamplingSettings(12)
    return sampler.steps == "blocks", sampler.sample(PROMPTS, 4, settings, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", PACKED)
def test_the_same_tokens_are_sampled_with_and_without_it(name: str) -> None:
    model = build(name)
    _, with_it = sampled(model, blocks=True)
    _, without = sampled(model, blocks=False)
    assert [c.ids for c in with_it] == [c.ids for c in without]
    for one, other in zip(with_it, without, strict=True):
        assert torch.allclose(one.logp, other.logp, atol=2e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_llama_shaped_models_have_it(name: str) -> None:
    assert sampled(build(name), blocks=True)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_layers_joined_to_one_product_give_what_they_give_apart(name: str, dtype: torch.dtype) -> None:
    backbone = find_backbone(build(name))[0]
    llama, precision = find_llama(backbone), LowPrecision(backbone.model, dtype)  # type: ignore[arg-type]
    pack = Pack.of([Group([5, 6, 7, 1], ()), Group([8, 2], ())])
    plan = PackedAttention(pack, dtype, native=False)
    assert llama is not None
    assert JoinedProducts.can_join(llama)
    joined = JoinedProducts(llama, precision)
    assert len([m for m in joined.linears if isinstance(m, nn.Linear)]) == 7 * len(llama.decoder.layers)
    with precision.sampling():
        wanted = llama.hidden(pack.ids, pack.positions, plan)
    with precision.sampling(without=joined.linears):
        found = llama.hidden(pack.ids, pack.positions, plan, joined)
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    assert float((found - wanted).norm() / wanted.norm()) < tolerance


def test_adapters_are_joined_with_what_they_add() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    backbone = find_backbone(model)[0]
    llama, precision = find_llama(backbone), LowPrecision(model, torch.float32)  # type: ignore[arg-type]
    pack = Pack.of([Group([5, 6, 7, 1], ())])
    plan = PackedAttention(pack, torch.float32, native=False)
    assert llama is not None
    assert JoinedProducts.can_join(llama)
    joined = JoinedProducts(llama, precision)
    with precision.sampling():
        wanted = llama.hidden(pack.ids, pack.positions, plan)
    with precision.sampling(without=joined.linears):
        found = llama.hidden(pack.ids, pack.positions, plan, joined)
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def test_weights_in_the_dtype_of_products_are_not_copied_and_their_adapters_not_rounded_away() -> None:
    from peft import LoraConfig, get_peft_model

    model = build("qwen2").to(torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    llama, precision = find_llama(find_backbone(model)[0]), LowPrecision(model, torch.bfloat16)  # type: ignore[arg-type]
    assert llama is not None
    x, layer = torch.randn(5, 32).to(torch.bfloat16), llama.decoder.layers[0]
    with torch.no_grad():
        for part in (layer.self_attn.q_proj, layer.mlp.down_proj):
            part.lora_B["default"].weight.normal_(std=1e-4, generator=torch.Generator().manual_seed(1))
        its = JoinedProducts(llama, precision).layers[0]
        q = layer.self_attn.q_proj(x).float()
        assert float((its.qkv(x)[:, : q.shape[1]].float() - q).norm() / q.norm()) < 5e-3
        kept = {m.weight.data_ptr() for m in model.modules() if isinstance(m, nn.Linear)}
        held = [c.cell_contents for c in its.o.__closure__ if isinstance(c.cell_contents, torch.Tensor)]
        assert all(t.data_ptr() in kept for t in held)
        layer.self_attn.q_proj.lora_B["default"].weight.mul_(1000)  # a change that shows
        changed = layer.self_attn.q_proj(x).float()
        found = JoinedProducts(llama, precision).layers[0].qkv(x)[:, : q.shape[1]].float()
        assert float((changed - q).norm()) > 0.1 * float(q.norm())
        assert float((found - changed).norm() / changed.norm()) < 1e-2


@pytest.mark.parametrize("name", ["gpt2", "gemma", "gemma3", "phi", "opt"])
def test_models_with_other_parts_have_none(name: str) -> None:
    assert find_llama(find_backbone(build(name))[0]) is None  # type: ignore[arg-type]


def test_a_model_of_the_same_parts_that_does_something_else_has_none() -> None:
    # SmolLM3 leaves the rotary positions out of some layers, which no part of it shows.
    model = build("smollm3")
    assert find_llama(find_backbone(model)[0]) is None  # type: ignore[arg-type]
    assert not sampled(model, blocks=True)[0]


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 10000.0}


def test_a_model_that_differs_at_far_positions_alone_has_none() -> None:
    from transformers import Ministral3Config

    def found(beta: float):
        config = Ministral3Config(
            vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=64,
            rope_parameters={**YARN, "llama_4_scaling_beta": beta},
        )  # fmt: skip
        backbone, why = find_backbone(make(config))
        assert why == ""
        return find_llama(backbone)

    assert found(0.0) is not None
    assert found(0.1) is None  # its queries grow from position 16 on


@pytest.mark.parametrize("kind", ["hook", "forward", "backward"])
def test_modules_that_do_more_than_their_class_are_called(kind: str) -> None:
    model = build("llama")
    mlp = model.model.layers[1].mlp
    if kind == "hook":
        mlp.register_forward_hook(lambda _, __, out: 2 * out)
    elif kind == "backward":
        mlp.register_full_backward_hook(lambda *_: None)
    else:
        own = mlp.forward
        mlp.forward = lambda x: 2 * own(x)
    backbone, why = find_backbone(model)
    assert why == ""
    assert find_llama(backbone) is None  # type: ignore[arg-type]


def test_it_runs_adapters_too() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama"), LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    has, with_it = sampled(model, blocks=True)
    assert has
    assert [c.ids for c in with_it] == [c.ids for c in sampled(model, blocks=False)[1]]
