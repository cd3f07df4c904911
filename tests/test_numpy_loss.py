"""The loss in NumPy and its derivative, against `ppo_loss` and autograd, row by row."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import law, seeds

from ppo import Batch, normalize, ppo_loss
from ppo.learner.eager import LossSettings
from ppo.learner.numpy_loss import normalized, policy_loss, value_loss
from ppo.losses import MAX_LOG_RATIO

settings_of_losses = st.builds(
    LossSettings,
    clip_range=st.sampled_from([0.0, 0.1, 0.2, 0.9]),
    entropy_coef=st.just(0.0),
    value_coef=st.sampled_from([0.0, 0.5, 2.0]),
    value_clip_range=st.sampled_from([None, 0.1, 1.0]),
    normalize_advantages=st.just(False),
    clip_range_high=st.sampled_from([None, 0.0, 0.28, 2.0]),
    dual_clip=st.sampled_from([None, 1.001, 1.1, 3.0]),
)


def draw_batch(seed, rows, scale):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(6, rows, generator=generator, dtype=torch.float64)
    names = ("log_probs", "values", "advantages", "returns")
    batch = Batch(obs=numbers[0], actions=numbers[0], **dict(zip(names, numbers[:4], strict=True)))
    log_probs = batch.log_probs + scale * numbers[4]
    return batch, log_probs.requires_grad_(), (batch.values + numbers[5]).requires_grad_()


@law
@given(
    settings_of_losses,
    seeds,
    st.integers(1, 40),
    st.integers(0, 39),
    st.sampled_from([0.05, 0.5, 3.0, 30.0]),
)
def test_every_term_and_its_slope_is_that_of_autograd_in_parts_too(
    settings, seed, rows, cut, scale
):
    batch, log_probs, values = draw_batch(seed, rows, scale)
    loss = ppo_loss(
        log_probs,
        batch.log_probs,
        batch.advantages,
        values,
        batch.returns,
        clip_range=settings.clip_range,
        value_coef=settings.value_coef,
        value_clip_range=settings.value_clip_range,
        old_values=batch.values,
        clip_range_high=settings.clip_range_high,
        dual_clip=settings.dual_clip,
    )
    loss.total.backward()
    actor = [x.detach().numpy() for x in (log_probs, batch.log_probs, batch.advantages)]
    critic = [x.detach().numpy() for x in (values, batch.returns, batch.values)]
    cut = cut % rows
    ours, slopes = np.zeros(4), []
    for part in (slice(cut), slice(cut, rows)):
        *metrics, d_log_probs = policy_loss(*(x[part] for x in actor), settings, rows)
        error, d_values = value_loss(*(x[part] for x in critic), settings, rows)
        ours += [*metrics, error]
        slopes.append([d_log_probs, d_values])
    d_log_probs, d_values = np.concatenate(slopes, axis=1)
    wanted = [loss.policy_loss, loss.approx_kl, loss.clip_fraction, loss.value_loss]
    assert ours == pytest.approx([part.item() for part in wanted], rel=1e-9, abs=1e-12)
    np.testing.assert_allclose(d_log_probs, log_probs.grad.numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(d_values, values.grad.numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dual_clip", [None, 3.0])
@pytest.mark.parametrize("log_ratio", [-MAX_LOG_RATIO - 1.0, MAX_LOG_RATIO + 1.0, 1e30, -1e30])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
def test_beyond_the_limit_of_the_log_ratio_all_is_finite_and_nothing_pulls(
    log_ratio, advantage, dual_clip
):
    settings = LossSettings(0.2, 0.0, 0.5, None, False, None, dual_clip)
    new, advantages = np.array([log_ratio], np.float32), np.array([advantage], np.float32)
    *metrics, slopes = policy_loss(new, 0.0 * new, advantages, settings, 1)
    assert all(map(math.isfinite, metrics))
    assert slopes == [0.0]


@law
@given(seeds, st.integers(1, 40), st.sampled_from([0.0, 1e-3, 1.0]))
def test_normalized_advantages_are_those_of_the_library(seed, rows, spread):
    x = 3.0 + spread * np.random.default_rng(seed).normal(size=rows)
    np.testing.assert_allclose(normalized(x), normalize(x), rtol=1e-9, atol=1e-9)
