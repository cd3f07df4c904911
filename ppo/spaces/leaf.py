"""Spaces as trees: what is nested, what is a leaf, and how a leaf is stored."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, TypeAlias

import gymnasium
import numpy as np
from gymnasium import spaces

__all__ = ["Leaf", "Space", "sub_spaces"]

Space: TypeAlias = "gymnasium.Space[Any]"


@dataclasses.dataclass(frozen=True)
class Leaf:
    """How one leaf of an observation or action is stored.

    Attributes:
        shape: Of one observation or action.
        dtype: Type of the storage.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def size(self) -> int:
        """Numbers in one observation or action."""
        return math.prod(self.shape)

    def empty(self, *axes: int) -> np.ndarray:
        """An array `[*axes, *shape]` without values."""
        return np.empty((*axes, *self.shape), self.dtype)


def sub_spaces(space: Space) -> Any:
    """A space as a tree (see `ppo.trees`): Dict and Tuple unfold, all else is a leaf.

    Example:
        >>> sub_spaces(spaces.Dict({"a": spaces.Discrete(2)}))
        {'a': Discrete(2)}
    """
    if isinstance(space, spaces.Dict):
        return {key: sub_spaces(item) for key, item in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        return tuple(sub_spaces(item) for item in space.spaces)
    return space
