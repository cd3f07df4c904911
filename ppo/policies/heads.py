"""From a feature vector to a distribution over actions: one head per kind of action space."""

from __future__ import annotations

import math
from typing import Any, Protocol

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from ppo.distributions import Categorical, DiagonalGaussian, Distribution
from ppo.policies.bodies import orthogonal_linear
from ppo.policies.options import PolicyConfig
from ppo.spaces import make_action_adapter

__all__ = ["ActionHead", "CategoricalHead", "GaussianHead", "make_action_head"]


class ActionHead(Protocol):
    """An `nn.Module` that turns features `[B, k]` into a distribution over raw actions."""

    def __call__(self, features: Tensor) -> Distribution:
        """Distribution over the actions, one per row."""

    def draw_noise(self, rng: np.random.Generator, num_steps: int) -> np.ndarray:
        """Noise `[num_steps, ...]` for that many draws."""


class CategoricalHead(nn.Module):
    """Logits for a Discrete space."""

    def __init__(
        self,
        space: spaces.Discrete,
        num_features: int,
        config: PolicyConfig,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.num_actions = int(space.n)
        self.linear = orthogonal_linear(
            num_features, self.num_actions, config.output_gain, generator
        )

    def forward(self, features: Tensor) -> Categorical:
        """Categorical distribution `[B]`."""
        return Categorical(self.linear(features))

    def draw_noise(self, rng: np.random.Generator, num_steps: int) -> np.ndarray:
        """Gumbel noise `[num_steps, n]`."""
        return Categorical.draw_noise(rng, (num_steps, self.num_actions))


class GaussianHead(nn.Module):
    """Mean from the features, standard deviation from one bounded parameter per component.

    The log standard deviation does not depend on the state and is kept in
    `[log_std_min, log_std_max]`: unbounded, it can drift until a density overflows far from the
    cause.
    """

    def __init__(
        self,
        space: spaces.Box,
        num_features: int,
        config: PolicyConfig,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.shape = space.shape
        size = math.prod(space.shape)
        self.linear = orthogonal_linear(num_features, size, config.output_gain, generator)
        self.log_std = nn.Parameter(torch.full((size,), config.log_std_init))
        self.log_std_bounds = (config.log_std_min, config.log_std_max)

    def bounded_log_std(self) -> Tensor:
        """The log standard deviation in use, `[d]`.

        The gradient passes the bound unchanged, so a parameter beyond it can come back.
        """
        clamped = self.log_std.clamp(*self.log_std_bounds)
        return self.log_std + (clamped - self.log_std).detach()

    def forward(self, features: Tensor) -> DiagonalGaussian:
        """Diagonal Gaussian over flattened actions `[B, d]`."""
        return DiagonalGaussian(self.linear(features), self.bounded_log_std())

    def draw_noise(self, rng: np.random.Generator, num_steps: int) -> np.ndarray:
        """Standard normal noise `[num_steps, d]`."""
        return DiagonalGaussian.draw_noise(rng, (num_steps, self.linear.out_features))


def make_action_head(
    space: gymnasium.Space[Any],
    num_features: int,
    config: PolicyConfig,
    generator: torch.Generator | None,
) -> CategoricalHead | GaussianHead:
    """Head for an action space; `SpaceError` where there is none."""
    make_action_adapter(space)
    if isinstance(space, spaces.Discrete):
        return CategoricalHead(space, num_features, config, generator)
    assert isinstance(space, spaces.Box)
    return GaussianHead(space, num_features, config, generator)
