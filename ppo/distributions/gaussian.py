"""Normal distributions with independent components."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["DiagonalGaussian"]

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


class DiagonalGaussian:
    r"""Normal distribution with independent components.

    .. math:: \log p(a) = -\sum_i \left[\tfrac12 z_i^2 + \log\sigma_i + \tfrac12\log 2\pi\right],
              \quad z_i = (a_i - \mu_i) / \sigma_i

    The density is that of the *raw* action; clipping to the bounds of a space happens at the
    environment, where it changes nothing about the density of what was sampled.

    Args:
        mean: `[B, d]`.
        log_std: `[B, d]` or `[d]`.

    Example:
        >>> dist = DiagonalGaussian(torch.zeros(1, 2), torch.zeros(2))
        >>> round(dist.log_prob(torch.zeros(1, 2)).item(), 4)  # -log(2 pi)
        -1.8379
    """

    def __init__(self, mean: Tensor, log_std: Tensor) -> None:
        self.mean = mean.float() if mean.dtype.itemsize < 4 else mean
        self.log_std = log_std.to(self.mean.dtype)

    @property
    def noise_size(self) -> int:
        """One number per component."""
        return self.mean.shape[-1]

    @staticmethod
    def draw_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Standard normal noise, float32, of the given shape (`[..., d]`)."""
        return rng.standard_normal(shape, dtype=np.float32)

    def sample(self, noise: Tensor) -> Tensor:
        """Actions `[B, d]` for standard normal noise `[B, d]`."""
        return self.mean + self.log_std.exp() * noise

    def mode(self) -> Tensor:
        """The mean, `[B, d]`."""
        return self.mean

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density of raw actions `[B, d]`, summed over components, `[B]`."""
        z = (action - self.mean) * torch.exp(-self.log_std)
        # Spreads that all rows have in common are summed once.
        return -0.5 * (z * z).sum(-1) - (self.log_std + _HALF_LOG_2PI).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy `[B]` in nats: a constant plus the sum of the log standard deviations."""
        of_all = (self.log_std + (0.5 + _HALF_LOG_2PI)).sum(-1)
        return of_all.expand(self.mean.shape[:-1])

    def kl(self, other: DiagonalGaussian) -> Tensor:
        """KL(self || other) `[B]` in nats."""
        ratio = torch.exp(2.0 * (self.log_std - other.log_std))
        shift = (self.mean - other.mean) * torch.exp(-other.log_std)
        terms = 0.5 * (ratio + shift * shift - 1.0) + other.log_std - self.log_std
        return terms.expand_as(self.mean).sum(-1)
