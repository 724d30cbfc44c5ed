"""One optimizer step: its gradient is that of the objective written out by hand, however it is computed."""

import copy
import math
from typing import Any

import pytest
import torch
from architectures import (
    MIXED,
    build,
    naive_log_probs,
    of_turns,
    random_groups,
    relative_error,
    take_gradient,
)
from played import CONTEXTS, PLAYED, SPANS, episodes
from small_policies import adapted, policy
from test_loss import by_formula
from torch import Tensor, nn

from grouprl.errors import TrainingError
from grouprl.learning.parameters import TrainedParameters
from grouprl.lm.generate.samples import Samples
from grouprl.lm.learn.metrics import StepSums
from grouprl.lm.learn.optimizer import make_optimizer
from grouprl.lm.learn.step import Mismatch, Step, optimizer_step, step_weights
from grouprl.lm.policy.policy import Policy
from grouprl.lm.prompts import Prompt
from grouprl.lm.settings.config import GRPOConfig
from grouprl.objective import Objective, sampler_correction, surrogates
from grouprl.objective.packed import last_index

GROUPS = random_groups(*MIXED)
COMPLETIONS = [c for g in GROUPS for c in g.completions]
LENGTHS = torch.tensor([len(c) for c in COMPLETIONS])
N, S = len(LENGTHS), int(LENGTHS.sum())
ADVANTAGES = torch.tensor([1.2, 0.0, -0.8, 0.5, 0.0, 0.0, -1.5, 0.7, 0.3, -0.3])
ALL = torch.arange(N)


def samples(advantages: Tensor = ADVANTAGES, finished: Tensor | None = None) -> Samples:
    """What a generation of GROUPS could have yielded."""
    return Samples(
        prompts=[Prompt(i, "", {}, tuple(g.prompt)) for i, g in enumerate(GROUPS)],
        group=torch.tensor([i for i, g in enumerate(GROUPS) for _ in g.completions]),
        completions=[list(c) for c in COMPLETIONS],
        finished=torch.ones(N).bool() if finished is None else finished,
        logp_sampled=torch.zeros(S), texts=[""] * N, rewards=torch.zeros(N, 1), returns=torch.zeros(N),
        advantages=torch.repeat_interleave(advantages, LENGTHS), logp_old=torch.zeros(S), logp_ref=torch.zeros(S),
        known_old=torch.zeros(S).bool(), known_ref=torch.zeros(S).bool(),
    )  # fmt: skip


CLIP = [f"clip_ratio/{name}" for name in ("low_mean", "low_min", "high_mean", "high_max", "region_mean")]


