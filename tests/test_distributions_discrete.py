import itertools
import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from families import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ppo.distributions import Bernoulli, Categorical, MultiCategorical

SEEDS = st.integers(0, 2**31)
# Up to the ends of float32: what networks that have blown up say.
LOGITS = st.floats(-3.0, 3.0) | st.sampled_from([0.0, 1e4, -1e4, 1e30, -1e30, 3.4e38, -3.4e38])
LOWEST = torch.finfo(torch.float32).min


@st.composite
def masked(draw):
    """Logits and a mask with at least one legal class per position; classes per position."""
    nvec = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    size = draw(st.integers(1, 4)), sum(nvec)
    logits = torch.from_numpy(draw(arrays(np.float64, size, elements=LOGITS))).float()
    mask = draw(arrays(np.bool_, size))
    for start, n in zip(itertools.accumulate([0, *nvec]), nvec, strict=False):
        for row in mask[:, start : start + n]:
            row[draw(st.integers(0, n - 1))] = True
    return nvec, logits.requires_grad_(), torch.from_numpy(mask)


def legal(mask, nvec, action):
    """Whether the mask allows every position of an action, `[B]`."""
    starts = torch.tensor(list(itertools.accumulate([0, *nvec]))[:-1])
    return mask.gather(-1, starts + action).all(-1)


# --- masks


@settings(max_examples=150)
@given(masked(), SEEDS)
def test_what_a_mask_forbids_is_never_drawn(case, seed):
    nvec, logits, mask = case
    dist = MultiCategorical(logits, nvec, mask)
    draws = 20
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        noise = MultiCategorical.draw_noise(rng, tuple(logits.shape))
        action = dist.sample(torch.from_numpy(noise))
        assert legal(mask, nvec, action).all()
        assert (dist.log_prob(action) > -1e29).all() or (logits.abs() > 1e29).any()
    assert legal(mask, nvec, dist.mode()).all()


@settings(max_examples=100)
@given(masked(), SEEDS)
def test_masked_results_and_gradients_are_finite_for_every_finite_logit(case, seed):
    nvec, logits, mask = case
    dist = MultiCategorical(logits, nvec, mask)
    rng = np.random.default_rng(seed)
    anything = torch.from_numpy(rng.integers(0, nvec, (len(logits), len(nvec))))
    other = MultiCategorical(normal(seed, *logits.shape).float(), nvec, mask)
    results = [dist.log_prob(anything), dist.entropy(), other.kl(dist)]
    assert all(torch.isfinite(result).all() for result in results)
    (dist.log_prob(dist.mode()) + dist.entropy() + dist.kl(other)).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[~mask] == 0.0).all()


@given(SEEDS, st.integers(2, 6))
def test_a_masked_categorical_is_that_of_the_legal_classes_alone(seed, n):
    rng = np.random.default_rng(seed)
    mask = torch.from_numpy(rng.random(n) < 0.5)
    mask[rng.integers(n)] = True
    logits, others = normal(seed, 3, n, scale=3.0), normal(seed + 1, 3, n, scale=3.0)
    dist, other = (Categorical(x, mask.expand(3, n)) for x in (logits, others))
    alone, other_alone = Categorical(logits[:, mask]), Categorical(others[:, mask])
    torch.testing.assert_close(dist.log_p[:, mask], alone.log_p)
    torch.testing.assert_close(dist.entropy(), alone.entropy())
    torch.testing.assert_close(dist.kl(other), alone.kl(other_alone))
    assert torch.equal(dist.mode(), mask.nonzero().squeeze(-1)[alone.mode()])
    assert (dist.log_p[:, ~mask] < -1e29).all()
    assert torch.isfinite(dist.log_p).all()


def test_a_mask_that_allows_everything_changes_nothing():
    logits = normal(0, 5, 4, scale=3.0)
    everything = torch.ones(5, 4, dtype=torch.bool)
    assert torch.equal(Categorical(logits, everything).log_p, Categorical(logits).log_p)
    pairs = torch.ones(5, 8, dtype=torch.bool)
    assert torch.equal(Bernoulli(logits, pairs).logits, Bernoulli(logits).logits)


