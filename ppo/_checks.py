"""Checks at the door: what a public function refuses, and how it says so.

Every message names the argument, what came, what was wanted and the remedy. Nothing here reads
the contents of a tensor, so no check ever waits for a device.
"""

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

KindT = TypeVar("KindT")


def check_unit_interval(name: str, value: object) -> None:
    """Raise unless ``value`` is a number in [0, 1]."""
    check_number(name, value)
    if not 0 <= value <= 1:  # type: ignore[operator]
        raise ValueError(
            f"{name} is {value!r}, wanted a number in [0, 1]; pass {name} between 0 and 1"
        )


def check_non_negative(name: str, value: object) -> None:
    """Raise unless ``value`` is a number of at least 0."""
    check_number(name, value)
    if not value >= 0:  # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}, wanted a number of at least 0; pass {name} >= 0")


def check_above_1(name: str, value: object) -> None:
    """Raise unless ``value`` is a number above 1."""
    check_number(name, value)
    if not value > 1:  # type: ignore[operator]
        raise ValueError(f"{name} is {value!r}, wanted a number above 1; pass {name} > 1")


def whole_number(name: str, value: float) -> int:
    """Return a number of at least 1, rounded up to an integer; raise for anything else."""
    check_number(name, value)
    if not 1 <= value < math.inf:  # NaN too
        raise ValueError(f"{name} must be at least 1 and finite, got {value!r}")
    return math.ceil(value)


def check_number(name: str, value: object) -> None:
    """Raise unless ``value`` is a real number."""
    # bool is a Real, but True given for a coefficient is a slip.
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(
            f"{name} is {value!r} ({type(value).__name__}), wanted a number; pass a Python float"
        )


def check_positive_integer(name: str, value: object) -> None:
    """Raise unless ``value`` is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(
            f"{name} is {value!r} ({type(value).__name__}), wanted an integer; pass a Python int"
        )
    if value < 1:
        raise ValueError(f"{name} is {value!r}, wanted an integer of at least 1; pass {name} >= 1")


def check_callable(name: str, value: object) -> None:
    """Raise unless ``value`` can be called, or is None."""
    if value is not None and not callable(value):
        raise TypeError(
            f"{name} is {value!r} ({_kind(type(value))}), wanted a function; pass the function "
            "itself, not what it returns"
        )


def as_device(device: torch.device | str) -> torch.device:
    """Return the device of that name; raise where there is none."""
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is unknown: {error}") from error


def check_floating(name: str, x: Tensor) -> None:
    """Raise unless ``x`` holds floating-point numbers."""
    if not x.is_floating_point():
        raise TypeError(
            f"{name} has dtype {_dtype(x)}, wanted a floating dtype; convert it to float32"
        )


def check_flags(name: str, x: Tensor) -> None:
    """Raise unless ``x`` holds booleans."""
    if x.dtype is not torch.bool:
        raise TypeError(f"{name} has dtype {_dtype(x)}, wanted bool; convert it to bool")


def check_time_axis(name: str, x: Tensor) -> None:
    """Raise unless ``x`` has a first axis of at least one step."""
    if x.ndim == 0 or x.shape[0] == 0:
        raise ValueError(
            f"{name} has shape {list(x.shape)}, wanted [T, ...] with T >= 1; "
            f"pass at least one step along the first axis"
        )


def check_same_shape(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Raise unless ``x`` and ``like`` have equal shapes: nothing is ever broadcast."""
    if x.shape != like.shape:
        raise ValueError(
            f"{name} has shape {list(x.shape)}, wanted {list(like.shape)}, the shape of "
            f"{like_name}; reshape or expand {name}, it is not broadcast"
        )


