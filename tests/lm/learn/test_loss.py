"""From the settings to weights, advantages and losses: by hand, and by formulas written out token by token."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from grouprl.lm.generate.estimate import estimate_advantages
from grouprl.lm.learn.metrics import StepSums, sums_of
from grouprl.lm.learn.step import step_weights as weights_of_step
from grouprl.lm.settings.config import GRPOConfig
from grouprl.objective import ESTIMATORS, LOSSES, Fixed, Objective, policy_loss
from grouprl.objective.losses import names

LOSS_TYPES = names(environments=False)
COMBINATIONS = [(name, level) for name in LOSS_TYPES for level in LOSSES[name].levels]


def config(**settings) -> GRPOConfig:
    if settings.get("loss_type") == "cispo":
        settings = {"epsilon_high": 1.5, **settings}
    if settings.get("loss_type") == "luspo":
        settings = {"importance_sampling_level": "sequence", **settings}
    return GRPOConfig(**settings)


def step_weights(c: GRPOConfig, lengths: Tensor, counted: Tensor) -> Tensor:
    return weights_of_step(Objective.of(c), lengths, counted)


def token_loss(c: GRPOConfig, logp: Tensor, entropy: Tensor, fixed: Fixed) -> tuple[Tensor, StepSums]:
    objective = Objective.of(c)
    terms = policy_loss(objective, logp, fixed)
    return terms.loss, sums_of(objective, terms, entropy, fixed)


# --- weights ----------------------------------------------------------------------------------------------------------

LENGTHS = torch.tensor([2, 3, 1])


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("grpo", [1 / 6] * 2 + [1 / 9] * 3 + [1 / 3]),
        ("sapo", [1 / 6] * 2 + [1 / 9] * 3 + [1 / 3]),
        ("dapo", [1 / 6] * 6),
        ("bnpo", [1 / 6] * 6),
        ("cispo", [1 / 6] * 6),
        ("dr_grpo", [1 / 30] * 6),
        ("luspo", [1 / 3] * 6),
        ("vespo", [1 / 6] * 6),
        ("spo", [1 / 6] * 6),
        ("dppo_tv", [1 / 6] * 6),
        ("dppo_kl", [1 / 6] * 6),
    ],
)
def test_weights_of_the_tokens_of_a_step(loss_type: str, expected: list[float]) -> None:
    found = step_weights(config(loss_type=loss_type, max_completion_length=10), LENGTHS, torch.ones(3).bool())
    torch.testing.assert_close(found, torch.tensor(expected))


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("grpo", [1 / 6] * 2 + [0] * 3 + [1 / 3]),  # still three samples
        ("sapo", [1 / 6] * 2 + [0] * 3 + [1 / 3]),
        ("dapo", [1 / 3] * 2 + [0] * 3 + [1 / 3]),  # but only three tokens
        ("bnpo", [1 / 3] * 2 + [0] * 3 + [1 / 3]),
        ("cispo", [1 / 3] * 2 + [0] * 3 + [1 / 3]),
        ("dr_grpo", [1 / 30] * 2 + [0] * 3 + [1 / 30]),
        ("luspo", [1 / 3] * 2 + [0] * 3 + [1 / 3]),
    ],
)
def test_masked_samples_weigh_nothing_and_count_as_samples_but_not_as_tokens(loss_type, expected) -> None:
    found = step_weights(
        config(loss_type=loss_type, max_completion_length=10), LENGTHS, torch.tensor([True, False, True])
    )
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_if_every_sample_is_masked_all_weights_are_0(loss_type: str) -> None:
    assert step_weights(config(loss_type=loss_type), LENGTHS, torch.zeros(3).bool()).tolist() == [0.0] * 6


# --- advantages -------------------------------------------------------------------------------------------------------

RETURNS = torch.tensor([1.0, 0.0, 0.0, 1.0, 2.0, 2.0], dtype=torch.float64)
GROUP = torch.tensor([0, 0, 0, 0, 1, 1])
STEPS = torch.tensor([1, 2, 1, 3, 1, 2])


def advantages(penalties: Tensor | None = None, **settings) -> list[float]:
    """Of each sample; its tokens agree."""
    per_token = estimate_advantages(
        config(**settings), RETURNS[:, None], torch.ones(1).double(), RETURNS, STEPS, GROUP, penalties
    )
    assert per_token.dtype == torch.float32
    parts = per_token.split(STEPS.tolist())
    if penalties is None:
        assert all(bool((part == part[0]).all()) for part in parts)
    return [float(part[0]) for part in parts]


S = 0.5 / (math.sqrt(1 / 3) + 1e-4)
B = math.sqrt(4 / 5) + 1e-4  # of all six returns, whose mean is 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [S, -S, -S, S, 0, 0]),
        ({"scale_rewards": "none"}, [0.5, -0.5, -0.5, 0.5, 0, 0]),
        ({"scale_rewards": "batch"}, [0.5 / B, -0.5 / B, -0.5 / B, 0.5 / B, 0, 0]),
        ({"advantage": "leave_one_out"}, [2 / 3, -2 / 3, -2 / 3, 2 / 3, 0, 0]),
        ({"advantage": "timestep", "gamma": 0.9}, [2 / 3, -2 / 3, -2 / 3, 2 / 3, 0, 0]),  # a completion is one turn
        ({"advantage": "gigpo"}, [2 * S, -2 * S, -2 * S, 2 * S, 0, 0]),  # in one state
        ({"advantage": "opo"}, [1 - 4 / 7, -4 / 7, -4 / 7, 1 - 4 / 7, 0, 0]),
        ({"advantage": "maxrl"}, [1, -1, -1, 1, 0, 0]),
        ({"advantage": "pass_at_k", "pass_k": 2, "num_generations": 2}, [2 / 3, 0, 0, 2 / 3, 0, 0]),
        ({"advantage": "pass_at_k"}, [0, 0, 0, 0, 0, 0]),  # of the whole group the best is not alone
    ],
)
def test_advantages_by_hand(settings: dict, expected: list[float]) -> None:
    assert advantages(**settings) == pytest.approx(expected, abs=1e-6)


def test_reinforce_pp_scales_over_the_tokens_of_the_batch() -> None:
    tokens = torch.repeat_interleave(RETURNS, STEPS)
    z = (RETURNS - tokens.mean()) / (tokens.std() + 1e-8)
    assert advantages(advantage="reinforce_pp") == pytest.approx(z.tolist(), abs=1e-6)
    centred = RETURNS - torch.tensor([0.5] * 4 + [2.0] * 2)
    tokens = torch.repeat_interleave(centred, STEPS)
    z = (centred - tokens.mean()) / (tokens.std() + 1e-8)
    found = advantages(advantage="reinforce_pp_baseline")
    assert found == pytest.approx([*z[:4].tolist(), 0.0, 0.0], abs=1e-6)


def test_penalties_are_taken_from_the_return_of_their_sample() -> None:
    penalties = torch.tensor([0.5, 0.1, 0.1, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]).double()
    # returns 0.5, -0.2, 0, 1 and 1, 2
    found = advantages(penalties, scale_rewards="none")
    assert found == pytest.approx([0.175, -0.525, -0.325, 0.675, -0.5, 0.5], abs=1e-6)


def test_several_reward_functions_may_be_scaled_one_by_one() -> None:
    rewards = torch.tensor([[1.0, 10.0], [0.0, 20.0], [0.0, 10.0], [1.0, 20.0]]).double()
    weights = torch.tensor([1.0, 0.5]).double()
    lengths, group = torch.tensor([1, 2, 1, 1]), torch.zeros(4, dtype=torch.int64)
    found = estimate_advantages(
        config(multi_objective_aggregation="normalize_then_sum"), rewards, weights, torch.zeros(4), lengths, group
    )
    a, b = 0.5 / (math.sqrt(1 / 3) + 1e-4), 0.5 * 5 / (5 * math.sqrt(4 / 3) + 1e-4)
    z = torch.tensor([a - b, -a + b, -a - b, a + b])
    z = z / (z.std() + 1e-4)
    torch.testing.assert_close(found, z[[0, 1, 1, 2, 3]])


@pytest.mark.parametrize("settings", [{"beta": 0.1, "kl_in": "reward"}, {"soft_overlong_cache": 4}])
def test_what_gdpo_would_leave_out_of_the_advantage_is_refused(settings: dict) -> None:
    from grouprl.errors import UsageError

    with pytest.raises(UsageError):
        config(multi_objective_aggregation="normalize_then_sum", **settings)


# --- losses -----------------------------------------------------------------------------------------------------------

N = [3, 1, 4, 2, 5]
TURNS = [[3], [1], [1, 3], [2], [2, 1, 2]]
OF_TURNS = torch.tensor([n for turns in TURNS for n in turns])


def data(seed: int = 0, spread: float = 0.4) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logp, old, reference, advantages (one per sample), weights."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(sum(N), generator=generator) * 4
    logp = old + spread * torch.randn(sum(N), generator=generator)
    ref = old + spread * torch.randn(sum(N), generator=generator)
    a = torch.repeat_interleave(torch.tensor([1.5, -0.7, -1.2, 0.4, 2.0]), torch.tensor(N))
    return logp, old, ref, a, torch.rand(sum(N), generator=generator)


def by_formula(
    c: GRPOConfig, logp: Tensor, old: Tensor, ref: Tensor | None, a: Tensor, weights: Tensor, lengths: list[int] = N,
    turns: list[list[int]] | None = None, sampled: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The loss, written out sample by sample and token by token in the precision given."""
    high = c.epsilon if c.epsilon_high is None else c.epsilon_high
    total = torch.zeros((), dtype=torch.float64)
    refs = itertools.repeat(None) if ref is None else ref.split(lengths)
    for new, o, A, w, r, of_turns, said in zip(
        logp.split(lengths), old.split(lengths), a.split(lengths), weights.split(lengths), refs,
        turns or [[n] for n in lengths], (old if sampled is None else sampled).split(lengths), strict=False,
    ):  # fmt: skip
        per_turn = [part.mean().exp().expand(len(part)) for part in (new - o).split(of_turns)]
        s = ((new - o).sum() / len(new)).exp()
        for t in range(len(new)):
            live = (new[t] - new[t].detach()).exp()  # 1 in value
            rho = (new[t] - o[t]).exp()
            if c.importance_sampling_level == "sequence":
                rho = s
            elif c.importance_sampling_level == "turn":
                rho = torch.cat(per_turn)[t]
            elif c.importance_sampling_level == "sequence_token":
                rho = s.detach() * live
            clipped = rho.clamp(1 - c.epsilon, 1 + high)
            if c.loss_type == "cispo":
                loss = -rho.detach().clamp(max=high) * A[t] * new[t]
            elif c.loss_type == "sapo":
                tau = c.sapo_temperature_pos if A[t] > 0 else c.sapo_temperature_neg
                loss = -4 / tau / (1 + (-tau * (rho - 1)).exp()) * A[t]
            elif c.loss_type == "spo":
                loss = -(rho * A[t] - A[t].abs() / (2 * c.epsilon) * (rho - 1) ** 2)
            elif c.loss_type == "vespo":
                w_all = (new - o).sum().exp().detach()
                k, decay = (c.vespo_k_pos, c.vespo_lambda_pos) if A[t] >= 0 else (c.vespo_k_neg, c.vespo_lambda_neg)
                loss = -(w_all**k) * (decay * (1 - w_all)).exp() * A[t] * new[t]
            elif c.loss_type in ("dppo_tv", "dppo_kl"):
                p, q = new[t].detach().exp(), o[t].exp()
                if c.loss_type == "dppo_tv":
                    far = (p - q).abs() > (c.dppo_threshold or 0.2)
                else:
                    rest = ((1 - q).clamp(min=1e-8) / (1 - p).clamp(min=1e-8)).log()
                    far = q * (q / p).log() + (1 - q) * rest > (c.dppo_threshold or 0.05)
                loss = -rho * A[t] * float(not (far and (p - q) * A[t] > 0))
            elif c.delta is not None:
                loss = -torch.minimum(rho.clamp(max=c.delta) * A[t], clipped * A[t])
            else:
                loss = -torch.minimum(rho * A[t], clipped * A[t])
            if c.off_policy_mask_threshold is not None and A[t] < 0:
                loss = loss * float((said - new).mean() <= c.off_policy_mask_threshold)
            if r is not None:
                d = (new[t] - r[t]).detach()
                value = {"k1": d, "k2": d**2 / 2, "k3": (-d).exp() + d - 1}[c.kl_estimator]
                # The value of the estimator times the ratio, with the gradient of KL(pi || ref): ratio d grad log pi.
                loss = loss + c.beta * (new[t] - o[t]).exp().detach() * (value + d * (live - 1))
            total = total + w[t] * loss
    return total


