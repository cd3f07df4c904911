"""Which spaces are supported, how raw actions become environment actions, spaces as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Protocol

import gymnasium
import numpy as np
from gymnasium import spaces

from ppo.errors import SpaceError

__all__ = [
    "ActionAdapter",
    "BoxActions",
    "DiscreteActions",
    "as_batch",
    "check_observation_space",
    "check_policy_spaces",
    "is_image",
    "make_action_adapter",
    "observation_dtype",
    "space_from_dict",
    "space_to_dict",
    "sub_spaces",
]

Space = gymnasium.Space[Any]

_MOST_ELEMENTS = 2**26  # of one observation; a damaged file must not fill the memory


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


def is_image(space: Space) -> bool:
    """True for uint8 boxes of two or three axes with bounds 0 and 255."""
    return (
        isinstance(space, spaces.Box)
        and space.dtype == np.uint8
        and len(space.shape) in (2, 3)
        and bool((space.low == 0).all() and (space.high == 255).all())
    )


def check_observation_space(space: Space) -> spaces.Box:
    """Return the space if observations of it can be collected, else raise `SpaceError`."""
    if isinstance(space, spaces.Box):
        return space
    raise SpaceError(
        f"observation space {space} is not supported: got {type(space).__name__}, wanted Box; "
        "wrap the environment, for example with gymnasium.wrappers.FlattenObservation"
    )


def check_policy_spaces(policy: object, observation_space: Space, action_space: Space) -> None:
    """Raise `SpaceError` for a policy that says it was built for other spaces."""
    for name, wanted in (
        ("observation_space", observation_space),
        ("action_space", action_space),
    ):
        built_for = getattr(policy, name, None)
        if built_for is not None and built_for != wanted:
            raise SpaceError(
                f"the policy was built for {name} {built_for}, but these environments have "
                f"{wanted}; build one for their spaces with make_policy, or wrap the environments"
            )


def observation_dtype(space: spaces.Box) -> np.dtype[Any]:
    """Storage type: images stay uint8, everything else becomes float32."""
    return np.dtype(np.uint8) if space.dtype == np.uint8 else np.dtype(np.float32)


def as_batch(obs: Any, space: Space) -> tuple[np.ndarray, bool]:
    """Observations `[B, ...]` as policies take them, copied, and whether only one was given.

    Raises:
        ValueError: `obs` has neither the shape of an observation nor of a batch.
    """
    shape = space.shape or ()
    array = np.asarray(obs, observation_dtype(space))  # type: ignore[arg-type]
    single = array.shape == shape
    if not single and array.shape[1:] != shape:
        raise ValueError(f"obs must have shape {shape} or [B, *{shape}], got shape {array.shape}")
    return np.array(array[None] if single else array), single


class ActionAdapter(Protocol):
    """Maps raw actions, as a policy samples them, to what the environment declares."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        """Convert raw actions `[n, *shape]` to environment actions `[n, ...]`."""


class DiscreteActions:
    """Raw classes 0 … n-1 become `start` … `start + n - 1` in the space's own integer type."""

    def __init__(self, space: spaces.Discrete) -> None:
        self.shape: tuple[int, ...] = ()
        self.dtype = np.dtype(np.int64)
        self._start = int(space.start)
        self._env_dtype = np.dtype(space.dtype)

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        """Shift classes `[n]` by `start`."""
        return (raw + self._start).astype(self._env_dtype, copy=False)


class BoxActions:
    """Raw real vectors are clipped to the bounds; what is stored for learning stays raw."""

    def __init__(self, space: spaces.Box) -> None:
        self.shape = space.shape
        self.dtype = np.dtype(np.float32)
        self._low, self._high = space.low, space.high
        self._env_dtype = np.dtype(space.dtype)

    def __call__(self, raw: np.ndarray) -> np.ndarray:
        """Clip vectors `[n, *shape]`; the result is a fresh array."""
        clipped: np.ndarray = np.minimum(np.maximum(raw, self._low), self._high)
        return clipped.astype(self._env_dtype, copy=False)


def make_action_adapter(space: Space) -> ActionAdapter:
    """Return the adapter of an action space, or raise `SpaceError` where there is none."""
    if isinstance(space, spaces.Discrete):
        return DiscreteActions(space)
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
        return BoxActions(space)
    raise SpaceError(
        f"action space {space} is not supported: got {type(space).__name__}, wanted Discrete or a "
        "Box of floating type; wrap the environment so that it takes one of these"
    )


def _bound_to_json(bound: np.ndarray) -> Any:
    """One number where the bound is uniform, else nested lists; infinities as strings."""
    values = bound if np.any(bound != bound.flat[0]) else np.asarray(bound.flat[0])
    return np.vectorize(_json_number, otypes=[object])(values).tolist()


def _json_number(value: Any) -> Any:
    """JSON knows no infinities: they become the strings `"inf"` and `"-inf"`."""
    number = value.item() if isinstance(value, np.generic) else value
    return number if np.isfinite(number) else str(float(number))


def space_to_dict(space: Space) -> dict[str, Any]:
    """Describe a supported space in plain JSON values; inverse of `space_from_dict`."""
    if isinstance(space, spaces.Discrete):
        return {
            "type": "Discrete",
            "n": int(space.n),
            "start": int(space.start),
            "dtype": str(space.dtype),
        }
    if isinstance(space, spaces.Box):
        return {
            "type": "Box",
            "low": _bound_to_json(space.low),
            "high": _bound_to_json(space.high),
            "shape": list(space.shape),
            "dtype": str(space.dtype),
        }
    raise SpaceError(f"space {space} cannot be described: {type(space).__name__} is not supported")


def space_from_dict(data: Mapping[str, Any]) -> Space:
    """Rebuild a space from `space_to_dict`; `SpaceError` if the description makes no sense."""
    try:
        if data["type"] == "Discrete":
            kind = np.dtype(data.get("dtype", "int64")).type
            return spaces.Discrete(int(data["n"]), start=int(data["start"]), dtype=kind)
        if data["type"] == "Box":
            dtype = np.dtype(data["dtype"])
            shape = tuple(int(size) for size in data["shape"])
            if math.prod(shape) > _MOST_ELEMENTS:
                raise ValueError(f"a Box of {math.prod(shape)} elements is beyond reason")
            low, high = (
                np.broadcast_to(np.asarray(data[key], dtype=np.float64), shape).astype(dtype)
                for key in ("low", "high")
            )
            return spaces.Box(low, high, shape, dtype.type)
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
        MemoryError,
        AssertionError,
    ) as error:
        raise SpaceError(f"damaged description of a space: {error}") from error
    raise SpaceError(f"unknown type of space in a description: {data['type']!r}")
