"""`ppo.losses.ppo_loss` and its derivative, written out in NumPy for a recorded policy.

The outputs of a policy are three vectors. What follows them is a handful of operations on one
number per row, for which a call of torch costs more than the work. Tests compare the derivative
with autograd's, term by term.
"""

from __future__ import annotations

import math

import numpy as np

from ppo.learner.eager import LossSettings
from ppo.losses import MAX_LOG_RATIO
from ppo.rollout import Batch

_NOISE = {np.dtype(kind): 8.0 * float(np.finfo(kind).eps) for kind in (np.float32, np.float64)}

__all__ = ["normalized", "policy_loss", "value_loss"]


def normalized(x: np.ndarray) -> np.ndarray:
    """`ppo.advantages.normalize` of a vector."""
    mean = _mean(x)
    centered = x - mean
    variance = float(np.dot(centered, centered)) / len(x)
    noise = _NOISE[x.dtype] * mean
    if variance <= noise * noise:
        return np.zeros_like(x)
    centered /= max(math.sqrt(variance), 1e-8)
    return centered


def policy_loss(
    log_probs: np.ndarray,
    old_log_probs: np.ndarray,
    advantages: np.ndarray,
    settings: LossSettings,
    d_log_probs: np.ndarray,
) -> tuple[float, float, float]:
    """Write d loss / d log-prob `[B]`; returns policy loss, approximate KL and clip fraction."""
    low = high = settings.clip_range
    if settings.clip_range_high is not None:
        high = settings.clip_range_high
    difference = log_probs - old_log_probs
    log_ratio = np.maximum(difference, -MAX_LOG_RATIO)
    np.minimum(log_ratio, MAX_LOG_RATIO, out=log_ratio)
    change = np.expm1(log_ratio)
    ratio = np.exp(log_ratio)
    surrogate = ratio * advantages
    clipped = np.maximum(ratio, 1.0 - low)
    np.minimum(clipped, 1.0 + high, out=clipped)
    clipped *= advantages
    # Only rows whose unclipped term is the minimum pull, and none beyond the clamp.
    pulls = surrogate <= clipped
    pulls &= log_ratio == difference
    objective = np.minimum(surrogate, clipped)
    if settings.dual_clip is not None:
        bound = np.where(advantages < 0.0, settings.dual_clip * advantages, -np.inf)
        pulls &= objective >= bound
        np.maximum(objective, bound, out=objective)
    np.multiply(surrogate, pulls, out=d_log_probs)
    d_log_probs /= -len(difference)
    outside = np.abs(change) > low if high == low else (change < -low) | (change > high)
    change -= log_ratio
    return -_mean(objective), _mean(change), np.count_nonzero(outside) / len(change)


def value_loss(
    values: np.ndarray, batch: Batch, settings: LossSettings, d_values: np.ndarray
) -> float:
    """Write d (value_coef * loss) / d value `[B]`; returns the value loss."""
    returns = batch.returns.numpy()
    error = values - returns
    square = error * error
    np.multiply(error, 2.0 * settings.value_coef / len(error), out=d_values)
    limit = settings.value_clip_range
    if limit is not None:
        old = batch.values.numpy()
        step = values - old
        clipped = np.clip(step, -limit, limit)
        other = old + clipped - returns
        other *= other
        d_values[(clipped != step) & (other > square)] = 0.0
        np.maximum(square, other, out=square)
    return _mean(square)


def _mean(x: np.ndarray) -> float:
    return float(np.add.reduce(x)) / len(x)
