import numpy as np
import pytest
import torch
from torch.testing import assert_close

from grouprl.errors import TrainingError, UsageError
from grouprl.objective import BaselineBatch, RandomFeatures, Sketch, baseline, fit_baseline, gae


def flags(*values):
    return torch.tensor(values, dtype=torch.bool)


def chain(copies=1):
    """Three states in a row with rewards 1, 2, 3 and an end: at gamma .5 worth 2.75, 3.5 and 3."""
    states = torch.cat((torch.eye(3), torch.ones(3, 1)), 1).double().repeat(copies, 1)
    rewards = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).repeat(copies)
    return states, rewards, torch.full((copies,), 3)


def batch_of(phi, rewards=None, samples=1):
    """Whole episodes of equal length."""
    n = len(phi)
    rewards = torch.zeros(n, dtype=phi.dtype) if rewards is None else rewards
    lengths, ends = torch.full((samples,), n // samples), torch.ones(samples, dtype=torch.bool)
    return BaselineBatch(phi, phi[:samples], rewards, lengths, ends)


def test_features_are_what_the_formula_says():
    features = RandomFeatures.create(2, 5, seed=3)
    observations, elapsed = torch.tensor([[0.5, -2.0], [50.0, 0.0]]), torch.tensor([0.25, 1.0])
    phi = features(observations, elapsed)
    assert phi.shape == (2, features.n_outputs) == (2, 5 + 4 + 3)
    w, c = features.weight.numpy(), features.offset.numpy()
    assert_close(phi[0, :5], torch.from_numpy(np.tanh(np.array([0.5, -2.0, 1.0]) @ w + c)).float())
    assert phi[0, 5:].tolist() == [0.5, -2.0, 0.25, 4.0, 0.25, 0.0625, 1.0]
    assert phi[1, 5:].tolist() == [10.0, 0.0, 100.0, 0.0, 1.0, 1.0, 1.0]  # clipped at 10


@pytest.mark.parametrize("cosine", [False, True])
def test_a_time_beyond_the_horizon_counts_as_its_end(cosine):
    features = RandomFeatures.create(2, 5, seed=3, cosine=cosine)
    observations = torch.randn(3, 2)
    late = features(observations, torch.tensor([1.0, 1.01, 1e6]))
    assert torch.equal(late, features(observations, torch.ones(3)))
    weights = torch.randn(features.n_outputs)
    assert_close(features.dot(observations, torch.full((3,), 50.0), weights), late @ weights)


def test_features_are_fixed_by_their_seed():
    first, again, other = (RandomFeatures.create(3, 8, seed) for seed in (1, 1, 2))
    assert torch.equal(first.weight, again.weight)
    assert torch.equal(first.offset, again.offset)
    assert not torch.equal(first.weight, other.weight)


def test_features_have_the_stated_spread():
    features = RandomFeatures.create(16, 4000, seed=0)
    assert features.weight.std().item() == pytest.approx(0.5, rel=0.02)  # 1 / sqrt(16 / 4)
    assert features.offset.min().item() >= -2.0
    assert features.offset.max().item() <= 2.0
    assert features.offset.std().item() == pytest.approx(4.0 / 12**0.5, rel=0.03)


def test_features_do_not_change_what_they_are_given():
    observations, elapsed = torch.full((2, 3), 20.0), torch.ones(2)
    RandomFeatures.create(3, 4, seed=0)(observations, elapsed)
    assert torch.equal(observations, torch.full((2, 3), 20.0))


def test_features_refuse_shapes_that_do_not_fit():
    features = RandomFeatures.create(3, 4, seed=0)
    with pytest.raises(UsageError, match=r"\[S, 3\]"):
        features(torch.zeros(5, 2), torch.zeros(5))
    with pytest.raises(UsageError, match="elapsed"):
        features(torch.zeros(5, 3), torch.zeros(5, 1))
    with pytest.raises(UsageError, match="n_features"):
        RandomFeatures.create(3, 0, seed=0)


def test_the_fit_recovers_the_values_of_a_chain():
    phi, rewards, lengths = chain(copies=4)
    phi_last = torch.ones(4, 4, dtype=torch.float64)  # must not matter: the end is terminal
    fit = fit_baseline(phi, phi_last, rewards, lengths, flags(1, 1, 1, 1), None, gamma=0.5, lam=1.0, ridge=1e-9)
    assert_close(fit.values[:3], torch.tensor([2.75, 3.5, 3.0], dtype=torch.float64), rtol=1e-6, atol=1e-6)
    assert fit.last_values.tolist() == [0.0] * 4
    assert_close(fit.advantages, torch.zeros(12, dtype=torch.float64), rtol=0, atol=1e-5)
    assert fit.explained_variance == pytest.approx(1.0, abs=1e-6)


def test_sweeps_carry_the_end_of_the_chain_back_to_its_start():
    phi, rewards, lengths = chain()
    # lambda 0 moves values one step back per sweep: three sweeps are needed, four are made at first
    fit = fit_baseline(phi, phi[:1], rewards, lengths, flags(1), None, gamma=0.5, lam=0.0, ridge=1e-9)
    assert_close(fit.values, torch.tensor([2.75, 3.5, 3.0], dtype=torch.float64), rtol=1e-5, atol=1e-5)
    short = fit_baseline(phi, phi[:1], rewards, lengths, flags(1), torch.zeros(4), gamma=0.5, lam=0.0, ridge=1e-9)
    assert short.values[0].item() == pytest.approx(1.0 + 0.5 * 2.0, abs=1e-5)  # two sweeps: V_1 knew of r_1 alone


def test_values_linear_in_the_features_are_recovered_in_float32():
    lengths = torch.tensor([50, 30, 20])
    to_end = torch.cat([torch.arange(n, 0, -1) for n in lengths.tolist()]).float() / 50.0
    phi = torch.stack((to_end, torch.ones(100)), 1)
    rewards = torch.full((100,), 1.0 / 50.0)
    fit = fit_baseline(phi, phi[:3], rewards, lengths, flags(1, 1, 1), None, gamma=1.0, lam=1.0, ridge=1e-7)
    assert_close(fit.values, to_end, rtol=1e-4, atol=1e-4)


def test_truncation_bootstraps_and_termination_does_not():
    # reward 1 for ever at gamma .9 is worth 10; a constant is the only feature
    ones, lengths = torch.ones(3, 1, dtype=torch.float64), torch.tensor([3])
    rewards, previous = ones[:, 0], torch.tensor([10.0], dtype=torch.float64)
    cut = fit_baseline(ones, ones[:1], rewards, lengths, flags(0), previous, gamma=0.9, lam=1.0)
    assert cut.weights.item() == pytest.approx(10.0, abs=1e-4)
    assert cut.last_values.item() == pytest.approx(10.0, abs=1e-4)
    assert_close(cut.advantages, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-4)
    ended = fit_baseline(ones, ones[:1], rewards, lengths, flags(1), previous, gamma=0.9, lam=1.0)
    assert ended.weights.item() == pytest.approx((1.0 + 1.9 + 2.71) / 3.0, abs=1e-4)
    assert ended.last_values.item() == 0.0
    assert_close(ended.advantages, torch.tensor([2.71, 1.9, 1.0], dtype=torch.float64) - 1.87, rtol=0, atol=1e-4)


def orthogonal(x, y, ridge, copies):
    """The fit of rewards +y0, y1 to a feature +x, -x and a constant, ``copies`` times two rows of one step."""
    feature = torch.tensor([x, -x], dtype=torch.float64).repeat(copies)
    phi = torch.stack((feature, torch.ones_like(feature)), 1)
    rewards = torch.tensor(y, dtype=torch.float64).repeat(copies)
    ends, lengths = torch.ones(2 * copies, dtype=torch.bool), torch.ones(2 * copies, dtype=torch.int64)
    return fit_baseline(phi, phi, rewards, lengths, ends, None, gamma=0.9, lam=0.9, ridge=ridge)


def test_the_ridge_is_the_one_stated():
    # a feature orthogonal to the constant: w = sum(x y) / (sum(x x) (1 + ridge)); the constant: mean(y) / (1 + 1e-6)
    fit = orthogonal(2.0, [5.0, 1.0], 0.5, copies=4)
    assert fit.weights.tolist() == pytest.approx([(10.0 - 2.0) / (8.0 * 1.5), 3.0 / (1.0 + 1e-6)], rel=1e-12)


def test_the_ridge_grows_where_there_are_less_than_four_rows_for_a_feature():
    # two features, two rows: (4 * 2 / 2)^2 = 16 times the ridge; four rows: 4 times
    assert orthogonal(2.0, [5.0, 1.0], 0.5, copies=1).weights[0].item() == pytest.approx(8.0 / (8.0 * 9.0), rel=1e-12)
    assert orthogonal(2.0, [5.0, 1.0], 0.5, copies=2).weights[0].item() == pytest.approx(8.0 / (8.0 * 3.0), rel=1e-12)


def test_a_feature_that_is_nearly_zero_is_held_by_the_floor_of_the_ridge():
    # 2e-3 / (2e-6 + 2 * 1e-3), where the feature's own power would have given 2e-3 / 4e-6 = 500
    assert orthogonal(1e-3, [1.0, -1.0], 1.0, copies=4).weights[0].item() == pytest.approx(
        2e-3 / (2e-6 + 2e-3), rel=1e-9
    )


def test_fits_to_batches_of_fewer_rows_than_features_do_not_run_away():
    # Each batch continues for ever at reward 1, worth 100: the values of a fit are in the targets of the next.
    generator, weights, worst = torch.Generator().manual_seed(0), None, 0.0
    features = RandomFeatures.create(4, 128, seed=0)
    for _ in range(300):
        states = torch.randn(68, 4, generator=generator)
        phi = features(states, torch.zeros(68))
        lengths, going_on = torch.full((16,), 4), torch.zeros(16, dtype=torch.bool)
        rewards = torch.ones(64) + torch.randn(64, generator=generator)
        fit = fit_baseline(phi[:64], phi[52:], rewards, lengths, going_on, weights, 0.99, 0.95, ridge=1e-4)
        weights, worst = fit.weights, max(worst, float(fit.values.abs().max()))
    assert worst < 1000


def test_advantages_and_explained_variance_are_those_of_the_values_returned():
    generator = torch.Generator().manual_seed(0)
    phi = torch.cat((torch.randn(60, 5, generator=generator), torch.ones(60, 1)), 1)
    rewards, lengths = torch.randn(60, generator=generator), torch.tensor([10, 20, 30])
    fit = fit_baseline(phi, phi[:3], rewards, lengths, flags(1, 0, 0), None, gamma=0.9, lam=0.8)
    assert fit.last_values[0].item() == 0.0
    assert_close(fit.values, phi @ fit.weights)
    assert_close(fit.last_values[1:], (phi[:3] @ fit.weights)[1:])
    assert torch.equal(fit.advantages, gae(rewards, fit.values, fit.last_values, lengths, 0.9, 0.8))
    target = fit.values + fit.advantages
    expected = 1.0 - (target - fit.values).var() / target.var()
    assert fit.explained_variance == pytest.approx(expected.item(), rel=1e-4)


def test_coinciding_features_are_no_obstacle():
    phi = torch.ones(5000, 200)
    rewards, lengths = torch.ones(5000), torch.full((50,), 100)
    ended = torch.ones(50, dtype=torch.bool)
    fit = fit_baseline(phi, phi[:50], rewards, lengths, ended, None, gamma=0.0, lam=0.9)
    assert_close(fit.values, torch.ones(5000), rtol=1e-3, atol=1e-3)


def test_features_too_alike_for_float32_are_told_apart_in_float64():
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(400, 1, generator=generator)
    phi = torch.cat((shared + 1e-4 * torch.randn(400, 30, generator=generator), torch.ones(400, 1)), 1)
    lengths, ended = torch.full((4,), 100), torch.ones(4, dtype=torch.bool)
    fit = fit_baseline(phi, phi[:4], shared[:, 0], lengths, ended, None, gamma=0.0, lam=0.9, ridge=1e-10)
    assert fit.explained_variance > 0.99


def test_a_constant_target_has_nothing_to_explain():
    phi = torch.ones(4, 1)
    fit = fit_baseline(phi, phi[:1], torch.zeros(4), torch.tensor([4]), flags(1), None, gamma=0.9, lam=0.9)
    assert fit.explained_variance == 0.0
    assert fit.advantages.tolist() == [0.0] * 4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_fit_that_is_not_finite_is_a_training_error(bad):
    phi, rewards, lengths = chain()
    with pytest.raises(TrainingError, match="baseline fit is not finite"):
        fit_baseline(phi, phi[:1], rewards * bad, lengths, flags(1), None, 0.9, 0.9)
    with pytest.raises(TrainingError, match="features are not finite"):
        fit_baseline(phi * bad, phi[:1], rewards, lengths, flags(1), None, 0.9, 0.9)


def test_dependent_features_without_a_ridge_are_a_training_error():
    phi = torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 1.0]])
    with pytest.raises(TrainingError, match="raise ridge"):
        fit_baseline(phi, phi, torch.ones(2), torch.tensor([1, 1]), flags(1, 1), None, 0.9, 0.9, ridge=0.0)