class Run:
    """A policy with its parameters and optimizer."""

    def __init__(self, model, ref_model=None, **settings) -> None:
        self.parameters = TrainedParameters(model)
        self._writing = self.parameters.written_in_place()
        self._writing.__enter__()
        self.policy: Policy = policy(model, ref_model, **{"learning_rate": 1e-2, **settings})
        self.config: GRPOConfig = self.policy.config
        self.optimizer = make_optimizer(self.parameters, self.config)
        self.model = model

    def step(self, of: Samples, chosen: Tensor = ALL) -> Step:
        return Step(self.policy, of, chosen, self.config, Objective.of(self.config))

    def gradient(self, step: Step, *, remember: bool = False) -> dict[str, Tensor]:
        self.parameters.start()
        for _ in step.gradients(StepSums(), Mismatch(), remember=remember):
            pass
        self.parameters.finish()
        return {name: p.grad.clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def take(self, step: Step, *, remember: bool = False) -> dict[str, float]:
        return optimizer_step(step, self.parameters, self.optimizer, remember=remember, on_gradient=lambda: None)

    def perturb(self) -> None:
        """As if some steps had been taken."""
        noise = torch.randn(self.parameters.size, generator=torch.Generator().manual_seed(9))
        self.parameters.load(self.parameters.values() + 0.02 * noise)


@torch.no_grad()
def naive_values(model: nn.Module, temperature: float = 1.0) -> Tensor:
    return torch.cat([naive_log_probs(model, g.prompt, c, temperature) for g in GROUPS for c in g.completions])


def naive_gradient(
    model, config: GRPOConfig, of: Samples, old: Tensor, ref: Tensor | None, counted: Tensor | None = None
) -> dict[str, Tensor]:
    """The gradient of the objective: all samples, one after the other, through the library's model and autograd."""
    copied = copy.deepcopy(model).eval()
    copied.gradient_checkpointing_disable()
    logp = torch.cat([naive_log_probs(copied, g.prompt, c, config.temperature) for g in GROUPS for c in g.completions])
    weights = step_weights(Objective.of(config), LENGTHS, torch.ones(N).bool() if counted is None else counted)
    sampled = of.logp_sampled.double() if of.sampled_elsewhere else None
    by_formula(config, logp, old, ref, of.advantages, weights, LENGTHS.tolist(), sampled=sampled).backward()
    return take_gradient(copied)


SETTINGS = [
    {},
    {"loss_type": "grpo", "epsilon": 0.05, "epsilon_high": 0.1},
    {"loss_type": "dr_grpo", "max_completion_length": 9, "delta": 1.5},
    {"loss_type": "cispo", "epsilon_high": 1.05},
    {"loss_type": "sapo", "temperature": 0.7},
    {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.02},
    {"loss_type": "vespo", "vespo_k_neg": 1.5},
    {"loss_type": "dppo_tv", "dppo_threshold": 0.01},
    {"loss_type": "dppo_kl", "dppo_threshold": 0.001, "beta": 0.1},
    {"loss_type": "spo", "epsilon": 0.05},
    {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 0.02, "temperature": 1.3},
    {"importance_sampling_level": "sequence_token", "beta": 0.2, "kl_estimator": "k1"},
    {"beta": 0.2, "temperature": 0.7},
    {"beta": 0.2, "kl_estimator": "k2", "loss_type": "cispo", "epsilon_high": 2.0, "off_policy_mask_threshold": 0.01},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_both_passes_over_a_generation_have_the_gradient_of_the_objective(settings: dict) -> None:
    """The first is on-policy and remembers; the second comes after the model has moved."""
    reference = build("llama", seed=1)
    run, of = Run(build("llama"), reference if settings.get("beta") else None, **settings), samples()
    old = naive_values(run.model, run.config.temperature)
    ref = naive_values(reference, run.config.temperature) if settings.get("beta") else None
    step = run.step(of)
    wanted = naive_gradient(run.model, run.config, of, old, ref)
    assert relative_error(run.gradient(step, remember=True), wanted) < 2e-5
    run.perturb()
    wanted = naive_gradient(run.model, run.config, of, old, ref)
    moved = (naive_values(run.model, run.config.temperature) - old).abs()
    assert float(moved.max()) > 0.2  # some ratios lie outside of any clip range
    assert relative_error(run.gradient(step), wanted) < 2e-5


def test_what_is_far_from_the_sampler_drops_out_from_the_first_pass_on() -> None:
    """Where another program sampled, it may be surer of its tokens than the policy is before the first step."""
    run, of = Run(build("llama"), off_policy_mask_threshold=0.5), samples()
    old = naive_values(run.model)
    for nats, kept in ((0.3, "all"), (3.0, "not those of negative advantage")):
        of.logp_sampled, of.sampled_elsewhere = (old + nats).float(), True
        found = run.gradient(run.step(of))
        wanted = samples(ADVANTAGES if kept == "all" else ADVANTAGES.clamp(min=0.0))
        assert relative_error(found, naive_gradient(run.model, policy_settings(run), wanted, old, None)) < 2e-5, kept
    of.sampled_elsewhere = False  # as with a sampler of one's own that leaves out unlikely tokens: nothing has moved
    assert relative_error(run.gradient(run.step(of)), naive_gradient(run.model, run.config, of, old, None)) < 2e-5


def policy_settings(run: Run) -> GRPOConfig:
    """The settings of a run without the mask."""
    return run.config.replace(off_policy_mask_threshold=None)


@pytest.mark.parametrize("budget", [1, 8, 20])
@pytest.mark.parametrize("settings", [{"beta": 0.1}, {"importance_sampling_level": "sequence"}])
def test_the_gradient_and_the_metrics_do_not_depend_on_the_micro_batches(budget: int, settings: dict) -> None:
    whole, divided = (Run(build("llama"), tokens_per_micro_batch=n, **settings) for n in (10**6, budget))
    steps = [run.step(samples()) for run in (whole, divided)]
    assert len(steps[0].micro_batches) == 1 < len(steps[1].micro_batches)
    for remember in (True, False):
        gradients = [run.gradient(s, remember=remember) for run, s in zip((whole, divided), steps, strict=True)]
        assert relative_error(gradients[1], gradients[0]) < 1e-5
        for run in (whole, divided):
            run.perturb()
    metrics = [run.take(s) for run, s in zip((whole, divided), steps, strict=True)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-3, abs=1e-5)


def test_plain_attention_has_the_same_gradient() -> None:
    gradients = [Run(build("llama"), attention=how, beta=0.1) for how in ("auto", "plain")]
    found = [run.gradient(run.step(samples())) for run in gradients]
    assert relative_error(found[1], found[0]) < 1e-5


# --- what is left out -------------------------------------------------------------------------------------------------


def test_samples_of_advantage_0_get_no_pass_and_change_no_gradient() -> None:
    skipping, complete = (Run(build("llama"), skip_zero_advantage=skip) for skip in (True, False))
    of = samples()
    step = skipping.step(of)
    assert sorted(torch.cat([part.samples for part in step.micro_batches]).tolist()) == [0, 2, 3, 6, 7, 8, 9]
    full = complete.step(samples())
    assert sorted(torch.cat([part.samples for part in full.micro_batches]).tolist()) == ALL.tolist()
    assert relative_error(skipping.gradient(step), complete.gradient(full)) < 1e-6
    wanted = naive_gradient(skipping.model, skipping.config, of, naive_values(skipping.model), None)
    assert relative_error(skipping.gradient(step), wanted) < 1e-5


def test_samples_of_advantage_0_may_be_moved_by_a_loss_of_ones_own_and_so_are_not_left_out() -> None:
    run = Run(build("llama"))

    def own(logp: Tensor, logp_old: Tensor, advantages: Tensor) -> Tensor:
        ratio = (logp - logp_old).exp()
        return -ratio * advantages + 0.5 * (ratio - 1).square()

    step = Step(run.policy, samples(), ALL, run.config, Objective.of(run.config, own))
    assert sorted(step.active.tolist()) == ALL.tolist()


def test_samples_of_advantage_0_are_moved_by_a_divergence_in_the_loss_and_so_not_left_out() -> None:
    run = Run(build("llama"), beta=0.1)
    assert len(run.step(samples()).active) == N
    run = Run(build("llama"), beta=0.1, kl_in="reward")
    assert len(run.step(samples()).active) == 7


def test_truncated_samples_can_be_left_out_and_still_count_as_samples() -> None:
    counted = torch.arange(N) % 3 != 0
    for loss_type in ("grpo", "dapo", "dr_grpo"):
        run = Run(build("llama"), mask_truncated_completions=True, loss_type=loss_type)
        of = samples(ADVANTAGES + 0.1, counted)
        step = run.step(of)
        assert sorted(step.active.tolist()) == counted.nonzero()[:, 0].tolist()
        wanted = naive_gradient(run.model, run.config, of, naive_values(run.model), None, counted)
        assert relative_error(run.gradient(step), wanted) < 1e-5


@pytest.mark.parametrize(
    "of", [samples(torch.zeros(N)), samples(ADVANTAGES, torch.zeros(N).bool())], ids=["equal", "truncated"]
)
def test_a_step_with_nothing_to_learn_from_has_a_gradient_of_0(of: Samples) -> None:
    run = Run(build("llama"), mask_truncated_completions=True)
    before = run.parameters.values()
    run.parameters.gradient.fill_(7.0)
    step = run.step(of)
    step.remember_old()
    metrics = run.take(step, remember=True)
    assert (metrics["loss"], metrics["grad_norm"]) == (0.0, 0.0)
    assert torch.equal(run.parameters.values(), before)


# --- episodes of several turns ----------------------------------------------------------------------------------------


def of_episodes(model: nn.Module, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of the model's tokens: one masked pass over each sample."""
    completions = [c for g in PLAYED for c in g.completions]
    parts = zip(CONTEXTS, completions, SPANS, strict=True)
    return torch.cat([of_turns(naive_log_probs(model, p, c, temperature), spans) for p, c, spans in parts])


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"loss_type": "grpo", "epsilon": 0.05, "beta": 0.2},
        {"importance_sampling_level": "turn", "epsilon": 0.02, "temperature": 0.7},
        {"importance_sampling_level": "turn", "loss_type": "grpo", "epsilon": 0.02},
        {"importance_sampling_level": "sequence", "loss_type": "luspo", "epsilon": 0.02},
    ],
)
def test_a_step_on_episodes_has_the_gradient_of_the_objective(settings: dict, plain: bool) -> None:
    reference = build("llama", seed=1) if settings.get("beta") else None
    run = Run(build("llama"), reference, attention="plain" if plain else "auto", **settings)
    of, temperature = episodes(), run.config.temperature
    with torch.no_grad():
        old = of_episodes(run.model, temperature)
        ref = None if reference is None else of_episodes(reference, temperature)
    of_turn = [[stop - start for start, stop in spans] for spans in SPANS]
    lengths = [sum(ns) for ns in of_turn]
    step = run.step(of, torch.arange(6))
    assert run.gradient(step, remember=True)
    run.perturb()
    copied = copy.deepcopy(run.model).eval()
    if run.config.loss_type == "dapo":
        weights = torch.full((sum(lengths),), 1 / sum(lengths))
    else:  # the first two samples are one episode
        of_episode = torch.tensor([lengths[0] + lengths[1]] * 2 + lengths[2:])
        weights = torch.repeat_interleave(1 / (5 * of_episode), torch.tensor(lengths))
        if run.config.loss_type == "luspo":
            weights = torch.full((sum(lengths),), 1 / 5)
    logp = of_episodes(copied, temperature)
    by_formula(run.config, logp, old, ref, of.advantages, weights, lengths, of_turn).backward()
    assert relative_error(run.gradient(step), take_gradient(copied)) < 1e-5


