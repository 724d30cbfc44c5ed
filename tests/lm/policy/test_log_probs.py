"""Log-probabilities and gradients of packed groups, against one sequence after the other through the library's model.

The bounds are 20 times what rounding to float32 makes of these models; both computations have that rounding.
"""

import pytest
import torch
from architectures import (
    EPISODES,
    MIXED,
    PACKED,
    PLAIN,
    as_samples,
    build,
    learned,
    make,
    make_log_probs,
    naive,
    naive_log_probs,
    random_episodes,
    random_groups,
    random_weights,
    relative_error,
    take_gradient,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from grouprl.errors import UsageError
from grouprl.lm.packed.low_precision import LowPrecision
from grouprl.lm.packed.packing import Group
from grouprl.lm.policy.log_probs import LogProbs, MicroBatch, steps_of


def assert_same(found: tuple, wanted: tuple, *, logp: float = 1e-4, gradient: float = 2e-5) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=logp)
    assert relative_error(found[1], wanted[1]) < gradient


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_log_probabilities_and_gradients_are_the_naive_ones(name: str, temperature: float) -> None:
    model, groups = build(name), random_groups(*MIXED)
    weights = random_weights(groups)
    wanted = naive(model, groups, weights, temperature)
    assert_same(learned(make_log_probs(model, temperature=temperature), groups, weights), wanted)


@pytest.mark.parametrize("name", PLAIN)
def test_plain_log_probabilities_and_gradients_are_the_naive_ones(name: str) -> None:
    model, groups = build(name), random_groups(*MIXED[:2])
    weights = random_weights(groups)
    wanted = naive(model, groups, weights, 0.7)
    assert_same(learned(make_log_probs(model, temperature=0.7, plain=True), groups, weights), wanted)


@pytest.mark.parametrize("name", PACKED + PLAIN)
def test_of_an_episode_the_turns_of_the_model_have_the_naive_numbers(name: str) -> None:
    model, groups = build(name), random_episodes(*EPISODES)
    weights = random_weights(groups)
    wanted = naive(model, groups, weights, 0.7)
    if name in PACKED:
        assert_same(learned(make_log_probs(model, temperature=0.7), groups, weights), wanted)
    assert_same(learned(make_log_probs(model, temperature=0.7, plain=True), groups, weights), wanted)


def test_a_turn_that_is_the_whole_completion_changes_no_bit() -> None:
    model, groups = build("llama"), random_groups(*MIXED)
    weights = random_weights(groups)
    as_turns = [Group(g.prompt, g.completions, [[(0, len(c))] for c in g.completions]) for g in groups]
    for plain in (False, True):
        found, wanted = (learned(make_log_probs(model, plain=plain), g, weights) for g in (as_turns, groups))
        assert torch.equal(found[0], wanted[0])
        assert all(torch.equal(found[1][name], wanted[1][name]) for name in wanted[1])


@pytest.mark.parametrize("budget", [1, 9, 14, 10**9])
def test_how_episodes_are_divided_into_parts_does_not_matter(budget: int) -> None:
    """A budget counts the tokens of the partner too, which take as much memory in every layer."""
    model, groups = build("gemma3"), random_episodes(*EPISODES)
    weights = random_weights(groups)
    log_probs = make_log_probs(model, budget=budget)
    parts = log_probs.micro_batches(*as_samples(groups)[:3], [g.spans(j) for g in groups for j in range(len(g.turns))])
    assert sorted(torch.cat([part.samples for part in parts]).tolist()) == list(range(6))
    assert all(sum(g.n_inputs for g in part.groups) <= max(budget, 14) for part in parts)
    found = learned(log_probs, groups, weights)
    assert_same(found, learned(make_log_probs(model), groups, weights), logp=2e-5, gradient=5e-6)


def test_the_entropy_of_an_episode_is_that_of_the_turns_of_the_model() -> None:
    model, groups = build("llama"), random_episodes(*EPISODES[:1])
    (group,) = groups
    n = len(random_weights(groups))
    for plain in (False, True):
        log_probs = make_log_probs(model, plain=plain)
        with log_probs.learning():
            entropy = log_probs.evaluate(MicroBatch(groups, torch.arange(3))).entropy
        wanted = []
        for spans, completion in zip(group.turns, group.completions, strict=True):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*group.prompt, *completion]])).logits[
                    0, len(group.prompt) - 1 :
                ]
            every = torch.distributions.Categorical(logits=logits).entropy()
            wanted += [every[start:stop] for start, stop in spans]
        assert len(entropy) == n
        torch.testing.assert_close(entropy, torch.cat(wanted), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma3"])
@pytest.mark.parametrize("shape", [((3, (1,)),), ((1, (1, 1)),), ((4, (2, 1)), (6, (1,)))])
def test_completions_of_one_token_have_the_naive_numbers(name: str, shape: tuple) -> None:
    model, groups = build(name), random_groups(*shape)
    weights = random_weights(groups)
    wanted = naive(model, groups, weights)
    assert_same(learned(make_log_probs(model), groups, weights), wanted)


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gpt2",
    ],
)
def test_one_group_alone_has_the_naive_numbers(name: str) -> None:
    model, groups = build(name), random_groups((5, (4, 1, 7)))
    weights = random_weights(groups)
    assert_same(learned(make_log_probs(model), groups, weights), naive(model, groups, weights))


