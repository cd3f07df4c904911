"""What every family of distributions offers."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor
from typing_extensions import Self

__all__ = ["Distribution"]


class Distribution(Protocol):
    """What every family offers; an action is `[B, ...]` (of `Joint` a tree), results are `[B]`."""

    @property
    def noise_size(self) -> int:
        """Numbers of noise per action."""

    def sample(self, noise: Tensor) -> Any:
        """Map noise `[B, noise_size]`, as drawn for this family, to actions `[B, ...]`."""

    def mode(self) -> Any:
        """Most likely action, `[B, ...]`."""

    def log_prob(self, action: Any) -> Tensor:
        """Log-density (or log-mass) of each action, `[B]`."""

    def entropy(self) -> Tensor:
        """Entropy in nats, `[B]`."""

    def kl(self, other: Self) -> Tensor:
        """KL(self || other) in nats, `[B]`."""
