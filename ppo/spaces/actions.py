"""From raw actions, as a policy samples and learns from them, to what an environment declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from gymnasium import spaces

from ppo.errors import SpaceError
from ppo.spaces.leaf import Leaf, Space

__all__ = ["ActionAdapter", "make_action_adapter"]


class ActionAdapter(Protocol):
    """Maps raw actions to environment actions.

    Attributes:
        leaves: How raw actions are stored: a `Leaf`, or a tree of them.
    """

    leaves: Any

    def __call__(self, raw: Any) -> Any:
        """Convert raw actions `[n, ...]` to environment actions `[n, ...]`, in fresh memory."""

    def rows(self, actions: Any) -> Sequence[Any]:
        """Environment actions one by one, each as the space declares it."""


class _DiscreteActions:
    """Raw classes 0 … n-1 become `start` … `start + n - 1` in the space's own integer type."""

    def __init__(self, space: spaces.Discrete) -> None:
        self.leaves = Leaf((), np.dtype(np.int64))
        self._start = int(space.start)
        self._env_dtype = np.dtype(space.dtype)

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        if not self._start:
            return raw.astype(self._env_dtype)
        return (raw + self._start).astype(self._env_dtype, copy=False)

    def rows(self, actions: np.ndarray) -> Any:
        return actions


class _ArrayActions:
    """Shared by the spaces whose actions are arrays."""

    def __init__(self, shape: tuple[int, ...], dtype: type[np.generic], env_dtype: Any) -> None:
        self.leaves = Leaf(shape, np.dtype(dtype))
        self._env_dtype = np.dtype(env_dtype)

    def rows(self, actions: np.ndarray) -> Any:
        if self.leaves.shape:
            return actions
        # An array of no axes is an array, and not a number.
        return [actions[index, ...] for index in range(len(actions))]


class _ClassActions(_ArrayActions):
    """Raw classes of MultiDiscrete count from 0; those of MultiBinary are 0 and 1."""

    def __init__(self, space: spaces.MultiDiscrete | spaces.MultiBinary) -> None:
        super().__init__(space.shape, np.int64, space.dtype)
        self._start = getattr(space, "start", 0)

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        return (raw + self._start).astype(self._env_dtype)


class _BoxActions(_ArrayActions):
    """Raw real vectors are clipped to the bounds; what is stored for learning stays raw.

    With `squash` they are from before a tanh, which is scaled to the bounds.
    """

    def __init__(self, space: spaces.Box, squash: bool) -> None:
        super().__init__(space.shape, np.float32, space.dtype)
        self._low, self._high = _bound(space.low), _bound(space.high)
        self._squash = squash

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        if self._squash:
            low, high = self._low.astype(np.float64), self._high.astype(np.float64)
            raw = low + (high - low) * (0.5 * np.tanh(raw) + 0.5)
        clipped: np.ndarray = np.minimum(np.maximum(raw, self._low), self._high)
        return clipped if clipped.dtype == self._env_dtype else clipped.astype(self._env_dtype)


def _bound(bounds: np.ndarray) -> Any:
    """One number where all are alike: spreading them over the rows takes as long as comparing.

    As an array without axes; a scalar would be made one in every call.
    """
    alike = bounds.dtype == np.float32 and bounds.size and (bounds == bounds.flat[0]).all()
    return np.array(bounds.flat[0]) if alike else bounds


class _NestedActions:
    """Dict and Tuple: every leaf by its own adapter."""

    def __init__(self, parts: Mapping[str, ActionAdapter] | tuple[ActionAdapter, ...]) -> None:
        self._parts = parts
        if isinstance(parts, Mapping):
            self.leaves: Any = {key: part.leaves for key, part in parts.items()}
        else:
            self.leaves = tuple(part.leaves for part in parts)

    def __call__(self, raw: Any) -> Any:
        if isinstance(self._parts, Mapping):
            return {key: part(raw[key]) for key, part in self._parts.items()}
        return tuple(part(item) for part, item in zip(self._parts, raw, strict=True))

    def rows(self, actions: Any) -> Sequence[Any]:
        if isinstance(self._parts, Mapping):
            columns = [part.rows(actions[key]) for key, part in self._parts.items()]
            return [dict(zip(self._parts, row, strict=True)) for row in zip(*columns, strict=True)]
        columns = [part.rows(item) for part, item in zip(self._parts, actions, strict=True)]
        return list(zip(*columns, strict=True))


def make_action_adapter(space: Space, *, squash: bool = False) -> ActionAdapter:
    """Return the adapter of an action space, or raise `SpaceError` where there is none.

    Args:
        space: Discrete, MultiDiscrete, MultiBinary, Box of floating type, or a Dict or Tuple of
            these, nested to any depth.
        squash: Raw Box actions are from before a tanh onto the bounds.
    """
    if isinstance(space, spaces.Discrete):
        return _DiscreteActions(space)
    if isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):
        return _ClassActions(space)
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        return _BoxActions(space, squash)
    if isinstance(space, spaces.Dict | spaces.Tuple) and len(space.spaces):
        if isinstance(space, spaces.Dict):
            parts = {k: make_action_adapter(s, squash=squash) for k, s in space.spaces.items()}
            return _NestedActions(parts)
        return _NestedActions(tuple(make_action_adapter(s, squash=squash) for s in space.spaces))
    raise SpaceError(
        f"action space {space} is not supported: got {type(space).__name__}, wanted Discrete, "
        "MultiDiscrete, MultiBinary, a Box of floating type, or a Dict or Tuple of these; wrap "
        "the environment so that it takes one of these"
    )
