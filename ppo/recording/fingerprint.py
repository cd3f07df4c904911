"""Whether a policy is still the one that was recorded, and whether it can be recorded at all."""

from __future__ import annotations

import dataclasses
import functools
import random
from collections import deque
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ppo._hooks import any_global_hook

__all__ = ["Fingerprint"]

_SIMPLE = (bool, int, float, str, bytes)
_COLLECTIONS = (dict, list, tuple, set, frozenset, deque)
_KINDS: dict[str, tuple[type, ...]] = {
    "tensor": (Tensor,),
    "array": (np.ndarray,),
    "container": (*_COLLECTIONS, SimpleNamespace),
    "generator": (np.random.Generator, np.random.RandomState, random.Random),
    "module": (nn.Module,),
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# What every module has, besides the user's attributes; of it, only this changes what it computes.
_OF_ALL = vars(nn.Module()).keys() - {"training"}

# Beyond these, looking would cost more than a recording saves.
_MOST_ITEMS = 10_000
_MOST_BYTES = 2**18


class Fingerprint:
    """Everything that hangs on a policy's modules: a recording holds while none is exchanged.

    Dicts, lists, tuples, sets, deques, dataclasses and `SimpleNamespace`s are looked into, at any
    depth, and NumPy arrays are compared by their bytes. What changes inside any other object that
    stays (an object of a class of the user's, a module in a list) does not show. Tensors need not:
    a recording reads them where they lie.

    Args:
        policy: Any module.

    Attributes:
        tensors: Parameters, buffers and other tensors that are attributes of a module.
        repeatable: False if somebody must be called whenever a module runs (hooks), if a module
            was compiled, if it holds a random generator that is not torch's, or if there is too
            much to look at: over 10,000 items in containers or 2^18 bytes in NumPy arrays.
    """

    def __init__(self, policy: nn.Module) -> None:
        modules = list(policy.modules())
        values: list[Any] = [
            value
            for module in modules
            for name, value in vars(module).items()
            if name not in _OF_ALL
        ]
        for module in modules:
            for table in (module._parameters, module._buffers, module._modules):
                values += table.values()
        hooks = [hook for m in modules for name in _HOOKS for hook in getattr(m, name).values()]
        self.tensors = _of(values, "tensor")
        on_tensors = [hooks for tensor in self.tensors for hooks in _hooks_of(tensor)]
        dense = [tensor for tensor in self.tensors if tensor.layout == torch.strided]
        places = [number for t in dense for number in (t.data_ptr(), *t.stride())]
        inside = _inside(values)
        values += inside or []
        arrays = _of(values, "array")
        few = inside is not None and sum(array.nbytes for array in arrays) <= _MOST_BYTES
        contents = [part for x in arrays if few for part in (x.dtype, *x.shape, x.tobytes())]
        self._values = [*values, *map(type, modules), *hooks, *on_tensors, *places, *contents]
        self.repeatable = few and not (
            hooks
            or any_global_hook()
            or any(on_tensors)
            or any("_orig_mod" in module._modules for module in modules)
            or any(getattr(module, "_compiled_call_impl", None) for module in modules)
            or bool(_of(values, "generator"))
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fingerprint):
            return NotImplemented
        return len(self._values) == len(other._values) and all(
            map(_same, self._values, other._values)
        )

    __hash__ = None  # type: ignore[assignment]


def _of(values: Sequence[Any], kind: str) -> list[Any]:
    """The values of this kind."""
    types = {each for each in set(map(type, values)) if _kind(each) == kind}  # a few, of hundreds
    return [value for value in values if type(value) in types] if types else []


@functools.lru_cache(maxsize=1024)
def _kind(cls: type) -> str:
    for name, classes in _KINDS.items():
        if issubclass(cls, classes):
            return name
    return "container" if dataclasses.is_dataclass(cls) else "other"


def _inside(values: Sequence[Any]) -> list[Any] | None:
    """Each container among the values, what it holds, and what is inside of that.

    None if that is too much.
    """
    found: list[Any] = []
    seen: set[int] = set()
    while containers := _of(values, "container"):
        values = []
        for container in containers:
            if id(container) in seen:
                continue
            seen.add(id(container))
            held = _held(container)
            if len(found) + len(values) + len(held) > _MOST_ITEMS:
                return None
            values += (container, len(held), *held)
            if isinstance(held, dict):
                values += held.values()
        found += values
    return found


def _held(container: Any) -> Any:
    if isinstance(container, _COLLECTIONS):
        return container
    if hasattr(container, "__dict__"):
        return vars(container)
    return [getattr(container, name, None) for name in container.__dataclass_fields__]


def _hooks_of(tensor: Tensor) -> tuple[object, object]:
    return tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None)


def _same(one: object, other: object) -> bool:
    return one is other or (type(one) is type(other) and isinstance(one, _SIMPLE) and one == other)