def found(c: GRPOConfig, logp, old, ref, a, weights) -> tuple[Tensor, Tensor, StepSums]:
    logp = logp.clone().requires_grad_()
    loss, sums = token_loss(c, logp, torch.ones_like(logp), Fixed(a, weights, old, ref, torch.tensor(N), OF_TURNS))
    (gradient,) = torch.autograd.grad(loss, logp)
    return loss.detach(), gradient, sums


def compare(c: GRPOConfig, logp, old, ref, a, weights) -> None:
    wide = logp.double().requires_grad_()
    base = wide.detach() if old is None else old.double()
    expected = by_formula(c, wide, base, None if ref is None else ref.double(), a.double(), weights.double(), N, TURNS)
    (wanted,) = torch.autograd.grad(expected, wide)
    loss, gradient, sums = found(c, logp, old, ref, a, weights)
    assert sums.loss == pytest.approx(float(loss), rel=1e-6)
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-6)


def equal_within_samples(weights: Tensor) -> Tensor:
    """As those of every loss type: one weight per sample."""
    return torch.cat([part[:1].expand(len(part)) for part in weights.split(N)])


@pytest.mark.parametrize(("loss_type", "level"), COMBINATIONS)
@pytest.mark.parametrize("on_policy", [False, True])
def test_losses_and_gradients_are_those_of_the_formulas(loss_type: str, level: str, on_policy: bool) -> None:
    logp, old, _, a, weights = data()
    c = config(loss_type=loss_type, importance_sampling_level=level)
    compare(c, logp, None if on_policy else old, None, a, equal_within_samples(weights))


