"""The command line as a whole: the parser, and one sentence for every fault."""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Sequence
from functools import partial
from typing import Any

from jsonargparse import ArgumentParser, set_parsing_settings
from rich.console import Console
from rich.logging import RichHandler

from overlock.cli import average, convert, evaluate, pack, predict, push, summary, train
from overlock.cli import compile as compile_
from overlock.settings import renew_options
from overlock.version import __version__

USER_FAULT, INTERRUPTED = 2, 130

"""Options of earlier versions, which are still taken."""
COMMANDS = {
    "train": train.COMMAND,
    "evaluate": evaluate.COMMAND,
    "predict": predict.COMMAND,
    "push": push.COMMAND,
    "pack": pack.COMMAND,
    "summary": summary.COMMAND,
    "average": average.COMMAND,
    "convert": convert.COMMAND,
    "compile": compile_.COMMAND,
}

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, that of the process by default.

    Returns:
        The exit code: 0; 2 for a fault of the user's, told in one sentence on stderr; 130 after Ctrl-C, and 128 more
        than the signal's number after another one.
    """
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    words = [_with_underscores(word) for word in (sys.argv[1:] if arguments is None else arguments)]
    # Names of classes and files are printed as they are, not read as markup.
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    subparsers: dict[str, ArgumentParser] = {}
    _show_notes(errors)
    arguments = words
    try:
        tell = partial(errors.print, "note:", markup=False)
        arguments = train.renew_config(renew_options(words, tell), tell)
        parser, subparsers = make_parser(arguments)
        options = parser.parse_args(arguments)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries' notes to programmers
            return COMMANDS[options.subcommand].run(options[options.subcommand], console) or 0
    except ArgumentError as error:
        sentence = _explain(error, arguments, subparsers)
    except (ValueError, ImportError) as error:  # the latter says what to install
        sentence = _sentence(error)
    except KeyboardInterrupt:
        errors.print("interrupted")
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, say head, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # of the machine, say a full disk
        sentence = ": ".join(str(part) for part in (error.filename, error.strerror or error) if part)
    errors.print("[red]error:[/red]", end=" ")
    errors.print(sentence, markup=False)
    return USER_FAULT


def _show_notes(errors: Console) -> None:
    """Like progress bars, the package's own notes on what takes long are for people at a terminal."""
    logger = logging.getLogger("overlock")
    if errors.is_terminal and not logger.handlers:
        logger.addHandler(RichHandler(console=errors, show_time=False, show_level=False, show_path=False))
        logger.setLevel(logging.INFO)


def make_parser(arguments: Sequence[str] = ()) -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    """The parser of the whole command line, and those of the sub-commands.

    Args:
        arguments: the command line. Of the sub-commands the one that it names has its options, on which its words may
            tell; making those of all would take longer than the rest of a call.
    """
    named = _command_of(arguments)
    settings: dict[str, Any] = dict(exit_on_error=False, allow_abbrev=False)
    parser = ArgumentParser(
        prog="overlock", description="OverLoCK: train, evaluate, predict, count.", version=__version__, **settings
    )
    subcommands = parser.add_subcommands(metavar="COMMAND", title="commands", description="", help="")
    subparsers = {}
    for name, command in COMMANDS.items():
        subparsers[name] = ArgumentParser(description=command.summary, **settings)
        if name == named:
            command.add_options(subparsers[name], arguments[arguments.index(name) + 1 :])
        subcommands.add_subcommand(name, subparsers[name], help=command.summary)
    return parser, subparsers


def _command_of(arguments: Sequence[str]) -> str | None:
    """The first word that is no option."""
    return next((word for word in arguments if not word.startswith("-")), None)


def _with_underscores(word: str) -> str:
    """Options are named as the fields they set; --image-size is taken for --image_size."""
    option, equals, value = word.partition("=")
    return option[:2] + option[2:].replace("-", "_") + equals + value if word.startswith("--") else word


def _explain(error: ArgumentError, arguments: Sequence[str], subparsers: dict[str, ArgumentParser]) -> str:
    """One sentence for a command line that does not parse, with the nearest thing that would."""
    command = _command_of(arguments)
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
    return f"{message}; see overlock {command} --help"


def _nearest(name: str, known: Sequence[str], otherwise: str) -> str:
    """A hint at the known name that is meant: one of its group written alike, one that ends so, one written alike."""
    last = {option: option.rpartition(".")[2].lstrip("-") for option in known}
    group, dot, end = name.rpartition(".")
    siblings = {last[option]: option for option in known if dot and option.startswith(group + dot)}
    near = [siblings[part] for part in difflib.get_close_matches(end, siblings, n=1)]
    near = near or [option for option in known if last[option] == end.lstrip("-")]
    near = near or difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"see {otherwise}"


def _sentence(error: Exception) -> str:
    """The message alone, also where a loading process has wrapped it in its traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].removeprefix("ValueError: ") if "Traceback" in str(error) else " ".join(lines)
