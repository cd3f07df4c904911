"""From YAML text or plain values to a typed dataclass, strictly.

YAML 1.1 reads `3e-4` as a string, `010` as 8, `on` as true, and lets the last of two equal keys
win. Here a scalar stays text until the field it is for says what it must be, a key given twice is
an error, as is `on` where no field says what it must be. Nothing is ever constructed from a tag.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import numbers
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import numpy as np
import yaml

from ppo.errors import ConfigError
from ppo.nearest import NearestError, setting_names
from ppo.schedules import Schedule, as_schedule

__all__ = [
    "Text",
    "check_fields",
    "parse_dataclass",
    "parse_override",
    "read_yaml",
    "write_yaml",
]

T = TypeVar("T")

_NULLS = {"", "null", "none", "~"}
_BOOLS = {"true": True, "false": False}
_UNCLEAR = {"yes", "no", "on", "off"}  # flags in YAML 1.1, and text in YAML 1.2
_INFINITIES = {".inf": math.inf, "+.inf": math.inf, "-.inf": -math.inf}
_MAX_VALUES = 10_000
# What plain text, numbers, dates, `<<` and `=` resolve to without a tag being written.
_PLAIN_TAGS = {"str", "int", "float", "bool", "null", "timestamp", "merge", "value", "seq", "map"}
_INTEGER = re.compile(r"[+-]?\d+(_\d+)*")


class Text(str):
    """A YAML scalar as written, with its line in a file; `quoted` if it stood in quotes."""

    line: int | None
    quoted: bool

    def __new__(cls, text: str, line: int | None, quoted: bool) -> Text:
        """Attach line and quoting to a string."""
        self = super().__new__(cls, text)
        self.line = line
        self.quoted = quoted
        return self

    @property
    def means_null(self) -> bool:
        """True for an empty value, `null`, `none` and `~`, without quotes."""
        return not self.quoted and self.lower() in _NULLS


def read_yaml(path: Path) -> dict[Any, Any]:
    """Read a mapping whose keys and scalars are `Text`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    data = _compose(text, str(path))
    if isinstance(data, Text) and data.means_null:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} must hold a mapping `key: value`, got {type(data).__name__}")
    return data


def write_yaml(path: Path, data: Mapping[str, Any]) -> None:
    """Write plain values as YAML that `read_yaml` understands in the same way."""
    text = yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


class _Dumper(yaml.SafeDumper):
    """Quotes every text that would be read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    ambiguous = _meaning(Text(text, 0, False)) != text
    style = '"' if ambiguous else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _represent_text)


def _compose(text: str, where: str, *, in_file: bool = True) -> Any:
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return {} if node is None else _Converter(where, in_file)(node)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{where} is not valid YAML: {reason}") from error
    except RecursionError:
        raise ConfigError(f"{where} is nested too deeply") from None


class _Converter:
    """Turns YAML nodes into dicts, lists and `Text`; what unfolds without end is an error."""

    def __init__(self, where: str, in_file: bool) -> None:
        self._where = where
        self._in_file = in_file
        self._left = _MAX_VALUES

    def __call__(self, node: yaml.Node) -> Any:
        line = node.start_mark.line + 1
        self._left -= 1
        if self._left < 0:
            self._refuse(line, f"more than {_MAX_VALUES} values, written out or by aliases")
        if node.tag.removeprefix("tag:yaml.org,2002:") not in _PLAIN_TAGS:
            self._refuse(line, f"tags are not allowed, got {node.tag}")
        if isinstance(node, yaml.ScalarNode):
            return Text(node.value, line if self._in_file else None, node.style in ("'", '"'))
        if isinstance(node, yaml.SequenceNode):
            return [self(item) for item in node.value]
        mapping: dict[Any, Any] = {}
        for key_node, value_node in node.value:
            key = self(key_node)
            line = key_node.start_mark.line + 1
            if not isinstance(key, str):
                self._refuse(line, f"a key must be plain text, got {key!r}")
            if key in mapping:
                self._refuse(line, f"{key!r} is given twice; keep one of them")
            mapping[key] = self(value_node)
        return mapping

    def _refuse(self, line: int, why: str) -> NoReturn:
        raise ConfigError(f"{self._where}:{line}: {why}")


def parse_override(override: str, data: MutableMapping[Any, Any]) -> None:
    """Apply `key=value` or `group.key=value` to a mapping; the value is YAML."""
    name, equals, value = override.partition("=")
    *groups, last = name.strip().split(".")
    if not equals or not name.strip():
        raise ConfigError(f"an override must be key=value, got {override!r}")
    for group in groups:
        if not isinstance(data.get(group), MutableMapping):
            data.pop(group, None)  # with the line it was written on
            data[group] = {}
        data = data[group]
    data.pop(last, None)
    where = f"override {override!r}"
    data[last] = _compose(value, where, in_file=False) if value.strip() else Text("", None, False)


class _LocatedError(ConfigError):
    """An error whose message says where, as far as that is known."""


def parse_dataclass(cls: type[T], data: Mapping[Any, Any], where: str = "") -> T:
    """Build a dataclass from a mapping of `Text` (from a file) or plain values.

    Args:
        cls: A dataclass.
        data: Values by name of the field.
        where: The file, for errors.

    Raises:
        ConfigError: A key is unknown, or a value ill-typed or out of range.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"settings must be a mapping {{key: value}}, got {data!r}")
    hints = _hints(cast("Any", cls))
    values: dict[str, Any] = {}
    for key, value in data.items():
        with _locating(where, key):
            if key not in hints:
                raise NearestError(str(key), setting_names(cls))
            values[str(key)] = _coerce(hints[key], value, str(key), where, lenient=True)
    try:
        return cls(**values)
    except ConfigError as error:
        word = re.match(r"\w+", str(error))
        key = next((key for key in data if word and key == word[0]), None)
        with _locating(where, key):
            raise


