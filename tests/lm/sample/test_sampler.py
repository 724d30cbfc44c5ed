"""Sampling, against the library's own generation and against the softmax of the plain model."""

import math

import pytest
import torch
from architectures import (
    EOS,
    PACKED,
    PAD,
    PLAIN,
    VOCABULARY,
    as_samples,
    build,
    make_log_probs,
    naive_log_probs,
    random_ids,
)
from torch import Tensor

from grouprl.errors import UsageError
from grouprl.lm.packed.backbone import Backbone
from grouprl.lm.packed.low_precision import LowPrecision
from grouprl.lm.packed.packing import Group
from grouprl.lm.sample.draw import SamplingSettings
from grouprl.lm.sample.plain import PlainSampler
from grouprl.lm.sample.rows import Completion
from grouprl.lm.sample.sampler import Sampler

NEVER = 10**6
"""An end of sequence that no model says."""


def packed(model, ends=(EOS,), *, dtype=torch.float32, **options) -> Sampler:
    return Sampler(Backbone(model), LowPrecision(model, dtype), ends, **options)


def plain(model, ends=(EOS,)) -> PlainSampler:
    return PlainSampler(model, torch.float32, ends, PAD)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = seeded(7)
    return [random_ids(n, generator) for n in lengths]


def ids_of(completions: list[Completion]) -> list[list[int]]:
    return [c.ids for c in completions]


PROMPTS = prompts_of(5, 1, 9, 3)


# --- greedy -----------------------------------------------------------------------------------------------------------


