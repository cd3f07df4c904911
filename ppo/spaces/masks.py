"""Action masks: which classes of the discrete leaves of an action space are legal now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from ppo.spaces.leaf import Space, sub_spaces
from ppo.trees import leaves

__all__ = ["MASK_KEY", "ActionMasks"]

MASK_KEY = "action_mask"
"""Where masks are looked for: in infos, and among the keys of a Dict observation."""


class ActionMasks:
    """Reads masks for one action space into flat vectors of bools.

    A flat mask `[M]` holds, for every discrete leaf in order: `n` entries for Discrete, `sum(nvec)`
    for MultiDiscrete (position after position), and two, for 0 and for 1, per position of
    MultiBinary. A Box has none.

    Args:
        space: A supported action space.

    Attributes:
        size: `M`; 0 if nothing can be masked.

    Example:
        >>> masks = ActionMasks(spaces.Dict({"go": spaces.Discrete(3), "by": spaces.Box(0, 1)}))
        >>> masks.read({"go": [1, 0, 1]}).tolist()
        [True, False, True]
    """

    def __init__(self, space: Space) -> None:
        self._tree = sub_spaces(space)
        # The choices of each draw: one draw of a mask must leave something to choose.
        self._choices = [count for leaf in leaves(self._tree) for count in _choices(leaf)]
        self._starts = (
            np.cumsum([0, *self._choices[:-1]]) if self._choices else np.zeros(0, np.int64)
        )
        self.size = sum(self._choices)

    def read(self, mask: Any) -> np.ndarray:
        """Flatten one mask.

        Args:
            mask: For Discrete an array `[n]`; for MultiDiscrete an array `[sum(nvec)]` or one
                array per position; for MultiBinary an array `[k, 2]` or `[2 k]`; for Dict and
                Tuple a dict or tuple of these, where what is missing or None is all legal. A flat
                array `[M]` always will do.

        Returns:
            Bools `[M]`.

        Raises:
            ValueError: The mask does not fit the space, or leaves no legal action.
        """
        flat = np.zeros(self.size, np.bool_)
        given = mask if isinstance(mask, Mapping | tuple | list) else np.asarray(mask)
        if isinstance(given, np.ndarray) and given.size == self.size and given.dtype != object:
            flat[:] = given.reshape(-1) != 0
        else:
            parts = _parts(self._tree, mask)
            flat[:] = np.concatenate(parts) if parts else True
        if self.size and not np.logical_or.reduceat(flat, self._starts).all():
            raise ValueError("the action mask leaves no legal action; one at least must be")
        return flat

    def lie_in(self, observation_space: Space) -> bool:
        """True if observations are Dicts with flat masks under the key `MASK_KEY`."""
        if not isinstance(observation_space, spaces.Dict):
            return False
        leaf = observation_space.spaces.get(MASK_KEY)
        if not isinstance(leaf, spaces.Box | spaces.MultiBinary):
            return False
        return 0 < self.size == int(np.prod(leaf.shape))


def _choices(leaf: Space) -> list[int]:
    if isinstance(leaf, spaces.Discrete):
        return [int(leaf.n)]
    if isinstance(leaf, spaces.MultiDiscrete):
        return [int(n) for n in leaf.nvec.reshape(-1)]
    if isinstance(leaf, spaces.MultiBinary):
        return [2] * int(np.prod(leaf.shape))
    return []


def _parts(tree: Any, mask: Any) -> list[np.ndarray]:
    """Flat masks of the leaves, in order."""
    if isinstance(tree, Mapping):
        if mask is not None and not (isinstance(mask, Mapping) and mask.keys() <= tree.keys()):
            raise ValueError(f"the action mask must be a dict with keys of {list(tree)}")
        given = mask or {}
        return [part for key, item in tree.items() for part in _parts(item, given.get(key))]
    if isinstance(tree, tuple):
        if mask is not None and len(mask) != len(tree):
            raise ValueError(f"the action mask must have {len(tree)} items, got {len(mask)}")
        items = (None,) * len(tree) if mask is None else mask
        return [part for one, two in zip(tree, items, strict=True) for part in _parts(one, two)]
    choices = _choices(tree)
    size = sum(choices)
    if mask is None or size == 0:
        return [np.ones(size, np.bool_)]
    if isinstance(mask, tuple | list) and len(mask) and np.ndim(mask[0]) > 0:
        mask = np.concatenate([np.asarray(part).reshape(-1) for part in _flat_items(mask)])
    array = np.asarray(mask)
    if array.size != size:
        raise ValueError(
            f"the action mask of {tree} has {array.size} entries in shape {array.shape}, "
            f"wanted {size}"
        )
    return [array.reshape(-1) != 0]


def _flat_items(mask: Any) -> list[Any]:
    """The arrays of a mask for MultiDiscrete, which Gymnasium nests by the shape of the space."""
    if isinstance(mask, tuple | list) and len(mask) and np.ndim(mask[0]) > 0:
        return [item for part in mask for item in _flat_items(part)]
    return [mask]
