"""Several independent choices of one class each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ppo.distributions.categorical import Categorical

__all__ = ["MultiCategorical"]


class MultiCategorical:
    r"""Independent `Categorical` distributions, of `nvec[0]`, `nvec[1]`, ... classes.

    .. math:: \log p(a) = \sum_{j=1}^{k} \log p_j(a_j)

    Args:
        logits: `[B, sum(nvec)]`, position after position.
        nvec: Number of classes of each of the `k` positions.
        mask: bool `[B, sum(nvec)]`, True for legal classes, at least one per position. None: all.

    Raises:
        TypeError: The mask is not bool.
        ValueError: The mask does not have the shape of the logits.

    Example:
        >>> dist = MultiCategorical(torch.tensor([[0.0, 0.0, 5.0, 0.0, 0.0]]), [3, 2])
        >>> dist.mode().tolist()
        [[2, 0]]
        >>> dist = MultiCategorical(torch.zeros(1, 5), [3, 2])
        >>> round(dist.entropy().item(), 4)  # log 6
        1.7918
    """

    def __init__(self, logits: Tensor, nvec: Sequence[int], mask: Tensor | None = None) -> None:
        # Neighbours with equally many classes are computed as one.
        runs = [(n, len(list(equals))) for n, equals in itertools.groupby(nvec)]
        self._lengths = [length for _, length in runs]
        self._widths = [n * length for n, length in runs]
        masks = [None] * len(runs) if mask is None else mask.split(self._widths, -1)
        self._parts = [
            Categorical(
                part.unflatten(-1, (length, n)),
                None if legal is None else legal.unflatten(-1, (length, n)),
            )
            for (n, length), part, legal in zip(
                runs, logits.split(self._widths, -1), masks, strict=True
            )
        ]

    @property
    def noise_size(self) -> int:
        """One number per class of each position."""
        return sum(self._widths)

    @staticmethod
    def draw_noise(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Standard Gumbel noise, float32, of the given shape (`[..., sum(nvec)]`)."""
        return Categorical.draw_noise(rng, shape)

    def sample(self, noise: Tensor) -> Tensor:
        """Classes `[B, k]` (int64) for Gumbel noise `[B, sum(nvec)]`."""
        pieces = zip(self._parts, noise.split(self._widths, -1), strict=True)
        return torch.cat([part.sample(own.view_as(part.log_p)) for part, own in pieces], -1)

    def mode(self) -> Tensor:
        """Most likely class of each position, `[B, k]`."""
        return torch.cat([part.mode() for part in self._parts], -1)

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability of classes `[B, k]`, summed over positions, `[B]`."""
        pieces = zip(self._parts, action.split(self._lengths, -1), strict=True)
        return torch.cat([part.log_prob(own) for part, own in pieces], -1).sum(-1)

    def entropy(self) -> Tensor:
        """Entropy `[B]` in nats: the sum over positions."""
        return torch.cat([part.entropy() for part in self._parts], -1).sum(-1)

    def kl(self, other: MultiCategorical) -> Tensor:
        """KL(self || other) `[B]` in nats: the sum over positions."""
        pairs = zip(self._parts, other._parts, strict=True)
        return torch.cat([part.kl(another) for part, another in pairs], -1).sum(-1)