def test_the_entropy_is_that_of_the_whole_distribution() -> None:
    model, (group,) = build("llama"), random_groups((5, (4, 1, 7)))
    log_probs = make_log_probs(model, temperature=0.7)
    with log_probs.learning():
        entropy = log_probs.evaluate(MicroBatch([group], torch.arange(3))).entropy
    wanted = []
    for completion in group.completions:
        ids = torch.tensor([[*group.prompt, *completion]])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(group.prompt) - 1 : -1] / 0.7
        wanted.append(torch.distributions.Categorical(logits=logits).entropy())
    torch.testing.assert_close(entropy, torch.cat(wanted), rtol=0, atol=1e-5)


def test_evaluating_outside_of_learning_is_refused() -> None:
    log_probs = make_log_probs(build("llama"))
    part = MicroBatch(list(random_groups((5, (4, 1)))), torch.arange(2))
    with log_probs.learning():
        log_probs.evaluate(part)
    with pytest.raises(UsageError, match="within learning"):
        log_probs.evaluate(part)


# --- what must not matter ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma():
    model, groups = build("gemma3"), random_groups(*MIXED)
    weights = random_weights(groups)
    return model, groups, weights, learned(make_log_probs(model), groups, weights)


@pytest.mark.parametrize("budget", [1, 7, 12, 20, 10**9])
def test_the_sum_over_parts_does_not_depend_on_the_budget(gemma, budget: int) -> None:
    model, groups, weights, wanted = gemma
    log_probs = make_log_probs(model, budget=budget)
    n_parts = len(log_probs.micro_batches(*as_samples(groups)[:3]))
    assert n_parts == 1 if budget == 10**9 else n_parts > 1
    assert_same(learned(log_probs, groups, weights), wanted, logp=2e-5, gradient=5e-6)


@settings(deadline=None, max_examples=10)
@given(order=st.permutations(range(len(MIXED))))
def test_the_order_of_the_groups_does_not_matter(gemma, order: list[int]) -> None:
    model, groups, weights, wanted = gemma
    of_group = weights.split([sum(ns) for _, ns in MIXED])
    logp, gradient = learned(make_log_probs(model), [groups[i] for i in order], torch.cat([of_group[i] for i in order]))
    expected = wanted[0].split([sum(ns) for _, ns in MIXED])
    assert_same((logp, gradient), (torch.cat([expected[i] for i in order]), wanted[1]), logp=2e-5, gradient=5e-6)


def test_what_else_is_in_the_pack_does_not_matter(gemma) -> None:
    model, groups, _, (logp, _) = gemma
    for group, expected in zip(groups, logp.split([sum(ns) for _, ns in MIXED]), strict=True):
        prompts, completions, index, lengths = as_samples([group])
        log_probs = make_log_probs(model)
        found = log_probs.without_gradient(log_probs.micro_batches(prompts, completions, index), lengths)
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_whether_the_prompt_is_shared_does_not_matter(gemma) -> None:
    model, groups, weights, wanted = gemma
    alone = [Group(g.prompt, [c]) for g in groups for c in g.completions]
    assert_same(learned(make_log_probs(model), alone, weights), wanted, logp=2e-5, gradient=5e-6)


def test_samples_of_a_prompt_need_not_be_neighbours(gemma) -> None:
    model, groups, _, (logp, _) = gemma
    prompts, completions, index, lengths = as_samples(groups)
    order = torch.randperm(len(completions), generator=torch.Generator().manual_seed(0)).tolist()
    log_probs = make_log_probs(model, budget=20)
    parts = log_probs.micro_batches(prompts, [completions[i] for i in order], [index[i] for i in order])
    assert sorted(torch.cat([part.samples for part in parts]).tolist()) == list(range(len(completions)))
    found = log_probs.without_gradient(parts, lengths[order])
    torch.testing.assert_close(found, logp[steps_of(torch.tensor(order), lengths)], rtol=0, atol=2e-5)


