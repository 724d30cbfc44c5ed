from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from grouprl.errors import UsageError
from grouprl.lm.models.restore import load_weights
from grouprl.lm.models.save import save_model
from grouprl.lm.models.tiny import build_tiny

SIZES: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 3,
}  # fmt: skip


def llama(**settings: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, **settings))


def gpt_neox() -> Any:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES))


def mixtral() -> Any:
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2))


def gemma3_with_images() -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    text = Gemma3TextConfig(**SIZES, num_key_value_heads=2, head_dim=8)
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=4
    )
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


def rwkv() -> Any:
    return RwkvForCausalLM(
        RwkvConfig(vocab_size=32, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2, context_length=32)
    )


def with_a_buffer() -> Any:
    """What a user put into a model: a module that its class does not know, with a buffer that is part of its state."""
    model = mixtral()
    model.model.layers[0].extra = torch.nn.BatchNorm1d(16)
    return model


MODELS = {
    "tied": lambda: llama(tie_word_embeddings=True), "gpt_neox": gpt_neox, "mixtral": mixtral, "rwkv": rwkv,
    "gemma3_with_images": gemma3_with_images, "with_a_buffer": with_a_buffer,
}  # fmt: skip


def randomise(model: Any, seed: int) -> dict[str, torch.Tensor]:
    """Fill every weight and buffer of the state; a copy of them."""
    generator = torch.Generator().manual_seed(seed)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.rand(value.shape, generator=generator))
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(model: Any, expected: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", MODELS)
def test_weights_of_any_architecture_come_back_bit_for_bit_and_in_place(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    expected = randomise(model, 0)
    save_model(model, None, tmp_path / "m")
    places = {name: value.data_ptr() for name, value in model.state_dict().items()}
    randomise(model, 1)
    assert not same(model, expected)
    before = torch.get_rng_state()
    load_weights(model, tmp_path / "m")
    assert same(model, expected)
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == places
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", ["tied", "mixtral"])
def test_no_weight_is_rounded_whatever_the_default_dtype_is(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]().to(torch.bfloat16)
    model.lm_head.to(torch.float64)
    model.model.layers[1].mlp.float()
    expected = randomise(model, 0)
    save_model(model, None, tmp_path / "m")
    randomise(model, 1)
    torch.set_default_dtype(torch.float16)
    try:
        load_weights(model, tmp_path / "m")
    finally:
        torch.set_default_dtype(torch.float32)
    assert same(model, expected)


@pytest.mark.parametrize("kind", ["tied", "mixtral"])
def test_weights_in_several_files_are_loaded(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    expected = randomise(model, 0)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len([*tmp_path.glob("model-*.safetensors")]) > 1
    randomise(model, 1)
    load_weights(model, tmp_path)
    assert same(model, expected)


def other_names() -> Any:
    model = mixtral()
    model.lm_head, model.head = torch.nn.Identity(), model.lm_head
    return model


@pytest.mark.parametrize(
    ("saved", "here", "said"),
    [
        (
            lambda: llama(tie_word_embeddings=False),
            lambda: llama(tie_word_embeddings=True),
            r"model.embed_tokens.weight and lm_head.weight are one weight here",
        ),
        (lambda: build_tiny(0)[0], llama, r"model.embed_tokens.weight is \[32, 64\] there and \[32, 16\] here"),
        (mixtral, llama, r"it lacks model.layers.0.mlp.gate_proj.weight, .* and 3 more"),
        (llama, mixtral, r"it lacks model.layers.0.mlp.gate.weight, .*experts.down_proj and 3 more"),
        (other_names, mixtral, r"it lacks lm_head.weight; it has head.weight besides"),
        (mixtral, with_a_buffer, r"it lacks model.layers.0.extra.weight"),
    ],
)
def test_what_another_model_has_otherwise_is_said_and_nothing_is_loaded(
    saved: Any, here: Any, said: str, tmp_path: Path
) -> None:
    save_model(saved(), None, tmp_path / "m")
    model = here()
    expected = randomise(model, 0)
    with pytest.raises(UsageError, match=said) as raised:
        load_weights(model, tmp_path / "m")
    assert "\n" not in str(raised.value)
    assert same(model, expected)


@pytest.mark.parametrize("kind", ["tied", "mixtral"])
def test_a_damaged_or_missing_file_is_named(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    save_model(model, None, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UsageError, match=r"the weights in .* are damaged"):
        load_weights(model, tmp_path / "m")
    file.unlink()
    with pytest.raises(UsageError, match=r"holds no model\.safetensors"):
        load_weights(model, tmp_path / "m")