@contextlib.contextmanager
def _locating(where: str, key: Any) -> Iterator[None]:
    """Put file and line of `key` before an error's message, unless an inner level has."""
    try:
        yield
    except _LocatedError:
        raise
    except ConfigError as error:
        line = getattr(key, "line", None)
        prefix = f"{where}:{line}: " if where and line is not None else ""
        raise _LocatedError(prefix + str(error)) from error


def check_fields(config: Any) -> None:
    """Check the types of a frozen dataclass's fields, and convert what means the same.

    Raises:
        ConfigError: A value is not of its field's type; names field and value.
    """
    for name, hint in _hints(cast("Any", type(config))).items():
        value = _coerce(hint, getattr(config, name), name, "", lenient=False)
        object.__setattr__(config, name, value)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _coerce(hint: Any, value: Any, name: str, where: str, *, lenient: bool) -> Any:
    """Convert one value to a field's type; `lenient` takes numbers written as strings."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        nothing = value is None or (isinstance(value, Text) and value.means_null)
        if nothing and type(None) in arguments:
            return None
        words = [w for a in arguments if typing.get_origin(a) is typing.Literal for w in a.__args__]
        if isinstance(value, str) and value in words:
            return str(value)
        (hint, *_) = (a for a in arguments if a is not type(None))
        try:
            return _coerce(hint, value, name, where, lenient=lenient)
        except ConfigError as error:
            also = words and typing.get_origin(hint) is not typing.Literal
            raise ConfigError(f"{error} (or one of {words})" if also else error) from None
    if origin is typing.Literal:
        if not isinstance(value, str) or value not in arguments:
            raise ConfigError(f"{name} must be one of {list(arguments)}, got {value!r}")
        return str(value)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise ConfigError(f"{name} must be a group of settings {{key: value}}, got {value!r}")
        return parse_dataclass(hint, value, where)
    if hint is Schedule:
        return _schedule(value, name, lenient)
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise ConfigError(f"{name} must be a list [a, b, ...], got {value!r}")
        item = arguments[0]
        return tuple(_coerce(item, part, name, where, lenient=lenient) for part in value)
    if hint is str and isinstance(value, str):
        return str(value)
    if hint in _SCALARS:
        convert, wanted = _SCALARS[hint]
        converted = convert(_written(value, lenient))
        if converted is None:
            raise ConfigError(f"{name} must be {wanted}, got {value!r}")
        return converted
    if origin is Mapping and isinstance(value, Mapping):
        if arguments[1] is Schedule:
            return {str(k): _schedule(x, f"{name}.{k}", lenient) for k, x in value.items()}
        _check_words(value, name, where)
        return _meaning(value)
    if origin is Sequence and isinstance(value, Sequence) and not isinstance(value, str):
        _check_words(list(value), name, where)
        return tuple(_meaning(list(value)))
    wanted = {str: "text", Mapping: "a group {key: value}", Sequence: "a list [a, b, ...]"}[
        origin or hint
    ]
    raise ConfigError(f"{name} must be {wanted}, got {value!r}")


def _written(value: Any, lenient: bool) -> Any:
    """What a scalar says: number or bool for unquoted text of a file, and lenient strings."""
    if isinstance(value, Text):
        return _meaning(value)
    return _meaning(Text(value, 0, False)) if lenient and isinstance(value, str) else value


def _check_words(value: Any, name: str, where: str) -> None:
    """Raise for a word that may be meant as a flag or as text, where no field says which."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            _check_words(item, f"{name}.{key}", where)
    elif isinstance(value, list):
        for item in value:
            _check_words(item, name, where)
    elif isinstance(value, Text) and not value.quoted and value.lower() in _UNCLEAR:
        with _locating(where, value):
            raise ConfigError(
                f"{name} is {value}, which may be a flag or text; write true or false, or, if "
                f'text is meant, "{value}" in quotes'
            )


def _meaning(value: Any) -> Any:
    """Plain values for `Text` where no field says the type: number, bool, null or text."""
    if isinstance(value, Mapping):
        return {str(key): _meaning(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_meaning(item) for item in value]
    if not isinstance(value, Text):
        return value
    text = value.lower()
    if value.quoted:
        return str(value)
    if value.means_null:
        return None
    if text in _BOOLS or text in _INFINITIES:
        return {**_BOOLS, **_INFINITIES}[text]
    try:
        # Decimal always: 010 is ten. Words such as `nan` and `infinity` are text.
        if _INTEGER.fullmatch(value):
            return int(value)
        return float(value) if value[-1:].isdigit() or value[-1:] == "." else str(value)
    except ValueError:
        return str(value)


def _number(value: Any) -> float | None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return None if math.isnan(number) else number


def _integer(value: Any) -> int | None:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    number = _number(value)
    return int(number) if number is not None and number.is_integer() else None


def _boolean(value: Any) -> bool | None:
    return bool(value) if isinstance(value, bool | np.bool_) else None


_SCALARS: dict[Any, tuple[Callable[[Any], Any], str]] = {
    float: (_number, "a number"),
    int: (_integer, "a whole number"),
    bool: (_boolean, "true or false"),
}


def _schedule(value: Any, name: str, lenient: bool) -> Schedule:
    if isinstance(value, Mapping):
        value = {
            str(kind): [_written(item, lenient) for item in items]
            if isinstance(items, list | tuple)
            else _written(items, lenient)
            for kind, items in value.items()
        }
    else:
        value = _written(value, lenient)
    try:
        return as_schedule(value)
    except (OverflowError, TypeError, ValueError) as error:
        raise ConfigError(f"{name}: {error}") from error