def test_arguments_that_do_not_fit_are_refused():
    phi, rewards, lengths = chain()
    good = {
        "phi": phi, "phi_last": phi[:1], "rewards": rewards, "lengths": lengths,
        "terminated": flags(1), "weights": None, "gamma": 0.9, "lam": 0.9,
    }  # fmt: skip
    for change, message in [
        ({"rewards": rewards[:2]}, "rewards has shape"),
        ({"phi_last": phi[:2]}, "phi_last has shape"),
        ({"phi_last": phi[:1, :2]}, "phi and phi_last"),
        ({"weights": torch.zeros(3)}, "weights has shape"),
        ({"terminated": torch.zeros(1)}, "boolean"),
        ({"ridge": -1.0}, "ridge"),
        ({"sweeps": 0}, "sweeps"),
        ({"gamma": 1.5}, "gamma"),
    ]:
        with pytest.raises(UsageError, match=message):
            fit_baseline(**(good | change))


def test_dot_is_the_product_with_the_features():
    features = RandomFeatures.create(3, 8, seed=1)
    generator = torch.Generator().manual_seed(0)
    observations, elapsed = torch.randn(50, 3, generator=generator) * 4, torch.rand(50, generator=generator)
    weights = torch.randn(features.n_outputs, generator=generator)
    assert_close(features.dot(observations, elapsed, weights), features(observations, elapsed) @ weights)


