"""Action distributions: exact against hand computation and torch.distributions, and sampled as often as they say."""

from math import exp, log, pi

import numpy as np
import pytest
import torch
from torch import distributions as td
from torch.distributions import kl_divergence

from grouprl.envs.distributions import (
    Categorical,
    DiagonalGaussian,
    Distribution,
    IndependentBernoulli,
    MultiCategorical,
)
from grouprl.errors import UsageError

FAMILIES = [
    Categorical(1),
    Categorical(2),
    Categorical(5),
    MultiCategorical((4,)),
    MultiCategorical((3, 3)),
    MultiCategorical((2, 5, 1, 3)),
    DiagonalGaussian(1),
    DiagonalGaussian(3),
    IndependentBernoulli(1),
    IndependentBernoulli(4),
]
MASKABLE = [Categorical(2), Categorical(5), MultiCategorical((3, 3)), MultiCategorical((2, 5, 3))]


def parameters(distribution: Distribution, rows: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, distribution.n_params)))


def one_action(distribution: Distribution) -> tuple[tuple[int, ...], type]:
    """Shape and dtype of one action."""
    match distribution:
        case Categorical():
            return (), np.int64
        case MultiCategorical(nvec):
            return (len(nvec),), np.int64
        case DiagonalGaussian(n) | IndependentBernoulli(n):
            return (n,), np.float32


def in_torch(distribution: Distribution, params: torch.Tensor) -> list[td.Distribution]:
    """The components as torch's own distributions, whose log-probabilities, entropies and KLs add up."""
    match distribution:
        case Categorical():
            return [td.Categorical(logits=params)]
        case MultiCategorical(nvec):
            return [td.Categorical(logits=part) for part in params.split(list(nvec), 1)]
        case DiagonalGaussian(n):
            return [td.Independent(td.Normal(params[:, :n], params[:, n:].exp()), 1)]
        case IndependentBernoulli():
            return [td.Independent(td.Bernoulli(logits=params), 1)]


def each_component(distribution: Distribution, actions: torch.Tensor) -> list[torch.Tensor]:
    return list(actions.unbind(1)) if isinstance(distribution, MultiCategorical) else [actions.double()]


def forbid_some(distribution: Categorical | MultiCategorical, rows: int) -> np.ndarray:
    """A random mask that leaves the first choice of every component."""
    mask = np.random.default_rng(5).random((rows, distribution.n_params)) < 0.5
    nvec = (distribution.n,) if isinstance(distribution, Categorical) else distribution.nvec
    mask[:, np.cumsum((0, *nvec[:-1]))] = True
    return mask


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("distribution", FAMILIES, ids=str)
class TestEveryFamily:
    def test_log_prob_is_that_of_torch_distributions(self, distribution: Distribution) -> None:
        params = parameters(distribution, 64)
        actions = torch.from_numpy(distribution.sample(params.numpy().astype(np.float32), np.random.default_rng(1)))
        parts = zip(in_torch(distribution, params), each_component(distribution, actions), strict=True)
        expected = sum(part.log_prob(action) for part, action in parts)
        torch.testing.assert_close(distribution.log_prob(params, actions), expected)

    def test_entropy_is_that_of_torch_distributions(self, distribution: Distribution) -> None:
        params = parameters(distribution, 64)
        expected = sum(part.entropy() for part in in_torch(distribution, params))
        torch.testing.assert_close(distribution.entropy(params), expected)

    def test_kl_is_that_of_torch_distributions(self, distribution: Distribution) -> None:
        p, q = parameters(distribution, 64, seed=1), parameters(distribution, 64, seed=2)
        parts = zip(in_torch(distribution, p), in_torch(distribution, q), strict=True)
        torch.testing.assert_close(distribution.kl(p, q), sum(kl_divergence(a, b) for a, b in parts))

    def test_kl_to_itself_is_zero_to_float32_accuracy(self, distribution: Distribution) -> None:
        params = parameters(distribution, 64).float()
        torch.testing.assert_close(distribution.kl(params, params.clone()), torch.zeros(64))

    def test_samples_and_modes_have_the_shape_and_dtype_of_their_family(self, distribution: Distribution) -> None:
        params = parameters(distribution, 7).numpy().astype(np.float32)
        for actions in (distribution.sample(params, np.random.default_rng(0)), distribution.mode(params)):
            shape, dtype = one_action(distribution)
            assert actions.shape == (7, *shape)
            assert actions.dtype == dtype

    def test_sampling_follows_the_generator_and_leaves_the_parameters(self, distribution: Distribution) -> None:
        params = parameters(distribution, 50).numpy().astype(np.float32)
        before = params.copy()
        first = distribution.sample(params, np.random.default_rng(3))
        np.testing.assert_array_equal(first, distribution.sample(params, np.random.default_rng(3)))
        np.testing.assert_array_equal(params, before)

    def test_the_mode_has_the_greatest_log_prob(self, distribution: Distribution) -> None:
        params = parameters(distribution, 100).float()
        mode = torch.from_numpy(distribution.mode(params.numpy()))
        for seed in range(10):
            other = torch.from_numpy(distribution.sample(params.numpy(), np.random.default_rng(seed)))
            assert (distribution.log_prob(params, mode) >= distribution.log_prob(params, other) - 1e-6).all()


