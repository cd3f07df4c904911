import math
from decimal import Decimal

import numpy as np
import pytest
import scipy.integrate
import scipy.stats
import torch
from families import HIGH, LOW, above_one, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo.distributions import GSDE, Beta, DiagonalGaussian, SquashedGaussian

SEEDS = st.integers(0, 2**31)
F64 = torch.float64


def one(value):
    return torch.full((1, 1), float(value), dtype=F64)


def squashed(mean, std, low=-2.0, high=3.0):
    return SquashedGaussian(one(mean), one(math.log(std)), low, high)


def inverse(dist, x):
    """The sample whose action is `x`, a number."""
    share = (x - dist.low.item()) / (dist.high - dist.low).item()
    return one(math.atanh(2.0 * share - 1.0))


# --- SquashedGaussian


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.3), (1.0, 1.0), (-0.5, 0.8), (0.3, 2.0)])
def test_the_squashed_density_is_that_of_the_environments_action_in_its_units(mean, std):
    dist = squashed(mean, std)

    def density(x):
        return math.exp(dist.log_prob(inverse(dist, x)).item())

    def probability(high):
        return scipy.integrate.quad(density, -2.0 + 1e-12, high, limit=400)[0]

    assert probability(3.0 - 1e-12) == pytest.approx(1.0, abs=1e-6)
    for x in (-1.5, 0.0, 1.0, 2.5):
        below = scipy.stats.norm(mean, std).cdf(inverse(dist, x).item())
        assert probability(x) == pytest.approx(below, abs=1e-7)


@given(st.floats(-12.0, 12.0), st.floats(-3.0, 3.0), st.floats(0.1, 3.0))
def test_the_correction_is_exact_far_out(u, mean, std):
    """Compared with 28 digits, where the naive log(1 - tanh(u)^2) loses everything."""
    cosh = (Decimal(u).exp() + Decimal(-u).exp()) / 2
    expected = scipy.stats.norm(mean, std).logpdf(u) - float((Decimal("2.5") / cosh**2).ln())
    assert squashed(mean, std).log_prob(one(u)).item() == pytest.approx(expected, abs=1e-8)


@pytest.mark.parametrize("mean", [0.0, 0.4, -1.0, 3.0, -8.0, 20.0])
@pytest.mark.parametrize("log_std", [-5.0, -1.0, 0.0, 0.7, 1.4, 2.0])
def test_the_squashed_entropy_is_accurate_and_its_gradient_too(mean, log_std):
    parameters = one(mean).requires_grad_(), one(log_std).requires_grad_()
    entropy = SquashedGaussian(*parameters, -2.0, 3.0).entropy()

    def expected(function):
        """Expectation over the sample, in standard deviations from the mean."""
        kink = -mean / math.exp(log_std)

        def at(z):
            return function(mean + math.exp(log_std) * z, z) * scipy.stats.norm.pdf(z)

        points = [kink] if abs(kink) < 9.0 else None
        return scipy.integrate.quad(at, -9.0, 9.0, points=points, limit=300)[0]

    def log_slope(u, z):
        return math.log(2.5) + 2.0 * (math.log(2.0) - abs(u) - math.log1p(math.exp(-2.0 * abs(u))))

    exact = log_std + 0.5 + 0.5 * math.log(2.0 * math.pi) + expected(log_slope)
    assert entropy.item() == pytest.approx(exact, abs=1e-4)
    entropy.backward()
    by_mean = expected(lambda u, z: -2.0 * math.tanh(u))
    by_log_std = 1.0 + expected(lambda u, z: -2.0 * math.tanh(u) * math.exp(log_std) * z)
    assert parameters[0].grad.item() == pytest.approx(by_mean, abs=3e-4)
    assert parameters[1].grad.item() == pytest.approx(by_log_std, abs=3e-4)


def test_the_squashed_kl_is_an_integral_and_the_bounds_play_no_part():
    p, q = squashed(0.3, 0.7), squashed(-0.5, 1.2)

    def at(x):
        log_p, log_q = (dist.log_prob(inverse(p, x)).item() for dist in (p, q))
        return math.exp(log_p) * (log_p - log_q)

    integral = scipy.integrate.quad(at, -2.0 + 1e-10, 3.0 - 1e-10, limit=400)[0]
    assert integral == pytest.approx(p.kl(q).item(), abs=1e-6)


def test_squashed_draws_follow_their_density():
    rows = 20_000
    dist = SquashedGaussian(torch.full((rows, 2), 0.4), torch.tensor([-0.5, 0.6]), LOW, HIGH)
    noise = SquashedGaussian.draw_noise(np.random.default_rng(5), (rows, 2))
    actions = dist.to_env(dist.sample(torch.from_numpy(noise))).double()
    assert ((actions >= LOW) & (actions <= HIGH)).all()
    for column, std in enumerate(np.exp([-0.5, 0.6])):
        low, high = LOW[column].item(), HIGH[column].item()

        def cdf(x, low=low, high=high, std=std):
            return scipy.stats.norm(0.4, std).cdf(np.arctanh(2.0 * (x - low) / (high - low) - 1.0))

        inside = np.clip(actions[:, column].numpy(), low + 1e-9, high - 1e-9)
        assert scipy.stats.kstest(inside, cdf).pvalue > 0.01


