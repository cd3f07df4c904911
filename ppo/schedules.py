"""Coefficients that change while training goes on.

A schedule turns progress, the share of the training that is done, in [0, 1], into a value. Outside
[0, 1] it keeps the value of the nearer end, so nothing overshoots below 0.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Protocol, runtime_checkable

from ppo._checks import check_number

__all__ = ["Constant", "Linear", "Schedule", "as_schedule"]


@runtime_checkable
class Schedule(Protocol):
    """What every schedule offers."""

    def __call__(self, progress: float, /) -> float:
        """Return the value at ``progress``, the share of the training that is done."""

    def to_plain(self) -> float | dict[str, list[float]]:
        """Return numbers, lists and mappings from which :func:`as_schedule` makes it again."""


@dataclass(frozen=True)
class Constant:
    """The same value throughout: f(p) = value.

    Args:
        value: The value, a finite number.

    Raises:
        ValueError: For a number that is not finite.
        TypeError: For anything but a number.

    Example:
        >>> Constant(0.2)(progress=0.7)
        0.2
    """

    value: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", _finite("value", self.value))

    def __call__(self, progress: float) -> float:
        """Return the value."""
        return self.value

    def to_plain(self) -> float:
        """Return the number."""
        return self.value


@dataclass(frozen=True)
class Linear:
    r"""A straight line: f(p) = (1 − p) start + p end, with p limited to [0, 1].

    Args:
        start: Value at the first update, a finite number.
        end: Value when training is done, a finite number.

    Raises:
        ValueError: For a number that is not finite.
        TypeError: For anything but numbers.

    Example:
        >>> annealed = Linear(0.5, 0.0)
        >>> annealed(0.0), annealed(0.5), annealed(1.5)
        (0.5, 0.25, 0.0)
    """

    start: float
    end: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "start", _finite("start", self.start))
        object.__setattr__(self, "end", _finite("end", self.end))

    def __call__(self, progress: float) -> float:
        """Return the value at ``progress``."""
        p = min(max(progress, 0.0), 1.0)
        # Exact at both ends, which start + p * (end - start) is not.
        return (1.0 - p) * self.start + p * self.end

    def to_plain(self) -> dict[str, list[float]]:
        """Return ``{"linear": [start, end]}``."""
        return {"linear": [self.start, self.end]}


# The name of each kind in a mapping, and the names of the numbers it takes.
_KINDS: dict[str, tuple[type[Constant] | type[Linear], tuple[str, ...]]] = {
    "constant": (Constant, ("value",)),
    "linear": (Linear, ("start", "end")),
}


def as_schedule(x: object) -> Schedule:
    """Return the schedule that a number, a schedule or a mapping describes.

    Args:
        x: A number, a :class:`Schedule`, or a mapping with one entry, such as
            ``{"linear": [3e-4, 0]}`` (in YAML ``{linear: [3e-4, 0]}``).

    Returns:
        A schedule; the same object if ``x`` is one.

    Raises:
        ValueError: For an unknown kind (the message names the nearest), the wrong number of
            values, or a value that is not finite.
        TypeError: For anything else.

    Example:
        >>> as_schedule(0.2)
        Constant(value=0.2)
        >>> as_schedule({"linear": [3e-4, 0]})
        Linear(start=0.0003, end=0.0)
    """
    if isinstance(x, Schedule) and not isinstance(x, type):
        return x
    if isinstance(x, Mapping):
        return _from_mapping(x)
    if isinstance(x, Real):
        return Constant(x)  # type: ignore[arg-type]
    raise TypeError(
        f"schedule is {x!r} ({type(x).__name__}), wanted a number, a schedule or a mapping; "
        f"write 3e-4 or {{linear: [3e-4, 0]}}"
    )


def _from_mapping(x: Mapping[object, object]) -> Schedule:
    if len(x) != 1:
        raise ValueError(
            f"schedule is {dict(x)!r}, wanted one entry; write for example {{linear: [3e-4, 0]}}"
        )
    ((kind, numbers),) = x.items()
    if not isinstance(kind, str) or kind not in _KINDS:
        nearest = difflib.get_close_matches(str(kind), _KINDS, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"schedule has the kind {kind!r}, wanted one of {sorted(_KINDS)}; "
            f"did you mean {nearest!r}?"
        )
    make, names = _KINDS[kind]
    if not isinstance(numbers, Sequence) or isinstance(numbers, str):
        numbers = [numbers]
    if len(numbers) != len(names):
        raise ValueError(
            f"schedule {kind!r} has {len(numbers)} values, wanted {len(names)}; "
            f"write {{{kind}: [{', '.join(names)}]}}"
        )
    return make(*numbers)


def _finite(name: str, x: float) -> float:
    check_number(name, x)
    number = float(x)
    if not math.isfinite(number):
        raise ValueError(f"{name} is {number}, wanted a finite number; pass a finite {name}")
    return number
