"""From what environments return to what is stored and what policies get."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from ppo.spaces.leaf import Leaf, Space, sub_spaces
from ppo.trees import leaves, map_tree

__all__ = ["ObservationLayout", "is_image", "observation_dtype"]

Place = Any  # an index, or a tuple of them
Writer = Callable[[Any, Place, Any], None]


def is_image(space: Space) -> bool:
    """True for uint8 boxes of two or three axes with bounds 0 and 255."""
    return (
        isinstance(space, spaces.Box)
        and space.dtype == np.uint8
        and len(space.shape) in (2, 3)
        and bool((space.low == 0).all() and (space.high == 255).all())
    )


def observation_dtype(space: Space) -> np.dtype[Any]:
    """Storage type of a leaf: bytes stay bytes, other boxes become float32, classes int64."""
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        return np.dtype(np.int64)
    if isinstance(space, spaces.MultiBinary):
        return np.dtype(np.int8)
    return np.dtype(np.uint8) if space.dtype == np.uint8 else np.dtype(np.float32)


class ObservationLayout:
    """How observations of a space are stored: one array for each of its leaves.

    Classes of Discrete and MultiDiscrete are stored from 0 on, without the space's `start`.

    Args:
        space: A supported observation space.

    Attributes:
        leaves: `Leaf` by leaf, as a tree.

    Example:
        >>> layout = ObservationLayout(spaces.Dict({"a": spaces.Discrete(3, start=1)}))
        >>> int(layout.copy({"a": 2})["a"])
        1
    """

    def __init__(self, space: Space) -> None:
        tree = sub_spaces(space)
        self.leaves = map_tree(lambda leaf: Leaf(leaf.shape or (), observation_dtype(leaf)), tree)
        self._starts = map_tree(lambda leaf: getattr(leaf, "start", 0), tree)
        self.write: Writer = _writer(self.leaves, self._starts)
        """Write one observation to a place in arrays `[..., *shape]`.

        Raises:
            ValueError: Its structure or a shape is not that of the space.
        """

    def empty(self, *axes: int) -> Any:
        """Arrays `[*axes, ...]` without values."""
        return map_tree(lambda leaf: leaf.empty(*axes), self.leaves)

    def copy(self, obs: Any) -> Any:
        """One observation in memory of its own."""
        arrays = self.empty(1)
        self.write(arrays, 0, obs)
        return map_tree(lambda array: array[0], arrays)

    def write_batch(self, arrays: Any, place: Place, obs: Any) -> None:
        """Write a batch of observations, as vector environments return them."""
        for array, start, leaf, rows in self._zip(arrays, self._starts, self.leaves, obs):
            if np.shape(rows)[1:] != leaf.shape:
                raise ValueError(_wrong_shape(rows, leaf, ("B", *leaf.shape)))
            array[place] = np.asarray(rows) - start if np.any(start) else rows

    def row(self, obs: Any, index: int) -> Any:
        """One observation of a batch, as the environment gave it."""
        self._check_structure(obs)
        return map_tree(lambda _, rows: rows[index], self.leaves, obs)

    def choose(self, rows: np.ndarray, obs: Any, other: Any) -> Any:
        """A batch that is `obs` where `rows` `[B]` is true and `other` elsewhere."""

        def where(leaf: Leaf, one: Any, two: Any) -> np.ndarray:
            chosen: np.ndarray = np.where(rows.reshape(-1, *(1 for _ in leaf.shape)), one, two)
            return chosen

        return map_tree(where, self.leaves, obs, other)

    def as_batch(self, obs: Any) -> tuple[Any, bool]:
        """Observations `[B, ...]` as policies take them, copied, and whether only one was given.

        Raises:
            ValueError: `obs` has neither the shape of an observation nor of a batch.
        """
        if (
            isinstance(self.leaves, Leaf)
            and isinstance(obs, tuple)
            and any(isinstance(part, Mapping) for part in obs[-1:])
        ):
            raise ValueError(
                "the observation came with an info, as reset and step return them; wanted it "
                "alone: `obs, info = env.reset()`"
            )
        self._check_structure(obs)
        arrays = map_tree(lambda leaf, given: np.asarray(given), self.leaves, obs)
        named = list(zip(leaves(self.leaves), leaves(arrays), strict=True))
        single = all(array.shape == leaf.shape for leaf, array in named)
        if not single:
            for leaf, array in named:
                if array.shape[1:] != leaf.shape or array.ndim != len(leaf.shape) + 1:
                    raise ValueError(_wrong_shape(array, leaf, leaf.shape, ("B", *leaf.shape)))
            if len({len(array) for _, array in named}) > 1:
                lengths = [len(array) for _, array in named]
                raise ValueError(f"obs must have the same number of rows in all leaves: {lengths}")

        def convert(leaf: Leaf, array: np.ndarray, start: Any) -> np.ndarray:
            moved = array - start if np.any(start) else array
            return np.array(moved[None] if single else moved, leaf.dtype)

        return map_tree(convert, self.leaves, arrays, self._starts), single

    def _check_structure(self, obs: Any) -> None:
        _check_structure(self.leaves, obs)

    def _zip(self, *trees: Any) -> Any:
        for tree in trees:
            self._check_structure(tree)
        flat = [leaves(map_tree(lambda _, item: [item], self.leaves, tree)) for tree in trees]
        return ([item for (item,) in items] for items in zip(*flat, strict=True))


def _writer(leaf: Any, start: Any) -> Writer:
    """A function that writes one observation; plain for a plain leaf, which is the hot path."""
    if isinstance(leaf, Mapping):
        parts = {key: _writer(item, start[key]) for key, item in leaf.items()}

        def write_mapping(arrays: Any, place: Place, obs: Any) -> None:
            _check_structure(leaf, obs)
            for key, write in parts.items():
                write(arrays[key], place, obs[key])

        return write_mapping
    if not isinstance(leaf, Leaf):
        items = [_writer(item, first) for item, first in zip(leaf, start, strict=True)]

        def write_tuple(arrays: Any, place: Place, obs: Any) -> None:
            _check_structure(leaf, obs)
            for index, write in enumerate(items):
                write(arrays[index], place, obs[index])

        return write_tuple
    shape, moved = leaf.shape, bool(np.any(start))

    def write_leaf(array: np.ndarray, place: Place, obs: Any) -> None:
        # Most are arrays, whose own shape is at hand.
        if getattr(obs, "shape", None) != shape and np.shape(obs) != shape:
            raise ValueError(_wrong_shape(obs, leaf, shape))
        array[place] = obs - start if moved else obs

    return write_leaf


def _check_structure(leaf: Any, obs: Any) -> None:
    """Raise `ValueError` where containers or keys are not those of the space."""
    if isinstance(leaf, Mapping):
        if not isinstance(obs, Mapping) or obs.keys() != leaf.keys():
            given = str(sorted(obs)) if isinstance(obs, Mapping) else type(obs).__name__
            raise ValueError(f"the observation must have the keys {sorted(leaf)}, got {given}")
        for key, item in leaf.items():
            _check_structure(item, obs[key])
    elif not isinstance(leaf, Leaf):
        if not isinstance(obs, tuple | list) or len(obs) != len(leaf):
            given = str(len(obs)) if isinstance(obs, tuple | list) else type(obs).__name__
            raise ValueError(f"the observation must be a tuple of {len(leaf)}, got {given}")
        for item, part in zip(leaf, obs, strict=True):
            _check_structure(item, part)


def _wrong_shape(obs: Any, leaf: Leaf, *wanted: tuple[Any, ...]) -> str:
    shapes = " or ".join(str(shape).replace("'", "") for shape in wanted)
    return f"the observation has shape {np.shape(obs)}, but the space has shape {shapes}"
