"""Checks of the settings of runs, in sentences that name the setting; imports nothing heavy."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, Literal, Union


def check_number(name: str, value: float | None, least: float, most: float = math.inf) -> None:
    """Raise ValueError for a number outside its range, naming the setting."""
    if value is None or (math.isfinite(value) and least <= value <= most):
        return
    where = f"at least {least:g}" if math.isinf(most) else f"in {least:g} to {most:g}"
    raise ValueError(f"{name} must be a finite number {where}, got {value}")


def check_types(settings: Any, prefix: str = "") -> None:
    """Raise ValueError for a field of a dataclass whose value is not of its type, naming it.

    Args:
        settings: a dataclass.
        prefix: of the names of its fields.
    """
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value, hint = getattr(settings, field.name), hints[field.name]
        if not _is_of(value, hint):
            raise ValueError(f"{prefix}{field.name} must be {_in_words(hint)}, got {value!r}")


def _is_of(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in arguments)
    if origin in (Union, types.UnionType):
        return any(_is_of(value, one) for one in arguments)
    if origin is tuple and isinstance(value, tuple):
        each = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return len(value) == len(each) and all(map(_is_of, value, each))
    if hint in (int, float):
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return hint is Any or isinstance(value, origin or hint)


_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", type(None): "null"}


def _in_words(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(map(_in_words, arguments))
    if origin is tuple:
        if arguments[-1] is Ellipsis:
            return f"a list, each of {_in_words(arguments[0])}"
        return f"a list of {len(arguments)}, each {_in_words(arguments[0])}"
    if origin is dict:
        return "a table of names and values"
    return _WORDS.get(hint, "a table of settings")
