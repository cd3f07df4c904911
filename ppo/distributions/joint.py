"""Nested actions: one independent distribution per leaf."""

from __future__ import annotations

import functools
import operator
from typing import Any

from torch import Tensor

from ppo.trees import leaves, map_tree, rebuild

__all__ = ["Joint"]


class Joint:
    r"""Independent distributions over the leaves of one nested action.

    .. math:: \log p(a) = \sum_{\text{leaves } j} \log p_j(a_j)

    Args:
        parts: Tree (dictionaries and tuples) of distributions. Actions are trees of that structure.

    Example:
        >>> import torch
        >>> from ppo.distributions import Bernoulli, DiagonalGaussian
        >>> arm = DiagonalGaussian(torch.ones(1, 2), torch.zeros(2))
        >>> gripper = Bernoulli(torch.zeros(1, 1))
        >>> dist = Joint({"arm": arm, "gripper": gripper})
        >>> dist.mode()
        {'arm': tensor([[1., 1.]]), 'gripper': tensor([[0]])}
        >>> round((dist.entropy() - arm.entropy()).item(), 4)  # log 2
        0.6931
    """

    def __init__(self, parts: Any) -> None:
        self.parts = parts

    @property
    def noise_size(self) -> int:
        """The sum over leaves."""
        return sum(part.noise_size for part in leaves(self.parts))

    def sample(self, noise: Tensor) -> Any:
        """Tree of actions for noise `[B, noise_size]`, leaf after leaf."""
        pieces = noise.split([part.noise_size for part in leaves(self.parts)], -1)
        return map_tree(lambda part, own: part.sample(own), self.parts, rebuild(self.parts, pieces))

    def mode(self) -> Any:
        """Tree of the leaves' modes."""
        return map_tree(lambda part: part.mode(), self.parts)

    def log_prob(self, action: Any) -> Tensor:
        """Log-density of a tree of actions, summed over leaves, `[B]`."""
        return _sum(map_tree(lambda part, own: part.log_prob(own), self.parts, action))

    def entropy(self) -> Tensor:
        """Entropy `[B]` in nats: the sum over leaves."""
        return _sum(map_tree(lambda part: part.entropy(), self.parts))

    def kl(self, other: Joint) -> Tensor:
        """KL(self || other) `[B]` in nats: the sum over leaves."""
        return _sum(map_tree(lambda part, another: part.kl(another), self.parts, other.parts))


def _sum(tree: Any) -> Tensor:
    total: Tensor = functools.reduce(operator.add, leaves(tree))
    return total