def test_an_episode_that_was_cut_weighs_nothing_with_all_of_its_samples() -> None:
    run = Run(build("llama"), mask_truncated_completions=True, loss_type="grpo")
    step = run.step(episodes(torch.tensor([True, False, False, True, False])), torch.arange(6))
    lengths = episodes().lengths.tolist()
    wanted = [[0.0] * lengths[0], [0.0] * lengths[1], *([1 / (5 * n)] * n for n in lengths[2:])]
    wanted[4] = [0.0] * lengths[4]
    torch.testing.assert_close(step.weights, torch.tensor([w for part in wanted for w in part]))
    assert step.active.tolist() == [2, 3, 5]


def test_ratios_of_turns_are_counted_by_turns_and_those_of_tokens_by_the_tokens_of_the_model() -> None:
    counts = {}
    for level in ("token", "turn", "sequence"):
        run = Run(build("llama"), importance_sampling_level=level)
        counts[level] = run.step(episodes(), torch.arange(6)).n_ratios
    assert counts == {"token": int(episodes().lengths.sum()), "turn": sum(map(len, SPANS)), "sequence": 6}


def test_the_steps_of_a_generation_share_out_whole_episodes() -> None:
    assert [part.tolist() for part in episodes().steps(1)] == [[0, 1, 2, 3, 4, 5]]
    assert [part.tolist() for part in episodes().steps(5)] == [[0, 1], [2], [3], [4], [5]]


