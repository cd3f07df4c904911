"""From YAML text or plain values to a typed dataclass, strictly.

YAML 1.1 reads `3e-4` as a string, `010` as 8, `on` as true, and lets the last of two equal keys
win. Here a scalar stays text until the field it is for says what it must be, and a key given twice
is an error. Nothing is ever constructed from a tag.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ppo.errors import ConfigError
from ppo.schedules import Schedule, as_schedule

__all__ = [
    "NearestError",
    "Text",
    "parse_dataclass",
    "parse_override",
    "parse_scalar",
    "read_yaml",
    "write_yaml",
]

T = TypeVar("T")

_NULLS = {"", "null", "none", "~"}
_BOOLS = {"true": True, "false": False}
_INTEGER = re.compile(r"[+-]?\d[\d_]*")


class NearestError(ConfigError):
    """A name is unknown; the message offers the nearest valid one."""

    def __init__(self, name: str, known: Sequence[str], what: str = "setting") -> None:
        close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(sorted(known))}"
        super().__init__(f"unknown {what} {name!r}; {hint}")


class Text(str):
    """A YAML scalar as written, with its line; `quoted` if it stood in quotes."""

    line: int
    quoted: bool

    def __new__(cls, text: str, line: int, quoted: bool) -> Text:
        """Attach line and quoting to a string."""
        self = super().__new__(cls, text)
        self.line = line
        self.quoted = quoted
        return self


def read_yaml(path: Path) -> dict[Any, Any]:
    """Read a mapping whose keys and scalars are `Text`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    data = _compose(text, str(path))
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping `key: value`, got {type(data).__name__}")
    return data


def write_yaml(path: Path, data: Mapping[str, Any]) -> None:
    """Write plain values as YAML."""
    path.write_text(yaml.safe_dump(dict(data), sort_keys=False), encoding="utf-8")


def _compose(text: str, where: str) -> Any:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return {} if node is None else _convert(node, where)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where} is not valid YAML: {error}") from error


def _convert(node: yaml.Node, where: str) -> Any:
    line = node.start_mark.line + 1
    if node.tag.startswith("!") or not node.tag.startswith("tag:yaml.org,2002:"):
        raise ConfigError(f"{where}:{line}: tags are not allowed, got {node.tag}")
    if isinstance(node, yaml.ScalarNode):
        return Text(node.value, line, node.style in ("'", '"'))
    if isinstance(node, yaml.SequenceNode):
        return [_convert(item, where) for item in node.value]
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = _convert(key_node, where)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise ConfigError(f"{where}:{line}: a key must be plain text, got {key!r}")
        if key in mapping:
            raise ConfigError(f"{where}:{line}: {key!r} is given twice; keep one of them")
        mapping[key] = _convert(value_node, where)
    return mapping


def parse_override(override: str, data: MutableMapping[Any, Any]) -> None:
    """Apply `key=value` or `group.key=value` to a mapping; the value is YAML."""
    name, equals, value = override.partition("=")
    if not equals or not name:
        raise ConfigError(f"an override must be key=value, got {override!r}")
    *groups, last = name.strip().split(".")
    for group in groups:
        if not isinstance(data.get(group), MutableMapping):
            data[group] = {}
        data = data[group]
    data[last] = _compose(value, f"override {override!r}") if value.strip() else Text("", 1, False)


def parse_dataclass(cls: type[T], data: Mapping[Any, Any], where: str = "") -> T:
    """Build a dataclass from a mapping of `Text` or plain values."""
    hints = typing.get_type_hints(cls)
    known = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values = {}
    for key, value in data.items():
        prefix = _prefix(where, key)
        try:
            if key not in known:
                raise NearestError(str(key), known)
            values[str(key)] = _parse(hints[key], value, str(key), where)
        except ConfigError as error:
            raise _located(error, prefix) from error
    try:
        return cls(**values)
    except ConfigError as error:
        name = str(error).partition(" ")[0].rstrip(":")
        key = next((key for key in data if key == name), None)
        raise _located(
            error, where + ": " if where and key is None else _prefix(where, key)
        ) from error


def _located(error: ConfigError, prefix: str) -> ConfigError:
    """The same error with file and line in front, unless an inner level has said them."""
    text = str(error)
    return error if not prefix or re.match(r"\S+:\d+: ", text) else ConfigError(prefix + text)


def _prefix(where: str, key: Any) -> str:
    line = getattr(key, "line", None)
    return f"{where}:{line}: " if where and line is not None else ""


def _parse(hint: Any, value: Any, name: str, where: str) -> Any:
    """Coerce one value to a field's type; `ConfigError` if it is not of that type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None or (_bare(value) and value.lower() in _NULLS):
            return None
        (hint,) = (argument for argument in arguments if argument is not type(None))
        return _parse(hint, value, name, where)
    if origin is typing.Literal:
        if str(value) not in arguments:
            raise ConfigError(f"{name} must be one of {list(arguments)}, got {value!s}")
        return str(value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be a group of settings {{key: value}}, got {value!r}")
        return parse_dataclass(hint, value, where)
    if hint is Schedule:
        return _parse_schedule(value, name)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"{name} must be a list [a, b, ...], got {value!r}")
        return tuple(_parse(arguments[0], item, name, where) for item in value)
    if hint in _SCALARS:
        return _SCALARS[hint](value, name)
    if hint is str and isinstance(value, str):
        return str(value)
    if origin is not None and isinstance(value, origin) and not isinstance(value, str):
        return _plain(value)
    raise ConfigError(
        f"{name} must be a {getattr(origin or hint, '__name__', hint)}, got {value!r}"
    )


def _bare(value: Any) -> bool:
    return isinstance(value, str) and not getattr(value, "quoted", False)


def _number(value: Any, name: str) -> float:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    try:
        if not _bare(value):
            raise ValueError
        number = float(value)
    except ValueError:
        raise ConfigError(f"{name} must be a number, got {value!r}") from None
    if math.isnan(number):
        raise ConfigError(f"{name} must be a number, got nan")
    return number


def _integer(value: Any, name: str) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if _bare(value) and _INTEGER.fullmatch(value):
        return int(value)  # decimal always: 010 is ten
    number = _number(value, name)
    if not number.is_integer():
        raise ConfigError(f"{name} must be a whole number, got {value!s}")
    return int(number)


def _boolean(value: Any, name: str) -> bool:
    if isinstance(value, bool):
        return value
    if _bare(value) and value.lower() in _BOOLS:
        return _BOOLS[value.lower()]
    raise ConfigError(f"{name} must be true or false, got {value!s}")


_SCALARS: dict[Any, Any] = {float: _number, int: _integer, bool: _boolean}


def _parse_schedule(value: Any, name: str) -> Schedule:
    if isinstance(value, Schedule):
        return value
    if isinstance(value, Mapping):
        value = {
            str(kind): [_number(item, f"{name}.{kind}") for item in items]
            if isinstance(items, Sequence) and not isinstance(items, str)
            else items
            for kind, items in value.items()
        }
    else:
        value = _number(value, name)
    try:
        return as_schedule(value)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {error}") from error


def parse_scalar(text: Any) -> Any:
    """What a scalar means where no field says its type: number, bool, null or text."""
    if not _bare(text):
        return str(text) if isinstance(text, str) else text
    for parse in (_integer, _number, _boolean):
        try:
            return parse(text, "")
        except ConfigError:
            continue
    return None if text.lower() in _NULLS else str(text)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return parse_scalar(value)
