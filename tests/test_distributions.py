import math

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppo.distributions import Categorical, DiagonalGaussian

SEEDS = st.integers(0, 2**32 - 1)
F64 = torch.float64


def normal(seed, *shape, scale=1.0):
    return torch.from_numpy(scale * np.random.default_rng(seed).standard_normal(shape))


def gaussian(seed, rows=3, size=2):
    return DiagonalGaussian(normal(seed, rows, size), normal(seed + 1, size, scale=0.5))


# --- Categorical


@given(SEEDS, st.integers(1, 6), st.floats(0.1, 30.0))
def test_categorical_is_torchs_categorical(seed, n, scale):
    logits, others = normal(seed, 5, n, scale=scale), normal(seed + 1, 5, n, scale=scale)
    ours, theirs = Categorical(logits), torch.distributions.Categorical(logits=logits)
    action = torch.from_numpy(np.random.default_rng(seed).integers(n, size=5))
    torch.testing.assert_close(ours.log_prob(action), theirs.log_prob(action))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    assert torch.equal(ours.mode(), theirs.mode)
    other = torch.distributions.Categorical(logits=others)
    expected = torch.distributions.kl_divergence(theirs, other)
    torch.testing.assert_close(ours.kl(Categorical(others)), expected)


@given(SEEDS, st.integers(1, 6))
def test_categorical_probabilities_sum_to_one_and_give_the_entropy(seed, n):
    logits = normal(seed, n, scale=3.0)
    dist = Categorical(logits.expand(n, n))
    log_p = dist.log_prob(torch.arange(n))
    torch.testing.assert_close(log_p.exp().sum(), torch.ones((), dtype=F64))
    torch.testing.assert_close(dist.entropy()[0], -(log_p.exp() * log_p).sum())
    assert 0.0 <= dist.entropy()[0] <= math.log(n) + 1e-12


@given(SEEDS, st.floats(-50.0, 50.0))
def test_a_constant_added_to_the_logits_changes_nothing(seed, constant):
    logits = normal(seed, 4, 3)
    plain, shifted = Categorical(logits), Categorical(logits + constant)
    torch.testing.assert_close(plain.log_p, shifted.log_p)
    noise = torch.from_numpy(Categorical.draw_noise(np.random.default_rng(seed), (4, 3)))
    assert torch.equal(plain.sample(noise), shifted.sample(noise))


def test_categorical_samples_have_the_frequencies_of_their_probabilities():
    probabilities = np.array([0.5, 0.3, 0.15, 0.05])
    rows = 20_000
    noise = torch.from_numpy(Categorical.draw_noise(np.random.default_rng(0), (rows, 4)))
    logits = torch.from_numpy(np.log(probabilities)).expand(rows, 4)
    draws = Categorical(logits).sample(noise)
    counts = torch.bincount(draws, minlength=4).numpy()
    assert draws.dtype == torch.int64
    assert scipy.stats.chisquare(counts, rows * probabilities).pvalue > 0.01


def test_gumbel_noise_follows_the_gumbel_distribution():
    noise = Categorical.draw_noise(np.random.default_rng(1), (5000, 2))
    assert noise.dtype == np.float32
    assert noise.shape == (5000, 2)
    assert np.isfinite(noise).all()
    assert scipy.stats.kstest(noise.reshape(-1), scipy.stats.gumbel_r.cdf).pvalue > 0.01


def test_gumbel_noise_is_finite_where_the_exponential_draw_is_zero():
    class Zero:
        def standard_exponential(self, shape, dtype):
            return np.zeros(shape, dtype)

    assert np.isfinite(Categorical.draw_noise(Zero(), (3,))).all()


def test_the_mode_is_the_first_among_equals():
    assert Categorical(torch.tensor([[1.0, 2.0, 2.0], [0.0, 0.0, 0.0]])).mode().tolist() == [1, 0]


@pytest.mark.parametrize("size", [1e3, 1e30, 3e38])
def test_categorical_is_finite_for_every_finite_logit(size):
    logits = torch.tensor([[size, -size, 0.0]], requires_grad=True)
    dist = Categorical(logits)
    assert dist.entropy().item() == pytest.approx(0.0)
    assert dist.log_prob(torch.tensor([0])).item() == pytest.approx(0.0)
    assert dist.kl(dist).item() == pytest.approx(0.0)
    (dist.entropy() + dist.log_prob(torch.tensor([0]))).sum().backward()
    assert torch.isfinite(logits.grad).all()


# --- DiagonalGaussian


@given(SEEDS, st.integers(1, 4))
def test_the_gaussian_is_torchs_gaussian(seed, size):
    mean, log_std = normal(seed, 5, size), normal(seed + 1, size)
    ours = DiagonalGaussian(mean, log_std)
    theirs = torch.distributions.Independent(torch.distributions.Normal(mean, log_std.exp()), 1)
    action = normal(seed + 2, 5, size, scale=3.0)
    torch.testing.assert_close(ours.log_prob(action), theirs.log_prob(action))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    assert torch.equal(ours.mode(), mean)
    other = torch.distributions.Independent(
        torch.distributions.Normal(mean + 1.0, torch.ones_like(mean)), 1
    )
    expected = torch.distributions.kl_divergence(theirs, other)
    kl = ours.kl(DiagonalGaussian(mean + 1.0, torch.zeros(size, dtype=F64)))
    torch.testing.assert_close(kl, expected)