@pytest.mark.parametrize(
    "settings",
    [
        {"epsilon_high": 0.28},
        {"epsilon": 0.05, "epsilon_high": 0.5},
        {"delta": 1.3},
        {"delta": 1.6, "epsilon_high": 0.4, "importance_sampling_level": "sequence"},
        {"loss_type": "cispo", "epsilon_high": 1.1},
        {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 0.3},
        {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_pos": 0.5},
        {"loss_type": "vespo", "vespo_k_neg": 0.5, "vespo_lambda_neg": 4.0},
        {"loss_type": "luspo", "epsilon": 0.02, "epsilon_high": 0.03},
        {"loss_type": "spo", "epsilon": 0.4},
        {"loss_type": "dppo_tv", "dppo_threshold": 0.05},
        {"loss_type": "dppo_kl", "dppo_threshold": 0.005},
        {"off_policy_mask_threshold": 0.05},
        {"off_policy_mask_threshold": 0.05, "importance_sampling_level": "sequence"},
        {"loss_type": "cispo", "off_policy_mask_threshold": 0.05, "importance_sampling_level": "sequence_token"},
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_every_setting_of_the_objective_enters_as_its_formula_says(settings: dict, seed: int) -> None:
    logp, old, _, a, weights = data(seed)
    compare(config(**settings), logp, old, None, a, equal_within_samples(weights))


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "sapo"])
@pytest.mark.parametrize("on_policy", [False, True])
def test_the_divergence_has_the_gradient_of_the_true_one(estimator: str, loss_type: str, on_policy: bool) -> None:
    logp, old, ref, a, weights = data()
    c = config(loss_type=loss_type, beta=0.3, kl_estimator=estimator)
    compare(c, logp, None if on_policy else old, ref, a, weights)


@pytest.mark.parametrize(("loss_type", "level"), COMBINATIONS)
def test_on_policy_is_the_same_as_old_log_probabilities_equal_to_the_new(loss_type: str, level: str) -> None:
    logp, _, ref, a, weights = data()
    c = config(loss_type=loss_type, importance_sampling_level=level, beta=0.1)
    none, given = found(c, logp, None, ref, a, weights), found(c, logp, logp, ref, a, weights)
    assert torch.equal(none[0], given[0])
    assert torch.equal(none[1], given[1])


@pytest.mark.parametrize(("loss_type", "level"), COMBINATIONS)
def test_at_ratio_1_every_gradient_is_weight_times_advantage(loss_type: str, level: str) -> None:
    logp, _, _, a, weights = data()
    weights = equal_within_samples(weights)
    _, gradient, _ = found(config(loss_type=loss_type, importance_sampling_level=level), logp, None, None, a, weights)
    torch.testing.assert_close(gradient, -weights * a, rtol=1e-5, atol=1e-7)


def test_sums_count_what_lies_outside_the_clip_range_on_the_side_that_is_cut() -> None:
    old = torch.zeros(6)
    logp = torch.tensor([1.3, 1.3, 1.1, 0.7, 0.7, 0.9]).log()
    a = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0])
    fixed = Fixed(a, torch.full((6,), 0.5), old, old + 0.1, torch.tensor([2, 4]))
    _, sums = token_loss(config(beta=0.1, kl_estimator="k1"), logp, torch.arange(6.0), fixed)
    assert (sums.low, sums.high, sums.tokens, sums.entropy) == (1.0, 1.0, 6, 15.0)
    assert (sums.least_low, sums.most_high) == (0.0, 0.5)  # of 0 and 1 / 4; of 1 / 2 and 0
    assert sums.kl == pytest.approx(float((logp.exp() * (logp - 0.1)).sum()), abs=1e-5)
    _, capped = token_loss(
        config(loss_type="cispo", epsilon_high=1.2), logp, torch.ones(6), fixed._replace(logp_ref=None)
    )
    assert (capped.low, capped.high, capped.kl) == (0.0, 1.0, 0.0)  # a cap has no lower bound


