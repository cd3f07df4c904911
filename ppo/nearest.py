"""Names that are unknown, and the nearest of those that are known."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

from ppo.errors import ConfigError

__all__ = ["NearestError", "names_the_nearest", "setting_names"]

T = TypeVar("T")


class NearestError(ConfigError):
    """A name is unknown; the message offers the nearest valid one.

    Args:
        name: What was given.
        known: Names that are valid; `group.setting` is found by its second part as well.
        what: What the names are of.
    """

    def __init__(self, name: str, known: Sequence[str], what: str = "setting") -> None:
        compared = {one.rpartition(".")[2].lower(): one for one in known}
        compared |= {one.lower(): one for one in known}
        close = difflib.get_close_matches(name.lower(), compared, n=1, cutoff=0.5)
        hint = (
            f"did you mean {compared[close[0]]!r}?"
            if close
            else f"known are {', '.join(sorted(known))}"
        )
        super().__init__(f"unknown {what} {name!r}; {hint}")


class UnknownArgumentError(NearestError, TypeError):
    """An argument has an unknown name, which to Python is a `TypeError`."""


def names_the_nearest(cls: type[T]) -> type[T]:
    """Let a dataclass that is given an unknown argument name the nearest of its own.

    Example:
        >>> @names_the_nearest
        ... @dataclasses.dataclass
        ... class Size:
        ...     width: int = 1
        >>> Size(widht=2)
        Traceback (most recent call last):
            ...
        ppo.nearest.UnknownArgumentError: unknown setting 'widht'; did you mean 'width'?
    """
    init: Callable[..., None] = cls.__init__
    known = {field.name for field in dataclasses.fields(cast("Any", cls))}

    @functools.wraps(init)
    def checked(self: T, *args: Any, **settings: Any) -> None:
        for name in settings:
            if name not in known:
                raise UnknownArgumentError(name, setting_names(cls))
        init(self, *args, **settings)

    cast("Any", cls).__init__ = checked
    return cls


def setting_names(cls: type) -> list[str]:
    """Names of a dataclass's fields, and of those in a field that is one: `policy.shared`."""
    names = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cast("Any", cls)):
        names.append(field.name)
        if dataclasses.is_dataclass(group := hints[field.name]):
            names += [f"{field.name}.{name}" for name in setting_names(cast("type", group))]
    return names
