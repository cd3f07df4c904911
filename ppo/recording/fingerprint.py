"""Whether a policy is still the one that was recorded, and whether it can be recorded at all."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["Fingerprint"]

_SIMPLE = (bool, int, float, str)
_GENERATORS = (np.random.Generator, np.random.RandomState, random.Random)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Fingerprint:
    """Everything that hangs on a policy's modules: a recording holds while none is exchanged.

    What changes inside an object that stays (a list, a tensor) does not show. Tensors need not: a
    recording reads them where they lie.

    Args:
        policy: Any module.

    Attributes:
        tensors: Parameters, buffers and other tensors that are attributes of a module.
        repeatable: False if somebody must be called whenever a module runs (hooks), if a module
            was compiled, or if it holds a random generator that is not torch's.
    """

    def __init__(self, policy: nn.Module) -> None:
        modules = list(policy.modules())
        tables = [
            table
            for module in modules
            for table in (vars(module), module._parameters, module._buffers, module._modules)
        ]
        hooks = [hook for m in modules for name in _HOOKS for hook in getattr(m, name).values()]
        values: list[Any] = [value for table in tables for value in table.values()]
        kinds = set(map(type, values))  # a few, where the values are hundreds
        of_tensors = {kind for kind in kinds if issubclass(kind, Tensor)}
        self.tensors = [value for value in values if type(value) in of_tensors]
        on_tensors = [hooks for tensor in self.tensors for hooks in _hooks_of(tensor)]
        dense = [tensor for tensor in self.tensors if tensor.layout == torch.strided]
        places = [number for t in dense for number in (t.data_ptr(), *t.stride())]
        self._values = [*values, *map(type, modules), *hooks, *on_tensors, *places]
        self.repeatable = not (
            hooks
            or nn.modules.module._has_any_global_hook()
            or any(on_tensors)
            or any("_orig_mod" in module._modules for module in modules)
            or any(getattr(module, "_compiled_call_impl", None) for module in modules)
            or any(issubclass(kind, _GENERATORS) for kind in kinds)
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Fingerprint):
            return NotImplemented
        return len(self._values) == len(other._values) and all(
            map(_same, self._values, other._values)
        )

    __hash__ = None  # type: ignore[assignment]


def _hooks_of(tensor: Tensor) -> tuple[object, object]:
    return tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None)


def _same(one: object, other: object) -> bool:
    return one is other or (type(one) is type(other) and isinstance(one, _SIMPLE) and one == other)