def test_sums_of_parts_add_up() -> None:
    a, b = StepSums(1.0, 2.0, 3.0, 4.0, 5.0, 6, 0.3, 0.6), StepSums(0.5, 0.5, 0.5, 0.5, 0.5, 1, 0.1, 0.2)
    a.add(b)
    assert a == StepSums(1.5, 2.5, 3.5, 4.5, 5.5, 7, 0.1, 0.6)


def test_where_a_completion_has_one_ratio_completions_are_counted() -> None:
    old, logp = torch.zeros(6), torch.tensor([1.3, 1.3, 0.7, 0.7, 0.7, 0.7]).log()
    fixed = Fixed(torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, -1.0]), torch.ones(6), old, None, torch.tensor([2, 4]))
    for level in ("sequence", "sequence_token"):
        _, sums = token_loss(config(importance_sampling_level=level), logp, torch.zeros(6), fixed)
        assert (sums.low, sums.high, sums.least_low, sums.most_high) == (1.0, 1.0, 0.0, 1.0)


def test_where_a_turn_has_one_ratio_turns_are_counted() -> None:
    old, logp = torch.zeros(6), torch.tensor([1.3, 1.3, 0.7, 0.7, 0.7, 1.0]).log()
    a = torch.tensor([1.0, 1.0, -1.0, -1.0, -1.0, -1.0])
    fixed = Fixed(a, torch.ones(6), old, None, torch.tensor([2, 4]), torch.tensor([1, 1, 2, 1, 1]))
    _, sums = token_loss(config(importance_sampling_level="turn"), logp, torch.zeros(6), fixed)
    assert (sums.low, sums.high, sums.least_low, sums.most_high) == (2.0, 2.0, 0.0, 1.0)


