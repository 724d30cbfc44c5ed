"""The loss that balances the load of experts: its value and gradient are those of Transformers' own function."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures import EOS, PAD, VOCABULARY, build, make, relative_error, take_gradient
from test_step import GROUPS, Run, naive_gradient, naive_values, samples
from torch import Tensor

from grouprl.errors import UsageError

_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1,
    "eos_token_id": EOS, "pad_token_id": PAD, "num_experts_per_tok": 2,
}  # fmt: skip
_QWEN = {**_SIZES, "num_experts": 4, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {**_SIZES, "num_local_experts": 4},
    "qwen2_moe": {**_QWEN, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**_QWEN, "head_dim": 8},
    "olmoe": {**_SIZES, "num_experts": 4},
    "flex_olmo": {**_SIZES, "num_experts": 4},
    "granitemoe": {**_SIZES, "num_local_experts": 4},
    "gpt_oss": {**_SIZES, "num_local_experts": 4, "head_dim": 8, "layer_types": ["full_attention"] * 2},
    "ernie4_5_moe": {
        **_SIZES, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16, "moe_layer_start_index": 0,
        "moe_layer_end_index": 1,
    },
    "minimax_m2": {**_SIZES, "num_local_experts": 4, "head_dim": 8, "rotary_dim": 4},
    "jetmoe": {**_SIZES, "num_key_value_heads": 2, "kv_channels": 8, "num_local_experts": 4, "aux_loss_coef": 0.01},
    "jamba": {**_SIZES, "num_experts": 4, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1,
              "expert_layer_period": 1, "expert_layer_offset": 0, "mamba_d_state": 4},
}  # fmt: skip
COEFFICIENT = 3.0


def experts(kind: str, **changes: Any) -> Any:
    """A small mixture of four experts, two for each token."""
    from transformers import CONFIG_MAPPING

    return make(CONFIG_MAPPING[kind](**{**KINDS[kind], **changes}))


def own_loss(model: Any) -> Tensor:
    """Transformers' loss of all that is read: every sequence without its last token, padded to one rectangle."""
    read = [[*group.prompt, *completion[:-1]] for group in GROUPS for completion in group.completions]
    longest = max(map(len, read))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in read])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in read])
    found = model(input_ids=ids, attention_mask=mask, use_cache=False, output_router_logits=True).aux_loss
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *((kind, "as it goes") for kind in KINDS),
        *((kind, how) for kind in ("mixtral", "qwen3_moe") for how in ("in parts", "plain", "recomputed")),
    ],
)
def test_the_loss_and_its_gradient_are_those_of_transformers_on_padded_sequences(kind: str, how: str) -> None:
    model, of = experts(kind), samples()
    by = {
        "as it goes": {}, "in parts": {"tokens_per_micro_batch": 12}, "plain": {"attention": "plain"},
        "recomputed": {"gradient_checkpointing": True, "tokens_per_micro_batch": 12},
    }[how]  # fmt: skip
    run = Run(model, router_aux_loss_coef=COEFFICIENT, **by)
    step = run.step(of)
    if kind in ("mixtral", "qwen3_moe"):
        assert run.policy.packed == (how != "plain")
        assert (len(step.micro_batches) == 1) == (how == "as it goes")
    copied = copy.deepcopy(model)
    wanted = own_loss(copied)
    (COEFFICIENT * wanted).backward()
    balance = take_gradient(copied)
    rest = naive_gradient(model, run.config, of, naive_values(model), None)
    assert relative_error(balance, rest) > 0.01  # it makes a difference
    both = {name: rest[name] + balance[name] for name in rest}
    assert relative_error(run.gradient(step), both) < 1e-4
    assert run.take(run.step(of))["aux_loss"] == pytest.approx(float(wanted.detach()), rel=1e-5)


@pytest.mark.parametrize("how", ["as it goes", "in parts"])
def test_samples_that_teach_nothing_are_routed_too(how: str) -> None:
    model = experts("mixtral")
    of = samples()
    of.advantages.zero_()
    by = {"tokens_per_micro_batch": 12} if how == "in parts" else {}
    run = Run(model, router_aux_loss_coef=COEFFICIENT, **by)
    copied = copy.deepcopy(model)
    (COEFFICIENT * own_loss(copied)).backward()
    assert relative_error(run.gradient(run.step(of)), take_gradient(copied)) < 1e-4


def test_the_coefficient_is_that_of_the_model_unless_it_is_given() -> None:
    assert Run(experts("mixtral", router_aux_loss_coef=0.02)).policy.log_probs.experts.coefficient == 0.02
    assert Run(experts("mixtral"), router_aux_loss_coef=0.5).policy.log_probs.experts.coefficient == 0.5
    assert Run(experts("mixtral"), router_aux_loss_coef=0.0).policy.log_probs.experts is None
    assert Run(experts("mixtral", router_aux_loss_coef=0.0)).policy.log_probs.experts is None
    assert Run(build("llama"), router_aux_loss_coef=0.0).policy.log_probs.experts is None


def test_a_process_without_samples_can_add_what_the_others_met_in_its_place() -> None:
    found = Run(experts("mixtral"), router_aux_loss_coef=0.5).policy.log_probs.experts.nothing(torch.device("cpu"))
    for number, part in enumerate(found):
        part += number
    assert [part.tolist() for part in found] == [[0.0] * 4, [1.0] * 4, 2.0]


def test_a_model_without_such_a_loss_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UsageError, match=r"router_aux_loss_coef=0.1, but LlamaForCausalLM gives no loss .* leave"):
        Run(build("llama"), router_aux_loss_coef=0.1)
    other = experts("mixtral", router_aux_loss_coef=0.1)
    other.num_experts_per_tok = 1  # as if its own loss counted something else
    experts_of = type(other).forward

    def forward(self: Any, *args: Any, **options: Any) -> Any:
        out = experts_of(self, *args, **options)
        if out.aux_loss is not None:
            out["aux_loss"] = out.aux_loss + 1.0
        return out

    other.forward = forward.__get__(other)
    with pytest.raises(UsageError, match="it computes another one"):
        Run(other, router_aux_loss_coef=0.1)
    Run(other)
    assert "it is trained without, although its configuration has router_aux_loss_coef=0.1" in caplog.text
