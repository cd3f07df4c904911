"""Beta distributions between bounds."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ppo._checks import at_least_float32

__all__ = ["Beta"]

_CANDIDATES = 6  # of which one is accepted with probability 1 - 2e-8 or more
_EDGE = torch.finfo(torch.float32).eps  # distance kept from the bounds, over their difference


class Beta:
    r"""Independent Beta distributions, scaled to bounds: no density is lost beyond them.

    .. math:: x = \frac{a - l}{h - l}, \quad \log p(a) = \sum_i \left[(\alpha_i - 1) \log x_i
              + (\beta_i - 1) \log(1 - x_i) - \log B(\alpha_i, \beta_i)
              - \log(h_i - l_i)\right]

    As the policy of a bounded action: Chou et al. 2017. A sample is the share
    :math:`g_1 / (g_1 + g_2)` of one of two Gamma variables, each made by the rejection method of
    Marsaglia and Tsang (2000) from six candidates given in advance; that none of them is accepted,
    and the first one is taken all the same, has probability 2e-8 at most. Samples stay 1.2e-7 of
    the width away from the bounds, and the density of what is nearer is that at this distance.

    Args:
        alpha: `[B, d]`, at least 1.
        beta: `[B, d]`, at least 1.
        low: Lower bounds `[d]`, or one for all.
        high: Upper bounds `[d]`, finite and above the lower ones.

    Example:
        >>> dist = Beta(torch.tensor([[2.0]]), torch.tensor([[4.0]]), low=-1.0, high=3.0)
        >>> dist.mode().item(), round(dist.log_prob(torch.tensor([[0.0]])).item(), 4)
        (0.0, -0.6399)
    """

    NOISE_PER_COMPONENT = 4 * _CANDIDATES
    """Two Gamma variables, for each the candidates, two numbers for each of them."""

    def __init__(
        self, alpha: Tensor, beta: Tensor, low: Tensor | float, high: Tensor | float
    ) -> None:
        self.alpha, self.beta = at_least_float32(alpha, beta)
        self.low, self.high = (
            torch.as_tensor(bound, dtype=self.alpha.dtype, device=self.alpha.device)
            for bound in (low, high)
        )

    @property
    def noise_size(self) -> int:
        """24 numbers per component."""
        return self.NOISE_PER_COMPONENT * self.alpha.shape[-1]

    @staticmethod
    def draw_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Standard normal noise, float32, of the given shape (`[..., 24 d]`)."""
        return rng.standard_normal(shape, dtype=np.float32)

    def sample(self, noise: Tensor) -> Tensor:
        """Actions `[B, d]` between the bounds, for standard normal noise `[B, 24 d]`."""
        first, second = noise.unflatten(-1, (-1, 2, 2 * _CANDIDATES)).unbind(-2)
        one, other = _gamma(self.alpha, first), _gamma(self.beta, second)
        return self._to_bounds(one / (one + other))

    def mode(self) -> Tensor:
        """Most likely action `[B, d]`; the centre where all are equally likely."""
        left, right = ((x - 1.0).clamp(min=1e-30) for x in (self.alpha, self.beta))
        return self._to_bounds(left / (left + right))

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-density of actions `[B, d]` within the bounds, summed over components, `[B]`."""
        x = ((action - self.low) / (self.high - self.low)).clamp(_EDGE, 1.0 - _EDGE)
        terms = (self.alpha - 1.0) * torch.log(x) + (self.beta - 1.0) * torch.log1p(-x)
        return (terms - self._log_normalizer()).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy `[B]` in nats."""
        left, right, both = self._digammas()
        expected = (self.alpha - 1.0) * (left - both) + (self.beta - 1.0) * (right - both)
        return (self._log_normalizer() - expected).sum(-1)

    def kl(self, other: Beta) -> Tensor:
        """KL(self || other) `[B]` in nats; both have the same bounds."""
        left, right, both = self._digammas()
        expected = (self.alpha - other.alpha) * (left - both)
        expected = expected + (self.beta - other.beta) * (right - both)
        return (other._log_normalizer() - self._log_normalizer() + expected).sum(-1)

    def _to_bounds(self, x: Tensor) -> Tensor:
        action = self.low + (self.high - self.low) * x.clamp(_EDGE, 1.0 - _EDGE)
        return torch.minimum(torch.maximum(action, self.low), self.high)  # it may be rounded up

    def _log_normalizer(self) -> Tensor:
        """The log of the Beta function and of the width, `[B, d]`."""
        log_beta = torch.lgamma(self.alpha) + torch.lgamma(self.beta)
        return log_beta - torch.lgamma(self.alpha + self.beta) + torch.log(self.high - self.low)

    def _digammas(self) -> tuple[Tensor, Tensor, Tensor]:
        alpha, beta = self.alpha, self.beta
        return torch.digamma(alpha), torch.digamma(beta), torch.digamma(alpha + beta)


def _gamma(shape: Tensor, noise: Tensor) -> Tensor:
    r"""Gamma variables `[B, d]` of shapes `[B, d]`, at least 1, and rate 1, from `[B, d, 2 c]`.

    The first of the `c` candidates :math:`d v`, :math:`v = (1 + z / \sqrt{9 d})^3`,
    :math:`d = shape - 1/3`, for which a uniform variable is small enough.
    """
    z, uniform = noise.chunk(2, -1)  # the second becomes uniform by its distribution function
    d = shape.unsqueeze(-1) - 1.0 / 3.0
    v = (1.0 + z / torch.sqrt(9.0 * d)) ** 3
    log_v = torch.log(v.clamp(min=torch.finfo(v.dtype).tiny))
    limit = 0.5 * z * z + d * (1.0 - v + log_v)
    accepted = (v > 0.0) & (torch.special.log_ndtr(uniform) < limit)
    first = accepted.int().argmax(-1, keepdim=True)
    return (d * log_v.exp()).gather(-1, first).squeeze(-1)
