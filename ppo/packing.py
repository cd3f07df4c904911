"""Plain values that hold arrays, taken apart into JSON and bytes, and put together again.

This is what pickle would do, but what comes back is data: no class is named, no code is run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["pack", "unpack"]

_KINDS = "biuf"  # arrays of flags and numbers


def pack(value: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Take a value apart.

    Args:
        value: None, flags, numbers, text, bytes, NumPy arrays and scalars of flags and numbers, and
            dictionaries (with text or whole numbers as keys), lists and tuples of these.

    Returns:
        What `json` can write, and uint8 arrays by name.

    Raises:
        TypeError: For anything else in it.

    Example:
        >>> document, arrays = pack({"x": np.arange(3), "y": (1, "two")})
        >>> unpack(document, arrays)
        {'x': array([0, 1, 2]), 'y': (1, 'two')}
    """
    arrays: dict[str, np.ndarray] = {}

    def take(data: np.ndarray) -> str:
        name = str(len(arrays))
        arrays[name] = np.frombuffer(data.tobytes(), np.uint8)
        return name

    def walk(item: Any) -> Any:
        if item is None or type(item) in (bool, int, float, str):
            return item
        if isinstance(item, np.ndarray | np.generic) and item.dtype.kind in _KINDS:
            array = np.asarray(item)
            # In one order of bytes, so that a file means the same everywhere.
            array = array.astype(array.dtype.newbyteorder("<"))
            what = "array" if isinstance(item, np.ndarray) else "scalar"
            return {what: [take(array), array.dtype.str, list(array.shape)]}
        if isinstance(item, bytes | bytearray):
            return {"bytes": take(np.frombuffer(item, np.uint8))}
        if isinstance(item, Mapping) and all(type(key) in (str, int) for key in item):
            return {"dict": [[key, walk(part)] for key, part in item.items()]}
        if isinstance(item, tuple | list):
            what = "tuple" if isinstance(item, tuple) else "list"
            return {what: [walk(part) for part in item]}
        raise TypeError(f"{type(item).__name__} is no plain value")

    return walk(value), arrays


def unpack(document: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    """Put together what `pack` took apart; arrays are copies.

    Raises:
        ValueError: The parts do not belong together, or were never written by `pack`.
    """
    if document is None or type(document) in (bool, int, float, str):
        return document
    if not isinstance(document, dict) or len(document) != 1:
        raise ValueError(f"{document!r:.60} is no packed value")
    ((what, content),) = document.items()
    if what == "bytes" and content in arrays:
        return arrays[content].tobytes()
    if what in ("array", "scalar"):
        array = _array(content, arrays)
        return array if what == "array" else array[()]
    if what in ("tuple", "list") and isinstance(content, list):
        items = [unpack(part, arrays) for part in content]
        return tuple(items) if what == "tuple" else items
    if what == "dict" and isinstance(content, list) and all(map(_is_entry, content)):
        return {key: unpack(part, arrays) for key, part in content}
    raise ValueError(f"{document!r:.60} is no packed value")


def _is_entry(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2 and type(item[0]) in (str, int)


def _array(content: Any, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    if not isinstance(content, list) or len(content) != 3 or content[0] not in arrays:
        raise ValueError(f"{content!r:.60} is no packed array")
    name, code, shape = content
    dtype = np.dtype(code) if isinstance(code, str) and len(code) <= 8 else np.dtype("V")
    whole = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    data = arrays[name]
    if dtype.kind not in _KINDS or not whole or data.nbytes != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{content!r:.60} is no packed array")
    array: np.ndarray = np.frombuffer(data.tobytes(), dtype).reshape(shape)
    return array.astype(dtype.newbyteorder("="))
