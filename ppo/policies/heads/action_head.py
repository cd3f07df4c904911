"""What a policy asks of an action head."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from ppo.distributions import Distribution

__all__ = ["ActionHead"]


class ActionHead(nn.Module):
    """Turns features `[B, F]` into a distribution over raw actions.

    Attributes:
        noise_size: Numbers of noise per action.
        mask_size: Entries of an action mask; 0 where there is nothing to forbid.
        squashed: Raw actions of Box leaves are samples before the tanh, not the environment's.
    """

    noise_size: int
    mask_size: int = 0
    squashed: bool = False

    def forward(self, features: Tensor, mask: Tensor | None = None) -> Distribution:
        """Distribution over the actions, one per row, of those that `[B, mask_size]` allows."""
        raise NotImplementedError

    def draw_noise(self, rng: np.random.Generator, num_steps: int) -> np.ndarray:
        """Noise `[num_steps, noise_size]`, float32, for that many draws."""
        raise NotImplementedError