@pytest.mark.parametrize(
    "probabilities", [[1.0], [0.3, 0.7], [0.001, 0.999], [0.5, 0.25, 0.25], [0.4, 0.01, 0.3, 0.29]]
)
def test_categorical_samples_as_often_as_its_probabilities(probabilities: list[float]) -> None:
    logits = np.tile(np.log(probabilities, dtype=np.float32) + 3, (200_000, 1))
    samples = Categorical(len(probabilities)).sample(logits, np.random.default_rng(0))
    counts = np.bincount(samples, minlength=len(probabilities))
    assert chi_square(counts, np.array(probabilities)) < 16  # P < 0.0012 for 3 degrees of freedom, less for fewer


def test_categorical_samples_rows_independently() -> None:
    logits = np.tile(np.float32([[0, -50, -50], [-50, 0, -50], [-50, -50, 0]]), (100, 1))
    samples = Categorical(3).sample(logits, np.random.default_rng(0))
    np.testing.assert_array_equal(samples, np.tile([0, 1, 2], 100))


@pytest.mark.parametrize("nvec", [(2, 2), (2, 3), (3, 1, 2)])
def test_multi_categorical_samples_every_combination_as_often_as_the_product_of_probabilities(
    nvec: tuple[int, ...],
) -> None:
    parts = [np.arange(1, n + 1) / np.arange(1, n + 1).sum() for n in nvec]
    logits = np.tile(np.log(np.concatenate(parts)).astype(np.float32), (100_000, 1))
    samples = MultiCategorical(nvec).sample(logits, np.random.default_rng(0))
    joint = parts[0]
    for part in parts[1:]:
        joint = np.multiply.outer(joint, part)
    counts = np.bincount(np.ravel_multi_index(tuple(samples.T), nvec), minlength=joint.size)
    assert chi_square(counts, joint.ravel()) < 21  # P < 0.001 for 5 degrees of freedom


def test_bernoulli_samples_each_switch_independently() -> None:
    probabilities = np.array([0.2, 0.9])
    logits = np.tile(np.log(probabilities / (1 - probabilities)).astype(np.float32), (100_000, 1))
    samples = IndependentBernoulli(2).sample(logits, np.random.default_rng(0))
    counts = np.bincount((samples @ [1, 2]).astype(int), minlength=4)
    assert chi_square(counts, np.array([0.8 * 0.1, 0.2 * 0.1, 0.8 * 0.9, 0.2 * 0.9])) < 17  # P < 0.001, 3 degrees


def test_gaussian_samples_have_the_mean_and_std_of_their_parameters() -> None:
    n = 100_000
    params = np.tile(np.float32([2.0, -1.0, log(0.5), log(3.0)]), (n, 1))
    z = (DiagonalGaussian(2).sample(params, np.random.default_rng(0)) - [2.0, -1.0]) / [0.5, 3.0]
    np.testing.assert_allclose(z.mean(0), 0, atol=4 / n**0.5)
    np.testing.assert_allclose(z.T @ z / n, np.eye(2), atol=4 * (2 / n) ** 0.5)


def test_categorical_values_agree_with_hand_computation() -> None:
    params = torch.tensor([[0.0, log(3.0)]])  # probabilities 1/4 and 3/4
    even = torch.zeros(1, 2)
    categorical = Categorical(2)
    torch.testing.assert_close(categorical.log_prob(params, torch.tensor([1])), torch.tensor([log(0.75)]))
    entropy = 0.25 * log(4) + 0.75 * log(4 / 3)
    torch.testing.assert_close(categorical.entropy(params), torch.tensor([entropy]))
    torch.testing.assert_close(categorical.kl(params, even), torch.tensor([log(2) - entropy]))


