"""The policy: how it runs, at which precision, and what the divergence is measured to."""

import logging
from types import SimpleNamespace

import pytest
import torch
from architectures import EOS, MIXED, PAD, PLAIN, as_samples, build, naive, random_groups
from small_policies import adapted, policy

from grouprl.errors import UsageError
from grouprl.lm.policy.fastest import has_dropout
from grouprl.lm.policy.policy import Policy, sampling_settings
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.plain import PlainSampler
from grouprl.lm.sample.sampler import Sampler
from grouprl.lm.settings.config import GRPOConfig

GROUPS = random_groups(*MIXED)


def log_probs(of: Policy, groups=GROUPS) -> torch.Tensor:
    prompts, completions, group, lengths = as_samples(groups)
    return of.log_probs.without_gradient(of.log_probs.micro_batches(prompts, completions, group), lengths)


def reference_log_probs(of: Policy, groups=GROUPS) -> torch.Tensor:
    prompts, completions, group, lengths = as_samples(groups)
    return of.reference.log_probs(of.log_probs.micro_batches(prompts, completions, group), lengths)


# --- packed or plain --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN)
def test_a_model_that_cannot_be_packed_warns_once_and_runs_plainly(name: str, caplog) -> None:
    model = build(name)
    with caplog.at_level(logging.WARNING, "grouprl"):
        found = policy(model, temperature=0.7, beta=0.1)
    (warning,) = [record for record in caplog.records if record.name == "grouprl"]
    assert type(model).__name__ in warning.getMessage()
    assert found.why_plain in warning.getMessage()
    assert not found.packed
    assert isinstance(found.sampler, PlainSampler)
    torch.testing.assert_close(log_probs(found), naive(model, GROUPS, None, 0.7)[0], rtol=0, atol=1e-5)
    assert torch.equal(reference_log_probs(found), log_probs(found))
    completions = found.sample([[5, 6], [7]], 2, torch.Generator().manual_seed(0))
    assert len(completions) == 4


def test_a_model_that_can_be_packed_is_and_nothing_is_said(caplog) -> None:
    model = build("llama")
    with caplog.at_level(logging.WARNING, "grouprl"):
        found = policy(model, temperature=0.7)
    assert caplog.records == []
    assert found.packed
    assert found.why_plain == ""
    assert isinstance(found.sampler, Sampler)
    torch.testing.assert_close(log_probs(found), naive(model, GROUPS, None, 0.7)[0], rtol=0, atol=1e-5)


def test_plain_attention_can_be_asked_for_without_a_warning(caplog) -> None:
    with caplog.at_level(logging.WARNING, "grouprl"):
        found = policy(build("llama"), attention="plain")
    assert caplog.records == []
    assert not found.packed
    assert isinstance(found.sampler, PlainSampler)
    torch.testing.assert_close(log_probs(found), log_probs(policy(build("llama"))), rtol=0, atol=1e-5)


def test_completions_end_at_the_tokenizers_token_and_at_those_of_the_generation_config() -> None:
    model = build("llama")
    model.generation_config.eos_token_id = list(range(40, 97))
    found = policy(model).sample([[5, 6]] * 4, 8, torch.Generator().manual_seed(0))
    assert any(c.finished and c.ids[-1] >= 40 for c in found)
    assert all(c.finished is (c.ids[-1] == EOS or c.ids[-1] >= 40) for c in found)
    model.generation_config.eos_token_id = None
    with pytest.raises(UsageError, match="end-of-sequence"):
        Policy(model, SimpleNamespace(eos_token_id=None, pad_token_id=PAD), GRPOConfig(bf16=False))


# --- precision --------------------------------------------------------------------------------------------------------


def test_products_run_in_the_precision_asked_for() -> None:
    assert policy(build("llama"), bf16=False).precision.dtype == torch.float32
    assert policy(build("llama"), bf16=True).precision.dtype == torch.bfloat16
    assert policy(build("llama").to(torch.bfloat16), bf16=False).precision.dtype == torch.bfloat16


@pytest.mark.parametrize(("bf16", "master"), [(True, torch.float32), (False, torch.bfloat16)])
def test_low_precision_is_near_full_precision(bf16: bool, master: torch.dtype) -> None:
    model = build("llama")
    wanted = naive(model, GROUPS)[0]
    found = log_probs(policy(model.to(master), bf16=bf16))
    assert 1e-4 < float((found - wanted).abs().mean()) < 0.1


# --- the reference ----------------------------------------------------------------------------------------------------


def test_without_beta_there_is_no_reference() -> None:
    assert policy(build("llama")).reference is None
    with pytest.raises(UsageError, match="beta=0 gives it no weight"):
        policy(build("llama"), build("llama", seed=1))


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("attention", ["auto", "plain"])
def test_the_reference_begins_equal_to_the_last_bit_and_stays(bf16: bool, attention: str) -> None:
    found = policy(build("llama"), beta=0.1, bf16=bf16, attention=attention)
    before = log_probs(found)
    assert torch.equal(reference_log_probs(found), before)
    with torch.no_grad():
        for p in found.model.parameters():
            p.mul_(1.1)
    assert torch.equal(reference_log_probs(found), before)
    assert float((log_probs(found) - before).abs().max()) > 0.01
    assert not reference_log_probs(found).requires_grad
    assert all(p.requires_grad for p in found.model.parameters())