def test_legal_logits_as_low_as_can_be_are_drawn_before_illegal_ones():
    logits = torch.tensor([[LOWEST, LOWEST, 5.0]])
    dist = Categorical(logits, torch.tensor([[False, True, False]]))
    noise = Categorical.draw_noise(np.random.default_rng(0), (500, 3))
    assert dist.mode().tolist() == [1]
    assert (dist.sample(torch.from_numpy(noise)) == 1).all()


def test_a_row_without_a_legal_class_spoils_no_other_row():
    """Rows that are no transitions may have any mask."""
    mask = torch.tensor([[False, False], [True, False]])
    logits = torch.zeros(2, 2, requires_grad=True)
    for dist in (Categorical(logits, mask), Bernoulli(logits[:, :1], mask)):
        logits.grad = None
        (dist.entropy() + dist.log_prob(dist.mode())).sum().backward()
        assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("mask", [torch.ones(2, 3), torch.ones(2, 3, dtype=torch.int8)])
def test_a_mask_must_be_bool(mask):
    with pytest.raises(TypeError, match="mask has dtype"):
        Categorical(torch.zeros(2, 3), mask)
    with pytest.raises(TypeError, match="mask has dtype"):
        MultiCategorical(torch.zeros(2, 3), (1, 2), mask)
    with pytest.raises(TypeError, match="mask has dtype"):
        Bernoulli(torch.zeros(2, 3), mask)