@settings(max_examples=200)
@given(st.floats(-1e4, 1e4, width=32), st.floats(-200.0, 200.0, width=32), st.floats(1e-3, 1e4))
def test_an_environments_action_is_never_beyond_its_bounds(low, u, width):
    low_bound, high_bound = np.float32(low), np.float32(low + width)
    if not low_bound < high_bound:
        return
    bounds = torch.tensor([low_bound]), torch.tensor([high_bound])
    dist = SquashedGaussian(torch.zeros(1, 1), torch.zeros(1), *bounds)
    assert low_bound <= dist.to_env(torch.tensor([[u]])).item() <= high_bound
    shapes = torch.ones(1, 1), torch.ones(1, 1)
    noise = torch.full((1, 24), u / 20.0)
    for action in (Beta(*shapes, *bounds).sample(noise), Beta(*shapes, *bounds).mode()):
        assert low_bound <= action.item() <= high_bound
        assert math.isfinite(Beta(*shapes, *bounds).log_prob(action).item())


def test_the_squashed_mode_is_the_median_of_the_actions():
    dist = squashed(0.8, 0.6)
    below = scipy.stats.norm(0.8, 0.6).cdf(dist.mode().item())
    assert below == pytest.approx(0.5)
    assert dist.to_env(dist.mode()).item() == pytest.approx(-2.0 + 2.5 * (math.tanh(0.8) + 1.0))


# --- Beta


@given(SEEDS, st.floats(0.1, 100.0))
def test_the_beta_is_scipys_beta(seed, scale):
    alpha, beta = above_one(seed, 3, 2, scale=scale), above_one(seed + 1, 3, 2, scale=scale)
    dist = Beta(alpha, beta, LOW, HIGH)
    low, width = LOW.double().numpy(), (HIGH - LOW).double().numpy()
    reference = scipy.stats.beta(alpha.numpy(), beta.numpy(), low, width)
    x = torch.from_numpy(np.random.default_rng(seed).uniform(0.01, 0.99, (3, 2)))
    action = LOW + (HIGH - LOW) * x
    np.testing.assert_allclose(dist.log_prob(action), reference.logpdf(action).sum(-1), rtol=1e-7)
    np.testing.assert_allclose(dist.entropy(), reference.entropy().sum(-1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 1.0), (2.0, 5.0), (1.3, 1.1), (40.0, 25.0)])
def test_beta_density_entropy_and_kl_are_integrals_of_the_density(alpha, beta):
    dist = Beta(one(alpha), one(beta), -1.0, 3.0)
    other = Beta(one(2.5), one(1.5), -1.0, 3.0)

    def integral(integrand):
        def at(x):
            log_p = dist.log_prob(one(x)).item()
            return math.exp(log_p) * integrand(log_p, other.log_prob(one(x)).item())

        return scipy.integrate.quad(at, -1.0, 3.0, limit=300)[0]

    assert integral(lambda p, q: 1.0) == pytest.approx(1.0, abs=1e-6)
    assert integral(lambda p, q: -p) == pytest.approx(dist.entropy().item(), abs=1e-6)
    assert integral(lambda p, q: p - q) == pytest.approx(dist.kl(other).item(), abs=1e-5)


@pytest.mark.parametrize(
    ("alpha", "beta"), [(1.0, 1.0), (1.0, 7.0), (1.5, 1.2), (5.0, 3.0), (300.0, 500.0)]
)
def test_beta_draws_follow_scipys_beta(alpha, beta):
    rows = 100_000
    dist = Beta(torch.full((rows, 1), alpha), torch.full((rows, 1), beta), -2.0, 5.0)
    noise = Beta.draw_noise(np.random.default_rng(0), (rows, dist.noise_size))
    draws = dist.sample(torch.from_numpy(noise)).squeeze(-1)
    assert draws.dtype == torch.float32
    assert scipy.stats.kstest(draws, scipy.stats.beta(alpha, beta, -2.0, 7.0).cdf).pvalue > 0.01


def test_components_of_the_beta_are_independent():
    rows = 20_000
    dist = Beta(torch.full((rows, 2), 1.5), torch.full((rows, 2), 1.5), LOW, HIGH)
    noise = Beta.draw_noise(np.random.default_rng(8), (rows, dist.noise_size))
    draws = dist.sample(torch.from_numpy(noise))
    assert abs(np.corrcoef(draws.T.numpy())[0, 1]) < 0.03
    assert dist.noise_size == 48