def test_multi_categorical_values_agree_with_hand_computation() -> None:
    params = torch.tensor([[0.0, log(3.0), 0.0, 0.0, log(2.0)]])  # (1/4, 3/4) and (1/4, 1/4, 1/2)
    multi = MultiCategorical((2, 3))
    torch.testing.assert_close(multi.log_prob(params, torch.tensor([[1, 2]])), torch.tensor([log(0.75 * 0.5)]))
    entropy = 0.25 * log(4) + 0.75 * log(4 / 3) + 0.5 * log(4) + 0.5 * log(2)
    torch.testing.assert_close(multi.entropy(params), torch.tensor([entropy]))
    torch.testing.assert_close(multi.kl(params, torch.zeros(1, 5)), torch.tensor([log(2) + log(3) - entropy]))
    np.testing.assert_array_equal(multi.mode(params.numpy()), [[1, 2]])


def test_gaussian_values_agree_with_hand_computation() -> None:
    params = torch.tensor([[1.0, 0.0, log(2.0), 0.0]])  # means 1, 0; stds 2, 1
    gaussian = DiagonalGaussian(2)
    by_hand = -0.5 * 1.0 - log(2) - 0.5 * 9.0 - log(2 * pi)  # z = (3 - 1) / 2 = 1 and -3
    torch.testing.assert_close(gaussian.log_prob(params, torch.tensor([[3.0, -3.0]])), torch.tensor([by_hand]))
    torch.testing.assert_close(gaussian.entropy(params), torch.tensor([log(2) + 1 + log(2 * pi)]))
    # KL(N(1, 2) || N(0, 1)) = -log 2 + (4 + 1) / 2 - 1 / 2
    torch.testing.assert_close(gaussian.kl(params, torch.zeros(1, 4)), torch.tensor([2 - log(2)]))
    np.testing.assert_array_equal(gaussian.mode(params.numpy()), [[1.0, 0.0]])


def test_bernoulli_values_agree_with_hand_computation() -> None:
    params = torch.tensor([[log(3.0), 0.0]])  # on with probability 3/4 and 1/2
    bernoulli = IndependentBernoulli(2)
    torch.testing.assert_close(bernoulli.log_prob(params, torch.tensor([[0.0, 1.0]])), torch.tensor([log(0.125)]))
    entropy = 0.25 * log(4) + 0.75 * log(4 / 3) + log(2)
    torch.testing.assert_close(bernoulli.entropy(params), torch.tensor([entropy]))
    torch.testing.assert_close(bernoulli.kl(params, torch.zeros(1, 2)), torch.tensor([2 * log(2) - entropy]))
    np.testing.assert_array_equal(bernoulli.mode(params.numpy()), [[1.0, 0.0]])


@pytest.mark.parametrize("distribution", MASKABLE, ids=str)
class TestMasks:
    def test_masked_actions_are_never_sampled(self, distribution: Categorical | MultiCategorical) -> None:
        rows = 20_000
        # The masked logits are by far the largest, so that any leak shows.
        mask = forbid_some(distribution, rows)
        logits = np.where(mask, 0, 50).astype(np.float32)
        actions = distribution.sample(distribution.apply_mask(logits, mask), np.random.default_rng(0))
        nvec = (distribution.n,) if isinstance(distribution, Categorical) else distribution.nvec
        columns = actions.reshape(rows, -1) + np.cumsum((0, *nvec[:-1]))
        assert np.take_along_axis(mask, columns, axis=1).all()
        modes = distribution.mode(distribution.apply_mask(logits, mask)).reshape(rows, -1)
        assert np.take_along_axis(mask, modes + np.cumsum((0, *nvec[:-1])), axis=1).all()

    def test_masked_logits_get_exactly_zero_and_the_others_finite_gradients(
        self, distribution: Categorical | MultiCategorical
    ) -> None:
        mask = forbid_some(distribution, 30)
        params = parameters(distribution, 30).float().requires_grad_()
        masked = distribution.apply_mask(params, torch.from_numpy(mask))
        reference = distribution.apply_mask(parameters(distribution, 30, seed=9).float(), torch.from_numpy(mask))
        actions = torch.from_numpy(distribution.sample(masked.detach().numpy(), np.random.default_rng(0)))
        outputs = {
            "log_prob": distribution.log_prob(masked, actions),
            "entropy": distribution.entropy(masked),
            "kl": distribution.kl(masked, reference),
            "reverse kl": distribution.kl(reference, masked),
        }
        for name, output in outputs.items():
            (gradient,) = torch.autograd.grad(output.sum(), params, retain_graph=True)
            assert output.isfinite().all(), name
            assert gradient.isfinite().all(), name
            assert (gradient[~torch.from_numpy(mask)] == 0).all(), name
            assert (gradient[torch.from_numpy(mask)] != 0).any(), name

    def test_numpy_and_torch_mask_alike(self, distribution: Categorical | MultiCategorical) -> None:
        params, mask = parameters(distribution, 10).float(), forbid_some(distribution, 10)
        in_numpy = distribution.apply_mask(params.numpy(), mask)
        assert in_numpy.dtype == np.float32
        np.testing.assert_array_equal(in_numpy, distribution.apply_mask(params, torch.from_numpy(mask)).numpy())

    def test_a_mask_that_forbids_nothing_changes_nothing(self, distribution: Categorical | MultiCategorical) -> None:
        params = parameters(distribution, 10)
        torch.testing.assert_close(distribution.apply_mask(params, torch.ones(params.shape)), params, rtol=0, atol=0)

    def test_a_fully_masked_row_still_gives_a_valid_action(self, distribution: Categorical | MultiCategorical) -> None:
        params = parameters(distribution, 5000).numpy().astype(np.float32)
        actions = distribution.sample(
            distribution.apply_mask(params, np.zeros(params.shape, bool)), np.random.default_rng(0)
        )
        sizes = np.array(distribution.n if isinstance(distribution, Categorical) else distribution.nvec)
        assert ((actions >= 0) & (actions < sizes)).all()