# --- several steps on one generation ----------------------------------------------------------------------------------


def test_the_steps_of_a_generation_share_out_its_samples_in_order() -> None:
    assert [part.tolist() for part in samples().steps(2)] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert [part.tolist() for part in samples().steps(5)] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def test_a_step_on_some_samples_has_the_weights_of_these_alone() -> None:
    run, of = Run(build("llama"), loss_type="grpo", epsilon=0.9), samples()
    chosen = torch.tensor([0, 2, 6, 7])
    step = run.step(of, chosen)
    weights = torch.zeros(N)
    weights[chosen] = 1 / (4 * LENGTHS[chosen])
    torch.testing.assert_close(step.weights, torch.repeat_interleave(weights, LENGTHS))
    copied = copy.deepcopy(run.model)
    logp = torch.cat([naive_log_probs(copied, g.prompt, c) for g in GROUPS for c in g.completions])
    (-(step.weights * of.advantages) * logp).sum().backward()
    assert relative_error(run.gradient(step), take_gradient(copied)) < 1e-5


@pytest.mark.parametrize("bf16", [False, True])
def test_remembered_log_probabilities_make_the_ratio_1_until_the_model_moves(bf16: bool, monkeypatch) -> None:
    ratios = []
    ratio = surrogates.ratio

    def spy(new: Tensor, old: Tensor) -> Tensor:
        ratios.append(ratio(new, old))
        return ratios[-1]

    run, of = Run(build("llama"), bf16=bf16, tokens_per_micro_batch=20), samples()
    first, second = (run.step(of, chosen) for chosen in (ALL[:5], ALL[5:]))
    second.remember_old()
    known = torch.repeat_interleave(torch.isin(ALL, second.active), LENGTHS)
    assert torch.equal(of.known_old, known)
    monkeypatch.setattr(surrogates, "ratio", spy)
    run.gradient(second)
    assert torch.cat(ratios).unique().tolist() == [1.0]
    run.take(first)
    ratios.clear()
    run.gradient(second)
    assert float((torch.cat(ratios) - 1).abs().max()) > 1e-3


