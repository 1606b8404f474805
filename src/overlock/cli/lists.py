"""Options that take lists: ``--images a b`` as the shell gives it, beside the parser's own ``--images [a,b]``."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Sequence
from itertools import takewhile
from typing import Any, Union

from jsonargparse import ArgumentParser


def join_lists(arguments: Sequence[str], parser: ArgumentParser) -> list[str]:
    """A command line in which the words after an option of lists are one, in brackets, unless they are already.

    Args:
        arguments: the words.
        parser: of the sub-command. An option of numbers takes the words that are some, others all up to the next one.
    """
    actions: Sequence[Any] = parser._actions
    kinds = {
        option: _element(getattr(action, "_typehint", None)) for action in actions for option in action.option_strings
    }
    joined: list[str] = []
    place = 0
    while place < len(arguments):
        option, equals, value = arguments[place].partition("=")
        place += 1
        kind = kinds.get(option)
        is_number = kind in (int, float)
        words = [value] if equals else arguments[place:]
        given = list(takewhile(_is_number if is_number else _is_value, words))
        if kind is None or not given or given == ["null"] or given[0].startswith("["):
            joined.append(f"{option}{equals}{value}")
            continue
        joined.append(f"{option}=[{','.join(given)}]" if is_number else f"{option}={json.dumps(given)}")
        place += 0 if equals else len(given)
    return joined


def _element(hint: Any) -> Any:
    """The type of the elements, where a type is that of lists, or of lists and None; else None."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        others = [one for one in arguments if one is not type(None)]
        return _element(others[0]) if len(others) == 1 else None
    return arguments[0] if origin in (list, tuple) else None


def _is_value(word: str) -> bool:
    return not word.startswith("-") or _is_number(word)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