def test_the_gaussian_is_scipys_gaussian():
    mean, log_std = np.array([0.3, -2.0]), np.array([-1.0, 0.7])
    action = np.array([0.5, 1.5])
    dist = DiagonalGaussian(torch.tensor(mean)[None], torch.tensor(log_std))
    reference = scipy.stats.multivariate_normal(mean, np.diag(np.exp(2 * log_std)))
    assert dist.log_prob(torch.tensor(action)[None]).item() == pytest.approx(
        reference.logpdf(action)
    )
    assert dist.entropy().item() == pytest.approx(reference.entropy())


@pytest.mark.parametrize(("mean", "log_std"), [(0.0, 0.0), (1.5, -1.0), (-4.0, 1.2)])
def test_gaussian_density_entropy_and_kl_are_integrals_of_the_density(mean, log_std):
    dist = DiagonalGaussian(torch.full((1, 1), mean, dtype=F64), torch.tensor([log_std]))
    other = DiagonalGaussian(torch.zeros(1, 1, dtype=F64), torch.tensor([0.5]))
    reach = 12 * math.exp(log_std)

    def integral(integrand):
        def at(x):
            action = torch.full((1, 1), x, dtype=F64)
            log_p = dist.log_prob(action).item()
            return math.exp(log_p) * integrand(log_p, other.log_prob(action).item())

        return scipy.integrate.quad(at, mean - reach, mean + reach, points=[mean])[0]

    assert integral(lambda p, q: 1.0) == pytest.approx(1.0)
    assert integral(lambda p, q: -p) == pytest.approx(dist.entropy().item())
    assert integral(lambda p, q: p - q) == pytest.approx(dist.kl(other).item())


def test_gaussian_samples_have_the_mean_and_the_spread_they_were_given():
    rows = 20_000
    mean, log_std = torch.tensor([2.0, -1.0]), torch.tensor([-1.0, 0.5])
    noise = DiagonalGaussian.draw_noise(np.random.default_rng(2), (rows, 2))
    assert noise.dtype == np.float32
    draws = DiagonalGaussian(mean.expand(rows, 2), log_std).sample(torch.from_numpy(noise))
    for column in range(2):
        reference = scipy.stats.norm(mean[column].item(), math.exp(log_std[column].item()))
        assert scipy.stats.kstest(draws[:, column].numpy(), reference.cdf).pvalue > 0.01
    assert abs(np.corrcoef(draws.T.numpy())[0, 1]) < 0.03


def test_a_log_std_per_row_is_as_good_as_a_shared_one():
    mean, log_std, action = normal(0, 4, 2), normal(1, 2), normal(2, 4, 2)
    shared, rows = DiagonalGaussian(mean, log_std), DiagonalGaussian(mean, log_std.expand(4, 2))
    assert torch.equal(shared.log_prob(action), rows.log_prob(action))
    assert torch.equal(shared.entropy(), rows.entropy())
    assert torch.equal(shared.kl(rows), torch.zeros(4, dtype=F64))
    assert shared.entropy().shape == shared.kl(rows).shape == (4,)


# --- both


@pytest.mark.parametrize("name", ["log_prob", "entropy", "kl"])
def test_categorical_gradients_are_the_derivatives(name):
    action = torch.tensor([0, 2, 1])
    other = Categorical(normal(5, 3, 3))
    arguments = {"log_prob": (action,), "entropy": (), "kl": (other,)}[name]
    logits = normal(3, 3, 3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda logits: getattr(Categorical(logits), name)(*arguments), (logits,)
    )


@pytest.mark.parametrize("name", ["log_prob", "entropy", "kl", "sample"])
def test_gaussian_gradients_are_the_derivatives(name):
    fixed = normal(5, 3, 2)
    arguments = {"log_prob": (fixed,), "entropy": (), "kl": (gaussian(9),), "sample": (fixed,)}
    mean, log_std = normal(3, 3, 2).requires_grad_(), normal(4, 2).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda mean, log_std: getattr(DiagonalGaussian(mean, log_std), name)(*arguments[name]),
        (mean, log_std),
        check_undefined_grad=False,
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    logits = torch.tensor([[1.0, -2.0, 3.0]], dtype=dtype)
    dist = Categorical(logits)
    assert dist.entropy().dtype == dist.log_prob(torch.tensor([1])).dtype == torch.float32
    torch.testing.assert_close(dist.log_p, torch.log_softmax(logits.float(), -1))
    mean = torch.tensor([[1.0, -2.0]], dtype=dtype)
    normal_dist = DiagonalGaussian(mean, torch.zeros(2, dtype=dtype))
    assert normal_dist.log_prob(mean).dtype == normal_dist.entropy().dtype == torch.float32
