"""Heads for Box spaces, whose actions they see flattened: one per family of distributions."""

from __future__ import annotations

import math

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.nn.functional import softplus

from ppo.distributions import GSDE, Beta, DiagonalGaussian, SquashedGaussian
from ppo.errors import SpaceError
from ppo.policies.bodies import orthogonal_linear
from ppo.policies.heads.action_head import ActionHead
from ppo.policies.options import PolicyConfig

__all__ = ["BetaHead", "GSDEHead", "GaussianHead", "SquashedGaussianHead"]


class GaussianHead(ActionHead):
    """Mean from the features, a bounded standard deviation per component.

    The log standard deviation is a parameter or, if `state_dependent_std`, a second output. It is
    kept in `[log_std_min, log_std_max]`: unbounded, it can drift until a density overflows far from
    the cause.
    """

    def __init__(
        self,
        space: spaces.Box,
        num_features: int,
        config: PolicyConfig,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.noise_size = math.prod(space.shape)
        self.linear = orthogonal_linear(
            num_features, self.noise_size, config.output_gain, generator
        )
        self.state_dependent = config.state_dependent_std
        if self.state_dependent:
            self.log_std_linear = orthogonal_linear(
                num_features, self.noise_size, config.output_gain, generator
            )
            nn.init.constant_(self.log_std_linear.bias, config.log_std_init)
        else:
            self.log_std = nn.Parameter(torch.full((self.noise_size,), config.log_std_init))
        self.log_std_bounds = (config.log_std_min, config.log_std_max)

    def bounded_log_std(self, features: Tensor | None = None) -> Tensor:
        """The log standard deviation in use: `[d]`, or `[B, d]` if it depends on the state.

        The gradient passes the bound unchanged, so a parameter beyond it can come back.
        """
        log_std: Tensor = self.log_std_linear(features) if self.state_dependent else self.log_std
        return _bounded(log_std, self.log_std_bounds)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> DiagonalGaussian:
        """Diagonal Gaussian over flattened actions `[B, d]`."""
        return DiagonalGaussian(self.linear(features), self.bounded_log_std(features))

    def draw_noise(self, rng: np.random.Generator, num_steps: int) -> np.ndarray:
        """Standard normal noise `[num_steps, d]`."""
        return DiagonalGaussian.draw_noise(rng, (num_steps, self.noise_size))


class SquashedGaussianHead(GaussianHead):
    """A `GaussianHead` whose samples a tanh brings between the bounds."""

    squashed = True
    low: Tensor
    high: Tensor

    def __init__(
        self,
        space: spaces.Box,
        num_features: int,
        config: PolicyConfig,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__(space, num_features, config, generator)
        _keep_bounds(self, space)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> SquashedGaussian:
        """Squashed Gaussian over flattened samples `[B, d]` before the tanh."""
        log_std = self.bounded_log_std(features)
        return SquashedGaussian(self.linear(features), log_std, self.low, self.high)


class BetaHead(ActionHead):
    """Both shapes of a Beta distribution from the features: softplus + 1, so it has one mode."""

    low: Tensor
    high: Tensor

    def __init__(
        self,
        space: spaces.Box,
        num_features: int,
        config: PolicyConfig,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        size = math.prod(space.shape)
        self.noise_size = Beta.NOISE_PER_COMPONENT * size
        self.linear = orthogonal_linear(num_features, 2 * size, config.output_gain, generator)
        _keep_bounds(self, space)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Beta:
        """Beta distribution over flattened actions `[B, d]` between the bounds."""
        alpha, beta = (softplus(self.linear(features)) + 1.0).chunk(2, -1)
        return Beta(alpha, beta, self.low, self.high)

    def draw_noise(self, rng: np.random.Generator, num_steps: int) -> np.ndarray:
        """Standard normal noise `[num_steps, 24 d]`."""
        return Beta.draw_noise(rng, (num_steps, self.noise_size))


class GSDEHead(ActionHead):
    """Mean from the features, and exploration that is linear in them.

    The exploration does not train the features (Raffin et al. 2021, section 3; as in the authors'
    code). `log_std` holds `[F, d]` logarithms of what the standard deviation of an action is where
    the features have mean square 1: the sum over features is divided by the root of their number.
    """

    def __init__(
        self,
        space: spaces.Box,
        num_features: int,
        config: PolicyConfig,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        size = math.prod(space.shape)
        self.noise_size = num_features * size
        self.gsde_steps = config.gsde_steps
        self.linear = orthogonal_linear(num_features, size, config.output_gain, generator)
        device = self.linear.weight.device
        log_std = torch.full((num_features, size), config.log_std_init, device=device)
        self.log_std = nn.Parameter(log_std)
        self.log_std_bounds = (config.log_std_min, config.log_std_max)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> GSDE:
        """State-dependent exploration over flattened actions `[B, d]`."""
        log_std = _bounded(self.log_std, self.log_std_bounds) - 0.5 * math.log(len(self.log_std))
        return GSDE(self.linear(features), features.detach(), log_std)

    def draw_noise(self, rng: np.random.Generator, num_steps: int) -> np.ndarray:
        """Standard normal noise `[num_steps, F d]`; `gsde_steps` rows (None: all) are the same."""
        repeats = self.gsde_steps or max(num_steps, 1)
        draws = GSDE.draw_noise(rng, (math.ceil(num_steps / repeats), self.noise_size))
        return draws.repeat(repeats, axis=0)[:num_steps]


def _bounded(log_std: Tensor, bounds: tuple[float, float]) -> Tensor:
    return log_std + (log_std.clamp(*bounds) - log_std).detach()


def _keep_bounds(head: ActionHead, space: spaces.Box) -> None:
    """Keep the bounds `[d]` of a space in a head; `SpaceError` if there is no room between them."""
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = (bound.reshape(-1).astype(np.float32) for bound in (space.low, space.high))
        width = high - low
    if not (np.isfinite(width) & (width > 0.0)).all():
        raise SpaceError(
            f"action space {space} has bounds that are infinite or equal, but the distributions "
            '"squashed" and "beta" live between finite bounds; use distribution="gaussian", or '
            "wrap the environment with gymnasium.wrappers.RescaleAction"
        )
    # With the values in the state, a copy made without values gets them when it is loaded.
    head.register_buffer("low", torch.from_numpy(low))
    head.register_buffer("high", torch.from_numpy(high))
