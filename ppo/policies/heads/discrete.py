"""Heads for Discrete, MultiDiscrete and MultiBinary spaces."""

from __future__ import annotations

import math

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from ppo.distributions import Bernoulli, Categorical, MultiCategorical
from ppo.policies.bodies import orthogonal_linear
from ppo.policies.heads.action_head import ActionHead
from ppo.policies.options import PolicyConfig

__all__ = ["BernoulliHead", "CategoricalHead", "MultiCategoricalHead"]


class CategoricalHead(ActionHead):
    """Logits for a Discrete space."""

    def __init__(
        self,
        space: spaces.Discrete,
        num_features: int,
        config: PolicyConfig,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.noise_size = self.mask_size = int(space.n)
        self.linear = orthogonal_linear(num_features, self.mask_size, config.output_gain, generator)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Categorical:
        """Categorical distribution `[B]`."""
        return Categorical(self.linear(features), mask)

    def draw_noise(self, rng: np.random.Generator, num_steps: int) -> np.ndarray:
        """Gumbel noise `[num_steps, n]`."""
        return Categorical.draw_noise(rng, (num_steps, self.noise_size))


class MultiCategoricalHead(ActionHead):
    """Logits for every position of a MultiDiscrete space of any shape."""

    def __init__(
        self,
        space: spaces.MultiDiscrete,
        num_features: int,
        config: PolicyConfig,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.nvec = tuple(space.nvec.reshape(-1).tolist())
        self.noise_size = self.mask_size = sum(self.nvec)
        self.linear = orthogonal_linear(num_features, self.mask_size, config.output_gain, generator)

    def forward(self, features: Tensor, mask: Tensor | None = None) -> MultiCategorical:
        """Categorical distributions over flattened positions `[B, k]`."""
        return MultiCategorical(self.linear(features), self.nvec, mask)

    def draw_noise(self, rng: np.random.Generator, num_steps: int) -> np.ndarray:
        """Gumbel noise `[num_steps, sum(nvec)]`."""
        return MultiCategorical.draw_noise(rng, (num_steps, self.noise_size))


class BernoulliHead(ActionHead):
    """A logit for every bit of a MultiBinary space of any shape."""

    def __init__(
        self,
        space: spaces.MultiBinary,
        num_features: int,
        config: PolicyConfig,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        self.noise_size = math.prod(space.shape)
        self.mask_size = 2 * self.noise_size
        self.linear = orthogonal_linear(
            num_features, self.noise_size, config.output_gain, generator
        )

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Bernoulli:
        """Bernoulli distributions over flattened bits `[B, k]`."""
        return Bernoulli(self.linear(features), mask)

    def draw_noise(self, rng: np.random.Generator, num_steps: int) -> np.ndarray:
        """Logistic noise `[num_steps, k]`."""
        return Bernoulli.draw_noise(rng, (num_steps, self.noise_size))
