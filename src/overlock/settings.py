"""Settings of runs: checks in sentences that name the setting, and the names of earlier versions; nothing heavy."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, Union

RENAMED = MappingProxyType({
    "augment.mirror": "augment.hflip",
    "force": "overwrite",
    "machine": "runtime",
    "machine.recompute": "runtime.grad_checkpointing",
    "machine.sync_norm": "runtime.sync_bn",
    "optim.drop_epochs": "optim.milestones",
    "optim.lr_batch": "optim.base_batch_size",
    "progress.returns": "progress.rollbacks",  # of checkpoints
    "safety.returns": "safety.rollbacks",
    "shift": "reduce_zero_label",
})  # fmt: skip
"""Settings and options of version 0.1, and their names now."""
VALUES = MappingProxyType({"optim.schedule": {"line": "linear", "drops": "multistep"}})
"""Values of settings, likewise."""


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
            raise ValueError(f"{prefix}{field.name} must be {in_words(hint)}, got {value!r}")


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


def in_words(hint: Any) -> str:
    """What values of a type are, for people."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(map(repr, arguments))
    if origin in (Union, types.UnionType):
        return " or ".join(map(in_words, arguments))
    if origin in (tuple, list):
        if origin is list or arguments[-1] is Ellipsis:
            return f"a list, each of {in_words(arguments[0])}"
        return f"a list of {len(arguments)}, each {in_words(arguments[0])}"
    if origin is dict:
        return "a table of names and values"
    return _WORDS.get(hint, "a table of settings")


def renew(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings, of which those of earlier versions have their names of now.

    Raises:
        ValueError: for a setting under both of its names.
    """
    renewed: dict[str, Any] = {}
    for name, value in settings.items():
        parts = value.items() if isinstance(value, Mapping) and _is_group(name) else [("", value)]
        for part, content in parts:
            old = f"{name}.{part}" if part else name
            group, _, last = _new_name(old).partition(".")
            place = renewed if not last else renewed.setdefault(group, {})
            if (last or group) in place:
                raise ValueError(f"{old} is called {_new_name(old)} now, and both are given; leave one of them out")
            place[last or group] = _new_value(_new_name(old), content)
        if isinstance(value, Mapping) and not value:
            renewed.setdefault(_new_name(name), {})
    return renewed


def renew_options(words: Sequence[str], tell: Callable[[str], object]) -> list[str]:
    """The words of a command line, of which options of earlier versions have their names of now.

    Args:
        words: as they were given.
        tell: called with a note on each.
    """
    renewed: list[str] = []
    option = ""
    for word in words:
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            new = _new_value(option, word)
        else:
            option = _new_name(name[2:])
            new = f"--{option}{equals}{_new_value(option, value)}"
        if new != word:
            old, now = (one.partition("=") for one in (word, new))
            tell(f"{old[0]} is now called {now[0]}" if old[0] != now[0] else f"{old[2]} is now called {now[2]}")
        renewed.append(new)
    return renewed


def _new_name(name: str) -> str:
    group, dot, rest = name.partition(".")
    return RENAMED.get(name) or f"{RENAMED.get(group, group) if dot else group}{dot}{rest}"


def _new_value(name: str, value: Any) -> Any:
    return VALUES.get(name, {}).get(value, value) if isinstance(value, str) else value


def _is_group(name: str) -> bool:
    return any(known.startswith(f"{name}.") for known in (*RENAMED, *RENAMED.values(), *VALUES))
