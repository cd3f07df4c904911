r"""Action distributions: one class per family, all maths in float32 or better.

A distribution is a batch `[B]` of independent densities over one action each. Randomness has an
owner: `sample` maps *given* noise to actions, `draw_noise` draws such noise from a NumPy generator
that the caller owns, so an action depends on (seed, environment, step) and on nothing else.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

__all__ = ["Categorical", "DiagonalGaussian", "Distribution"]

_HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


class Distribution(Protocol):
    """What every family offers; `action` is `[B, ...]`, all results are `[B]`."""

    def sample(self, noise: Tensor) -> Tensor:
        """Map noise, as drawn for this family, to actions `[B, ...]`."""

    def mode(self) -> Tensor:
        """Most likely action, `[B, ...]`."""

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density (or log-mass) of each action, `[B]`."""

    def entropy(self) -> Tensor:
        """Entropy in nats, `[B]`."""

    def kl(self, other: Self) -> Tensor:
        """KL(self || other) in nats, `[B]`."""


class Categorical:
    r"""Distribution over `n` classes given unnormalised log-probabilities.

    Sampling is the Gumbel-max trick, :math:`a = \arg\max_i (l_i + g_i)` with standard Gumbel
    noise :math:`g` (Maddison et al. 2014, section 2): one addition and one argmax per draw.

    Args:
        logits: `[B, n]`, any finite numbers.

    Example:
        >>> dist = Categorical(torch.tensor([[0.0, 0.0], [9.0, -9.0]]))
        >>> dist.mode().tolist(), [round(h, 3) for h in dist.entropy().tolist()]
        ([0, 0], [0.693, 0.0])
    """

    def __init__(self, logits: Tensor) -> None:
        log_p = torch.log_softmax(logits.float() if logits.dtype.itemsize < 4 else logits, -1)
        # The difference of two finite logits may overflow, and 0 * -inf is NaN.
        self.log_p = log_p.clamp(min=torch.finfo(log_p.dtype).min)

    @staticmethod
    def draw_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Standard Gumbel noise, float32, of the given shape (`[..., n]`)."""
        exponential = rng.standard_exponential(shape, dtype=np.float32)
        return -np.log(np.maximum(exponential, np.finfo(np.float32).tiny))

    def sample(self, noise: Tensor) -> Tensor:
        """Classes `[B]` (int64) for Gumbel noise `[B, n]`."""
        return (self.log_p + noise).argmax(-1)

    def mode(self) -> Tensor:
        """Most likely class, `[B]`, the first among equals."""
        return self.log_p.argmax(-1)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability of classes `[B]`."""
        return self.log_p.gather(-1, action.long().unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """Entropy `[B]` in nats."""
        return -(self.log_p.exp() * self.log_p).sum(-1)

    def kl(self, other: Categorical) -> Tensor:
        """KL(self || other) `[B]` in nats."""
        return (self.log_p.exp() * (self.log_p - other.log_p)).sum(-1)


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
        return -(0.5 * z * z + self.log_std + _HALF_LOG_2PI).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy `[B]` in nats: a constant plus the sum of the log standard deviations."""
        per_component = (self.log_std + 0.5 + _HALF_LOG_2PI).expand_as(self.mean)
        return per_component.sum(-1)

    def kl(self, other: DiagonalGaussian) -> Tensor:
        """KL(self || other) `[B]` in nats."""
        ratio = torch.exp(2.0 * (self.log_std - other.log_std))
        shift = (self.mean - other.mean) * torch.exp(-other.log_std)
        terms = 0.5 * (ratio + shift * shift - 1.0) + other.log_std - self.log_std
        return terms.expand_as(self.mean).sum(-1)
