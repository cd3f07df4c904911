"""Means over the valid rows of a tensor, and the point where a spread is only rounding."""

import torch
from torch import Tensor


def select(x: Tensor, valid: Tensor | None) -> Tensor:
    """Return ``x`` with 0 where not ``valid``; to be done before any product of ``x``.

    Afterwards it is too late: the gradient of a product with a dropped NaN is 0 * NaN.
    """
    return x if valid is None else torch.where(valid, x, 0.0)


def masked_mean(x: Tensor, valid: Tensor | None) -> Tensor:
    """Return the mean of ``x`` where ``valid``; 0 if nothing is.

    NaN and inf in invalid entries reach neither the mean nor its gradient.
    """
    if valid is None:
        return x.mean()
    return select(x, valid).sum() / valid.sum().clamp(min=1)


def masked_moments(x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return mean and population variance of ``x`` where ``valid``.

    A variance that the rounding of equal numbers could have made comes back as exactly 0, so
    that a constant is told from a signal.
    """
    mean = masked_mean(x, valid)
    variance = masked_mean((x - mean).square(), valid)
    # The mean of equal numbers is off by a few units in their last place, and so is every
    # difference from it.
    noise = 8 * torch.finfo(x.dtype).eps * mean
    return mean, torch.where(variance > noise.square(), variance, 0.0)