def test_a_mask_is_never_broadcast():
    with pytest.raises(ValueError, match="mask has shape"):
        Categorical(torch.zeros(2, 3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask has shape"):
        Bernoulli(torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask has shape"):
        MultiCategorical(torch.zeros(2, 3), (1, 2), torch.ones(1, 3, dtype=torch.bool))


# --- MultiCategorical


@given(SEEDS, st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_a_multi_categorical_is_one_categorical_after_the_other(seed, nvec):
    rng = np.random.default_rng(seed)
    logits, others = normal(seed, 4, sum(nvec)), normal(seed + 1, 4, sum(nvec))
    dist, other = MultiCategorical(logits, nvec), MultiCategorical(others, nvec)
    singles, other_singles = (
        [Categorical(part) for part in x.split(nvec, -1)] for x in (logits, others)
    )
    noise = torch.from_numpy(MultiCategorical.draw_noise(rng, (4, dist.noise_size)))
    pieces = noise.split(nvec, -1)
    action = dist.sample(noise)
    one_by_one = [s.sample(piece) for s, piece in zip(singles, pieces, strict=True)]
    assert torch.equal(action, torch.stack(one_by_one, -1))
    assert action.dtype == torch.int64
    assert torch.equal(dist.mode(), torch.stack([s.mode() for s in singles], -1))
    log_p = sum(s.log_prob(action[:, k]) for k, s in enumerate(singles))
    torch.testing.assert_close(dist.log_prob(action), log_p)
    torch.testing.assert_close(dist.entropy(), sum(s.entropy() for s in singles))
    pairs = zip(singles, other_singles, strict=True)
    torch.testing.assert_close(dist.kl(other), sum(s.kl(o) for s, o in pairs))


def test_the_probabilities_of_all_combinations_sum_to_one_and_give_the_entropy():
    nvec = (2, 3, 3)
    actions = torch.tensor(list(itertools.product(*map(range, nvec))))
    logits = normal(1, 1, 8).expand(len(actions), 8)
    dist = MultiCategorical(logits, nvec)
    log_p = dist.log_prob(actions)
    assert log_p.exp().sum().item() == pytest.approx(1.0)
    assert -(log_p.exp() * log_p).sum().item() == pytest.approx(dist.entropy()[0].item())


def test_draws_of_two_positions_have_their_frequencies_and_are_independent():
    first, second = np.array([0.2, 0.8]), np.array([0.5, 0.1, 0.4])
    rows = 20_000
    logits = torch.from_numpy(np.log(np.concatenate([first, second]))).expand(rows, 5)
    noise = MultiCategorical.draw_noise(np.random.default_rng(0), (rows, 5))
    draws = MultiCategorical(logits, (2, 3)).sample(torch.from_numpy(noise))
    counts = np.bincount((draws[:, 0] * 3 + draws[:, 1]).numpy(), minlength=6)
    expected = rows * np.outer(first, second).reshape(-1)
    assert scipy.stats.chisquare(counts, expected).pvalue > 0.01


# --- Bernoulli


@given(SEEDS, st.integers(1, 4), st.floats(0.1, 3.0))
def test_the_bernoulli_is_scipys_bernoulli(seed, size, scale):
    logits, others = normal(seed, 3, size, scale=scale), normal(seed + 1, 3, size)
    dist, other = Bernoulli(logits), Bernoulli(others)
    action = torch.from_numpy(np.random.default_rng(seed).integers(2, size=(3, size)))
    p, q = (scipy.special.expit(x.numpy()) for x in (logits, others))
    rest, other_rest = (scipy.special.expit(-x.numpy()) for x in (logits, others))
    expected = scipy.stats.bernoulli.logpmf(action.numpy(), p).sum(-1)
    np.testing.assert_allclose(dist.log_prob(action), expected, rtol=1e-9)
    entropy = scipy.special.entr(p) + scipy.special.entr(rest)
    np.testing.assert_allclose(dist.entropy(), entropy.sum(-1), rtol=1e-9, atol=1e-12)
    kl = scipy.special.rel_entr(p, q) + scipy.special.rel_entr(rest, other_rest)
    np.testing.assert_allclose(dist.kl(other), kl.sum(-1), rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(dist.mode(), p > 0.5)


@given(SEEDS)
def test_a_bernoulli_is_a_categorical_of_two_classes(seed):
    logits = normal(seed, 4, 1, scale=3.0)
    dist, twin = Bernoulli(logits), Categorical(torch.cat([torch.zeros(4, 1), logits], -1))
    action = torch.from_numpy(np.random.default_rng(seed).integers(2, size=(4, 1)))
    torch.testing.assert_close(dist.log_prob(action), twin.log_prob(action[:, 0]))
    torch.testing.assert_close(dist.entropy(), twin.entropy())


def test_bernoulli_draws_have_their_frequencies():
    probabilities, rows = np.array([0.03, 0.5, 0.9]), 20_000
    logits = torch.from_numpy(scipy.special.logit(probabilities)).expand(rows, 3)
    noise = Bernoulli.draw_noise(np.random.default_rng(4), (rows, 3))
    draws = Bernoulli(logits).sample(torch.from_numpy(noise))
    assert draws.dtype == torch.int64
    for ones, p in zip(draws.sum(0).tolist(), probabilities, strict=True):
        assert scipy.stats.binomtest(ones, rows, p).pvalue > 0.01


def test_logistic_noise_follows_the_logistic_distribution():
    noise = Bernoulli.draw_noise(np.random.default_rng(1), (5000, 2))
    assert scipy.stats.kstest(noise.reshape(-1), scipy.stats.logistic.cdf).pvalue > 0.01


@settings(max_examples=100)
@given(arrays(np.float64, (3, 2), elements=LOGITS), arrays(np.bool_, (3, 2, 2)), SEEDS)
def test_bits_that_a_mask_forbids_are_never_drawn_and_gradients_stay_finite(x, allowed, seed):
    allowed[..., 0] |= ~allowed.any(-1)
    logits, mask = torch.from_numpy(x).float().requires_grad_(), torch.from_numpy(allowed)
    dist = Bernoulli(logits, mask.flatten(1))
    rng = np.random.default_rng(seed)
    for _ in range(10):
        action = dist.sample(torch.from_numpy(Bernoulli.draw_noise(rng, (3, 2))))
        assert mask.gather(-1, action.unsqueeze(-1)).all()
    assert mask.gather(-1, dist.mode().unsqueeze(-1)).all()
    anything = torch.from_numpy(rng.integers(2, size=(3, 2)))
    other = Bernoulli(torch.zeros(3, 2), mask.flatten(1))
    results = [dist.log_prob(anything), dist.entropy(), dist.kl(other), other.kl(dist)]
    assert all(torch.isfinite(result).all() for result in results)
    (dist.log_prob(dist.mode()) + dist.entropy() + dist.kl(other)).sum().backward()
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[~mask.all(-1)] == 0.0).all()


def test_a_forced_bit_has_no_entropy_and_a_forbidden_one_no_probability():
    mask = torch.tensor([[True, False, False, True]])
    dist = Bernoulli(torch.tensor([[3.0, -3.0]]), mask)
    assert dist.mode().tolist() == [[0, 1]]
    assert dist.entropy().item() == dist.log_prob(torch.tensor([[0, 1]])).item() == 0.0
    assert -math.inf < dist.log_prob(torch.tensor([[1, 1]])).item() < -1e29
