"""The closed-form baseline whose fits are pulled to the one before."""

import pytest
import torch

from grouprl.errors import TrainingError, UsageError
from grouprl.objective import RandomFeatures, fit_baseline, fit_pulled_baseline, gae

ENDS = torch.tensor([True, False])


def batch(n_features=6, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    phi = torch.randn(50, n_features, generator=generator, dtype=dtype)
    last = torch.randn(2, n_features, generator=generator, dtype=dtype)
    phi[:, -1] = last[:, -1] = 1.0
    return phi, last, torch.randn(50, generator=generator, dtype=dtype), torch.tensor([20, 30]), ENDS


def test_by_hand():
    # One feature, always 1; two samples of one step. V = 3; A = r + .5 V(last) - V; the first terminated.
    ones = torch.ones(2, 1, dtype=torch.float64)
    rewards, lengths = torch.tensor([5.0, 1.0], dtype=torch.float64), torch.tensor([1, 1])
    fit = fit_pulled_baseline(ones, ones, rewards, lengths, ENDS, torch.tensor([3.0]).double(), 0.5, 0.9, pull=0.25)
    assert fit.values.tolist() == [3.0, 3.0]
    assert fit.last_values.tolist() == [0.0, 3.0]
    assert fit.advantages.tolist() == [2.0, -0.5]
    assert fit.weights.tolist() == pytest.approx([3.0 + 1.5 / (2 + 2 * 0.25)])  # w + (Phi'Phi + n pull)^-1 Phi'A
    assert fit.valued_by.tolist() == [3.0]


@pytest.mark.parametrize("n_features", [6, 80])
def test_the_weights_are_the_least_of_what_the_fit_minimises(n_features):
    phi, last, rewards, lengths, ends = batch(n_features)
    before = torch.linspace(-1, 1, n_features, dtype=torch.float64)
    fit = fit_pulled_baseline(phi, last, rewards, lengths, ends, before, 0.9, 0.8, pull=0.3)
    targets = fit.values + fit.advantages
    w = fit.weights.clone().requires_grad_()
    away = (w - before).square() * phi.square().mean(0)
    ((targets - phi @ w).square().sum() + 50 * 0.3 * away.sum()).backward()
    assert w.grad.abs().max() < 1e-9


def test_values_and_advantages_are_those_before_the_batch():
    phi, last, rewards, lengths, ends = batch()
    before = torch.linspace(-1, 1, 6, dtype=torch.float64)
    fit = fit_pulled_baseline(phi, last, rewards, lengths, ends, before, 0.9, 0.8)
    after = torch.where(ends, 0.0, last @ before)
    torch.testing.assert_close(fit.values, phi @ before)
    torch.testing.assert_close(fit.advantages, gae(rewards, phi @ before, after, lengths, 0.9, 0.8))
    first = fit_pulled_baseline(phi, last, rewards, lengths, ends, None, 0.9, 0.8)
    torch.testing.assert_close(first.advantages, gae(rewards, 0 * rewards, torch.zeros(2).double(), lengths, 0.9, 0.8))


def test_batch_after_batch_it_comes_to_the_fixed_point_of_all():
    # The same batch again and again: V = Phi w with Phi'A(w) = 0 does not depend on the pull.
    phi, last, rewards, lengths, ends = batch()
    found = []
    for pull in (0.03, 0.3):
        weights = None
        for _ in range(3000):
            weights = fit_pulled_baseline(phi, last, rewards, lengths, ends, weights, 0.9, 0.8, pull).weights
        found.append(weights)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-8)
    refitted = fit_baseline(phi, last, rewards, lengths, ends, found[0], 0.9, 0.8, ridge=1e-12, sweeps=500)
    torch.testing.assert_close(refitted.weights, found[0], rtol=1e-3, atol=1e-4)


def test_what_it_refuses():
    phi, last, rewards, lengths, ends = batch()
    with pytest.raises(UsageError, match=r"pull must be above 0, got 0; 0\.3 suits"):
        fit_pulled_baseline(phi, last, rewards, lengths, ends, None, 0.9, 0.8, pull=0)
    with pytest.raises(UsageError, match="weights has shape"):
        fit_pulled_baseline(phi, last, rewards, lengths, ends, torch.zeros(5), 0.9, 0.8)
    rewards[3] = float("nan")
    with pytest.raises(TrainingError, match="raise baseline_pull"):
        fit_pulled_baseline(phi, last, rewards, lengths, ends, None, 0.9, 0.8)
    phi[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="observations"):
        fit_pulled_baseline(phi, last, rewards, lengths, ends, None, 0.9, 0.8)


def test_cosines_vary_slowly():
    features = RandomFeatures.create(16, 512, seed=0, cosine=True)
    assert features.n_outputs == 512 + 2 * 16 + 3
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(64, 16, generator=generator)
    near = s + torch.randn(64, 16, generator=generator) * 0.1
    elapsed = torch.zeros(64)
    phi, other = features(s, elapsed)[:, :512], features(near, elapsed)[:, :512]
    # E[cos a cos b] of Gaussian frequencies and uniform phases is half the Gaussian kernel: width 2 sqrt(D) = 8.
    kernel = torch.exp(-(s - s.roll(1, 0)).square().sum(1) / (2 * 8.0**2)) / 2
    torch.testing.assert_close((phi * phi.roll(1, 0)).mean(1), kernel, rtol=0, atol=0.1)
    wide = RandomFeatures.create(16, 512, seed=0)
    assert (phi - other).square().mean() < (wide(s, elapsed) - wide(near, elapsed))[:, :512].square().mean() / 2
    weights = torch.linspace(-1, 1, features.n_outputs)
    torch.testing.assert_close(features.dot(s, elapsed, weights), features(s, elapsed) @ weights, rtol=1e-4, atol=1e-4)