def test_a_second_iteration_uses_the_log_probabilities_of_the_first() -> None:
    run, of = Run(build("llama")), samples(ADVANTAGES + 0.1)
    before = naive_values(run.model)
    step = run.step(of)
    first = run.take(step, remember=True)
    assert bool(of.known_old.all())
    torch.testing.assert_close(of.logp_old, before, rtol=0, atol=1e-5)
    assert first["sampling/sampling_logp_difference/max"] == pytest.approx(float(before.abs().max()), abs=1e-4)
    wanted = naive_gradient(run.model, run.config, of, before, None)
    assert relative_error(run.gradient(step), wanted) < 1e-5
    second = run.take(step, remember=True)
    assert second["clip_ratio/region_mean"] > 0 == first["clip_ratio/region_mean"]
    assert not any(name.startswith("sampling/") for name in second)


@pytest.mark.parametrize("known", [False, True], ids=["on policy", "old policy known"])
@pytest.mark.parametrize(
    ("mode", "low", "high"),
    [("token_truncate", None, 1.1), ("sequence_mask", 0.9, 1.1), ("sequence_truncate", 0.9, None)],
)
def test_what_another_program_sampled_is_weighed_by_how_likely_it_is_here(
    mode: Any, low: float | None, high: float | None, known: bool
) -> None:
    run, of = Run(build("llama")), samples(ADVANTAGES + 0.1)
    here = naive_values(run.model)
    of.logp_sampled = here - 0.1 * torch.randn(S, generator=torch.Generator().manual_seed(1))
    if known:
        of.remember_old(torch.arange(S), here)
    config = run.config.replace(
        use_vllm=True, vllm_importance_sampling_mode=mode, vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
    )  # fmt: skip
    step = Step(run.policy, of, ALL, config, Objective.of(config))
    found = run.gradient(step)
    weight = sampler_correction(here, of.logp_sampled, LENGTHS, mode, low, high)
    assert len(weight.unique()) > 2  # some are within the bounds
    of.advantages = of.advantages * weight
    assert relative_error(found, naive_gradient(run.model, run.config, of, here, None)) < 1e-5

    mismatch = Mismatch()
    for _ in step.gradients(StepSums(), mismatch, remember=False):
        pass
    ratios = weight if mode.startswith("token") else weight[last_index(LENGTHS)]
    apart = (here - of.logp_sampled).abs()
    assert mismatch.metrics() == pytest.approx({
        "sampling/sampling_logp_difference/mean": float(apart.mean()),
        "sampling/sampling_logp_difference/max": float(apart.max()),
        "sampling/importance_sampling_ratio/min": float(ratios.min()),
        "sampling/importance_sampling_ratio/mean": float(ratios.mean()),
        "sampling/importance_sampling_ratio/max": float(ratios.max()),
    }, abs=1e-4)  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"importance_sampling_level": "sequence"}, CLIP), ({"loss_type": "sapo"}, []),
        ({"loss_type": "cispo", "epsilon_high": 2.0}, ["cispo_clip_ratio"]),
    ],
)  # fmt: skip
def test_a_loss_has_the_clip_ratios_of_what_it_clips(settings: dict, names: list[str]) -> None:
    run, of = Run(build("llama"), **settings), samples(torch.zeros(N))
    assert [name for name in run.take(run.step(of)) if "clip" in name] == names


