"""Values read from files (JSON, checkpoints), checked against the annotations of the type they should have."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints, is_typeddict

from sagan.errors import UserError, is_int, listed, shown


def conform(value: Any, kind: Any, where: str = "") -> Any:
    """Return a plain value as a value of type ``kind``; ``where`` is the value's name in messages.

    Dataclasses are made of dictionaries, tuples of lists, and paths of strings. A dictionary for a dataclass or a
    TypedDict has exactly its keys. Integers have 64 bits.

    Raises:
        UserError: if it is none; the message names the place and what was expected.

    Example:
        >>> conform({"a": [1]}, dict[str, tuple[int, ...]])
        {'a': (1,)}
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, UnionType):
        return _one_of(value, arguments, where)
    if is_dataclass(kind) or is_typeddict(kind):
        return _fields(value, kind, where)
    if origin in (list, tuple):
        _expect(isinstance(value, (list, tuple)), value, "a list", where)
        return origin(conform(each, arguments[0], f"{where}[{i}]") for i, each in enumerate(value))
    if origin is dict:
        _expect(isinstance(value, dict), value, "a dictionary", where)
        keys = [conform(key, arguments[0], f"a key of {where}") for key in value]
        return {key: conform(value[key], arguments[1], _inner(where, key)) for key in keys}
    if origin is Literal:
        _expect(type(value) is str and value in arguments, value, f"one of {', '.join(arguments)}", where)
    elif kind is float:
        _expect(type(value) is float or is_int(value), value, "a number", where)
    elif kind is int:
        _expect(is_int(value), value, "an integer", where)
    elif kind is Path:
        _expect(isinstance(value, str), value, "a path", where)
        return Path(value)
    else:
        name = {str: "text", bool: "True or False", NoneType: "None"}.get(kind, f"a {kind.__name__}")
        _expect(isinstance(value, kind), value, name, where)
    return value


def check_names(found: Collection[Any], expected: Collection[Any], where: str) -> None:
    """Raise :class:`UserError` if two sets of names differ."""
    if set(found) != set(expected):
        sides = (("unknown", set(found) - set(expected)), ("missing", set(expected) - set(found)))
        named = [f"{what} {listed(sorted(side, key=shown))}" for what, side in sides if side]
        raise UserError(f"{where}{where and ': '}{', '.join(named)}")


def _one_of(value: Any, kinds: tuple[Any, ...], where: str) -> Any:
    failures = []
    for kind in kinds:
        try:
            return conform(value, kind, where)
        except UserError as error:
            failures.append(error)
    raise failures[0]  # None comes last


def _fields(value: Any, kind: Any, where: str) -> Any:
    hints = get_type_hints(kind)
    make: Any = kind
    names = [each.name for each in fields(kind)] if is_dataclass(kind) else list(hints)
    _expect(isinstance(value, dict), value, "a dictionary", where or kind.__name__)
    check_names(value, names, where)
    values = {name: conform(value[name], hints[name], _inner(where, name)) for name in names}
    if not is_dataclass(kind):
        return values
    try:
        return make(**values)
    except UserError as error:  # a value out of range
        raise UserError(_inner(where, str(error))) from None


def _expect(condition: bool, value: Any, expected: str, where: str) -> None:
    if not condition:
        raise UserError(f"{where}: expected {expected}, got {shown(value)}")


def _inner(where: str, name: Any) -> str:
    return f"{where}.{name}" if where else str(name)