@pytest.mark.parametrize("n", [12, 40])
@pytest.mark.parametrize("ridge", [1e-4, 1e-2])
def test_the_matrix_of_rows_gives_the_weights_that_the_matrix_of_features_gives(n, ridge):
    generator = torch.Generator().manual_seed(n)
    phi = torch.randn(n, 60, dtype=torch.float64, generator=generator)
    phi[:, 3] *= 1e-3
    phi[:, 5] = 0.0
    phi[:, -1] = 1.0
    targets = 50 + torch.randn(n, dtype=torch.float64, generator=generator)
    batches = [batch_of(phi[: n // 3]), batch_of(phi[n // 3 :])]  # an earlier one makes no difference
    primal, dual = baseline._primal(batches, ridge)(targets), baseline._dual(batches, ridge)(targets)
    assert_close(dual, primal, rtol=1e-6, atol=1e-8)
    penalty = torch.full((60,), ridge).double() * (phi.square().sum(0)).clamp(min=n * 1e-3)
    penalty[-1] = n * 1e-6
    assert_close(dual, torch.linalg.solve(phi.T @ phi + penalty.diag(), phi.T @ targets), rtol=1e-6, atol=1e-8)


def test_a_fit_with_more_features_than_rows_is_the_same_either_way(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    phi, last = torch.randn(30, 80, generator=generator), torch.randn(3, 80, generator=generator)
    phi[:, -1] = last[:, -1] = 1.0
    rewards, lengths = torch.randn(30, generator=generator), torch.full((3,), 10)
    case = (phi, last, rewards, lengths, flags(True, False, False), None, 0.99, 0.95)
    expected = fit_baseline(*case)
    monkeypatch.setattr(baseline, "_DUAL_ABOVE", 0)
    monkeypatch.setattr(baseline, "_primal", None)  # not called
    found = fit_baseline(*case)
    assert_close(found.weights, expected.weights, rtol=1e-2, atol=1e-3)
    assert_close(found.advantages, expected.advantages, rtol=1e-2, atol=1e-3)
    phi[4, 7] = torch.nan
    with pytest.raises(TrainingError, match="not finite"):
        fit_baseline(*case)


def test_a_sketch_adds_each_entry_to_one_sum_with_a_sign():
    sketch = Sketch.create(10, 4, seed=0)
    of_each = sketch(torch.eye(10)) * 3**0.5  # three entries to a sum
    assert of_each.shape == (10, 4)
    assert (of_each != 0).sum(1).tolist() == [1] * 10
    assert_close(of_each.abs().sum(1), torch.ones(10))
    assert of_each.abs().sum(0).sort().values.tolist() == pytest.approx([2, 2, 3, 3])
    x = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    assert_close(sketch(x) * 3**0.5, x @ of_each)
    assert torch.equal(sketch(torch.full((1, 10), 50.0)), sketch(torch.full((1, 10), 10.0)))  # clipped at 10
    assert torch.equal(sketch(x), Sketch.create(10, 4, seed=0)(x))


def test_a_sketch_keeps_scalar_products_in_expectation():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(1, 2048, generator=generator) for _ in range(2))
    y += x
    found = [float((sketch(x) * sketch(y)).sum() * 8) for sketch in (Sketch.create(2048, 256, s) for s in range(50))]
    assert np.mean(found) == pytest.approx(float((x * y).sum()), rel=0.05)


def test_earlier_batches_enter_the_regression_as_further_rows():
    # one step an episode, a constant as the only feature: the value is the mean reward of all rows (ridge 1e-6)
    ones = torch.ones(2, 1, dtype=torch.float64)
    earlier = [batch_of(ones, torch.tensor([4.0, 6.0], dtype=torch.float64), samples=2)]
    now = torch.tensor([1.0, 3.0], dtype=torch.float64)
    case = (ones, ones, now, torch.tensor([1, 1]), flags(1, 1), None, 0.9, 0.9)
    assert fit_baseline(*case).values.tolist() == pytest.approx([2.0, 2.0], rel=1e-5)
    fit = fit_baseline(*case, earlier=earlier)
    assert fit.values.tolist() == pytest.approx([3.5, 3.5], rel=1e-5)  # (1 + 3 + 4 + 6) / 4
    assert fit.advantages.tolist() == pytest.approx([-2.5, -0.5], rel=1e-4)  # of this batch alone


@pytest.mark.parametrize("dual", [False, True])
def test_a_fit_with_earlier_batches_is_a_fit_to_all_their_samples(dual, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    if dual:
        monkeypatch.setattr(baseline, "_DUAL_ABOVE", 0)
        monkeypatch.setattr(baseline, "_primal", None)  # not called
    phi = torch.randn(90, 100 if dual else 6, generator=generator)
    phi[:, -1] = 1.0
    rewards, lengths, ends = torch.randn(90, generator=generator), torch.tensor([10, 20, 15, 45]), flags(1, 0, 0, 1)
    last, weights = torch.randn(4, phi.shape[1], generator=generator), torch.randn(phi.shape[1], generator=generator)
    whole = fit_baseline(phi, last, rewards, lengths, ends, weights, 0.9, 0.8)
    earlier = [
        BaselineBatch(phi[30:45], last[2:3], rewards[30:45], lengths[2:3], ends[2:3]),
        BaselineBatch(phi[45:], last[3:], rewards[45:], lengths[3:], ends[3:]),
    ]
    fit = fit_baseline(phi[:30], last[:2], rewards[:30], lengths[:2], ends[:2], weights, 0.9, 0.8, earlier=earlier)
    assert_close(fit.weights, whole.weights, rtol=1e-3, atol=1e-4)
    assert_close(fit.advantages, whole.advantages[:30], rtol=1e-3, atol=1e-3)
    assert fit.values.shape == (30,)


def test_the_matrix_of_a_kept_batch_is_computed_once(monkeypatch):
    counted, gram = [], baseline.gram_of
    monkeypatch.setattr(baseline, "gram_of", lambda rows: counted.append(len(rows)) or gram(rows))
    kept = batch_of(torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), samples=2)
    for _ in range(3):
        fit_baseline(kept.phi[:30], kept.phi[:1], kept.rewards[:30], torch.tensor([30]), flags(1), None, 0.9, 0.9,
                     earlier=[kept])  # fmt: skip
    assert sorted(counted) == [30, 30, 30, 40]


def test_an_earlier_batch_of_other_features_is_refused():
    phi, rewards, lengths = chain()
    with pytest.raises(UsageError, match="the 4 features of this one"):
        fit_baseline(phi, phi[:1], rewards, lengths, flags(1), None, 0.9, 0.9, earlier=[batch_of(phi[:, 1:])])


def test_with_its_level_set_a_fit_leaves_advantages_of_mean_0():
    # Reward 1 for ever at gamma .9 is worth 10, in two sweeps from 0 (four, the first time) at lambda .5 not nearly.
    ones, lengths = torch.ones(40, 1, dtype=torch.float64), torch.tensor([20, 20])
    case = (ones, ones[:2], ones[:, 0], lengths, flags(0, 0), None, 0.9, 0.5)
    assert fit_baseline(*case).values[0].item() < 7.0
    fit = fit_baseline(*case, level=True)
    assert fit.values.tolist() == pytest.approx([10.0] * 40, rel=1e-9)
    assert fit.weights.item() == pytest.approx(10.0, rel=1e-9)  # from which the next fit begins
    assert fit.last_values.tolist() == pytest.approx([10.0, 10.0], rel=1e-9)
    assert float(fit.advantages.mean()) == pytest.approx(0.0, abs=1e-9)


def test_the_level_shows_a_fall_as_bad_as_it_is():
    # Reward 1 a step; of 16 pieces of 32 steps one ends in a fall. V is a constant: its advantage before the fall is
    # 1 - V, so the lower V lags, the better the fall looks.
    ones, lengths = torch.ones(512, 1, dtype=torch.float64), torch.full((16,), 32)
    ends = flags(1, *[0] * 15)
    plain, levelled = (
        fit_baseline(ones, ones[:16], ones[:, 0], lengths, ends, None, 0.99, 0.95, level=level)
        for level in (False, True)
    )
    assert plain.last_values[0].item() == levelled.last_values[0].item() == 0.0
    assert levelled.advantages[31].item() < plain.advantages[31].item() - 5.0
    assert float(levelled.advantages.mean()) == pytest.approx(0.0, abs=1e-9)