def test_no_two_names_stand_for_the_same_estimator_or_loss() -> None:
    """A name whose entry is another's would silently be that one."""
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    lengths, returns = torch.tensor([1, 3, 2, 2, 1, 4]), torch.tensor([1.0, 0.5, 0.0, 0.25, 2.0, 1.0]).double()
    found = {}
    offered = [name for name, estimator in ESTIMATORS.items() if estimator.language_models]
    for name in offered:
        c = GRPOConfig(advantage=name, num_generations=3, prompts_per_step=2)
        a = estimate_advantages(c, returns[:, None], torch.ones(1), returns, lengths, group)
        found[name] = tuple(a.tolist())
    assert found.pop("timestep") == found["leave_one_out"]  # which is said: a completion is one turn
    assert len(set(found.values())) == len(offered) - 1
    losses = {}
    for name in LOSS_TYPES:
        c = config(loss_type=name, epsilon_high=1.5 if name == "cispo" else None)
        logp, old, _, a, _ = data()
        weights = step_weights(c, torch.tensor(N), torch.ones(len(N)).bool())
        losses[name] = float(
            token_loss(c, 2 * logp, torch.zeros_like(logp), Fixed(a, weights, old, None, torch.tensor(N)))[0]
        )
    assert losses.pop("bnpo") == losses["dapo"]  # which is said
    assert len(set(losses.values())) == len(losses)


