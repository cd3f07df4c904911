"""Spaces as plain JSON values, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces

from ppo.errors import SpaceError
from ppo.spaces.leaf import Space

__all__ = ["space_from_dict", "space_to_dict"]

_MOST_ELEMENTS = 2**26  # of one observation; a damaged file must not fill the memory
_MOST_LEVELS = 30


def _bound_to_json(bound: np.ndarray) -> Any:
    """One number where the bound is uniform, else nested lists; infinities as strings."""
    if bound.size == 0:
        return 0  # any number: there is nothing to bound
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
    if isinstance(space, spaces.MultiDiscrete):
        return {
            "type": "MultiDiscrete",
            "nvec": space.nvec.tolist(),
            "start": space.start.tolist(),
            "dtype": str(space.dtype),
        }
    if isinstance(space, spaces.MultiBinary):
        # That of n bits is not equal to that of the shape (n,).
        shaped = not isinstance(space.n, int)
        return {"type": "MultiBinary", "shape": list(space.shape), "shaped": shaped}
    if isinstance(space, spaces.Box):
        return {
            "type": "Box",
            "low": _bound_to_json(space.low),
            "high": _bound_to_json(space.high),
            "shape": list(space.shape),
            "dtype": str(space.dtype),
        }
    if isinstance(space, spaces.Dict):
        # A list of pairs keeps the order, which is that of the leaves.
        items = [[key, space_to_dict(item)] for key, item in space.spaces.items()]
        return {"type": "Dict", "spaces": items}
    if isinstance(space, spaces.Tuple):
        return {"type": "Tuple", "spaces": [space_to_dict(item) for item in space.spaces]}
    raise SpaceError(f"space {space} cannot be described: {type(space).__name__} is not supported")


def space_from_dict(data: Mapping[str, Any]) -> Space:
    """Rebuild a space from `space_to_dict`; `SpaceError` if the description makes no sense."""
    try:
        return _build(data, _MOST_LEVELS)
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


def _build(data: Mapping[str, Any], levels: int) -> Space:
    if levels == 0:
        raise ValueError(f"more than {_MOST_LEVELS} levels are beyond reason")
    kind = data["type"]
    if kind == "Discrete":
        dtype = np.dtype(data.get("dtype", "int64")).type
        return spaces.Discrete(int(data["n"]), start=int(data["start"]), dtype=dtype)
    if kind == "MultiDiscrete":
        nvec, start = (np.asarray(data[name], np.int64) for name in ("nvec", "start"))
        if nvec.shape != start.shape or nvec.ndim == 0:
            raise ValueError("nvec and start of a MultiDiscrete must be lists of one shape")
        return spaces.MultiDiscrete(nvec, dtype=np.dtype(data["dtype"]).type, start=start)
    if kind == "MultiBinary":
        shape = _shape(data)
        shaped = data.get("shaped", False) or len(shape) != 1
        return spaces.MultiBinary(shape if shaped else shape[0])
    if kind == "Box":
        shape, dtype = _shape(data), np.dtype(data["dtype"])
        # Not every integer is a float64.
        exact = dtype if dtype.kind in "iu" else np.dtype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):  # too large for the type: no bound
            low, high = (
                np.broadcast_to(np.asarray(data[key], exact), shape).astype(dtype)
                for key in ("low", "high")
            )
        return spaces.Box(low, high, shape, dtype.type)
    if kind == "Dict":
        named = {str(key): _build(item, levels - 1) for key, item in data["spaces"]}
        if len(named) != len(data["spaces"]):
            raise ValueError("a Dict has two spaces of one name")
        space = spaces.Dict({})
        space.spaces = named  # its constructor would sort them
        return space
    if kind == "Tuple":
        return spaces.Tuple([_build(item, levels - 1) for item in data["spaces"]])
    raise SpaceError(f"unknown type of space in a description: {kind!r}")


def _shape(data: Mapping[str, Any]) -> tuple[int, ...]:
    shape = tuple(int(size) for size in data["shape"])
    if math.prod(shape) > _MOST_ELEMENTS:
        raise ValueError(f"a space of {math.prod(shape)} elements is beyond reason")
    return shape
