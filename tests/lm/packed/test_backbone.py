"""Which models the packed paths may run, and that asking leaves no trace."""

import pytest
import torch
from architectures import PACKED, PLAIN, build, make
from torch import nn

from grouprl.lm.packed import attention
from grouprl.lm.packed.attention import PackedAttention, UnsupportedError
from grouprl.lm.packed.backbone import Backbone, find_backbone
from grouprl.lm.packed.packing import Group, Pack
from grouprl.lm.packed.trial import plain_logits

WHY = {
    "bloom": "differ",
    "mamba": "differ",
    "granite": "behind the head",
    "gemma2_capped": "behind the head",
}


def mixture_with_a_window(window: int):
    """A model whose sliding window is in the mask alone: its layers do not tell attention of it."""
    from transformers import PhimoeConfig

    return make(
        PhimoeConfig(
            vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, sliding_window=window,
        )
    )  # fmt: skip


@pytest.mark.parametrize("loud", [True, False])
@pytest.mark.parametrize("name", PACKED)
def test_an_architecture_that_can_be_packed_is_found_out(name: str, loud: bool) -> None:
    backbone, why = find_backbone(build(name, loud=loud))
    assert why == ""
    assert isinstance(backbone, Backbone)


@pytest.mark.parametrize("loud", [True, False])
@pytest.mark.parametrize("name", PLAIN)
def test_an_architecture_that_cannot_be_packed_is_refused_with_the_reason(name: str, loud: bool) -> None:
    backbone, why = find_backbone(build(name, loud=loud))
    assert backbone is None
    assert WHY[name] in why


def test_a_window_that_only_the_mask_knows_of_is_found_out() -> None:
    assert find_backbone(mixture_with_a_window(4))[0] is None


def test_a_long_window_that_only_the_mask_knows_of_is_found_out_too() -> None:
    assert find_backbone(mixture_with_a_window(12))[0] is None


def test_positions_that_depend_on_the_longest_sequence_beside_are_found_out() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert find_backbone(build("llama", max_position_embeddings=16, rope_parameters=rope))[0] is None


def test_a_model_that_calls_a_layer_twice_in_a_pass_is_found_out() -> None:
    from transformers import HrmTextConfig

    config = HrmTextConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    assert find_backbone(make(config))[0] is None


def test_a_model_that_is_not_causal_or_has_no_linear_head_is_refused() -> None:
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    assert find_backbone(make_bert := BertLMHeadModel(config))[0] is None
    assert not make_bert.config.is_decoder
    model = build("llama")
    model.lm_head = nn.Sequential(model.lm_head)
    backbone, why = find_backbone(model)
    assert backbone is None
    assert "no decoder with a linear head" in why


def test_an_adapter_is_run_packed_unless_it_changes_the_head() -> None:
    from peft import LoraConfig, get_peft_model

    def adapted(*targets: str):
        config = LoraConfig(r=2, target_modules=list(targets), init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(build("qwen2"), config)

    assert find_backbone(adapted("q_proj", "down_proj"))[0] is not None
    assert find_backbone(adapted("lm_head"))[0] is None


@pytest.mark.parametrize("training", [True, False])
def test_what_a_model_keeps_of_a_token_is_found_without_its_dropout(training: bool) -> None:
    model = build("gpt2").train(training)  # attention drops 0.1
    assert Backbone(model).kept == 2 * 2 * model.config.n_embd
    assert model.training is training
    assert all(module.training is training for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "bloom", "granite"])
@pytest.mark.parametrize("training", [True, False])
def test_finding_out_leaves_the_model_as_it_was(name: str, training: bool) -> None:
    model = build(name).train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    find_backbone(model)
    assert model.training is training
    assert model.config._attn_implementation == "eager"
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert attention._active is None


def test_finding_out_draws_no_random_number() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    find_backbone(build("llama"))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_model_gets_its_own_attention_back_after_an_exception() -> None:
    model = build("gemma3")
    backbone = Backbone(model)

    def halt() -> None:
        assert model.config._attn_implementation == attention.NAME
        raise RuntimeError("halt")

    with pytest.raises(RuntimeError, match="halt"), backbone.following(PackedAttention(None)):
        halt()
    assert model.config._attn_implementation == "eager"
    with pytest.raises(UnsupportedError):
        attention.attention_function(nn.Module(), *[torch.zeros(1, 1, 1, 4)] * 3, None)


def test_hidden_states_give_the_logits_of_the_plain_model() -> None:
    model = build("qwen3")
    backbone = Backbone(model)
    ids = torch.tensor([5, 6, 7, 8])
    pack = Pack.of([Group(ids.tolist(), ())])
    with backbone.following(PackedAttention(pack)), torch.no_grad():
        logits = backbone.head(backbone.hidden(pack.ids, pack.positions))
    torch.testing.assert_close(logits, plain_logits(model, ids[None])[0], rtol=0, atol=2e-5)
    assert backbone.device == torch.device("cpu")
