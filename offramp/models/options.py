"""Frozen dataclasses of options from plain values, as JSON and TOML have them, checked on the way."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar

from offramp.errors import OptionError

T = TypeVar("T")


def options_from_dict(kind: type[T], values: object, where: str) -> T:
    """Build a dataclass from values by field name: tables become dataclasses, lists tuples, whole numbers floats.

    `where` says in messages what is read. Raises OptionError for what is no table, for an unknown name, with the
    nearest known one, for a missing one, for a value of the wrong type, and what the dataclass itself raises.
    """
    if not isinstance(values, Mapping):
        names = ", ".join(field.name for field in fields(kind))  # type: ignore[arg-type]
        raise OptionError(f"{where}: got {values!r}, expected a table with {names}")
    hints = typing.get_type_hints(kind)
    known = {field.name: field for field in fields(kind)}  # type: ignore[arg-type]
    check_names(values, known, where)
    if missing := [
        name
        for name, field in known.items()
        if field.default is MISSING and field.default_factory is MISSING and name not in values
    ]:
        raise OptionError(f"{where}: {', '.join(missing)} is missing")
    found = {name: _converted(value, hints[name], f"{where}, {name}") for name, value in values.items()}
    try:
        return kind(**found)
    except OptionError as exc:
        raise OptionError(f"{where}: {exc}") from exc


def check_names(values: Mapping[str, Any], known: typing.Iterable[str], where: str) -> None:
    """Raise OptionError for a name that is not `known`, with the nearest one that is."""
    names = list(known)
    for name in values:
        if name not in names:
            raise OptionError(f"{where}: got {name!r}, {nearest(name, names)}")


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """Return what to say about a wrong name: the nearest known one, or all of them."""
    names = sorted(known)
    if close := difflib.get_close_matches(name, names, n=1):
        return f"did you mean {close[0]!r}?"
    return f"expected one of {', '.join(names)}"


def _converted(value: Any, hint: Any, where: str) -> Any:
    """A value as the type that its field declares. Raises OptionError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        return None if value is None else _converted(value, inner[0], where)
    if isinstance(hint, type) and is_dataclass(hint):
        return value if isinstance(value, hint) else options_from_dict(hint, value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise OptionError(f"{where}: got {value!r}, expected a list")
        return tuple(_converted(one, arguments[0], where) for one in value)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise OptionError(f"{where}: got {value!r}, expected a table")
        return {name: _converted(one, arguments[1], f"{where}.{name}") for name, one in value.items()}
    return _plain(value, hint, where)


def _plain(value: Any, hint: Any, where: str) -> Any:
    """A number, text or bool; literals are checked by their dataclass."""
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint in (int, float, str, bool) and type(value) is not hint:
        raise OptionError(f"{where}: got {value!r}, expected {hint.__name__}")
    return value
