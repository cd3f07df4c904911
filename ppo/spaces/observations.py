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
_WHOLE = frozenset((int, np.int64, np.int32, np.uint8))  # the types that classes mostly have


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
        self._doors = map_tree(_Door, tree)
        self.write: Writer = _writer(self._doors)
        """Write one observation to a place in arrays `[..., *shape]`.

        Raises:
            ValueError: Its structure or a shape is not that of the space, or its numbers are none
                of an integer type or no classes of the space. Bounds of a Box are not looked at.
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
        for array, door, rows in self._zip(arrays, self._doors, obs):
            if np.shape(rows)[1:] != door.leaf.shape:
                raise ValueError(_wrong_shape(rows, ("B", *door.leaf.shape)))
            array[place] = door.stored(rows)

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
            ValueError: `obs` has neither the shape of an observation nor of a batch, or numbers
                that are not those of the space; see `write`.
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
                    raise ValueError(_wrong_shape(array, leaf.shape, ("B", *leaf.shape)))
            if len({len(array) for _, array in named}) > 1:
                lengths = [len(array) for _, array in named]
                raise ValueError(f"obs must have the same number of rows in all leaves: {lengths}")

        def convert(door: _Door, array: np.ndarray) -> np.ndarray:
            stored = door.stored(array)
            return np.array(stored[None] if single else stored, door.leaf.dtype)

        return map_tree(convert, self._doors, arrays), single

    def _check_structure(self, obs: Any) -> None:
        _check_structure(self.leaves, obs)

    def _zip(self, *trees: Any) -> Any:
        for tree in trees:
            self._check_structure(tree)
        flat = [leaves(map_tree(lambda _, item: [item], self.leaves, tree)) for tree in trees]
        return ([item for (item,) in items] for items in zip(*flat, strict=True))


class _Door:
    """What one leaf of an observation must be, and how it becomes what is stored."""

    def __init__(self, space: Space) -> None:
        self.space = space
        self.leaf = Leaf(space.shape or (), observation_dtype(space))
        self.start = np.asarray(getattr(space, "start", 0), self.leaf.dtype)
        self._moved = bool(self.start.any())
        # Below 0 is beyond them too, if it is read as a number without sign.
        self._unsigned = np.dtype(f"u{self.leaf.dtype.itemsize}")
        self.sizes: np.ndarray | None = None
        if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
            sizes = space.n if isinstance(space, spaces.Discrete) else space.nvec
            self.sizes = np.asarray(sizes, self._unsigned)
        elif isinstance(space, spaces.MultiBinary):
            self.sizes = np.asarray(2, self._unsigned)

    def stored(self, given: Any) -> np.ndarray:
        """The numbers of observations `[..., *shape]`, exactly, and classes counted from 0."""
        array: np.ndarray = np.asarray(given)
        dtype = self.leaf.dtype
        if dtype.kind == "f":
            return array
        if array.dtype != dtype:
            with np.errstate(invalid="ignore"):  # NaN; it is no integer
                whole = array.astype(dtype)
            if not (same := whole == array).all():
                raise ValueError(self._unfit(array, ~same))
            array = whole
        if self.sizes is None:
            return array
        classes: np.ndarray = array - self.start if self._moved else array
        beyond = classes.view(self._unsigned) >= self.sizes
        if np.count_nonzero(beyond):  # in a third of the time of any()
            raise ValueError(self._unfit(array, beyond))
        return classes

    def _unfit(self, given: np.ndarray, bad: np.ndarray) -> str:
        place = tuple(np.argwhere(bad)[0].tolist())
        where = f" at {list(place)}" if place else ""
        if self.sizes is None:
            wanted, remedy = f"a number of {self.leaf.dtype}", f"a Box of {given.dtype} for example"
        else:
            wanted, remedy = "one of its classes", "with more classes for example"
        return (
            f"the observation has {given[place]}{where} ({given.dtype}), but the space is "
            f"{self.space}: wanted {wanted}; declare the space of what is returned, {remedy}, or "
            "return what is declared"
        )


def _writer(door: Any) -> Writer:
    """A function that writes one observation; plain for a plain leaf, which is the hot path."""
    if isinstance(door, Mapping):
        parts = {key: _writer(item) for key, item in door.items()}

        def write_mapping(arrays: Any, place: Place, obs: Any) -> None:
            _check_structure(door, obs)
            for key, write in parts.items():
                write(arrays[key], place, obs[key])

        return write_mapping
    if isinstance(door, tuple):
        items = [_writer(item) for item in door]

        def write_tuple(arrays: Any, place: Place, obs: Any) -> None:
            _check_structure(door, obs)
            for index, write in enumerate(items):
                write(arrays[index], place, obs[index])

        return write_tuple
    shape, dtype, stored = door.leaf.shape, door.leaf.dtype, door.stored
    floating, counted = dtype.kind == "f", door.sizes is not None

    def write_leaf(array: np.ndarray, place: Place, obs: Any) -> None:
        # Most are arrays, whose own shape is at hand.
        if getattr(obs, "shape", None) != shape and np.shape(obs) != shape:
            raise ValueError(_wrong_shape(obs, shape))
        if floating or (not counted and getattr(obs, "dtype", None) is dtype):
            array[place] = obs
        else:
            array[place] = stored(obs)

    if not isinstance(door.space, spaces.Discrete):
        return write_leaf
    start, size = int(door.space.start), int(door.space.n)

    def write_class(array: np.ndarray, place: Place, obs: Any) -> None:
        if type(obs) in _WHOLE:
            number = int(obs) - start
            if 0 <= number < size:
                array[place] = number
                return
        write_leaf(array, place, obs)

    return write_class


def _check_structure(leaf: Any, obs: Any) -> None:
    """Raise `ValueError` where containers or keys are not those of the space."""
    if isinstance(leaf, Mapping):
        if not isinstance(obs, Mapping) or obs.keys() != leaf.keys():
            given = str(sorted(obs)) if isinstance(obs, Mapping) else type(obs).__name__
            raise ValueError(f"the observation must have the keys {sorted(leaf)}, got {given}")
        for key, item in leaf.items():
            _check_structure(item, obs[key])
    elif isinstance(leaf, tuple):
        if not isinstance(obs, tuple | list) or len(obs) != len(leaf):
            given = str(len(obs)) if isinstance(obs, tuple | list) else type(obs).__name__
            raise ValueError(f"the observation must be a tuple of {len(leaf)}, got {given}")
        for item, part in zip(leaf, obs, strict=True):
            _check_structure(item, part)


def _wrong_shape(obs: Any, *wanted: tuple[Any, ...]) -> str:
    shapes = " or ".join(str(shape).replace("'", "") for shape in wanted)
    return f"the observation has shape {np.shape(obs)}, but the space has shape {shapes}"