def test_a_masked_distribution_is_the_distribution_over_the_actions_left() -> None:
    masked = Categorical(3).apply_mask(torch.tensor([[0.0, 7.0, log(3.0)]]), np.array([[1, 0, 1]]))
    left = torch.tensor([[0.0, log(3.0)]])
    torch.testing.assert_close(Categorical(3).entropy(masked), Categorical(2).entropy(left))
    torch.testing.assert_close(Categorical(3).log_prob(masked, torch.tensor([2])), torch.tensor([log(0.75)]))
    assert masked.softmax(-1)[0, 1] == 0.0


def test_a_mask_without_any_action_left_is_an_error_that_names_the_row() -> None:
    Categorical(2).check_mask(np.array([[1, 0], [0, 1]]))
    with pytest.raises(UsageError, match="environment 1 forbids all 2 actions"):
        Categorical(2).check_mask(np.array([[1, 0], [0, 0]]))
    MultiCategorical((2, 3)).check_mask(np.array([[1, 0, 0, 0, 1]]))
    with pytest.raises(UsageError, match="environment 0 forbids every choice of component 1"):
        MultiCategorical((2, 3)).check_mask(np.array([[1, 1, 0, 0, 0]]))


@pytest.mark.parametrize("shape", [(2,), (1, 3), (1, 2, 1)])
def test_a_mask_of_the_wrong_shape_is_an_error_that_names_the_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"allowed is \(n, 2\)"):
        Categorical(2).check_mask(np.ones(shape))


@pytest.mark.parametrize("distribution", [DiagonalGaussian(2), IndependentBernoulli(2)], ids=str)
def test_distributions_without_a_choice_among_actions_refuse_masks(
    distribution: DiagonalGaussian | IndependentBernoulli,
) -> None:
    with pytest.raises(UsageError, match="Discrete and MultiDiscrete"):
        distribution.apply_mask(np.zeros((1, 2), np.float32), np.ones((1, 2)))
    with pytest.raises(UsageError, match="Discrete and MultiDiscrete"):
        distribution.check_mask(np.ones((1, 2)))


def test_extreme_logits_neither_warn_nor_overflow() -> None:
    logits = np.float32([[1e8, -1e8], [-1e8, 1e8], [3e38, 0]])
    with np.errstate(all="raise", under="ignore"):
        for seed in range(50):
            rng = np.random.default_rng(seed)
            np.testing.assert_array_equal(Categorical(2).sample(logits, rng), [0, 1, 0])
            np.testing.assert_array_equal(IndependentBernoulli(2).sample(logits[:2], rng), [[1, 0], [0, 1]])
            wide = np.concatenate([logits, np.full((3, 1), -1e8, np.float32)], axis=1)
            np.testing.assert_array_equal(Categorical(3).sample(wide, rng), [0, 1, 0])


def test_a_rare_action_keeps_its_frequency_in_both_samplers() -> None:
    rare = exp(-8.0)
    for n_actions in (2, 3):
        logits = np.zeros((300_000, n_actions), np.float32)
        logits[:, 0] = log(rare * (n_actions - 1) / (1 - rare))
        count = int((Categorical(n_actions).sample(logits, np.random.default_rng(0)) == 0).sum())
        expected = 300_000 * rare  # about 100, with a standard deviation of 10
        assert abs(count - expected) < 4 * expected**0.5