def test_a_third_iteration_uses_them_too() -> None:
    run, of = Run(build("llama")), samples(ADVANTAGES + 0.1)
    before = naive_values(run.model)
    step = run.step(of)
    for _ in range(2):
        run.take(step, remember=True)
    wanted = naive_gradient(run.model, run.config, of, before, None)
    assert relative_error(run.gradient(step, remember=True), wanted) < 1e-5


def test_without_remembering_every_pass_is_on_policy() -> None:
    run, of = Run(build("llama")), samples()
    step = run.step(of)
    run.take(step)
    assert not of.known_old.any()


# --- the divergence at the start --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_divergence_is_exactly_0_before_the_first_step(bf16: bool, lora: bool, estimator: str) -> None:
    model = adapted(build("llama")) if lora else build("llama")
    run, of = Run(model, beta=0.1, bf16=bf16, kl_estimator=estimator, tokens_per_micro_batch=30), samples()
    step = run.step(of)
    assert run.take(step)["kl"] == 0.0
    assert torch.equal(of.known_ref, torch.ones(S).bool())
    for _ in range(2):
        run.take(step)
    metrics = run.take(step)
    assert math.isfinite(metrics["kl"])
    assert metrics["kl"] != 0.0


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_divergence_is_logged_as_the_mean_of_its_estimates_over_tokens(estimator: str) -> None:
    reference = build("llama", seed=1)
    run = Run(build("llama"), reference, beta=0.1, kl_estimator=estimator, tokens_per_micro_batch=30)
    d = naive_values(run.model) - naive_values(reference)
    wanted = {"k1": d, "k2": d.square() / 2, "k3": (-d).exp() + d - 1}[estimator].mean()
    assert run.take(run.step(samples()))["kl"] == pytest.approx(float(wanted), rel=1e-4)


