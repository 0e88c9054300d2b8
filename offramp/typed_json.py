"""From what `json.loads` gave to dataclasses, every type checked. Standard library only."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any

from offramp.errors import CorruptError


def decoded(kind: Any, value: Any, where: str) -> Any:
    """`value` as `kind` (a dataclass, tuple, dict, union or scalar type), or CorruptError naming `where`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(typing.cast(type, kind), value, where)
    if origin in (types.UnionType, typing.Union):
        return _decode_union(arguments, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(decoded(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: decoded(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and type(value) is int:
        return float(value)
    if origin is None and type(value) is kind:
        return value
    raise CorruptError(f"{where}: got {type(value).__name__}, expected {kind}; export the bundle again")


def _decode_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    for kind in kinds:
        if kind is type(None) and value is None:
            return None
        if kind is not type(None) and (dataclasses.is_dataclass(kind) or type(value) is kind):
            return decoded(kind, value, where) if value is not None else None
    raise CorruptError(f"{where}: got {type(value).__name__}, expected one of {kinds}; export the bundle again")


def _decode_dataclass(kind: type, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise CorruptError(f"{where}: got {type(value).__name__}, expected an object")
    hints = typing.get_type_hints(kind)
    required = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is dataclasses.MISSING}
    if missing := required - value.keys():
        raise CorruptError(f"{where}: missing {', '.join(sorted(missing))}; export the bundle again")
    if unknown := value.keys() - hints.keys():
        raise CorruptError(f"{where}: unknown {', '.join(sorted(unknown))}; export the bundle again")
    return kind(**{name: decoded(hints[name], item, f"{where}.{name}") for name, item in value.items()})
