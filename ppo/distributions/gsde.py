"""Exploration that is a function of the state."""

from __future__ import annotations

import torch
from torch import Tensor

from ppo._checks import at_least_float32
from ppo.distributions.gaussian import DiagonalGaussian

__all__ = ["GSDE"]

_LEAST_VARIANCE = 1e-6  # where the features vanish


class GSDE(DiagonalGaussian):
    r"""Generalised state-dependent exploration: Gaussian noise that is linear in features.

    .. math:: a = \mu + \phi^\top \Theta, \quad \Theta_{fi} = \sigma_{fi}\, \epsilon_{fi},
              \quad a_i \sim \mathcal N\left(\mu_i, \textstyle\sum_f \phi_f^2 \sigma_{fi}^2\right)

    With one matrix :math:`\epsilon` kept for many steps the noise is smooth: equal states get equal
    actions (Raffin et al. 2021, section 3). Density, entropy and divergence are those of each
    action by itself, whose variance gets 1e-6 added for features that vanish.

    Args:
        mean: `[B, d]`.
        features: `[B, F]`.
        log_std: `[F, d]`, per feature and component.

    Example:
        >>> features = torch.tensor([[3.0, 4.0]])
        >>> dist = GSDE(torch.zeros(1, 1), features, torch.zeros(2, 1))
        >>> round(dist.log_std.exp().item(), 4), dist.sample(torch.tensor([[1.0, 1.0]])).item()
        (5.0, 7.0)
    """

    def __init__(self, mean: Tensor, features: Tensor, log_std: Tensor) -> None:
        mean, self.features, log_std = at_least_float32(mean, features, log_std)
        self._std_per_feature = log_std.exp()
        variance = self.features.square() @ self._std_per_feature.square()
        super().__init__(mean, 0.5 * torch.log(variance + _LEAST_VARIANCE))

    @property
    def noise_size(self) -> int:
        """One number per feature and component."""
        return self._std_per_feature.numel()

    def sample(self, noise: Tensor) -> Tensor:
        """Actions `[B, d]` for standard normal noise `[B, F d]`, feature after feature."""
        matrix = noise.view(-1, *self._std_per_feature.shape) * self._std_per_feature
        return self.mean + (self.features.unsqueeze(-1) * matrix).sum(-2)
