"""The entropy bonus, and learning from the tokens of the highest entropy: gradients against a naive masked loss."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures import build, of_turns, relative_error, take_gradient
from played import CONTEXTS, PLAYED, SPANS, episodes
from test_step import ADVANTAGES, ALL, GROUPS, LENGTHS, N, Run, naive_values, samples
from torch import Tensor, nn

from grouprl.lm.learn.step import step_weights
from grouprl.objective import Fixed, Objective, policy_loss


def naive_terms(model: nn.Module, prompt: Any, completion: Any, temperature: float) -> Tensor:
    """``[2, n]`` log-probabilities and entropies: one sequence, the softmax over everything."""
    ids = torch.tensor([[*prompt, *completion]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
    of_all = (logits[0, -len(completion) - 1 : -1] / temperature).log_softmax(-1)
    return torch.stack([of_all.gather(1, ids[0, len(prompt) :, None])[:, 0], -(of_all.exp() * of_all).sum(-1)])


def naive_gradient(model: nn.Module, config: Any, counted: Tensor | None = None) -> dict[str, Tensor]:
    """On policy, by autograd: what TRL's formulas give, with the quantile and the mean over the whole step."""
    copied = copy.deepcopy(model).eval()
    terms = [naive_terms(copied, g.prompt, c, config.temperature) for g in GROUPS for c in g.completions]
    logp, entropy = torch.cat(terms, 1)
    of_sample = torch.ones(N).bool() if counted is None else counted
    weights = step_weights(Objective.of(config), LENGTHS, of_sample)
    mask = of_sample.repeat_interleave(LENGTHS)
    chosen = mask & (entropy >= entropy[mask].quantile(1 - config.top_entropy_quantile))
    losses = -(logp - logp.detach()).exp() * ADVANTAGES.repeat_interleave(LENGTHS) * chosen
    if config.beta:
        ref = naive_values(build("llama", seed=1), config.temperature)
        losses = losses + config.beta * ((ref - logp).exp() - (ref - logp) - 1) * (logp - logp.detach()).exp()
    loss = (losses * weights).sum()
    if config.entropy_coef:
        loss = loss - config.entropy_coef * entropy[chosen].mean()
    loss.backward()
    return take_gradient(copied)


@pytest.mark.parametrize("how", ["packed", "in several parts", "plain"])
@pytest.mark.parametrize(
    "settings",
    [
        {"entropy_coef": 0.5},
        {"entropy_coef": 0.5, "loss_type": "grpo", "temperature": 0.7},
        {"top_entropy_quantile": 0.2},
        {"top_entropy_quantile": 0.35, "entropy_coef": 0.3, "loss_type": "dr_grpo", "beta": 0.1},
        {"top_entropy_quantile": 0.35, "entropy_coef": 0.3, "mask_truncated_completions": True},
    ],
)
def test_the_gradient_is_that_of_the_loss_written_out(settings: dict[str, Any], how: str) -> None:
    by = {"packed": {}, "in several parts": {"tokens_per_micro_batch": 8}, "plain": {"attention": "plain"}}[how]
    run = Run(build("llama"), build("llama", seed=1) if "beta" in settings else None, **settings, **by)
    finished = torch.arange(N) % 3 > 0
    step = run.step(samples(finished=finished))
    assert (len(step.micro_batches) > 1) == (how != "packed")
    counted = finished if run.config.mask_truncated_completions else None
    wanted = naive_gradient(run.model, run.config, counted)
    assert relative_error(run.gradient(step), wanted) < 1e-5
    without = naive_gradient(run.model, run.config.replace(top_entropy_quantile=1.0, entropy_coef=0.0), counted)
    assert relative_error(without, wanted) > 0.05


@pytest.mark.parametrize("plain", [False, True])
def test_tokens_of_a_partner_are_neither_chosen_nor_counted(plain: bool) -> None:
    run = Run(
        build("llama"), top_entropy_quantile=0.5, entropy_coef=0.3, attention="plain" if plain else "auto"
    )  # fmt: skip
    of, copied = episodes(), copy.deepcopy(run.model)
    completions = [c for g in PLAYED for c in g.completions]
    parts = zip(CONTEXTS, completions, SPANS, strict=True)
    terms = [naive_terms(copied, p, c, 1.0) for p, c, _ in parts]
    logp, entropy = (torch.cat([of_turns(t[i], s) for t, s in zip(terms, SPANS, strict=True)]) for i in (0, 1))
    chosen = entropy >= entropy.quantile(0.5)
    losses = -(logp - logp.detach()).exp() * of.advantages * chosen
    (losses.mean() - 0.3 * entropy[chosen].mean()).backward()
    assert relative_error(run.gradient(run.step(of, torch.arange(6))), take_gradient(copied)) < 1e-5


def test_metrics_say_what_the_bonus_is() -> None:
    run = Run(build("llama"), entropy_coef=0.5)
    plain = Run(build("llama"), skip_zero_advantage=False)
    metrics, without = (each.take(each.step(samples())) for each in (run, plain))
    assert metrics["entropy"] == pytest.approx(without["entropy"], rel=1e-5)
    assert metrics["policy_loss"] == pytest.approx(without["loss"], abs=1e-5)
    assert metrics["loss"] == pytest.approx(without["loss"] - 0.5 * without["entropy"], rel=1e-5)
    assert metrics["entropy_coef"] == 0.5
    assert not {"policy_loss", "entropy_coef"} & without.keys()


def test_samples_without_advantage_are_moved_by_the_bonus_and_counted_by_the_quantile() -> None:
    for settings in ({"entropy_coef": 0.5}, {"top_entropy_quantile": 0.5}):
        assert torch.equal(Run(build("llama"), **settings).step(samples()).active, ALL)


def test_a_step_on_truncated_completions_alone_has_no_gradient() -> None:
    run = Run(build("llama"), top_entropy_quantile=0.5, entropy_coef=0.5, mask_truncated_completions=True)
    metrics = run.take(run.step(samples(finished=torch.zeros(N).bool())))
    assert metrics["grad_norm"] == 0.0


def test_the_loss_by_hand() -> None:
    logp, entropy = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([0.5, 1.0, 2.0])
    fixed = Fixed(
        torch.tensor([1.0, 2.0, -1.0]), 0.5, chosen=torch.tensor([True, False, True]),
        entropy_weights=torch.tensor([0.25, 0.0, 0.75]),
    )  # fmt: skip
    terms = policy_loss(Objective(entropy_coef=0.1), logp, fixed, entropy=entropy)
    # half of (-1 + 0 + 1), and a tenth of 0.125 + 1.5
    assert float(terms.loss) == pytest.approx(-0.1625)
    assert terms.bonus is not None
    assert float(terms.bonus) == pytest.approx(0.1625)