def test_the_divergence_is_logged_where_it_is_a_part_of_the_reward_too() -> None:
    run = Run(build("llama"), build("llama", seed=1), beta=0.1, kl_in="reward")
    assert run.take(run.step(samples())).get("kl") != 0.0


# --- taking the step --------------------------------------------------------------------------------------------------


def test_the_metrics_of_a_step_by_hand() -> None:
    run, of = Run(build("llama"), max_grad_norm=0.0), samples()
    with torch.no_grad():
        copied = copy.deepcopy(run.model)
    step = run.step(of)
    seen = []
    metrics = optimizer_step(
        step, run.parameters, run.optimizer, remember=False,
        on_gradient=lambda: seen.append(run.parameters.gradient.clone()),
    )  # fmt: skip
    # On-policy every ratio is 1: the loss is minus the weighted advantages.
    assert metrics["loss"] == pytest.approx(float(-(of.advantages / S).sum()), abs=1e-6)
    assert metrics["grad_norm"] == pytest.approx(float(seen[0].norm()), rel=1e-5)
    assert {name: value for name, value in metrics.items() if "clip" in name} == dict.fromkeys(CLIP, 0.0)
    entropies = []
    for i in step.active.tolist():
        prompt, completion = GROUPS[int(of.group[i])].prompt, COMPLETIONS[i]
        with torch.no_grad():
            logits = copied(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        entropies.append(torch.distributions.Categorical(logits=logits).entropy())
    assert metrics["entropy"] == pytest.approx(float(torch.cat(entropies).mean()), rel=1e-4)
    assert "kl" not in metrics


def test_the_gradient_is_clipped_to_the_bound_and_its_norm_is_that_of_before() -> None:
    norms = []
    run = Run(build("llama"), max_grad_norm=0.01)
    metrics = optimizer_step(
        run.step(samples()), run.parameters, run.optimizer, remember=False,
        on_gradient=lambda: norms.append(float(run.parameters.gradient.norm())),
    )  # fmt: skip
    assert metrics["grad_norm"] > 0.01
    assert norms == [pytest.approx(0.01, rel=1e-3)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_the_run_before_anything_has_moved(value: float) -> None:
    run = Run(build("llama"), skip_zero_advantage=False)
    before = run.parameters.values()
    advantages = ADVANTAGES.clone()
    advantages[3] = value
    with pytest.raises(TrainingError, match="not finite"):
        run.take(run.step(samples(advantages)))
    assert torch.equal(run.parameters.values(), before)
    assert not run.optimizer.state


# --- what else can be trained -----------------------------------------------------------------------------------------


def test_an_adapter_learns_by_the_gradient_of_the_objective_and_the_base_stays() -> None:
    model = adapted(build("llama"), init_lora_weights=False, lora_dropout=0.1)
    run, of = Run(model, beta=0.1), samples()
    assert run.policy.packed
    ref = naive_values(model)
    run.perturb()
    wanted = naive_gradient(model, run.config, of, naive_values(model), ref)
    assert all("lora" in name for name in wanted)
    step = run.step(of)
    assert relative_error(run.gradient(step), wanted) < 1e-5
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    run.take(step)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) is ("lora" not in name)
    completions = run.policy.sample([GROUPS[0].prompt], 4, torch.Generator().manual_seed(0))
    with torch.no_grad():
        by_hand = [naive_log_probs(model, GROUPS[0].prompt, c.ids) for c in completions]
    torch.testing.assert_close(torch.cat([c.logp for c in completions]), torch.cat(by_hand), rtol=0, atol=1e-4)


def test_what_dropout_drops_in_a_group_depends_on_the_step_and_on_no_other_group() -> None:
    run, of = Run(adapted(build("llama"), init_lora_weights=False, lora_dropout=0.5), disable_dropout=False), samples()

    def gradient(number: int, *groups: int) -> Tensor:
        step = run.step(of)
        step.micro_batches = [b for b in step.micro_batches if int(of.group[b.samples[0]]) in groups]
        run.parameters.start()
        for _ in step.gradients(StepSums(), Mismatch(), remember=False, number=number):
            pass
        run.parameters.finish()
        return run.parameters.gradient.clone()

    every = range(len(GROUPS))
    torch.manual_seed(1)
    state = torch.get_rng_state()
    together = gradient(4, *every)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    torch.testing.assert_close(sum(gradient(4, i) for i in reversed(every)), together, rtol=1e-5, atol=1e-7)
    assert float((gradient(5, *every) - together).norm() / together.norm()) > 0.05


def test_a_divergence_in_the_reward_is_no_term_of_the_loss() -> None:
    of = samples()
    run, without = Run(build("llama"), build("llama", seed=1), beta=0.3, kl_in="reward"), Run(build("llama"))
    run.policy.reference.log_probs = None  # nobody asks
    found, wanted = run.gradient(run.step(of)), without.gradient(without.step(of))
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())


