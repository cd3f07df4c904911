"""`ppo.losses.ppo_loss` and its derivative, written out in NumPy for a recorded policy.

The outputs of a policy are three vectors. What follows them is a handful of operations on one
number per row, for which a call of torch costs more than the work. Tests compare the derivative
with autograd's, term by term.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from ppo.learner.eager import LossSettings
from ppo.losses import MAX_LOG_RATIO

_NOISE = {np.dtype(kind): 8.0 * float(np.finfo(kind).eps) for kind in (np.float32, np.float64)}

__all__ = ["normalized", "policy_loss", "share", "value_loss"]


def normalized(x: np.ndarray) -> np.ndarray:
    """`ppo.advantages.normalize` of a vector."""
    mean = float(np.add.reduce(x)) / len(x)  # in pairs: exact enough for a constant
    centered = x - mean
    variance = float(centered.dot(centered)) / len(x)
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
    num_rows: int,
) -> tuple[float, float, float, np.ndarray]:
    """What these rows add to a minibatch's policy loss, approximate KL and clip fraction.

    Args:
        log_probs: Of the policy as it is now, `[R]`.
        old_log_probs: Of the policy that acted, `[R]`.
        advantages: Normalised, if they are to be, `[R]`.
        settings: Of the loss.
        num_rows: All rows of the minibatch, B.

    Returns:
        The three numbers, and d loss / d log-prob `[R]`.
    """
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
    surrogate *= pulls
    surrogate /= -num_rows
    outside = np.abs(change) > low if high == low else (change < -low) | (change > high)
    change -= log_ratio
    fraction = np.count_nonzero(outside) / num_rows
    return -share(objective, num_rows), share(change, num_rows), fraction, surrogate


def value_loss(
    values: np.ndarray,
    returns: np.ndarray,
    old_values: np.ndarray | None,
    settings: LossSettings,
    num_rows: int,
) -> tuple[float, np.ndarray]:
    """What these rows add to a minibatch's value loss.

    Args:
        values: Of the critic as it is now, `[R]`.
        returns: What they should be, `[R]`.
        old_values: Of the critic at the rollout, `[R]`; None where they are not clipped to.
        settings: Of the loss.
        num_rows: All rows of the minibatch, B.

    Returns:
        The number, and d (value_coef * loss) / d value `[R]`.
    """
    error = values - returns
    slope = 2.0 * settings.value_coef / num_rows
    limit = settings.value_clip_range
    if limit is None:
        return float(error.dot(error)) / num_rows, slope * error
    assert old_values is not None
    square = error * error
    error *= slope
    step = values - old_values
    clipped = np.clip(step, -limit, limit)
    other = old_values + clipped - returns
    other *= other
    error[(clipped != step) & (other > square)] = 0.0
    np.maximum(square, other, out=square)
    return share(square, num_rows), error


def share(x: np.ndarray, num_rows: int) -> float:
    """What these rows add to a mean; as a product with ones, in half the time of a sum."""
    return float(x.dot(_ones(len(x), x.dtype))) / num_rows


@functools.lru_cache
def _ones(size: int, dtype: np.dtype[Any]) -> np.ndarray:
    return np.ones(size, dtype)