def generated(model, prompt: list[int], n: int) -> list[int]:
    """What transformers' generate continues with, one prompt at a time."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n, eos_token_id=EOS,
        pad_token_id=PAD,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", PACKED)
def test_the_likeliest_tokens_are_those_of_generate(name: str) -> None:
    model = build(name)
    found = packed(model).sample(PROMPTS, 1, SamplingSettings(10, temperature=0.0), seeded())
    assert ids_of(found) == [generated(model, prompt, 10) for prompt in PROMPTS]


@pytest.mark.parametrize("name", PLAIN)
def test_the_plain_sampler_agrees_with_generate_one_prompt_at_a_time(name: str) -> None:
    model = build(name)
    found = plain(model).sample(PROMPTS, 2, SamplingSettings(6, temperature=0.0), seeded())
    assert ids_of(found) == [generated(model, prompt, 6) for prompt in PROMPTS for _ in range(2)]


def test_every_completion_of_a_group_is_the_same_if_greedy() -> None:
    found = packed(build("mistral")).sample(PROMPTS, 3, SamplingSettings(8, temperature=0.0), seeded())
    assert all(ids_of(found)[i] == ids_of(found)[i - i % 3] for i in range(12))


@pytest.mark.parametrize("max_rows", [1, 2, 5, 6, 8])
def test_how_many_rows_share_a_step_does_not_matter(max_rows: int) -> None:
    model = build("gemma3")
    how = SamplingSettings(8, temperature=0.0)
    together = packed(model).sample(PROMPTS, 2, how, seeded())
    found = packed(model, max_rows=max_rows).sample(PROMPTS, 2, how, seeded())
    assert ids_of(found) == ids_of(together)
    for a, b in zip(found, together, strict=True):
        torch.testing.assert_close(a.logp, b.logp, rtol=0, atol=1e-5)


def test_a_cache_that_has_to_grow_keeps_what_it_holds() -> None:
    model = build("llama", max_position_embeddings=128)
    how = SamplingSettings(80, temperature=0.0, min_new_tokens=80)  # more than twice the room a cache begins with
    (found,) = packed(model).sample(prompts_of(3), 1, how, seeded())
    wanted = model.generate(
        input_ids=torch.tensor(prompts_of(3)), do_sample=False, max_new_tokens=80, min_new_tokens=80, pad_token_id=PAD
    )
    assert found.ids == wanted[0, 3:].tolist()


# --- the distribution -------------------------------------------------------------------------------------------------


def chi_square_bound(cells: int) -> float:
    """What chi-square with cells - 1 degrees of freedom exceeds once in 1000 times (Wilson and Hilferty)."""
    n = cells - 1
    return n * (1 - 2 / (9 * n) + 3.09 * math.sqrt(2 / (9 * n))) ** 3


@pytest.mark.parametrize("kind", [packed, plain])
def test_pairs_of_tokens_come_as_often_as_the_softmax_says(kind) -> None:
    model = build("qwen2", vocab_size=9, pad_token_id=3)
    n, prompt = 4000, [4, 5, 6]
    found = kind(model, (NEVER,)).sample([prompt], n, SamplingSettings(2), seeded(3))
    count = torch.zeros(9, 9)
    for c in found:
        count[c.ids[0], c.ids[1]] += 1
    with torch.no_grad():
        pairs = [[a, b] for a in range(9) for b in range(9)]
        expected = n * torch.stack([naive_log_probs(model, prompt, pair).sum() for pair in pairs]).exp().view(9, 9)
    assert float(expected.sum()) == pytest.approx(n, rel=1e-4)
    common = expected >= 5
    observed = torch.cat([count[common], count[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    assert len(wanted) > 15
    assert float(((observed - wanted).square() / wanted).sum()) < chi_square_bound(len(wanted))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "opt"])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_recorded_log_probabilities_are_those_of_the_learner_and_of_the_plain_model(name, temperature) -> None:
    model = build(name)
    found = packed(model).sample(PROMPTS, 3, SamplingSettings(9, temperature=temperature), seeded())
    groups = [Group(p, ids_of(found)[3 * i : 3 * i + 3]) for i, p in enumerate(PROMPTS)]
    recorded = torch.cat([c.logp for c in found])
    prompts, completions, group, lengths = as_samples(groups)
    log_probs = make_log_probs(model, temperature=temperature)
    by_learner = log_probs.without_gradient(log_probs.micro_batches(prompts, completions, group), lengths)
    torch.testing.assert_close(recorded, by_learner, rtol=0, atol=1e-4)
    with torch.no_grad():
        by_hand = [naive_log_probs(model, g.prompt, c, temperature) for g in groups for c in g.completions]
    torch.testing.assert_close(recorded, torch.cat(by_hand), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", *PLAIN])
def test_the_plain_sampler_records_the_log_probabilities_of_the_plain_model(name: str) -> None:
    model = build(name)
    found = plain(model).sample(PROMPTS, 2, SamplingSettings(5, temperature=0.6), seeded())
    with torch.no_grad():
        by_hand = [naive_log_probs(model, PROMPTS[i // 2], c.ids, 0.6) for i, c in enumerate(found)]
    torch.testing.assert_close(torch.cat([c.logp for c in found]), torch.cat(by_hand), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", [packed, plain])
@pytest.mark.parametrize(
    "how",
    [
        {"top_k": 3},
        {"top_p": 0.6},
        {"min_p": 0.3},
        {"repetition_penalty": 1.8},
        {"top_k": 9, "repetition_penalty": 2.0},
    ],
)
def test_recorded_log_probabilities_are_those_of_what_was_drawn_from(kind, how: dict) -> None:
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        RepetitionPenaltyLogitsProcessor,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    processors = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    model = build("llama")
    found = kind(model, (NEVER,)).sample(PROMPTS, 2, SamplingSettings(6, temperature=0.8, **how), seeded())
    for i, completion in enumerate(found):
        for t, token in enumerate(completion.ids):
            ids = torch.tensor([[*PROMPTS[i // 2], *completion.ids[:t]]])
            with torch.no_grad():
                logits = model(input_ids=ids).logits[:, -1]
            logits = RepetitionPenaltyLogitsProcessor(how.get("repetition_penalty", 1.0))(ids, logits) / 0.8
            for name in [name for name in processors if name in how]:
                logits = processors[name](how[name])(ids, logits)
            assert float(completion.logp[t]) == pytest.approx(float(logits.log_softmax(-1)[0, token]), abs=1e-4)


# --- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [packed, plain])
@pytest.mark.parametrize("ends", [(EOS,), (EOS, 50, 60), tuple(range(40))])
def test_a_completion_ends_with_its_first_end_of_sequence(kind, ends: tuple[int, ...]) -> None:
    model = build("llama")
    found = kind(model, ends).sample(PROMPTS, 8, SamplingSettings(12, temperature=1.5), seeded())
    assert len(found) == 32
    for c in found:
        assert c.finished is (c.ids[-1] in ends)
        assert not set(c.ids[:-1]) & set(ends)
        assert len(c.ids) == 12 or c.finished
        assert c.logp.shape == (len(c.ids),)
    assert any(c.finished for c in found)


def test_one_that_ends_with_the_last_token_allowed_is_finished() -> None:
    def at_the_last(logits: Tensor, rows: Tensor, step: int) -> Tensor:
        only = torch.full_like(logits, -math.inf)
        only[:, EOS if step == 3 else 10] = 0.0
        return only

    found = packed(build("llama")).sample(PROMPTS, 2, SamplingSettings(4), seeded(), at_the_last)
    assert ids_of(found) == [[10, 10, 10, EOS]] * 8
    assert all(c.finished for c in found)


@pytest.mark.parametrize("kind", [packed, plain])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_no_completion_ends_before_the_least_length(kind, temperature: float) -> None:
    ends = tuple(range(90))  # 90 of 97 tokens end it
    how = SamplingSettings(9, temperature=temperature, min_new_tokens=4)
    found = kind(build("llama"), ends).sample(PROMPTS, 4, how, seeded())
    assert min(len(c.ids) for c in found) >= 5
    assert any(len(c.ids) == 5 for c in found)
    assert all(token not in ends for c in found for token in c.ids[:4])


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_rows_that_leave_change_nothing_for_those_that_stay(name: str) -> None:
    """The same draws where nothing ends: each completion is a beginning of its unending counterpart."""
    model = build(name)
    ends = tuple(range(0, VOCABULARY, 9))
    how = SamplingSettings(20, temperature=1.4)
    found = packed(model, ends).sample(PROMPTS, 6, how, seeded(2))
    unending = packed(model, (NEVER,)).sample(PROMPTS, 6, how, seeded(2))
    lengths = [len(c.ids) for c in found]
    assert len(set(lengths)) > 5  # rows left one after the other
    ends_of_groups = [max(lengths[6 * i : 6 * i + 6]) for i in range(4)]
    assert min(ends_of_groups) < max(ends_of_groups)  # a whole group left before the others
    for c, more in zip(found, unending, strict=True):
        assert c.ids == more.ids[: len(c.ids)]
        torch.testing.assert_close(c.logp, more.logp[: len(c.ids)], rtol=0, atol=1e-5)
        assert not set(more.ids[: len(c.ids) - 1]) & set(ends)


# --- randomness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [packed, plain])
def test_the_generator_alone_decides_the_draws(kind) -> None:
    sampler = kind(build("llama"))
    how = SamplingSettings(6)
    generator = seeded(1)
    torch.manual_seed(1)
    first = ids_of(sampler.sample(PROMPTS, 2, how, generator))
    second = ids_of(sampler.sample(PROMPTS, 2, how, generator))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert ids_of(sampler.sample(PROMPTS, 2, how, seeded(1))) == first != second
    assert torch.equal(torch.get_rng_state(), state)


def test_completions_of_a_group_differ() -> None:
    found = packed(build("llama")).sample([PROMPTS[0]] * 2, 8, SamplingSettings(8), seeded())
    assert len({tuple(ids) for ids in ids_of(found)}) == 16


# --- adjusting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_rows", [256, 4])
def test_logits_can_be_adjusted_completion_by_completion(max_rows: int) -> None:
    """Completion i is told to say 10 + i, and i of them before it ends."""
    asked = []

    def adjust(logits: Tensor, rows: Tensor, step: Tensor) -> Tensor:
        asked.append((rows.tolist(), int(step)))
        said = torch.where(rows == step, EOS, 10 + rows)
        return torch.full_like(logits, -math.inf).scatter_(1, said[:, None], 0.0)

    found = packed(build("llama"), max_rows=max_rows).sample(PROMPTS, 2, SamplingSettings(20), seeded(), adjust)
    assert ids_of(found) == [[10 + i] * i + [EOS] for i in range(8)]
    assert all(c.finished for c in found)
    assert torch.cat([c.logp for c in found]).tolist() == [0.0] * sum(range(1, 9))
    for rows, step in asked:
        assert all(row >= step for row in rows)  # asked for running completions alone


def test_the_plain_sampler_refuses_to_adjust() -> None:
    with pytest.raises(UsageError, match="cannot adjust"):
        plain(build("llama")).sample(PROMPTS, 1, SamplingSettings(2), seeded(), lambda logits, rows, step: logits)


# --- what a checkpoint says of sampling -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": 0.01}, {"top_k": 1}, {"top_p": 0.01}, {"min_p": 0.99}, {"repetition_penalty": 9.0},
        {"min_new_tokens": 4},
        {"typical_p": 0.1}, {"epsilon_cutoff": 0.2}, {"no_repeat_ngram_size": 1},
        {"suppress_tokens": list(range(10, 90))}, {"num_beams": 2},
    ],
)  # fmt: skip
def test_nothing_is_taken_from_the_generation_config_of_a_checkpoint(setting: dict) -> None:
    how = SamplingSettings(4, temperature=2.0)
    model = build("bloom")
    wanted = ids_of(plain(model).sample(PROMPTS, 8, how, seeded()))
    model.generation_config.update(**setting)
    assert ids_of(plain(model).sample(PROMPTS, 8, how, seeded())) == wanted


# --- the model's mode and precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [packed, plain])
@pytest.mark.parametrize("training", [False, True])
def test_sampling_runs_without_dropout_and_leaves_the_mode_as_it_was(kind, training: bool) -> None:
    model = build("gpt2")  # its dropout is 0.1
    wanted = kind(model).sample(PROMPTS, 2, SamplingSettings(6), seeded())
    model.train(training)
    found = kind(model).sample(PROMPTS, 2, SamplingSettings(6), seeded())
    assert ids_of(found) == ids_of(wanted)
    assert model.training is training
    assert model.config._attn_implementation == "eager"
    assert not any("forward" in vars(module) for module in model.modules())


def test_in_bfloat16_recorded_log_probabilities_are_near_those_of_the_learner() -> None:
    model = build("llama")
    found = packed(model, dtype=torch.bfloat16).sample(PROMPTS, 4, SamplingSettings(8), seeded())
    groups = [Group(p, ids_of(found)[4 * i : 4 * i + 4]) for i, p in enumerate(PROMPTS)]
    prompts, completions, group, lengths = as_samples(groups)
    log_probs = make_log_probs(model, dtype=torch.bfloat16)
    by_learner = log_probs.without_gradient(log_probs.micro_batches(prompts, completions, group), lengths)
    difference = (torch.cat([c.logp for c in found]) - by_learner).abs()
    assert float(difference.mean()) < 0.03
    assert all(0 <= token < VOCABULARY for ids in ids_of(found) for token in ids)


def test_prompts_are_read_in_batches_of_bounded_rows_and_tokens(monkeypatch) -> None:
    monkeypatch.setattr("grouprl.lm.sample.sampler.PROMPT_TOKENS", 10)
    sampler = packed(build("llama"), max_rows=6)
    assert list(sampler._batches([4, 4, 4, 30, 1, 1, 1, 1], 2)) == [(0, 2), (2, 3), (3, 4), (4, 7), (7, 8)]
    assert list(sampler._batches([], 2)) == []
    greedily = SamplingSettings(5, temperature=0.0)
    together = packed(build("llama")).sample(PROMPTS, 2, greedily, seeded())
    assert ids_of(sampler.sample(PROMPTS, 2, greedily, seeded())) == ids_of(together)
