"""One sentence for a command line that will not do, with the nearest thing that would."""

from __future__ import annotations

import difflib
import re
from argparse import ArgumentError
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser

from overlock.settings import in_words


def command_of(arguments: Sequence[str]) -> str | None:
    """The first word that is no option."""
    return next((word for word in arguments if not word.startswith("-")), None)


def explain(error: ArgumentError, arguments: Sequence[str], subparsers: dict[str, ArgumentParser]) -> str:
    """One sentence for a command line that does not parse, with the nearest thing that would."""
    command = command_of(arguments)
    if command not in subparsers:
        known = ", ".join(subparsers)
        near = difflib.get_close_matches(command or "", subparsers, n=1)
        mend = f"did you mean {near[0]!r}?" if near else f"the commands are {known}"
        return f"unknown command {command!r}; {mend}" if command else f"no command given; the commands are {known}"
    options = [option for action in subparsers[command]._actions for option in action.option_strings]
    for word in arguments:
        option = word.partition("=")[0]
        if option.startswith("--") and option not in options:
            return f"unknown option {option}; {_nearest(option, options, f'overlock {command} --help')}"
    message = " ".join(str(error).split()).replace(f"{command}.", "")
    unknown = re.search(r"does not accept option '([\w.]+)'", message)
    if unknown:  # in a file of settings
        keys = [option.removeprefix("--") for option in options]
        return f"unknown setting {unknown[1]!r}; {_nearest(unknown[1], keys, f'overlock {command} --help')}"
    wrong = _explain_value(str(error), subparsers[command])
    return f"{wrong or message}; see overlock {command} --help"


def _nearest(name: str, known: Sequence[str], otherwise: str) -> str:
    """A hint at the known name that is meant: one of its group written alike, one that ends so, one written alike."""
    last = {option: option.rpartition(".")[2].lstrip("-") for option in known}
    group, dot, end = name.rpartition(".")
    siblings = {last[option]: option for option in known if dot and option.startswith(group + dot)}
    near = [siblings[part] for part in difflib.get_close_matches(end, siblings, n=1)]
    near = near or [option for option in known if last[option] == end.lstrip("-")]
    near = near or difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"see {otherwise}"


def last_sentence(error: Exception) -> str:
    """The message alone, also where a loading process has wrapped it in its traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].removeprefix("ValueError: ") if "Traceback" in str(error) else " ".join(lines)


def _explain_value(message: str, parser: ArgumentParser) -> str | None:
    """The sentence for a value of another type than its option's; None for other faults."""
    key = re.match(r'Parser key "([\w.]+)"', message)
    given = re.search(r"(?:Given|Got) value: (.*)", message)
    if not key or not given:
        return None
    action: Any = next((action for action in parser._actions if action.dest == key[1]), None)
    hint = getattr(action, "_typehint", None) or getattr(action, "type", None)
    return f"--{key[1]} must be {in_words(hint)}, got {given[1].strip()!r}" if hint else None