def check_tensor(name: str, x: object) -> None:
    """Raise unless ``x`` is a torch tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} is of type {_kind(type(x))}, wanted a torch tensor; "
            f"convert it with torch.as_tensor({name})"
        )


def check_limit(name: str, limit: float | Tensor) -> None:
    """Raise unless ``limit`` is a number of at least 0; a tensor is believed, not read."""
    if not isinstance(limit, Tensor):
        check_non_negative(name, limit)


def check_rows(valid: Tensor | None, **tensors: Tensor | None) -> None:
    """Raise unless the tensors that are given are floating, and ``valid`` bool, of one shape."""
    given = [(name, x) for name, x in tensors.items() if x is not None]
    first_name, first = given[0]
    for name, x in given:
        check_tensor(name, x)
        check_floating(name, x)
        check_same_shape(name, x, first_name, first)
    if valid is not None:
        check_tensor("valid", valid)
        check_flags("valid", valid)
        check_same_shape("valid", valid, first_name, first)


def require(name: str, x: Tensor | None, partner: str) -> Tensor:
    """Return ``x``; raise if it is missing though its ``partner`` came."""
    if x is None:
        raise ValueError(f"{name} is None though {partner} came, wanted a tensor; pass {name} too")
    return x


def to_tensors(arrays: Mapping[str, object]) -> tuple[list[Tensor], Callable[[Tensor], Any]]:
    """Return tensors that share the memory of ``arrays``, and the way back for a result.

    All must be tensors or all NumPy arrays; the first one decides. Only an array that torch
    cannot look into (read-only, negative strides, foreign byte order) is copied.
    """
    first_name, first = next(iter(arrays.items()))
    if isinstance(first, Tensor):
        return [_as_kind(Tensor, x, name, first_name) for name, x in arrays.items()], _as_it_is
    if isinstance(first, np.ndarray):
        return [
            _from_numpy(_as_kind(np.ndarray, x, name, first_name)) for name, x in arrays.items()
        ], Tensor.numpy
    raise TypeError(
        f"{first_name} is of type {_kind(type(first))}, wanted a torch tensor or a NumPy array; "
        f"convert it with torch.as_tensor({first_name})"
    )


def open_trajectory(
    numbers: Mapping[str, object], terminated: object, truncated: object
) -> tuple[list[Tensor], Tensor, Tensor, Callable[[Tensor], Any]]:
    """Check the arguments of a trajectory and return them as tensors.

    Returns:
        The numbers in one dtype, ``terminated``, ``truncated`` (or, if that is None,
        ``terminated`` again), and the function that turns a result back into what the caller uses.
    """
    flags = {"terminated": terminated}
    if truncated is not None:
        flags["truncated"] = truncated
    tensors, restore = to_tensors({**numbers, **flags})
    first_name, first = next(iter(numbers)), tensors[0]
    check_time_axis(first_name, first)
    for name, x in zip([*numbers, *flags], tensors, strict=True):
        if name in flags:
            check_flags(name, x)
        else:
            check_floating(name, x)
        check_same_shape(name, x, first_name, first)
    count = len(numbers)
    return at_least_float32(*tensors[:count]), tensors[count], tensors[-1], restore


def at_least_float32(*xs: Tensor) -> list[Tensor]:
    """Return ``xs`` in one common floating dtype, float32 or wider."""
    dtype = torch.float32
    for x in xs:
        if x.dtype is not dtype:
            dtype = torch.promote_types(dtype, x.dtype)
    return [x if x.dtype is dtype else x.to(dtype) for x in xs]


def _as_kind(kind: type[KindT], x: object, name: str, first_name: str) -> KindT:
    if not isinstance(x, kind):
        raise TypeError(
            f"{name} is of type {_kind(type(x))}, wanted {_kind(kind)} like {first_name}; "
            f"convert all arguments to the one or the other"
        )
    return x


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _from_numpy(x: np.ndarray[Any, Any]) -> Tensor:
    native = np.require(x, dtype=x.dtype.newbyteorder("="), requirements=("C", "W"))
    return torch.from_numpy(native)


def _dtype(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _kind(kind: type) -> str:
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
