"""Nested observations and actions: dictionaries and tuples whose leaves are arrays or tensors.

A *tree* is a leaf, a dictionary of trees, or a tuple of trees. What has no structure is a leaf, so
code that handles trees handles plain tensors too. A leaf's *path* names the keys that lead to it,
joined by slashes (`"arm/camera"`, `"0/1"`); a bare leaf has the path `""`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["leaves", "leaves_with_paths", "map_tree", "rebuild"]

# Most trees are one array. It takes ten times as long to ask whether that is a mapping. A tuple, as
# PyTorch 2.6 exports nothing that asks a set of classes, or a union of them.
_ARRAYS = (np.ndarray, Tensor)


def map_tree(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Apply a function to every leaf, together with the leaves of other trees of that structure.

    Example:
        >>> map_tree(lambda x, y: x + y, {"a": 1, "b": (2, 3)}, {"a": 10, "b": (20, 30)})
        {'a': 11, 'b': (22, 33)}
    """
    if type(tree) in _ARRAYS:
        return function(tree, *others)
    if isinstance(tree, Mapping):
        return {
            key: map_tree(function, item, *(other[key] for other in others))
            for key, item in tree.items()
        }
    if isinstance(tree, tuple):
        return tuple(map_tree(function, *items) for items in zip(tree, *others, strict=True))
    return function(tree, *others)


def leaves_with_paths(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf with its path, in order.

    Example:
        >>> list(leaves_with_paths({"a": 1, "b": (2, 3)}))
        [('a', 1), ('b/0', 2), ('b/1', 3)]
    """
    if isinstance(tree, Mapping):
        items: Any = tree.items()
    elif isinstance(tree, tuple):
        items = enumerate(tree)
    else:
        yield path, tree
        return
    for key, item in items:
        yield from leaves_with_paths(item, f"{path}/{key}" if path else str(key))


def leaves(tree: Any) -> list[Any]:
    """All leaves, in order."""
    if type(tree) in _ARRAYS:
        return [tree]
    if isinstance(tree, tuple):
        return [leaf for item in tree for leaf in leaves(item)]
    if isinstance(tree, Mapping):
        return [leaf for item in tree.values() for leaf in leaves(item)]
    return [tree]


def rebuild(tree: Any, values: Sequence[Any]) -> Any:
    """A tree of the same structure with these leaves, in the order of `leaves`.

    Example:
        >>> rebuild({"a": 0, "b": (0, 0)}, [1, 2, 3])
        {'a': 1, 'b': (2, 3)}
    """
    if type(tree) in _ARRAYS or not isinstance(tree, (Mapping, tuple)):
        (value,) = values
        return value
    remaining = iter(values)
    return map_tree(lambda _: next(remaining), tree)