# --- beside TRL -------------------------------------------------------------------------------------------------------

TRL = [
    (
        {"loss_type": "luspo", "importance_sampling_level": "sequence", "epsilon": 0.04, "epsilon_high": 0.04},
        1.1202569, [-0.317077, -0.317077, 0.203567, 0.516948, 0.516948, 0.516948],
    ),
    ({"loss_type": "vespo"}, -0.6781657, [-0.181541, -0.181541, 0.097519, 0.27345, 0.27345, 0.27345]),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "loss", "gradient"), TRL, ids=["luspo", "vespo"])
def test_a_loss_and_its_gradient_are_the_numbers_of_trl(settings: dict, loss: float, gradient: list[float]) -> None:
    """As `GRPOTrainer._compute_loss` of TRL 1.16 gives them; benchmarks/lm_losses.py has more of them."""
    lengths = torch.tensor([2, 1, 3])
    logp = torch.tensor([-0.9, -1.4, -0.3, -2.0, -0.8, -1.1], requires_grad=True)
    old = torch.tensor([-1.0, -1.2, -0.5, -1.9, -1.1, -1.0])
    a = torch.repeat_interleave(torch.tensor([1.0, -0.5, -1.5]), lengths)
    weights = step_weights(config(**settings), lengths, torch.ones(3).bool())
    found, _ = token_loss(config(**settings), logp, torch.zeros(6), Fixed(a, weights, old, None, lengths))
    found.backward()
    assert float(found) == pytest.approx(loss, abs=1e-6)
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx(gradient, abs=1e-6)