def test_log_probabilities_of_samples_outside_the_parts_are_0(gemma) -> None:
    model, groups, _, (logp, _) = gemma
    prompts, completions, index, lengths = as_samples(groups)
    log_probs = make_log_probs(model, budget=12)
    part = log_probs.micro_batches(prompts, completions, index)[0]
    found = log_probs.without_gradient([part], lengths)
    chosen = steps_of(part.samples, lengths)
    torch.testing.assert_close(found[chosen], logp[chosen], rtol=0, atol=2e-5)
    found[chosen] = 0.0
    assert not found.any()


def test_the_steps_of_samples_lie_where_their_lengths_say() -> None:
    lengths = torch.tensor([2, 3, 1])
    assert steps_of(torch.tensor([2, 0]), lengths).tolist() == [5, 0, 1]
    assert steps_of(torch.tensor([1]), lengths).tolist() == [2, 3, 4]
    assert steps_of(torch.tensor([], dtype=torch.int64), lengths).tolist() == []


# --- precision --------------------------------------------------------------------------------------------------------


def test_low_precision_is_no_less_exact_than_autocast() -> None:
    from transformers import LlamaConfig

    model = make(
        LlamaConfig(
            vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=4, tie_word_embeddings=True,
        )
    )  # fmt: skip
    groups = random_groups((12, (20, 9, 30)), (5, (16, 24)), (20, (12,)))
    weights = random_weights(groups)
    logp, gradient = naive(model, groups, weights)
    with torch.autocast("cpu", torch.bfloat16):
        parts = [naive_log_probs(model, g.prompt, c) for g in groups for c in g.completions]
    (weights * torch.cat(parts)).sum().backward()
    autocast_logp, autocast_gradient = torch.cat(parts).detach(), take_gradient(model)
    our_logp, our_gradient = learned(make_log_probs(model, dtype=torch.bfloat16), groups, weights)
    autocast_error = relative_error(autocast_gradient, gradient)
    assert 1e-3 < autocast_error < 0.2  # there is something to compare with
    assert relative_error(our_gradient, gradient) <= 1.25 * autocast_error
    assert float((our_logp - logp).norm()) <= 1.25 * float((autocast_logp - logp).norm())


# --- the model's mode -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_learning_restores_the_mode_and_the_forwards_after_an_exception_too(plain: bool, training: bool) -> None:
    model = build("gpt2").train(training)
    log_probs = make_log_probs(model, plain=plain)

    def halt() -> None:
        assert not model.training
        raise RuntimeError("halt")

    with pytest.raises(RuntimeError, match="halt"), log_probs.learning():
        halt()
    assert all(module.training is training for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    assert model.config._attn_implementation == "eager"


def test_dropout_layers_are_at_rest_unless_asked_for() -> None:
    model, groups = build("gpt2", attn_pdrop=0.0), random_groups(*MIXED)  # its other dropout is 0.1
    weights = random_weights(groups)
    log_probs = make_log_probs(model)
    first = learned(log_probs, groups, weights)[0]
    assert torch.equal(learned(log_probs, groups, weights)[0], first)
    awake = LogProbs(model, log_probs.backbone, LowPrecision(model, torch.float32), 1.0, 10**9, dropout=True)
    assert float((learned(awake, groups, weights)[0] - first).abs().max()) > 0.05


def test_attention_dropout_is_refused_by_packed_attention() -> None:
    model, groups = build("gpt2"), random_groups(*MIXED)
    backbone = make_log_probs(model).backbone
    awake = LogProbs(model, backbone, LowPrecision(model, torch.float32), 1.0, 10**9, dropout=True)
    with pytest.raises(UsageError, match="leave disable_dropout on"):
        learned(awake, groups, random_weights(groups))


@pytest.mark.parametrize(
    ("name", "changes", "plain"),
    [
        ("opt", {"dropout": 0.1}, False),
        ("gpt2", {}, True),
        ("llama", {"attention_dropout": 0.1}, True),
        ("llama", {"attention_dropout": 0.1}, False),
        ("phi", {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attention_dropout": 0.1}, False),
    ],
)
def test_no_dropout_of_the_model_is_left_active(name: str, changes: dict, plain: bool) -> None:
    model, groups = build(name, **changes), random_groups(*MIXED)
    weights = random_weights(groups)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        assert_same(learned(make_log_probs(model, plain=plain), groups, weights), naive(model, groups, weights))


@pytest.mark.parametrize("name", ["llama", "gemma3", "phi"])
def test_gradient_checkpointing_changes_no_number(name: str) -> None:
    model, groups = build(name), random_groups(*MIXED)
    weights = random_weights(groups)
    wanted = learned(make_log_probs(model), groups, weights)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    passes = []
    handle = model.get_decoder().layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
    log_probs = make_log_probs(model, budget=20)
    found = learned(log_probs, groups, weights)
    handle.remove()
    assert len(passes) == 2 * len(log_probs.micro_batches(*as_samples(groups)[:3]))  # everything was run again
    assert_same(found, wanted, logp=2e-5, gradient=5e-6)