def test_no_candidate_of_the_beta_is_accepted_as_seldom_as_promised():
    """Of one candidate in twenty at most is nothing made: 0.05 ** 6 < 2e-8."""
    rng = np.random.default_rng(9)
    z, u = rng.standard_normal(1_000_000), rng.random(1_000_000)
    for shape in (1.0, 1.5, 3.0, 30.0):
        d = shape - 1.0 / 3.0
        v = np.maximum(1.0 + z / np.sqrt(9.0 * d), 1e-50) ** 3
        accepted = np.log(u) < 0.5 * z * z + d * (1.0 - v + np.log(v))
        assert (1.0 - accepted.mean()) ** 6 < 2e-8


@given(SEEDS)
def test_the_beta_mode_has_the_highest_density(seed):
    alpha, beta = above_one(seed, 1, 1, scale=4.0), above_one(seed + 1, 1, 1, scale=4.0)
    dist = Beta(alpha, beta, -1.0, 3.0)
    best = dist.log_prob(dist.mode()).item()
    others = torch.linspace(-1.0, 3.0, 41, dtype=F64).unsqueeze(-1)
    assert (dist.log_prob(others) <= best + 1e-9).all()


def test_the_mode_of_a_flat_beta_is_the_centre():
    assert Beta(one(1.0), one(1.0), -1.0, 3.0).mode().item() == 1.0


def test_the_beta_density_is_finite_on_the_bounds_and_beyond():
    dist = Beta(one(3.0), one(1.0), -1.0, 3.0)
    for action in (-5.0, -1.0, 3.0, 5.0):
        assert math.isfinite(dist.log_prob(one(action)).item())


def test_beta_draws_keep_away_from_the_bounds():
    extreme = torch.tensor([[1.0, 1e6]]), torch.tensor([[1e6, 1.0]])
    dist = Beta(*extreme, -1.0, 1.0)
    noise = Beta.draw_noise(np.random.default_rng(0), (1, 48))
    for action in (dist.sample(torch.from_numpy(noise)), dist.mode()):
        assert (action.abs() < 1.0).all()
        assert torch.isfinite(dist.log_prob(action)).all()


# --- GSDE


def gsde(seed, rows=4, size=2, width=3):
    mean, features = normal(seed, rows, size), normal(seed + 1, rows, width)
    return mean, features, normal(seed + 2, width, size, scale=0.5)


@given(SEEDS)
def test_gsde_is_a_gaussian_whose_variance_is_that_of_its_noise(seed):
    mean, features, log_std = gsde(seed)
    dist = GSDE(mean, features, log_std)
    variance = (features**2) @ log_std.exp() ** 2
    action = normal(seed + 3, 4, 2)
    expected = scipy.stats.norm(mean, (variance + 1e-6).sqrt()).logpdf(action).sum(-1)
    np.testing.assert_allclose(dist.log_prob(action), expected)
    twin = DiagonalGaussian(mean, 0.5 * torch.log(variance + 1e-6))
    assert torch.equal(dist.entropy(), twin.entropy())
    assert torch.equal(dist.kl(GSDE(mean + 1.0, features, log_std)), twin.kl(_shifted(twin)))
    assert torch.equal(dist.mode(), mean)


def _shifted(gaussian):
    return DiagonalGaussian(gaussian.mean + 1.0, gaussian.log_std)


def test_a_gsde_sample_is_the_mean_plus_features_times_the_matrix():
    mean, features, log_std = gsde(0)
    noise = normal(9, 4, 6)
    action = GSDE(mean, features, log_std).sample(noise)
    for row in range(4):
        matrix = noise[row].reshape(3, 2) * log_std.exp()
        torch.testing.assert_close(action[row], mean[row] + features[row] @ matrix)


def test_gsde_draws_of_fresh_matrices_follow_the_density():
    rows = 20_000
    mean, features, log_std = (x.float() for x in gsde(3, rows=1))
    dist = GSDE(mean.expand(rows, 2), features.expand(rows, 3), log_std)
    noise = GSDE.draw_noise(np.random.default_rng(2), (rows, dist.noise_size))
    draws = dist.sample(torch.from_numpy(noise))
    for column in range(2):
        std = dist.log_std[0, column].exp().item()
        reference = scipy.stats.norm(mean[0, column].item(), std)
        assert scipy.stats.kstest(draws[:, column], reference.cdf).pvalue > 0.01


def test_with_one_matrix_equal_states_get_equal_actions():
    mean, features, log_std = gsde(1)
    features[1], mean[1] = features[0], mean[0]
    noise = normal(4, 1, 6).expand(4, 6)
    action = GSDE(mean, features, log_std).sample(noise)
    assert torch.equal(action[0], action[1])
    assert not torch.equal(action[0], action[2])


def test_gsde_without_features_is_finite():
    dist = GSDE(torch.ones(1, 2), torch.zeros(1, 3), torch.zeros(3, 2))
    assert dist.sample(torch.ones(1, 6)).tolist() == [[1.0, 1.0]]
    assert math.isfinite(dist.entropy().item())