def test_a_reference_that_shares_weights_with_the_model_is_refused() -> None:
    base = build("llama")
    with pytest.raises(UsageError, match="shares weights"):
        policy(adapted(base), base, beta=0.1)
    with pytest.raises(UsageError, match="shares weights"):
        policy(base, base, beta=0.1)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_reference_of_a_new_adapter_is_the_model_without_it(bf16: bool) -> None:
    base = build("llama")
    wanted = log_probs(policy(build("llama"), bf16=bf16))
    found = policy(adapted(base), beta=0.1, bf16=bf16)
    assert found.packed
    assert torch.equal(log_probs(found), wanted)  # an adapter begins as 0
    learn(found)
    assert float((log_probs(found) - wanted).abs().max()) > 0.1
    assert torch.equal(reference_log_probs(found), wanted)
    assert found.reference.state().keys() == {n for n, _ in found.model.named_parameters() if "lora" in n}


def test_an_adapter_that_has_learned_something_is_part_of_the_reference() -> None:
    model = adapted(build("llama"))
    learn(model=model)
    found = policy(model, beta=0.1)
    wanted = log_probs(found)
    assert torch.equal(reference_log_probs(found), wanted)
    learn(found)
    assert torch.equal(reference_log_probs(found), wanted)


def learn(found: Policy | None = None, model=None) -> None:
    """Move the adapter."""
    with torch.no_grad():
        for name, p in (found.model if model is None else model).named_parameters():
            if "lora_B" in name:
                p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))


def test_a_reference_has_no_dropout() -> None:
    model = build("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and module is not getattr(module, "attn_dropout", None):
            module.p = 0.3
    found = policy(model, beta=0.1, disable_dropout=False, attention="plain")
    wanted = naive(model.eval(), GROUPS)[0]
    for _ in range(2):
        torch.testing.assert_close(reference_log_probs(found), wanted, rtol=0, atol=1e-5)
        torch.testing.assert_close(log_probs(found), wanted, rtol=0, atol=1e-5)
    with found.log_probs.learning():
        part = found.log_probs.micro_batches(*as_samples(GROUPS)[:3])[0]
        assert float((found.log_probs.evaluate(part).logp - wanted[: int(part.samples.numel())]).abs().max()) > 0.01


def test_a_reference_may_be_given() -> None:
    other = build("llama", seed=1)
    for model in (build("llama"), adapted(build("llama"))):
        found = policy(model, other, beta=0.1)
        torch.testing.assert_close(reference_log_probs(found), naive(other, GROUPS)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["given", "copied", "adapter"])
def test_a_reference_can_follow_the_model(kind: str) -> None:
    model = adapted(build("llama")) if kind == "adapter" else build("llama")
    other = build("llama", seed=1) if kind == "given" else None
    found = policy(model, other, beta=0.1, sync_ref_model=True)
    before = {name: value.clone() for name, value in found.reference.state().items()}
    with torch.no_grad():
        for p in found.model.parameters():
            p.add_(0.5)
    found.reference.follow(0.25)
    trained = {name: p for name, p in found.model.named_parameters() if p.requires_grad}
    assert found.reference.state().keys() == trained.keys() == before.keys()
    for name, value in found.reference.state().items():
        torch.testing.assert_close(value, 0.25 * trained[name] + 0.75 * before[name])
    found.reference.load(before)
    for name, value in found.reference.state().items():
        assert torch.equal(value, before[name])


def test_a_reference_of_another_kind_cannot_follow() -> None:
    for model, other in ((adapted(build("llama")), build("llama")), (build("llama"), build("gpt2"))):
        policy(model, other, beta=0.1)
        with pytest.raises(UsageError, match="give a ref_model of the same kind"):
            policy(model, other, beta=0.1, sync_ref_model=True)


@pytest.mark.parametrize(("name", "has"), [("llama", False), ("gpt2", True), ("opt", False)])
def test_dropout_is_found_wherever_it_is_said(name: str, has: bool) -> None:
    model = build(name)
    assert has_dropout(model) is has
    assert policy(model, disable_dropout=False, attention="plain").log_probs.dropout is has
    model.config.attention_dropout = 0.1
    assert has_dropout(model)
    assert policy(build(name)).log_probs.dropout is False
    assert has_dropout(adapted(build("llama"), lora_dropout=0.1))
    assert not has_dropout(adapted(build("llama")))


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_sampling_settings_come_from_the_configuration_alone() -> None:
    config = GRPOConfig(
        max_completion_length=7,
        temperature=0.6,
        top_k=5,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.2,
        min_new_tokens=2,
    )
    assert sampling_settings(config) == SamplingSettings(7, 0.6, 5, 0.9, 0.1, 1.2, 2)
    assert sampling_settings(GRPOConfig()) == SamplingSettings(512)
    assert sampling_settings(config, greedy=True) == SamplingSettings(7, temperature=0.0, min_new_tokens=2)


def test_settings_given_take_the_place_of_the_configurations() -> None:
    found = policy(build("llama")).sample([[5, 6]], 3, torch.Generator().manual_seed(0), SamplingSettings(2, 0.0))
    assert len({tuple(c.ids) for c in found}) == 1
    assert len(found[0].ids) <= 2


@pytest.mark.parametrize(("asked", "rows"), [(None, 1024), (3, 3)])
def test_rows_of_a_decode_step_are_as_asked_or_as_memory_suggests(asked: int | None, rows: int) -> None:
    sampler = policy(build("llama"), max_rows_per_decode=asked).sampler
    assert isinstance(sampler, Sampler)
    assert sampler.max_rows == rows