def test_an_adapter_on_a_base_of_low_precision_learns_in_full_precision() -> None:
    model = adapted(build("llama").to(torch.bfloat16), init_lora_weights=False)
    run, of = Run(model), samples()
    assert run.parameters.gradient.dtype == torch.float32
    assert run.policy.precision.dtype == torch.bfloat16
    wide = copy.deepcopy(model).float()
    wanted = naive_gradient(wide, run.config, of, naive_values(wide), None)
    assert relative_error(run.gradient(run.step(of)), wanted) < 0.1


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_frozen_embeddings_stay_and_everything_else_learns(name: str) -> None:
    model = build(name)
    model.get_input_embeddings().weight.requires_grad_(False)
    run, of = Run(model), samples()
    wanted = naive_gradient(model, run.config, of, naive_values(model), None)
    assert "model.embed_tokens.weight" not in wanted
    assert ("lm_head.weight" in wanted) is (name == "qwen2")
    step = run.step(of)
    assert relative_error(run.gradient(step), wanted) < 1e-5
    before = model.get_input_embeddings().weight.clone()
    run.take(step)
    assert torch.equal(model.get_input_embeddings().weight, before)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing_has_the_same_gradient(lora: bool, frozen: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted(build("llama"), init_lora_weights=False) if lora else build("llama")
        if frozen:
            model.get_input_embeddings().weight.requires_grad_(False)
        run = Run(model, gradient_checkpointing=checkpointing, beta=0.1)
        gradients.append(run.gradient(run.step(samples())))
    assert relative_error(gradients[1], gradients[0]) < 1e-6


def test_master_weights_of_low_precision_learn() -> None:
    model = build("llama").to(torch.bfloat16)
    wide = copy.deepcopy(model).float()
    run, of = Run(model), samples()
    wanted = naive_gradient(wide, run.config, of, naive_values(wide), None)
    step = run.step(of)
    found = run.gradient(step)
    assert {g.dtype for g in found.values()} == {torch.bfloat16}
    assert relative_error(found, wanted) < 0.1
    before = naive_values(wide)
    for _ in range(3):
        metrics = run.take(step)
    assert run.parameters.gradient.dtype == torch.bfloat16
    assert all(math.isfinite(value) for value in metrics.values())
    gain = (naive_values(copy.deepcopy(model).float()) - before) * of.advantages
    assert float(gain.sum()) > 0  # good completions have become likelier, bad ones less


def test_steps_make_good_completions_likelier_and_bad_ones_less_likely() -> None:
    run, of = Run(build("gemma3"), epsilon=0.9), samples()
    before = naive_values(run.model)
    step = run.step(of)
    for _ in range(5):
        run.take(step)
    gain = naive_values(run.model) - before
    assert float(gain[of.advantages > 0].mean()) > 0 > float(gain[of.advantages < 0].mean())
